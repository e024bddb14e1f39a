# Shared by the job scripts beside it: `train` and `launch`. Sourced, never run.
# Settings of the site are in site.sh.
#
# One task per GPU; data_tools/process/launcher.py reads Slurm's variables, so no MPI is needed.
# A training job that nears its time limit, or is told to stop by `scancel --signal=TERM`, saves a
# checkpoint, is queued again and continues. So does one that crashes, a bounded number of times,
# and one that Slurm itself queues again: preempted (PreemptMode=REQUEUE), or after a node failed.

# shellcheck source=site.sh
source "${SLURM_SUBMIT_DIR:-.}/slurm/site.sh"

RETRY_SEC=${RETRY_SEC:-10}  # between two tries of a command that Slurm does not answer
SAVED=75  # exit code of a program that saved its work and is to be started again

# Print the value of `#SBATCH --NAME=VALUE` in the job script.
directive() {
  sed -n "s/^#SBATCH --$1=\([^ ]*\).*/\1/p" "$0" | head -n 1
}

# Choose where the ranks meet: the first node, and the site's port or one of this job's own.
rendezvous() {
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
  # Without the site's choice: below the ports that Linux hands out itself.
  MASTER_PORT=${SITE_PORT:-$((10000 + SLURM_JOB_ID % 20000))}
  export MASTER_ADDR MASTER_PORT
}

# Run a Python program on every task of the job: launch PROGRAM ARGUMENT...
# With --dry-run among the arguments, print the command instead; needs no Slurm.
# A program that saved its work and says so is queued again.
launch() {
  local status=0
  run_tasks "$@" || status=$?
  # What a program had finished before SIGTERM ended it stays finished.
  if ((status > 128)) && [[ $nears_limit == yes ]]; then status=$SAVED; fi
  if ((status == SAVED)) && [[ $is_ended == no ]]; then queue_again; fi
  return "$status"
}

# Train on every task of the job, after a look at its nodes: train FLAG-OF-training/main.py...
train() {
  local status=0
  if [[ $CHECK_NODES == yes ]]; then run_tasks training/preflight.py "$@" || status=$?; fi
  if ((status == 0)) && [[ $nears_limit == yes ]]; then status=$SAVED; fi
  if ((status == 0)); then run_tasks training/main.py "$@" || status=$?; fi
  if ((status == 0)) || [[ $is_dry_run == yes || $is_ended == yes ]]; then return "$status"; fi
  # A rank that does not mind signals yet ends with 1 or the signal's number: no crash.
  if ((status == 1 || status > 128)) && [[ $nears_limit == yes ]]; then status=$SAVED; fi
  if python_command training/retry.py "$status" "$@"; then queue_again; fi
  return "$status"
}

# This job in Slurm's commands. One job of an array may have the array's own number, which would
# mean all of them.
job_number() {
  if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
    echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  else
    echo "$SLURM_JOB_ID"
  fi
}

# Try a command again for a minute: a controller of Slurm that restarts answers nobody meanwhile.
insist() {
  local tries=6
  until "$@"; do
    tries=$((tries - 1))
    if ((tries == 0)); then return 1; fi
    sleep "$RETRY_SEC"
  done
}

queue_again() {
  if ! insist requeue; then
    echo "error: Slurm did not queue job $(job_number) again; submit it once more, it continues" >&2
  fi
}

requeue() {
  local job restarts
  if [[ $is_ended == yes ]]; then return; fi  # while it was tried before
  job=$(job_number)
  # On a node that Slurm has lost, this script may outlive its job and must not end the next start.
  restarts=$(scontrol show job "$job" | sed -n 's/.* Restarts=\([0-9]*\).*/\1/p') || return
  if [[ -n $restarts && $restarts != "${SLURM_RESTART_COUNT:-0}" ]]; then
    echo "job $job was queued again by Slurm itself"
    return
  fi
  echo "job $job is queued again"
  scontrol requeue "$job"
}

# An empty array is an unset variable to a bash before 4.4, hence the + below.
python_command() {
  ${CONTAINER[@]+"${CONTAINER[@]}"} "$VENV/bin/python" -u "$@"
}

is_dry_run=no nears_limit=no is_ended=no step=

run_tasks() {
  local word arguments=()
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
    ${SRUN_FLAGS[@]+"${SRUN_FLAGS[@]}"}
    ${CONTAINER[@]+"${CONTAINER[@]}"} "$VENV/bin/python" -u "${arguments[@]}"
  )
  if [[ $is_dry_run == yes ]]; then
    printf '%q ' "${command[@]}"
    printf '\n'
    return
  fi
  if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "error: $0: not inside a Slurm job; submit it with: sbatch $0 (or look at it: bash $0 --dry-run)" >&2
    exit 2
  fi
  # The callers keep this function's exit code, which switches `set -e` off in here.
  if ((${#MODULES[@]})) && ! module load "${MODULES[@]}"; then
    echo "error: module load ${MODULES[*]} failed; correct MODULES in slurm/site.sh" >&2
    exit 2
  fi
  rendezvous
  export OMP_NUM_THREADS=$cpus
  run_and_mind_signals "${command[@]}"
}

# Run a command in the background, so that this shell can react to signals meanwhile.
run_and_mind_signals() {
  local status
  "$@" &
  step=$!
  while  # a trapped signal ends `wait` early
    is_interrupted=no status=0
    wait "$step" || status=$?
    [[ $is_interrupted == yes ]]
  do :; done
  step=
  return "$status"
}

# sbatch --signal=B:USR1@SECONDS, or USR2, tells this shell that the limit is near; the ranks save
# and leave on SIGTERM, which scancel sends to the tasks and not to this shell.
on_near_limit() {
  is_interrupted=yes nears_limit=yes
  echo "job $(job_number) is near its time limit: the ranks save and leave"
  insist end_ranks || echo "error: Slurm did not pass the signal on; the ranks train on" >&2
}

# Nothing is left to do where the step has ended by itself meanwhile.
end_ranks() {
  scancel --signal=TERM "$(job_number)" || ! is_step_left
}

is_step_left() {
  [[ -n $step ]] && kill -0 "$step" 2>/dev/null
}

if [[ -n ${SLURM_JOB_ID:-} ]]; then
  trap on_near_limit USR1 USR2
  # Slurm ends the job and has sent it to the tasks as well: wait for them to save. Whether the job
  # is queued again is decided by who ended it.
  trap 'is_interrupted=yes is_ended=yes' TERM
fi

cd "${SLURM_SUBMIT_DIR:-.}"
