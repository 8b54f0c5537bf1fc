#!/usr/bin/env bash
# DeepSpeed 0.19.8: with round_robin_gradients, ds_to_universal writes other weights than were trained, without a word.
#
# At ZeRO stages 1 and 2 `zero_optimization.round_robin_gradients` reorders the parameters of a group before they are
# flattened and cut for the ranks. The places of the parameters that a checkpoint holds (param_slice_mappings) are counted in
# the order before, so the converter to universal checkpoints (deepspeed.checkpoint.ds_to_universal) cuts at wrong places. The
# shapes fit, nothing is reported, and a run that continues from the result, at another number of ranks for instance, has
# scrambled weights and moments. A checkpoint that is loaded as it is, by the same number of ranks, is right.
#
# Six equal linear layers, two ranks on the CPU, stage 2, three steps. Seen with Python 3.11.7, torch 2.14.1, numpy 2.4.6:
#
#   deepspeed 0.19.8: 0 of 6 converted weights differ from the trained ones without round_robin_gradients, 4 of 6 with it
#
# Exit status: 0 while this is so, 1 when the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'deepspeed==0.19.8' 'torch==2.14.1' 'numpy==2.4.6'
cat > "$folder/train.py" <<'PYTHON'
import sys

import deepspeed
import torch

out, round_robin = sys.argv[1], sys.argv[2] == "true"
torch.manual_seed(0)
model = torch.nn.Sequential(*[torch.nn.Linear(8, 8, bias=False) for _ in range(6)])
zero = {"stage": 2, "round_robin_gradients": round_robin}
adam = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
config = {"train_batch_size": 4, "optimizer": adam, "zero_optimization": zero}
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
for _ in range(3):
    engine.backward(engine(torch.randn(2, 8)).square().mean())
    engine.step()
engine.save_checkpoint(out, tag="last")
if engine.global_rank == 0:
    torch.save({name: p.detach().clone() for name, p in model.named_parameters()}, f"{out}/trained.pt")
PYTHON
cat > "$folder/compare.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch


def differing(folder):
    """The number of converted weights that are not the trained ones, and the number of all."""
    trained = torch.load(f"{folder}/saved/trained.pt")
    read = {name: torch.load(f"{folder}/universal/zero/{name}/fp32.pt", weights_only=False)["param"] for name in trained}
    return sum(not torch.equal(read[name], value) for name, value in trained.items()), len(trained)


(plain, all_), (reordered, _) = differing(sys.argv[1]), differing(sys.argv[2])
print(f"deepspeed {version('deepspeed')}: {plain} of {all_} converted weights differ from the trained ones without "
      f"round_robin_gradients, {reordered} of {all_} with it")
sys.exit(0 if (plain, reordered) == (0, 4) else 1)
PYTHON
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
for round_robin in false true; do
    {
        "$folder/venv/bin/torchrun" --standalone --nproc-per-node 2 "$folder/train.py" "$folder/$round_robin/saved" "$round_robin"
        "$folder/venv/bin/python" -m deepspeed.checkpoint.ds_to_universal --inject_missing_state \
            --input_folder "$folder/$round_robin/saved/last" --output_folder "$folder/$round_robin/universal"
    } > "$folder/log" 2>&1 || { code=$?; cat "$folder/log" >&2; exit $code; }
done
"$folder/venv/bin/python" "$folder/compare.py" "$folder/false" "$folder/true"
