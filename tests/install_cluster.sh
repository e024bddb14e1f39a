#!/usr/bin/env bash
# Install what the tests marked `cluster` need, if it is missing: Slurm, munge, OpenMPI, MPICH (whose
# mpirun.mpich stands beside OpenMPI's mpirun), sshd, pdsh, Chromium.
set -euo pipefail

declare -A package=(
  [slurmctld]=slurmctld [slurmd]=slurmd [sbatch]=slurm-client [munged]=munge [mpirun]=openmpi-bin
  [mpirun.mpich]=mpich
  [sshd]=openssh-server [ssh]=openssh-client [pdsh]=pdsh [ip]=iproute2 [nsenter]=util-linux
  [mount]=mount [hostname]=hostname [pkill]=procps [chromium]=chromium
)
PATH=$PATH:/usr/sbin:/sbin
missing=()
for program in "${!package[@]}"; do
  command -v "$program" >/dev/null || missing+=("${package[$program]}")
done
if ((${#missing[@]})); then
  if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "error: the cluster tests need the packages ${missing[*]} and root; install them first" >&2
    exit 2
  fi
  apt-get update
  # The tests start their own daemons; the system's stay off.
  policy=/usr/sbin/policy-rc.d
  if [[ ! -e $policy ]]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
  fi
  DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "${missing[@]}"
fi
if ! unshare --net --uts --mount --pid --fork true; then
  echo "error: the cluster tests need root and a kernel with network namespaces" >&2
  exit 2
fi
