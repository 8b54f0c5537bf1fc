"""A folder of images or of class folders: what is in it, what is left out, and what may be meant otherwise."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from dsmim.log import some
from dsmim.packing.files import ImageFile, extension, stamp_at
from dsmim.shards.extensions import is_image
from dsmim.shards.tally import Tally
from dsmim.shards.walk import walk

# What programs leave beside images: macOS in zip files, Windows, Synology, file systems. Names with a dot in front too.
_HIDDEN = {"__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"}
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}


@dataclass
class Folder:
    """The images below a folder."""

    path: Path
    files: list[ImageFile] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    """Names of the class folders, also of empty ones; none when the images have no class folders."""
    left_out: Tally = field(default_factory=Tally)


def read_folder(path: Path) -> Folder:
    """Return the images below a folder, sorted by path; the first level of a folder of folders gives the classes.

    Hidden files and folders and files without an image's extension are left out and counted. Every folder is read once,
    under its own path rather than under that of a link. Raises ValueError when images are beside class folders, and
    OSError for a folder that cannot be read.
    """
    folder = Folder(path)
    names, tops = _walk(path, folder.left_out)
    relatives = [name.relative_to(path) for name in names]
    levels = {len(relative.parts) == 1 for relative in relatives}
    if levels == {True, False}:
        stray = [relative for relative in relatives if len(relative.parts) == 1]
        raise ValueError(
            f"{path}: contains images beside class folders: {some(stray, len(stray))}; move them into a class folder "
            "or elsewhere, or give a table"
        )
    labelled = levels == {False}
    folder.classes = sorted(tops) if labelled else []
    for name, relative in zip(names, relatives, strict=True):
        if stamp := stamp_at(name):
            folder.files.append(ImageFile(name, relative, relative.parts[0] if labelled else None, stamp))
        else:
            folder.left_out.count("links to missing files", str(name))
    return folder


def doubts(folder: Folder) -> list[str]:
    """Return a warning where folders that were taken for classes look like something else."""
    splits = [name for name in folder.classes if name.lower() in _SPLITS]
    if splits and (len(splits) > 1 or len(folder.classes) == 1):
        return [_split_hint(folder.path, splits)]
    inner = sorted({file.name.parts[1] for file in folder.files if len(file.name.parts) > 2})
    if len(folder.classes) == 1 and len(inner) > 1:
        only = folder.path / folder.classes[0]
        return [
            f"all images are in one class, {folder.classes[0]!r}, which holds the folders {some(inner, len(inner))}; "
            f"if these are the classes, build from {shlex.quote(str(only))}"
        ]
    return []


def _split_hint(path: Path, splits: list[str]) -> str:
    """Return the commands that build splits, the training set first: it numbers the classes."""
    first, *others = sorted(splits, key=lambda name: (not name.lower().startswith("train"), name))
    lines = [f"dsmim shards build {shlex.quote(str(path / first))} OUT --name {first}"]
    lines += [
        f"dsmim shards build {shlex.quote(str(path / name))} OUT --name {name} --classes OUT/classes.json"
        for name in others
    ]
    names = (
        f"{', '.join(splits)}: as a class, this name looks"
        if not others
        else f"{', '.join(splits)}: as classes, these names look"
    )
    return "\n  ".join([f"{names} like splits of a data set; to build each split from its class folders:", *lines])


def _walk(root: Path, left_out: Tally) -> tuple[list[Path], set[str]]:
    """Return the paths of the images below a folder, sorted, and the names of its sub-folders that were read."""
    images, tops = [], set()
    for top, folders, files in walk(root, left_out):
        if any(name.endswith(".build.json") for name in files):
            left_out.count("folders of shards", str(top))
            folders.clear()
            continue
        if top.parent == root:
            tops.add(top.name)
        folders[:] = [name for name in folders if not _is_hidden(name, top, left_out)]
        images += [top / name for name in files if _is_wanted(name, top, left_out)]
    return sorted(images), tops


def _is_hidden(name: str, top: Path, left_out: Tally) -> bool:
    hidden = name.startswith(".") or name in _HIDDEN
    if hidden:
        left_out.count("hidden", str(top / name))
    return hidden


def _is_wanted(name: str, top: Path, left_out: Tally) -> bool:
    if _is_hidden(name, top, left_out):
        return False
    if not is_image(kind := extension(name)):
        left_out.count(f".{kind}" if kind else "without extension", str(top / name))
        return False
    return True
