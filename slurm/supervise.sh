# Sourced by the templates: runs a launcher, passes requests to stop on to its ranks, and requeues the job where the exit
# code asks for it.
#
#   supervise srun|deepspeed|mpirun ARGUMENTS…
#
#   75   the run stopped on request and saved everything: requeue
#   70   a rank was lost: requeue, while the job has been restarted less than DSMIM_RESTARTS times (3)
#   134, 135, 137, 139   a rank was killed, or crashed: the same, because srun gives the highest code of all ranks.
#        Not 143: that is how ranks end whom Slurm terminates because another has failed
#   else the job ends with that code
#
# docs/slurm.md tells more. Slurm's commands are needed here, dsmim is not: it may live in a container.

# In a job array one task bears the number of the whole array, and a command that names it would reach all tasks.
dsmim_job=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
dsmim_job=${dsmim_job:-$SLURM_JOB_ID}
unset "${!SQUEUE_@}" # a user's own formats and filters

say() { echo "dsmim job $dsmim_job: $*" >&2; }

supervise() {
  launcher_name=${1##*/} launcher='' asked=''
  tell_the_end
  trap 'ask USR1' USR1
  trap 'ask USR2' USR2
  trap 'ask TERM' TERM
  "$@" &
  launcher=$!
  [ -z "$asked" ] || hand_on # what came before there was a launcher
  while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" || :; done # a signal cuts a wait short
  local code=0
  wait "$launcher" || code=$?
  finish "$code"
}

# Ranks save before the job ends (checkpoint.before_end_minutes). Slurm 22.05 does not tell them when that is.
tell_the_end() {
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
  [ -z "$launcher" ] || hand_on
}

# srun and mpirun send it on to every rank. deepspeed would die of it, and its ranks are a job step. Never by
# `scancel` to mpirun's: those steps hold its daemons, which would die, and not the ranks of this node.
hand_on() {
  case $launcher_name in
    srun | mpirun | mpiexec) kill -USR1 "$launcher" 2>/dev/null ;;
    *) scancel --signal=USR1 "$dsmim_job" ;;
  esac
}

finish() {
  local code=$1
  trap '' USR1 USR2 TERM # a requeue ends this shell with TERM
  if [ "$code" = 75 ]; then
    requeue "stopped on request, everything is saved"
  elif [ -n "$asked" ] && [ "$code" -gt 128 ]; then # the request came while Python was starting
    requeue "ended by the request to stop (exit code $code); the last checkpoint stands"
  elif [[ " 70 134 135 137 139 " = *" $code "* ]]; then
    lost "$code"
  fi
  exit "$code"
}

lost() {
  if [ "${SLURM_RESTART_COUNT:-0}" -lt "${DSMIM_RESTARTS:-3}" ]; then
    requeue "a rank was lost (exit code $1)"
  else
    say "a rank was lost (exit code $1), after ${SLURM_RESTART_COUNT:-0} restarts: given up"
  fi
}

# A job that is running and may be requeued is. One that is being ended is not: whoever cancels it means it, and Slurm
# itself requeues what it preempts.
requeue() {
  local state
  state=$(squeue --noheader --jobs="$dsmim_job" --format=%T)
  say "$1"
  if [ "$state" = RUNNING ] && scontrol requeue "$dsmim_job"; then
    say "requeued"
  else
    say "not requeued (state: ${state:-unknown}); to go on, submit the same command again"
  fi
}

# In a job array: the recipe key that this task varies, the n-th word of DSMIM_SWEEP, by default the seed.
variant() {
  [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || return 0
  local words=(${DSMIM_SWEEP:-})
  if [ "${#words[@]}" = 0 ]; then
    echo "seed=$SLURM_ARRAY_TASK_ID"
  elif [ "$SLURM_ARRAY_TASK_ID" -lt "${#words[@]}" ]; then
    echo "${words[$SLURM_ARRAY_TASK_ID]}"
  else
    say "DSMIM_SWEEP has ${#words[@]} words (0 to $((${#words[@]} - 1))), none for this task"
    return 1
  fi
}

# What follows --run-dir among the arguments.
run_dir_of() {
  while [ "$#" -gt 1 ]; do
    [ "$1" != --run-dir ] || { echo "$2" && return; }
    shift
  done
  say "a job array needs --run-dir: every task trains in a folder of its own below it"
  return 1
}
