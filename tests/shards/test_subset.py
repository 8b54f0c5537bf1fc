"""Subsets: exact counts, nesting, independence from the shards, and the recipe's data.subset."""

import os
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmim.cli.main import main
from dsmim.data.order import Order
from dsmim.data.reader import DataError, ShardReader
from dsmim.shards.index import fingerprint, write_index
from dsmim.shards.opening import open_shards
from dsmim.shards.subset import choose
from tests.conftest import dsmim, image_bytes, make_shards, tiny_recipe, write_tar


def drawn(shards, fraction: str, seed=0, balanced=False) -> set[str]:
    rows, _ = choose(shards, Fraction(fraction), seed, balanced, workers=1)
    keys = [shard.table().keys[row] for shard, part in zip(shards, rows, strict=True) for row in part]
    assert len(set(keys)) == len(keys)
    return set(keys)


def tiny_shards(folder: Path, labels: list[list[int]]):
    number = 0
    for shard, part in enumerate(labels):
        members = []
        for label in part:
            members += [(f"k{number}.jpg", b"x"), (f"k{number}.cls", b"%d" % label)]
            number += 1
        write_index(write_tar(folder / f"train-{shard}.tar", members))
    return open_shards(f"{folder}/train-*.tar")


@given(
    labels=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=5),
    fractions=st.lists(st.integers(1, 100), min_size=1, max_size=4),
    seed=st.integers(0, 9),
    balanced=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_exact_counts_and_nesting(tmp_path_factory, labels, fractions, seed, balanced):
    shards = tiny_shards(tmp_path_factory.mktemp("s"), labels)
    total, smaller = sum(map(len, labels)), set()
    for percent in sorted(fractions):
        if total * percent < 100:
            with pytest.raises(ValueError, match="is none"):
                drawn(shards, f"0.{percent:02d}", seed, balanced)
            continue
        keys = drawn(shards, str(Fraction(percent, 100)), seed, balanced)
        assert len(keys) == total * percent // 100 and smaller <= keys
        smaller = keys


