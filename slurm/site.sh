# Settings of the site: edit this file once per cluster; nothing else in slurm/ needs to change.
# Sourced by common.sh, never run.
#
# Partition and account are sbatch's own: give them with `sbatch --partition=... --account=...`, or
# export SBATCH_PARTITION and SBATCH_ACCOUNT in your shell.

MODULES=()                   # environment modules to load, e.g. MODULES=(cuda/13.0 gcc/13)
VENV=${VENV:-.venv}          # virtual environment whose python runs the job, on a shared disk
CONTAINER=()                 # command that enters a container, e.g. CONTAINER=(apptainer exec --nv image.sif)
SRUN_FLAGS=()                # further flags of srun, e.g. SRUN_FLAGS=(--cpu-bind=cores --mpi=none)
# export NCCL_SOCKET_IFNAME=ib0  # and whatever else the site's network needs
# If a collective of NCCL does not end, torch writes the last ones of each rank into
# /tmp/nccl_trace_rank_N (TORCH_NCCL_DEBUG_INFO_TEMP_FILE names another place).
export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
# Against memory that is free and in pieces too small, where sizes change from step to step (expert
# parallelism, dispatched experts). Not tried on a GPU.
# export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
# Port where the ranks meet, on the job's first node; empty = one from the job's number, 10000 to
# 29999. Jobs that share a node need different ones.
SITE_PORT=${SITE_PORT:-}

# A job that crashes is queued again, at most this often without a new checkpoint in between.
export MAX_RESTARTS=${MAX_RESTARTS:-3}
# A node that exchanges less than this with the first one is refused; 0 = only warn of one that is
# much slower than the others. Gigabytes per second.
export MIN_NODE_GBPS=${MIN_NODE_GBPS:-0}
# Look at the nodes before training on them (training/preflight.py); it costs one more start of
# Python.
CHECK_NODES=${CHECK_NODES:-yes}
