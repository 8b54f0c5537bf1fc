"""Show on photographs what each augmentation does: python examples/augmentations.py IMAGE.jpg OUT [SECOND.jpg]

Writes one strip per augmentation into the folder OUT, as docs/augmentation.md shows them. SECOND is the image that
mixup and CutMix mix in (default: the mirrored IMAGE).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from dsmim.data.normalisation import IMAGENET
from dsmim.data.streams import own_stream, reseed
from dsmim.data.three_augment import Operation, change
from dsmim.data.transforms import eval_transform, train_transform
from dsmim.recipe import Augment, ClassifyTask
from dsmim.tasks.mixing import mix

SIDE, GAP, TILES = 112, 4, 6
PLAIN = Augment(hflip=0.0, interpolation="bicubic")


def main(image: str, out: str, second: str | None = None) -> None:
    """Write the strips of an image into a folder."""
    data, folder = Path(image).read_bytes(), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    other = eval_transform(PLAIN, SIDE)(Path(second).read_bytes()) if second else None
    with own_stream():
        for name, tiles in strips(data, other).items():
            _strip(tiles).save(folder / f"augment_{name}.jpg", quality=80, optimize=True)


def strips(data: bytes, other: torch.Tensor | None) -> dict[str, list[torch.Tensor]]:
    """Return tiles (3, SIDE, SIDE) uint8 by the name of the augmentation."""
    centre = eval_transform(PLAIN, SIDE)(data)
    three = [("greyscale", 0), ("solarize", 0), ("blur", 0.5), ("blur", 1.0), ("blur", 2.0)]
    jitter = [("brightness", 0.7), ("brightness", 1.3), ("contrast", 0.7), ("contrast", 1.3), ("saturation", 0.7)]
    rand = {"rand_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.5}
    return {
        "crop": [centre, *_drawn(data, range(3), crop_scale=(0.08, 1.0)), *_drawn(data, range(2), crop="simple")],
        "three": [centre, *_changed(centre, three)],
        "jitter": [centre, *_changed(centre, jitter)],
        "deit3": _drawn(data, range(6, 6 + TILES), crop="simple", three_augment=True, color_jitter=0.3, hflip=0.5),
        "rand": _drawn(data, range(3, 3 + TILES), **rand),
        "mix": _mixed(centre, centre.flip(-1) if other is None else other),
    }


def _drawn(data: bytes, seeds: range, **changes: object) -> list[torch.Tensor]:
    transform, tiles = train_transform(PLAIN.model_copy(update=changes), SIDE), []
    for seed in seeds:
        reseed(seed)
        tiles.append(transform(data))
    return tiles


def _changed(image: torch.Tensor, operations: list[Operation]) -> list[torch.Tensor]:
    return [TF.pil_to_tensor(change(TF.to_pil_image(image), [one])) for one in operations]


def _mixed(image: torch.Tensor, other: torch.Tensor) -> list[torch.Tensor]:
    """Return three pairs by mixup, then three by CutMix."""
    pairs = IMAGENET(torch.stack([image, other] * 3))  # (6, 3, SIDE, SIDE)
    tiles = []
    for alphas in ({"mixup": 0.8}, {"cutmix": 1.0}):
        settings = ClassifyTask(name="classify", num_classes=2, **alphas)
        tiles += IMAGENET.undo(mix(pairs, torch.eye(2).repeat(3, 1), torch.arange(6), settings, seed=1)[0])[::2]
    return tiles


def _strip(tiles: list[torch.Tensor]) -> Image.Image:
    strip = Image.new("RGB", (len(tiles) * (SIDE + GAP) - GAP, SIDE), "white")
    for place, tile in enumerate(tiles):
        strip.paste(TF.to_pil_image(tile), (place * (SIDE + GAP), 0))
    return strip


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