@given(st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_balanced_classes_differ_by_one_until_they_are_used_up(tmp_path_factory, wanted):
    labels = [0] * 20 + [1] * 15 + [2] * 5
    shards = tiny_shards(tmp_path_factory.mktemp("b"), [labels[:13], labels[13:]])
    counts = Counter(labels[int(key[1:])] for key in drawn(shards, f"{wanted}/40", balanced=True))
    sizes = {0: 20, 1: 15, 2: 5}
    open_classes = [counts[c] for c in sizes if counts[c] < sizes[c]]
    assert sum(counts.values()) == wanted
    assert not open_classes or (
        max(open_classes) - min(open_classes) <= 1 and max(counts.values()) <= max(open_classes) + 1
    )


def test_a_fraction_is_exact_where_floating_point_is_not(tmp_path):
    shards = tiny_shards(tmp_path, [[0] * 50, [0] * 50])
    assert int(100 * 0.29) == 28 and len(drawn(shards, "0.29")) == 29


def test_the_draw_does_not_depend_on_the_shards(tmp_path):
    labels = [i % 3 for i in range(40)]
    one = tiny_shards(tmp_path / "one", [labels])
    many = tiny_shards(tmp_path / "many", [labels[:7], labels[7:20], labels[20:]])
    for balanced in (False, True):
        assert drawn(one, "0.3", 1, balanced) == drawn(many, "0.3", 1, balanced) != drawn(one, "0.3", 2, balanced)


def test_balanced_needs_labels(tmp_path):
    write_index(write_tar(tmp_path / "t.tar", [("a.png", image_bytes(0)), ("b.png", image_bytes(1))]))
    with pytest.raises(ValueError, match="2 of 2 samples have no class number"):
        drawn(open_shards(str(tmp_path / "t.tar")), "0.5", balanced=True)


@pytest.fixture
def half(tmp_path):
    make_shards(tmp_path, [17, 3, 13, 11, 9])
    dsmim("shards", "subset", f"{tmp_path}/train-*.tar", tmp_path / "half.txt", "--fraction", 0.5)
    return tmp_path


def test_the_order_is_a_single_pass_over_the_list(half):
    listed = (half / "half.txt").read_text().split()
    shards = open_shards(f"{half}/train-*.tar", subset=str(half / "half.txt"))
    assert len(listed) == 26 == sum(shard.samples for shard in shards)
    order, reader = Order([shard.samples for shard in shards], 0, 2), ShardReader(shards)
    for epoch in (0, 1):
        draws = [order[epoch * 26 + place] for place in range(26)]
        assert sorted(reader.read(draw.shard, draw.row)[0] for draw in draws) == sorted(listed)
    assert fingerprint(shards) != fingerprint(open_shards(f"{half}/train-*.tar"))


def test_a_list_of_another_program_is_looked_up(half):
    listed = half / "mine.txt"
    listed.write_text("k00040\nk00001\nk00018\n")
    with pytest.raises(ValueError, match="have not been found in the shards yet; run: dsmim shards subset SHARDS"):
        open_shards(f"{half}/train-*.tar", subset=str(listed))
    assert "3 of 53 samples" in dsmim("shards", "subset", f"{half}/train-*.tar", listed).stdout
    shards = open_shards(f"{half}/train-*.tar", subset=str(listed))
    assert [key for shard in shards for key in shard.table().keys] == ["k00001", "k00018", "k00040"]
    assert listed.read_text().startswith("k00040")
    listed.write_text("k00040\nnowhere\n")
    done = dsmim("shards", "subset", f"{half}/train-*.tar", listed, check=False)
    assert done.returncode == 1 and "1 of 2 keys are not in the shards, such as ['nowhere']" in done.stderr


def test_out_of_date_subsets_are_refused(half):
    listed = half / "half.txt"
    with pytest.raises(ValueError, match=r"was made for other shards than data\.train names"):
        open_shards(f"{half}/train-00[0-3].tar", subset=str(listed))
    listed.write_text(listed.read_text() + "k00000\n")
    with pytest.raises(ValueError, match="has changed since its keys were found"):
        open_shards(f"{half}/train-*.tar", subset=str(listed))
    with pytest.raises(ValueError, match="no such file"):
        open_shards(f"{half}/train-*.tar", subset=str(half / "none.txt"))


def test_keys_that_are_in_two_shards_are_listed_with_the_shard(tmp_path):
    for name in "ab":
        write_index(write_tar(tmp_path / f"{name}.tar", [(f"{i}.png", image_bytes(i)) for i in range(4)]))
    dsmim("shards", "subset", tmp_path, tmp_path / "half.txt", "--fraction", 0.5)
    lines = (tmp_path / "half.txt").read_text().splitlines()
    assert len(lines) == 4 and all(line.split("\t")[1] in ("a.tar", "b.tar") for line in lines)
    before = [shard.table().keys for shard in open_shards(str(tmp_path), subset=str(tmp_path / "half.txt"))]
    dsmim("shards", "subset", tmp_path, tmp_path / "half.txt")
    assert [shard.table().keys for shard in open_shards(str(tmp_path), subset=str(tmp_path / "half.txt"))] == before
    (tmp_path / "bare.txt").write_text("1\n")
    done = dsmim("shards", "subset", tmp_path, tmp_path / "bare.txt", check=False)
    assert "key '1' is in" in done.stderr and "add a tab and the shard's name" in done.stderr


def test_words_that_do_not_fit(half, capsys):
    for words, message in [
        (["--fraction", "0.1"], "exists already"),
        (["--seed", "1"], "have no effect without --fraction"),
    ]:
        assert main(["shards", "subset", f"{half}/train-*.tar", str(half / "half.txt"), *words]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["shards", "subset", f"{half}/train-*.tar", "x", "--fraction", "1.5"])


def test_a_recipe_trains_on_its_subset(half, tmp_path):
    import yaml

    recipe = tiny_recipe(half)
    recipe["data"] |= {"val": None, "subset": str(half / "half.txt")}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    seen = dsmim("samples", tmp_path / "r.yaml", "--steps", "0:4").stdout.split()
    assert set(seen[:26]) == set((half / "half.txt").read_text().split())
    done = dsmim("train", tmp_path / "r.yaml", "--run-dir", tmp_path / "run")
    assert "26 samples" in done.stdout + done.stderr


def test_a_subset_that_is_replaced_while_a_run_reads_it_is_noticed(half):
    listed, rows = half / "half.txt", half / "half.txt.rows"
    shards = open_shards(f"{half}/train-*.tar", subset=str(listed))
    listed.unlink()
    dsmim("shards", "subset", f"{half}/train-*.tar", listed, "--fraction", 0.6, "--seed", 3)
    with pytest.raises(DataError, match=r"half\.txt\.rows: changed since it was opened; start again"):
        [ShardReader(shards).read(shard, 0) for shard in range(5)]
    rows.write_bytes(b"damage")
    os.utime(rows)
    with pytest.raises(ValueError, match=r"half\.txt\.rows is damaged"):
        open_shards(f"{half}/train-*.tar", subset=str(listed))


def test_lists_with_the_line_ends_of_other_programs(half):
    (half / "mine.txt").write_bytes(b"\xef\xbb\xbfk00001\r\nk00040\r\n\r\n")
    assert "2 of 53 samples" in dsmim("shards", "subset", f"{half}/train-*.tar", half / "mine.txt").stdout
    (half / "none.txt").write_text("\n")
    assert "is empty" in dsmim("shards", "subset", half, half / "none.txt", check=False).stderr


def test_shards_of_one_name_in_two_folders(tmp_path):
    for name in "ab":
        write_index(write_tar(tmp_path / name / "t.tar", [(f"{i}.png", image_bytes(i)) for i in range(4)]))
    patterns = [tmp_path / "a", tmp_path / "b"]
    dsmim("shards", "subset", *patterns, tmp_path / "half.txt", "--fraction", 0.5)
    assert "4 of 8 samples" in dsmim("shards", "subset", *patterns, tmp_path / "half.txt").stdout
