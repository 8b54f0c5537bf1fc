# The templates source this file. It runs a launcher, passes requests to stop to the ranks, and requeues the job if the
# exit code asks for it.
#
#   follow ARGUMENTS…                              the arguments of `dsmim train`, which tell the run directory
#   supervise srun|deepspeed|mpirun ARGUMENTS…
#
#   75   the run stopped on request and saved everything: requeue
#   76   it was asked to stop before its first step: requeue
#   70   a rank was lost: requeue
#   134, 135, 137, 139   a rank was killed, or crashed: as for 70, because srun returns the highest code of all ranks.
#        Not 143: with that code end the ranks that Slurm terminates because another one has failed
#   else the job ends with that code
#
# But not after DSMIM_RESTARTS (3) restarts in a row without a new checkpoint. Restarts after progress do not count.
# See docs/slurm.md. This file needs Slurm's commands but not dsmim, which may be inside a container.

# In a job array, one task has the number of the whole array: a command with that number would reach all tasks.
dsmim_job=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
dsmim_job=${dsmim_job:-$SLURM_JOB_ID}
dsmim_run=''                 # the run directory, once `follow` knows it
unset "${!SQUEUE_@}"         # the user's own formats and filters would change squeue's output
unset SLURM_EXPORT_ENV       # after `sbatch --export=NONE` it would keep this shell's environment from the ranks

say() { echo "dsmim job $dsmim_job: $*" >&2; }

follow() {
  dsmim_run=$(run_dir_of "$@")
  [ -n "$dsmim_run" ] || dsmim_run=runs/$(recipe_name "$1")
}

supervise() {
  launcher_name=${1##*/} launcher='' asked=''
  export_end_time
  begin_session
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

# Set began_at to the newest checkpoint, and idle_restarts to the number of restarts since a new one was saved.
# RUN/slurm/restarts holds both, and the job, for the job's next start: Slurm requeues by itself too.
begin_session() {
  local job='' checkpoint='' count=''
  began_at=$(newest_checkpoint) idle_restarts=0
  if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
    [ -z "$dsmim_run" ] || { read -r job checkpoint count <"$dsmim_run/slurm/restarts"; } 2>/dev/null || :
    if [ "$job" = "$dsmim_job" ]; then
      [ "$checkpoint" != "$began_at" ] || idle_restarts=$((count + 1))
    elif [ "$began_at" = none ]; then
      idle_restarts=$SLURM_RESTART_COUNT
    fi
  fi
  [ -d "$dsmim_run" ] || return 0 # not yet created, or not visible from this shell
  { mkdir -p "$dsmim_run/slurm" && echo "$dsmim_job $began_at $idle_restarts" >"$dsmim_run/slurm/restarts"; } || :
}

newest_checkpoint() {
  local name=''
  # read fails although it has read the name: the file has no newline at its end
  [ -z "$dsmim_run" ] || { read -r name <"$dsmim_run/checkpoints/latest"; } 2>/dev/null || :
  echo "${name:-none}"
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
    retry "stopped on request, everything is saved"
  elif [ "$code" = 76 ]; then
    retry "asked to stop before the first step"
  elif [ -n "$asked" ] && [ "$code" -gt 128 ]; then # the request came while Python was starting
    retry "ended by the request to stop (exit code $code); the last checkpoint is kept"
  elif [[ " 70 134 135 137 139 " = *" $code "* ]]; then
    retry "a rank was lost (exit code $code)"
  fi
  exit "$code"
}

retry() {
  if [ "$(newest_checkpoint)" != "$began_at" ] || [ "$idle_restarts" -lt "${DSMIM_RESTARTS:-3}" ] ||
    { [ "$code" = 75 ] && [ ! -d "$dsmim_run" ]; }; then # a container's folder, perhaps: believe the exit code
    requeue "$1"
  else
    say "$1, after $idle_restarts restarts without a new checkpoint: not requeued again. When the cause is fixed," \
      "submit the same command again to resume"
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

# Print the folder that --run-dir names among the arguments; nothing if there is none. The last one counts.
run_dir_of() {
  local dir=''
  while [ "$#" -gt 0 ]; do
    case $1 in
      --run-dir=*) dir=${1#*=} ;;
      --run-dir) dir=${2:-} ;;
    esac
    shift
  done
  printf '%s\n' "$dir"
}

# Print the name of a recipe, which is given by its name or by its file: the default run directory is runs/NAME.
recipe_name() {
  if [ -f "$1" ]; then
    sed -n "s/^name: *[\"']\{0,1\}\([A-Za-z0-9_.-]*\).*/\1/p" "$1"
  else
    printf '%s\n' "$1"
  fi
}
