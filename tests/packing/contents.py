"""What tests of packing compare: the samples of shards."""

from pathlib import Path

from dsmim.shards.opening import open_shards
from dsmim.shards.tar import parse_sample


def samples_of(pattern) -> dict[str, dict[str, bytes]]:
    found = {}
    for index in open_shards(str(pattern), None, "test"):
        data, table = Path(index.tar).read_bytes(), index.table()
        places = [table.place(row) for row in range(index.samples)]
        found |= dict(parse_sample(data[offset : offset + length]) for offset, length in places)
    return found
