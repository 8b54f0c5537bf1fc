#!/usr/bin/env bash
# megatron-energon 7.4.1: after a change of ranks that keeps ranks × workers, random augmentations change.
#
# docs/source/advanced/repro_scaling.md gives two runs with one global batch of 8, four ranks × one worker and one rank ×
# four workers, and says that "you will be able to reproduce the same global batches". Their samples are the same, as this
# script confirms. What encode_sample draws under @stateless(restore_seeds=True) is not: the seed is made of the worker's
# number, which stays, and of TaskEncoder.current_sample_index, which counts over the workers of a rank (worker.py,
# active_worker_sample_index) and so changes with their number. Crops and flips of an image differ, then, in a run that
# continues on another number of ranks. (In the same layout a restored run repeats them exactly.)
#
# Seen with Python 3.11.7, torch 2.14.1, numpy 2.4.6:
#
#   energon 7.4.1: 8 of 8 global batches have equal keys, 0 of 8 equal random numbers
#
# Exit status: 0 while this is so, 1 when the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'megatron-energon==7.4.1' 'torch==2.14.1' 'numpy==2.4.6'
cat > "$folder/run.py" <<'PYTHON'
import io
import random
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

from megatron.energon import DefaultTaskEncoder, TextSample, WorkerConfig, get_savable_loader, get_train_dataset, stateless
from megatron.energon.flavors import BaseWebdatasetFactory

GLOBAL_BATCH, MICRO_BATCH, BATCHES = 8, 2, 8


class Encoder(DefaultTaskEncoder):
    @stateless(restore_seeds=True)
    def encode_sample(self, sample):
        return TextSample.derive_from(sample, text=f"{random.random():.12f}")


def write(folder):
    """Four tars of sixteen texts, and energon's index."""
    names = [f"{shard}.tar" for shard in range(4)]
    for shard, name in enumerate(names):
        with tarfile.open(folder / name, "w") as tar:
            for row in range(16):
                member = tarfile.TarInfo(f"{shard}{row:02d}.txt")
                member.size = 4
                tar.addfile(member, io.BytesIO(b"text"))
    BaseWebdatasetFactory.prepare_dataset(folder, names, split_parts_ratio=[("train", 1)], workers=1)
    (folder / ".nv-meta" / "dataset.yaml").write_text(
        "sample_type: {__module__: megatron.energon, __class__: TextSample}\nfield_map: {text: txt}\n"
    )


def global_batches(folder, ranks, workers):
    """Sorted (key, random number) of every global batch."""
    loaders = []
    for rank in range(ranks):
        config = WorkerConfig(rank=rank, world_size=ranks, num_workers=workers)
        dataset = get_train_dataset(
            folder, worker_config=config, batch_size=MICRO_BATCH, shuffle_buffer_size=8, max_samples_per_sequence=4,
            task_encoder=Encoder(),
        )
        loaders.append(iter(get_savable_loader(dataset)))
    micro_batches = GLOBAL_BATCH // (MICRO_BATCH * ranks)
    batches = []
    for _ in range(BATCHES):
        parts = [next(loader) for loader in loaders for _ in range(micro_batches)]
        batches.append(sorted(pair for part in parts for pair in zip(part.__key__, part.text)))
    return batches


folder = Path(sys.argv[1])
folder.mkdir()
write(folder)
many, one = global_batches(folder, 4, 1), global_batches(folder, 1, 4)
again = global_batches(folder, 4, 1)
keys = sum([k for k, _ in a] == [k for k, _ in b] for a, b in zip(many, one))
draws = sum(a == b for a, b in zip(many, one))
print(f"energon {version('megatron-energon')}: {keys} of {BATCHES} global batches have equal keys, {draws} of {BATCHES} "
      "equal random numbers")
assert many == again, "the same layout no longer repeats itself"
sys.exit(0 if (keys, draws) == (BATCHES, 0) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder/data" 2> "$folder/stderr" || { code=$?; cat "$folder/stderr" >&2; exit $code; }
