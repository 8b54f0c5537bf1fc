# The templates source this file. It runs a launcher, passes requests to stop to the ranks, and requeues the job if the
# exit code asks for it.
#
#   supervise srun|deepspeed|mpirun ARGUMENTS…
#
#   75   the run stopped on request and saved everything: requeue
#   70   a rank was lost: requeue if the job has been restarted less than DSMIM_RESTARTS times (3)
#   134, 135, 137, 139   a rank was killed, or crashed: as for 70, because srun returns the highest code of all ranks.
#        Not 143: with that code end the ranks that Slurm terminates because another one has failed
#   else the job ends with that code
#
# See docs/slurm.md. This file needs Slurm's commands but not dsmim, which may be inside a container.

# In a job array, one task has the number of the whole array: a command with that number would reach all tasks.
dsmim_job=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
dsmim_job=${dsmim_job:-$SLURM_JOB_ID}
unset "${!SQUEUE_@}" # the user's own formats and filters would change squeue's output

say() { echo "dsmim job $dsmim_job: $*" >&2; }

supervise() {
  launcher_name=${1##*/} launcher='' asked=''
  export_end_time
  trap 'ask USR1' USR1
  trap 'ask USR2' USR2
  trap 'ask TERM' TERM
  "$@" &
  launcher=$!
  [ -z "$asked" ] || pass_on # a signal that came before the launcher was started
  while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" || :; done # a signal ends a wait early
  local code=0
  wait "$launcher" || code=$?
  finish "$code"
}

# Ranks save before the job ends (checkpoint.before_end_minutes). Slurm 22.05 does not give them its end time.
export_end_time() {
  local end
  end=${SLURM_JOB_END_TIME:-$(SLURM_TIME_FORMAT=%s squeue --noheader --jobs="$dsmim_job" --format=%e 2>/dev/null)}
  case $end in
    '' | *[!0-9]*) ;; # no limit
    *) export SLURM_JOB_END_TIME=$end ;;
  esac
}

ask() {
  asked=$1
  say "got SIG$1; the ranks are asked to save and stop"
  [ -z "$launcher" ] || pass_on
}

# srun and mpirun forward the signal to every rank. deepspeed would die of it; its ranks are a job step, which `scancel`
# reaches. Never use `scancel` with mpirun: it reaches mpirun's daemons, which would die, but not this node's ranks.
pass_on() {
  case $launcher_name in
    srun | mpirun | mpiexec) kill -USR1 "$launcher" 2>/dev/null ;;
    *) scancel --signal=USR1 "$dsmim_job" ;;
  esac
}

finish() {
  local code=$1
  trap '' USR1 USR2 TERM # a requeue sends TERM to this shell
  if [ "$code" = 75 ]; then
    requeue "stopped on request, everything is saved"
  elif [ -n "$asked" ] && [ "$code" -gt 128 ]; then # the request came while Python was starting
    requeue "ended by the request to stop (exit code $code); the last checkpoint is kept"
  elif [[ " 70 134 135 137 139 " = *" $code "* ]]; then
    lost "$code"
  fi
  exit "$code"
}

lost() {
  if [ "${SLURM_RESTART_COUNT:-0}" -lt "${DSMIM_RESTARTS:-3}" ]; then
    requeue "a rank was lost (exit code $1)"
  else
    say "a rank was lost (exit code $1), after ${SLURM_RESTART_COUNT:-0} restarts: not requeued again"
  fi
}

# Requeue the job only while it is running. A job that is being ended stays so: the user has cancelled it, or Slurm
# has preempted it and requeues it itself.
requeue() {
  local state
  state=$(squeue --noheader --jobs="$dsmim_job" --format=%T)
  say "$1"
  if [ "$state" = RUNNING ] && scontrol requeue "$dsmim_job"; then
    say "requeued"
  else
    say "not requeued (state: ${state:-unknown}); to resume, submit the same command again"
  fi
}

# Print the key=value that this task of a job array changes: the n-th word of DSMIM_SWEEP, or by default the seed.
variant() {
  [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || return 0
  local words=(${DSMIM_SWEEP:-})
  if [ "${#words[@]}" = 0 ]; then
    echo "seed=$SLURM_ARRAY_TASK_ID"
  elif [ "$SLURM_ARRAY_TASK_ID" -lt "${#words[@]}" ]; then
    echo "${words[$SLURM_ARRAY_TASK_ID]}"
  else
    say "DSMIM_SWEEP has ${#words[@]} words (0 to $((${#words[@]} - 1))), but none for this task"
    return 1
  fi
}

# Print what follows --run-dir among the arguments.
run_dir_of() {
  while [ "$#" -gt 1 ]; do
    [ "$1" != --run-dir ] || { echo "$2" && return; }
    shift
  done
  say "a job array needs --run-dir: every task trains in its own folder inside it"
  return 1
}
