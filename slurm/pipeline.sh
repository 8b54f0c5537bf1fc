#!/usr/bin/env bash
# Submit pre-training, then fine-tuning as a job array, then the evaluation of each variant:
#   slurm/pipeline.sh RUN_DIR PRETRAIN_RECIPE FINETUNE_RECIPE [key=value …]
# key=value changes both recipes, such as data.train=…. Variants of fine-tuning: DSMIM_SWEEP="seed=0 seed=1 seed=2" or
# "optim.lr=1e-3 optim.lr=5e-4". More options for each sbatch: DSMIM_SBATCH="--partition=gpu --account=me".
# If a job fails, the jobs that need it are cancelled. Prints the numbers of the three jobs.
set -euo pipefail
if [ "$#" -lt 3 ]; then
  sed -n '2,6s/^# //p' "$0" >&2
  exit 2
fi
export DSMIM_SLURM=${DSMIM_SLURM:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
export DSMIM_SWEEP=${DSMIM_SWEEP:-seed=0 seed=1 seed=2}
run_dir=$1 pretrain=$2 finetune=$3
shift 3
read -ra variants <<<"$DSMIM_SWEEP"
read -ra options <<<"${DSMIM_SBATCH:-}"
# Where sbatch passes no environment on, pass on what the templates read.
[ "${SBATCH_EXPORT:-}" != NONE ] || export SBATCH_EXPORT=DSMIM_SLURM,DSMIM_SWEEP,DSMIM_RESTARTS
array=--array=0-$((${#variants[@]} - 1))

submit() { sbatch --parsable --kill-on-invalid-dep=yes ${options[@]+"${options[@]}"} "$@" | cut -d ';' -f 1; }

first=$(submit "$DSMIM_SLURM/pretrain.sbatch" "$pretrain" --run-dir "$run_dir/pretrain" "$@")
second=$(submit --dependency="afterok:$first" "$array" "$DSMIM_SLURM/finetune.sbatch" "$finetune" \
  --run-dir "$run_dir/finetune" "$@" model.weights="$run_dir/pretrain")
third=$(submit --dependency="aftercorr:$second" "$array" "$DSMIM_SLURM/evaluate.sbatch" "$run_dir/finetune")
echo "pretrain $first, finetune $second, evaluate $third"
