"""Training on shards of a web server or a bucket: indexed, cached, and the same as from disk."""

import json
import re
from pathlib import Path

import pytest
import yaml

from dsmim.cli.main import main
from dsmim.data.from_recipe import open_reader, training_shards
from dsmim.data.order import Order
from dsmim.data.reader import ShardReader
from dsmim.packing.verify import verify_all
from dsmim.recipe import Data
from dsmim.shards.index import fingerprint
from dsmim.shards.opening import index_all, open_shards
from tests.conftest import dsmim, make_shards, tiny_recipe, two_forked_ranks
from tests.shards.servers import wait_for


@pytest.fixture
def server(server, shards):
    """Serves the training shards without their indexes."""
    for tar in sorted(shards.glob("train-*.tar")):
        server.add(f"/{tar.name}", tar.read_bytes())
    return server


def urls(server) -> str:
    return server.url("/train-{000..004}.tar")


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key in ("step", "loss", "grad_norm")} for line in lines]


def test_two_ranks_train_as_from_disk_and_download_each_shard_once(server, shards, tmp_path):
    dsmim("shards", "index", urls(server), "--index-dir", tmp_path / "index")
    assert all(server.gets[f"/train-{i:03d}.tar"] == 1 for i in range(5))
    recipe = tiny_recipe(shards, batch={"global_batch": 8}, schedule={"duration": {"steps": 9}})
    recipe["data"] |= {"val": None, "workers": 2}
    for name in ("disk", "web"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        recipe["data"] |= {
            "train": urls(server),
            "index_dir": str(tmp_path / "index"),
            "cache_dir": str(tmp_path / "c"),
        }
        two_forked_ranks("train", tmp_path / f"{name}.yaml", "--run-dir", tmp_path / name)
    assert metrics(tmp_path / "web") == metrics(tmp_path / "disk") and len(metrics(tmp_path / "web")) == 9
    assert all(server.gets[f"/train-{i:03d}.tar"] == 2 for i in range(5))
    assert len(list((tmp_path / "c").glob("*.tar"))) == 5 and not list((tmp_path / "c").glob("*.part"))


def test_an_index_beside_a_remote_shard_saves_reading_the_shard(server, shards, tmp_path):
    for tar in shards.glob("train-*.tar"):
        server.add(f"/{tar.name}.dsmi", (tar.parent / f"{tar.name}.dsmi").read_bytes())
    indexes = index_all([urls(server)], str(tmp_path), workers=1).shards
    assert [index.samples for index in indexes] == [17, 3, 13, 11, 9]
    assert not any(server.gets[f"/train-{i:03d}.tar"] for i in range(5))
    assert verify_all([urls(server)], str(tmp_path), 1, True).problems == []


def test_a_web_page_in_place_of_an_index_is_ignored(server, tmp_path):
    """Some servers answer 200 and a page for a missing file."""
    for i in range(5):
        server.add(f"/train-{i:03d}.tar.dsmi", b"<html>not found</html>")
    assert len(index_all([urls(server)], str(tmp_path), workers=1).shards) == 5
    assert all(server.gets[f"/train-{i:03d}.tar"] == 1 for i in range(5))


def test_upcoming_shards_are_downloaded_before_they_are_needed(server, tmp_path):
    index_all([urls(server)], str(tmp_path / "i"), workers=1)
    data = Data(train=urls(server), index_dir=str(tmp_path / "i"), cache_dir=str(tmp_path / "c"), shuffle_window=2)
    shards = training_shards(data)
    reader, order = open_reader(data, shards, 2), Order([s.samples for s in shards], 0, 2)
    reader.prefetch(order.upcoming(0))
    wanted = {shards[number].sha256 for number in order.upcoming(0)}
    assert len(wanted) == 4
    wait_for(lambda: {path.stem for path in (tmp_path / "c").glob("*.tar")} == wanted)
    server.files.clear()  # the downloaded shards are read without the server
    for position in range(sum(shards[number].samples for number in order.upcoming(0)[:2])):
        draw = order[position]
        assert reader.read(draw.shard, draw.row)[0]


def test_a_missing_index_or_cache_is_named(server, tmp_path):
    def error(**changes) -> str:
        data = Data(train=urls(server), shuffle_window=2, **changes)
        with pytest.raises(ValueError) as caught:
            open_reader(data, training_shards(data), data.shuffle_window)
        return str(caught.value)

    index = {"index_dir": str(tmp_path / "i")}
    assert "the indexes of remote shards are kept in a local folder: data.index_dir=DIR" in error()
    assert re.search(r"has no index .*run: dsmim shards index http://", error(**index))
    index_all([urls(server)], str(tmp_path / "i"), workers=1)
    assert "data.cache_dir: missing" in error(**index)
    small = error(**index, cache_dir=str(tmp_path / "c"), cache_gb=1e-5)
    assert "data.cache_gb: 1e-05 is less than the" in small and "of two windows of 2 shards" in small


def test_a_shard_that_differs_from_its_index_stops_the_run_and_is_named(server, shards, tmp_path):
    index_all([urls(server)], str(tmp_path / "i"), workers=1)
    for tar in shards.glob("train-*.tar"):
        server.add(f"/{tar.name}", tar.read_bytes()[:-512] + b"x" * 512)
    recipe = tiny_recipe(shards)
    recipe["data"] |= {"train": urls(server), "val": None, "index_dir": str(tmp_path / "i")}
    recipe["data"] |= {"cache_dir": str(tmp_path / "c"), "workers": 1}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    done = dsmim("train", tmp_path / "r.yaml", "--run-dir", tmp_path / "run", check=False)
    assert done.returncode == 1 and "contents differ from its index" in done.stderr and "Traceback" not in done.stderr


def test_pipe_runs_only_when_it_is_allowed(tmp_path, capsys):
    make_shards(tmp_path, [3, 4])
    pipe = f"pipe:cat {tmp_path}/train-{{000..001}}.tar"
    assert main(["shards", "index", pipe, "--index-dir", str(tmp_path / "i")]) == 1
    assert "--allow-pipe" in capsys.readouterr().err
    assert main(["shards", "index", pipe, "--index-dir", str(tmp_path / "i"), "--allow-pipe", "--workers", "1"]) == 0
    with pytest.raises(ValueError, match=r"data\.allow_pipe=true"):
        training_shards(Data(train=pipe, index_dir=str(tmp_path / "i")))
    data = Data(train=pipe, index_dir=str(tmp_path / "i"), cache_dir=str(tmp_path / "c"), allow_pipe=True)
    shards = training_shards(data)
    assert [index.samples for index in shards] == [3, 4]
    assert open_reader(data, shards, 2).read(1, 3)[0] == "k00006"


def test_shards_in_a_bucket(bucket, shards, tmp_path):
    for tar in shards.glob("train-*.tar"):
        bucket.put_object(Bucket="shards", Key=f"set/{tar.name}", Body=tar.read_bytes())
    there = "s3://shards/set/train-{000..004}.tar"
    index_all([there], str(tmp_path / "i"), workers=1)
    data = Data(train=there, index_dir=str(tmp_path / "i"), cache_dir=str(tmp_path / "c"))
    local = open_shards(f"{shards}/train-*.tar")
    indexes = training_shards(data)
    assert fingerprint(indexes) == fingerprint(local)
    assert open_reader(data, indexes, 2).read(3, 5) == ShardReader(local).read(3, 5)


def test_a_glob_in_an_url_is_refused():
    with pytest.raises(ValueError, match="cannot be expanded in a URL"):
        open_shards("https://127.0.0.1/train-*.tar", "x")


def test_a_header_of_the_environment_reaches_a_server_that_needs_it(server, shards, tmp_path):
    server.tokens["/gated/t.tar"] = "Bearer secret"
    url = server.add("/gated/t.tar", (shards / "val-000.tar").read_bytes())
    words = ["shards", "index", url, "--index-dir", tmp_path / "i"]
    done = dsmim(*words, check=False, NO_PROXY="127.0.0.1")
    assert done.returncode == 1 and "(status 401); if it needs a token, give a header by the environment" in done.stderr
    header = '{"client_kwargs": {"headers": {"Authorization": "Bearer secret"}}}'
    assert "1 shards, 8 samples" in dsmim(*words, NO_PROXY="127.0.0.1", FSSPEC_HTTP=header).stdout
    assert not any(b"secret" in file.read_bytes() for file in (tmp_path / "i").iterdir())
