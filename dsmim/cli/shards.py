"""`dsmim shards …`: the commands that build, index and verify shards, and draw subsets of them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dsmim.cli.words import command, count, home_path, image_key, quality, share, splits
from dsmim.shards.cores import cores


def add_shards(commands) -> None:
    """Add `dsmim shards` with its sub-commands."""
    about = "Build, index and verify WebDataset shards, and draw subsets of them"
    shards = commands.add_parser("shards", help=about, description=about)
    commands = shards.add_subparsers(required=True, metavar="COMMAND")
    _add_build(commands)
    _add_index(commands)
    _add_verify(commands)
    _add_subset(commands)


def _add_build(commands) -> None:
    about = "Write shards from an image folder, a table (CSV or TSV: path,label) or other tars; run again to continue"
    build = command(commands, "build", about, _build)
    build.add_argument(
        "source", help="a folder of images or of class folders, a table, or tars (put patterns in quotes)"
    )
    build.add_argument("out", type=home_path, help="folder for the shards")
    build.add_argument(
        "--root", type=home_path, help="folder that the paths of a table start from (default: the table's)"
    )
    build.add_argument(
        "--classes",
        type=home_path,
        metavar="LIST",
        help="number the classes by this list: classes.json of an earlier build, or one name per line",
    )
    build.add_argument(
        "--numeric-classes",
        choices=("number", "order", "text"),
        help="class names that are numbers: take each as its class number, or count from 0 in the order of the "
        "numbers (as timm) or of the text (as torchvision)",
    )
    build.add_argument("--name", default="data", help="shards are named NAME-000000.tar (default: data)")
    build.add_argument(
        "--split", type=splits, default={}, metavar="train=0.9,val=0.1", help="split at random into NAME=SHARE"
    )
    build.add_argument("--per-shard", type=count, default=1000, metavar="N", help="images per shard (default: 1000)")
    build.add_argument(
        "--short-side", type=count, metavar="PIXELS", help="shrink images whose short side is longer than this"
    )
    build.add_argument(
        "--quality", type=quality, default=90, metavar="1..100", help="JPEG quality of shrunk images (default: 90)"
    )
    build.add_argument("--skip-undecodable", action="store_true", help="leave out images that cannot be decoded")
    build.add_argument(
        "--max-pixels",
        type=count,
        metavar="N",
        help="with --short-side or --skip-undecodable: an image with more pixels counts as undecodable (default: "
        "178956970)",
    )
    build.add_argument(
        "--keys", type=home_path, metavar="LIST", help="take only the samples whose keys are in this file"
    )
    build.add_argument(
        "--without", type=home_path, metavar="LIST", help="leave out the samples whose keys are in this file"
    )
    build.add_argument("--seed", type=int, default=0, help="seed of the shuffle before writing (default: 0)")
    build.add_argument("--no-shuffle", action="store_true", help="keep the order of the source and read it in sequence")
    build.add_argument(
        "--index-dir",
        type=home_path,
        metavar="DIR",
        help="folder of the source tars' indexes (default: beside the tars)",
    )
    _add_workers(build)


def _add_index(commands) -> None:
    about = "Write the index that training on a WebDataset tar needs. The tars may come from any tool"
    index = command(commands, "index", about, _index)
    index.add_argument("--force", action="store_true", help="write valid indexes again too")
    index.add_argument(
        "--labels",
        metavar="SPEC",
        help="where class numbers or names come from: cls or another extension (KEY.cls), json:FIELD (of KEY.json), "
        "folder (the last one of the key), or a table (.csv, .tsv) of key,label (default: numbers in KEY.cls)",
    )
    index.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="names of the classes, in the order of their numbers: JSON, or one per line (default: names are sorted, "
        "and written to classes.json beside the indexes)",
    )
    index.add_argument(
        "--image-key",
        type=image_key,
        metavar="EXTENSION",
        help="the member that is the image, if a sample has several: KEY.EXTENSION",
    )
    _add_patterns(index)


def _add_verify(commands) -> None:
    about = "Compare shards with their indexes, and name every problem and its place"
    verify = command(commands, "verify", about, _verify)
    verify.add_argument("--decode", action="store_true", help="decode every image too")
    verify.add_argument("--max-pixels", type=count, metavar="N", help="with --decode: as data.max_pixels in a recipe")
    verify.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write one JSON line per shard; unchanged shards that it lists are skipped",
    )
    _add_patterns(verify)


def _add_subset(commands) -> None:
    about = "Draw samples at random (--fraction) and list their keys, or look up the keys of an existing list"
    subset = command(commands, "subset", about, _subset)
    subset.add_argument("--fraction", type=share, metavar="P", help="draw floor(N x P) of N samples")
    subset.add_argument(
        "--seed", type=int, help="seed of the draw (default: 0); at one seed, larger fractions contain smaller ones"
    )
    subset.add_argument(
        "--balanced", action="store_true", help="draw equally many samples of every class, as far as a class has them"
    )
    subset.add_argument("shards", nargs="+", help="as in data.train: tars, folders, globs or brace patterns")
    subset.add_argument("list", type=Path, help="file of keys, for data.subset in a recipe")
    _add_common(subset)


def _add_patterns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", help="tars, folders, globs, brace patterns, http(s):// or s3:// URLs")
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--index-dir",
        type=os.path.expanduser,
        metavar="DIR",
        help="folder of the indexes, if the shards' folder is read-only or remote",
    )
    parser.add_argument("--allow-pipe", action="store_true", help="run the commands of pipe: shards")
    _add_workers(parser)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=count,
        default=cores(),
        metavar="N",
        help="processes to use (default: %(default)s, the available CPU cores)",
    )


def _build(options) -> None:
    from dsmim.log import some
    from dsmim.packing.classes import class_lines
    from dsmim.packing.sources import count_labels, filter_sources, read_sources, split_sources
    from dsmim.packing.writer import BUILD_MAX_PIXELS, WriteOptions, build_shards
    from dsmim.shards.subset import read_list

    if options.max_pixels and not (options.short_side or options.skip_undecodable):
        raise ValueError(
            "--max-pixels: has no effect without --short-side or --skip-undecodable, because images are not decoded; "
            "give one of them, or leave it out"
        )
    found = read_sources(options.source, options.root, options.index_dir, options.classes, options.numeric_classes)
    for line in found.warnings:
        print(f"warning: {line}", file=sys.stderr)
    sources = found.sources
    if options.keys or options.without:
        lists = (
            path and [line.partition("\t")[0] for line in read_list(path)] for path in (options.keys, options.without)
        )
        sources = filter_sources(sources, *lists)
    seed = None if options.no_shuffle else options.seed
    parts = split_sources(sources, options.split or {options.name: 1.0}, seed)
    for line in class_lines(found.classes, {name: count_labels(part) for name, part in parts.items()}):
        print(line)
    writing = WriteOptions(
        options.per_shard, options.short_side, options.quality, options.skip_undecodable,
        options.max_pixels or BUILD_MAX_PIXELS,
    )  # fmt: skip
    built = build_shards(parts, options.out, found.classes, writing, options.workers)
    for line in built.left_out:
        print(f"left out: {line}")
    if built.renewed:
        print(f"built again, because their images have changed: {some(built.renewed, len(built.renewed))}")
    images, kept = sum(index.samples for index in built.shards), len(built.shards) - built.written
    print(f"{images} images in {len(built.shards)} shards in {options.out}" + (f", {kept} kept" if kept else ""))
    for line in found.left_out.line():
        print(line)


def _index(options) -> None:
    from dsmim.shards.classes import read_names
    from dsmim.shards.opening import index_all
    from dsmim.shards.sample_format import SampleFormat, checked_spec

    form = SampleFormat(
        options.labels and checked_spec(options.labels),
        options.image_key,
        options.classes and read_names(options.classes),
    )
    done = index_all(options.shards, options.index_dir, options.workers, options.force, options.allow_pipe, form)
    print(f"{len(done.shards)} shards, {sum(index.samples for index in done.shards)} samples")
    for line in done.remarks():
        print(line)


def _verify(options) -> int:
    from dsmim.packing.verify import verify_all
    from dsmim.recipe.data import MAX_PIXELS

    found = verify_all(
        options.shards,
        options.index_dir,
        options.workers,
        options.decode,
        options.report,
        options.allow_pipe,
        options.max_pixels or MAX_PIXELS,
    )
    summary = f"{len(found.problems)} problems" if found.problems else "all shards are as indexed"
    for line in [*found.problems, summary, *found.left_out.line()]:
        print(line)
    return 1 if found.problems else 0


def _subset(options) -> None:
    from dsmim.shards.opening import open_shards
    from dsmim.shards.subset import choose, find, read_list, write_list, write_rows

    if not options.fraction and (options.balanced or options.seed is not None):
        raise ValueError("--seed and --balanced have no effect without --fraction: give it too, or leave them out")
    shards = open_shards(options.shards, options.index_dir, allow_pipe=options.allow_pipe)
    if options.fraction:
        if options.list.exists():
            raise ValueError(f"{options.list}: exists already; remove it, or leave out --fraction to look up its keys")
        rows, unique = choose(shards, options.fraction, options.seed or 0, options.balanced, options.workers)
        write_list(options.list, shards, rows, unique)
    else:
        rows = find(shards, read_list(options.list))
    write_rows(options.list, shards, rows)
    print(f"{sum(map(len, rows))} of {sum(shard.samples for shard in shards)} samples in {options.list}")
