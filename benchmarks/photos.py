"""Make a set of photographs like ImageNet's: mostly 500 × 375, JPEG of about 100 KB, in ten class folders.

    python benchmarks/photos.py OUT [--count 400] [--images DIR] [--cache DIR]

They are cut at several scales from the wallpapers of three Debian packages, or from the photographs in DIR. With the
same seed and sources the images are the same.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGES = ("mate-backgrounds", "lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04")
CACHE = Path.home() / ".cache" / "dsmim" / "benchmark"
NO_PHOTOGRAPHS = {"abstract", "desktop"}  # folders of mate-backgrounds with drawings
MIN_SIDE = 1024  # pixels of the short side of a source
SIZE = (500, 375)  # the most frequent size in ImageNet
PORTRAITS = 0.2  # share of images in portrait format
BYTES = (85_000, 125_000)  # ImageNet-1K: 138 GB in 1.28 million training images
QUALITIES = (50, 98)
LARGEST = 1200  # pixels: large sources are decoded at a reduced scale whose short side is at least this
SMALLEST_CUT = 0.25  # side of a cut, divided by that of the largest cut of its source
CLASSES = 10
SEED = 0


def make_photos(out: Path, count: int, images: Path | None = None, cache: Path = CACHE, seed: int = SEED) -> Path:
    """Write `count` photographs to `out`, unless an earlier call did. Raises ValueError when there are no sources."""
    about = json.dumps({"count": count, "images": str(images), "seed": seed, "size": SIZE, "bytes": BYTES})
    stamp = out / "made.json"
    if stamp.is_file() and stamp.read_text() == about:
        return out
    if out.exists() and not stamp.is_file():
        raise ValueError(f"{out}: exists and was not made by this script; remove it or name another folder")
    shutil.rmtree(out, ignore_errors=True)
    folder = images or fetch_wallpapers(cache)
    partial = out.with_name(f".partial-{out.name}")  # so that an interrupted call leaves no incomplete set
    shutil.rmtree(partial, ignore_errors=True)
    for number, data in enumerate(_photos(sources(folder), count, np.random.default_rng(seed))):
        path = partial / f"class{number % CLASSES}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (partial / stamp.name).write_text(about)
    return partial.rename(out)


def fetch_wallpapers(cache: Path) -> Path:
    """Download and unpack the wallpaper packages into `cache`, without root rights; return the folder of the files."""
    unpacked = cache / "wallpapers"
    if unpacked.is_dir():
        return unpacked
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise ValueError("apt-get is missing, which downloads the wallpapers; give --images DIR with large photographs")
    partial = cache / ".partial-wallpapers"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _run("apt-get", "download", *PACKAGES, cwd=cache)
    for package in sorted(cache.glob("*.deb")):
        _run("dpkg-deb", "-x", package.name, str(partial), cwd=cache)
    return partial.rename(unpacked)


def sources(folder: Path) -> list[Path]:
    """Return the photographs of a folder that are large enough. Raises ValueError when there are none."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png") and p.is_file())
    paths = [p for p in paths if not NO_PHOTOGRAPHS.intersection(p.relative_to(folder).parts)]
    large = [p for p in paths if _short_side(p) >= MIN_SIDE]
    if not large:
        raise ValueError(f"{folder}: contains no JPEG or PNG with a short side of at least {MIN_SIDE} pixels")
    return large


def _photos(paths: list[Path], count: int, generator: np.random.Generator) -> Iterator[bytes]:
    """Yield `count` JPEGs, equally many of each source whose cuts have enough detail."""
    left = count
    while left:
        share, fruitful = -(-left // len(paths)), []
        for path in paths:
            found = _cuts(path, min(share, left), generator)
            left -= len(found)
            fruitful += [path] if len(found) == share else []
            yield from found
        if left and not fruitful:
            raise ValueError(f"the photographs have too little detail: {count - left} of {count} cuts could be made")
        paths = fruitful


def _cuts(path: Path, wanted: int, generator: np.random.Generator) -> list[bytes]:
    """Return up to `wanted` cuts of one source, after at most two tries for each."""
    with Image.open(path) as image:
        image.draft("RGB", (LARGEST, LARGEST))  # decodes large JPEGs at half or a quarter of their size
        whole = image.convert("RGB")
    found: list[bytes] = []
    for _ in range(2 * wanted):
        if len(found) < wanted and (data := encode(cut(whole, generator), generator.uniform(*BYTES))):
            found.append(data)
    return found


def cut(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Return a random part of the image, shrunk to 500 × 375 or 375 × 500."""
    width, height = SIZE if generator.random() >= PORTRAITS else SIZE[::-1]
    largest = min(image.width / width, image.height / height)
    factor = max(1.0, largest * generator.uniform(SMALLEST_CUT, 1))  # never enlarged
    left = generator.uniform(0, image.width - width * factor)
    top = generator.uniform(0, image.height - height * factor)
    box = (left, top, left + width * factor, top + height * factor)
    return image.resize((width, height), Image.Resampling.HAMMING, box, reducing_gap=1.5)


def encode(image: Image.Image, target: float) -> bytes | None:
    """Encode a JPEG (4:2:0) of the lowest quality that takes `target` bytes.

    Return None when its size is outside the range BYTES: such an image is a smooth drawing or an empty sky.
    """
    low, high = QUALITIES
    if len(_jpeg(image, high)) < BYTES[0]:
        return None
    while low < high:
        middle = (low + high) // 2
        if len(_jpeg(image, middle)) < target:
            low = middle + 1
        else:
            high = middle
    data = _jpeg(image, low)
    return data if BYTES[0] <= len(data) <= BYTES[1] else None


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def _short_side(path: Path) -> int:
    with Image.open(path) as image:
        return min(image.size)


def _run(*command: str, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command)}: {done.stderr.strip()}; or give --images DIR with large photographs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--images", type=Path, help="folder of large photographs, instead of the Debian packages")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the packages are kept")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    try:
        out = make_photos(args.out, args.count, args.images, args.cache, args.seed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    sizes = [path.stat().st_size for path in out.rglob("*.jpg")]
    print(f"{out}: {len(sizes)} photographs, {np.mean(sizes) / 1000:.0f} KB on average")


if __name__ == "__main__":
    main()
