"""What a user gives to predict or reconstruct: image files, folders of them, or shards; each image once, in order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dsmim.data.dataset import EvalDataset, SampleTransform
from dsmim.data.decode import Undecodable
from dsmim.data.from_recipe import open_reader
from dsmim.data.order import stream_key
from dsmim.data.streams import reseed
from dsmim.log import some
from dsmim.recipe import Data
from dsmim.shards.extensions import is_image
from dsmim.shards.opening import names_shards, open_shards
from dsmim.shards.tally import Tally
from dsmim.shards.walk import matching, walk

SHOWN = 5  # names in an error message


class ImageFiles(EvalDataset):
    """Image files without labels, each once, in the given order. The random stream of one (its mask) depends on the
    file's name without extension, as that of a shard's sample depends on its key."""

    def __init__(self, paths: list[str], transform: SampleTransform, max_pixels: int):
        self.paths, self.transform, self.classes, self.max_pixels = paths, transform, None, max_pixels

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, sample: int) -> tuple[str, str]:
        """Return nothing for the shard, and the path of an image."""
        return "", self.paths[sample]

    def _load(self, sample: int) -> dict[str, Any]:
        path = Path(self.paths[sample])
        reseed(stream_key("evaluation", path.stem))
        try:
            return {"key": str(path), **self.transform(path.read_bytes(), None)}
        except OSError as error:
            raise Undecodable(f"{path}: cannot be read: {error.strerror}") from None
        except Undecodable as error:
            raise Undecodable(f"{path}: cannot be decoded: {error}") from None


def open_images(inputs: list[str], data: Data, transform: SampleTransform) -> EvalDataset:
    """Open image files, folders and patterns of them, or shards. Labels are not read.

    data: where the indexes and the cache of shards are. Raises ValueError when an input is missing or has no image, and
    when images and shards are mixed.
    """
    shards = [word for word in inputs if names_shards(word)]
    if not shards:
        return ImageFiles(image_files(inputs), transform, data.max_pixels)
    if len(shards) < len(inputs):
        files = next(word for word in inputs if word not in shards)
        raise ValueError(f"{files} is an image or a folder of images, {shards[0]} a shard; give one kind at a time")
    indexes = open_shards(inputs, data.index_dir, "shards", allow_pipe=data.allow_pipe)
    return EvalDataset(open_reader(data, indexes, window=1), transform, None)


def image_files(inputs: list[str]) -> list[str]:
    """Return the image files that paths, folders and globs name: in the order given, those of one folder or glob
    sorted. Hidden files are left out. Raises ValueError that lists the inputs without an image."""
    found = [_files(word) for word in inputs]
    if empty := [word for word, files in zip(inputs, found, strict=True) if not files]:
        raise ValueError(
            f"no image found: {some(empty, len(empty), SHOWN)}; give image files, folders or shards (.tar)"
        )
    return [path for files in found for path in files]


def _files(word: str) -> list[str]:
    if os.path.isdir(word):  # noqa: PTH112 - paths stay as they were given
        return _in_folder(word)
    if os.path.isfile(word):  # noqa: PTH113
        return [word]  # whatever its name: its bytes decide the format
    return sorted(path for path in matching(word) if os.path.isfile(path))  # noqa: PTH113


def _in_folder(folder: str) -> list[str]:
    found = []
    for top, folders, names in walk(Path(folder), Tally()):
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = (name for name in names if not name.startswith("."))
        found += [str(top / name) for name in visible if is_image(Path(name).suffix.lower().lstrip("."))]
    return sorted(found)
