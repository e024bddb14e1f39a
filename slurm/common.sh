# Shared by the job scripts beside it: settings of the site, and `launch`. Sourced, never run.
#
# One task per GPU; training/processes.py reads Slurm's variables, so no MPI is needed.
# A job that nears its time limit saves a checkpoint, is queued again and continues. So does a
# preempted job where the partition's PreemptMode is REQUEUE.

# --- Site settings: edit here, once per cluster --------------------------------------------------
# Partition and account are sbatch's own: give them with `sbatch --partition=... --account=...`, or
# export SBATCH_PARTITION and SBATCH_ACCOUNT in your shell.
MODULES=()                   # environment modules to load, e.g. MODULES=(cuda/13.0 gcc/13)
VENV=${VENV:-.venv}          # virtual environment whose python runs the job, on a shared disk
CONTAINER=()                 # command that enters a container, e.g. CONTAINER=(apptainer exec --nv image.sif)
SRUN_FLAGS=()                # further flags of srun, e.g. SRUN_FLAGS=(--cpu-bind=cores --mpi=none)
# export NCCL_SOCKET_IFNAME=ib0  # and whatever else the site's network needs
# -------------------------------------------------------------------------------------------------

# Print the value of `#SBATCH --NAME=VALUE` in the job script.
directive() {
  sed -n "s/^#SBATCH --$1=\([^ ]*\).*/\1/p" "$0" | head -n 1
}

# Choose where the ranks meet: the first node, and a port of this job's own.
rendezvous() {
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
  MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))  # below the ports that Linux hands out itself
  export MASTER_ADDR MASTER_PORT
}

# Run a Python program on every task of the job: launch PROGRAM ARGUMENT...
# With --dry-run among the arguments, print the command instead; needs no Slurm.
launch() {
  local word is_dry_run=no arguments=()
  for word in "$@"; do
    if [[ $word == --dry-run ]]; then is_dry_run=yes; else arguments+=("$word"); fi
  done
  local cpus=${SLURM_CPUS_PER_TASK:-$(directive cpus-per-task)}
  local command=(
    srun
    --nodes="${SLURM_JOB_NUM_NODES:-$(directive nodes)}"
    --ntasks-per-node="${SLURM_NTASKS_PER_NODE:-$(directive ntasks-per-node)}"
    --cpus-per-task="$cpus"  # srun does not take it over from sbatch
    --kill-on-bad-exit=1     # one dead rank ends the job instead of leaving the others waiting
    "${SRUN_FLAGS[@]}" "${CONTAINER[@]}" "$VENV/bin/python" -u "${arguments[@]}"
  )
  if [[ $is_dry_run == yes ]]; then
    printf '%q ' "${command[@]}"
    printf '\n'
    return
  fi
  if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "error: $0: not inside a Slurm job; submit it with: sbatch $0 (or look at it: bash $0 --dry-run)" >&2
    return 2
  fi
  if ((${#MODULES[@]})); then module load "${MODULES[@]}"; fi
  rendezvous
  export OMP_NUM_THREADS=$cpus
  run_until_done_or_requeue "${command[@]}"
}

# Run a command in the background, so that this shell can react to signals meanwhile.
run_until_done_or_requeue() {
  local step status nears_limit=no is_interrupted
  # sbatch --signal=B:USR1@SECONDS tells this shell that the limit is near; the ranks save and
  # leave on SIGTERM, which scancel sends to the tasks and not to this shell.
  trap 'is_interrupted=yes; nears_limit=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
  trap 'is_interrupted=yes' TERM  # Slurm has sent it to the tasks as well: wait for them to save
  "$@" &
  step=$!
  while  # a trapped signal ends `wait` early
    is_interrupted=no status=0
    wait "$step" || status=$?
    [[ $is_interrupted == yes ]]
  do :; done
  trap - USR1 TERM
  if [[ $nears_limit == yes && $status == 0 ]]; then
    echo "time limit near: checkpoint saved, job $SLURM_JOB_ID is queued again"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  return "$status"
}

cd "${SLURM_SUBMIT_DIR:-.}"
