#!/usr/bin/env bash
# Try the program on other versions of Python and torch than those that requirements.txt pins:
#
#   tests/versions.sh python3.12:2.11.0 python3.13:2.12.0
#
# Each pair gets a virtual environment in a temporary folder, from the package index, which may have
# builds for GPUs only (5 GB each); they are hidden. Run are the tests of models, of the engine's
# parts and of the stream, then every command of the documentation. Exit code 1 if a pair failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if (($# == 0)); then
  echo "error: name pairs of Python and torch, such as python3.12:2.11.0" >&2
  exit 2
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failed=()
for pair in "$@"; do
  python=${pair%:*} torch=${pair##*:}
  bin=$folder/venv/bin
  echo "== Python $("$python" -c 'import platform; print(platform.python_version())'), torch $torch"
  "$python" -m venv "$folder/venv"
  sed "s/^torch==.*/torch==$torch/" requirements.txt >"$folder/requirements.txt"
  cp requirements-dev.txt "$folder/"
  "$bin/python" -m pip install --quiet --disable-pip-version-check -r "$folder/requirements-dev.txt"
  PATH=$bin:$PATH CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 "$bin/python" -m pytest -q \
    -p no:cacheprovider --basetemp "$folder/tmp" \
    --deselect 'tests/training/engine/test_deepspeed_internals.py::test_the_installed_version_is_the_pinned_one[torch]' \
    tests/models tests/training/engine \
    tests/data_tools/stream tests/commands/test_documented_commands.py || failed+=("$pair")
  rm -rf "$folder/venv" "$folder/tmp"
done
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
