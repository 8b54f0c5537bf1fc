"""Damaged images and shards, and what happens then: the lines of the table "Damage" in docs/data.md."""

import io
import os
import random
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image

from dsmim.data.dataset import TarDataset
from dsmim.data.decode import MAX_PIXELS, Undecodable, decode, image_size
from dsmim.data.from_recipe import open_reader, training_shards
from dsmim.data.loader import train_loader
from dsmim.data.order import Order
from dsmim.data.reader import DataError, ShardReader
from dsmim.data.transforms import train_transform
from dsmim.packing.verify import verify_all, verify_shard
from dsmim.recipe import Augment, Data
from dsmim.shards.index import write_index
from dsmim.shards.opening import open_shards
from tests.conftest import image_bytes, make_shards, write_tar


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(mode: str = "RGB") -> Image.Image:
    return Image.open(io.BytesIO(image_bytes(1))).resize((48, 40)).convert(mode)


def bomb(side: int = 40_000) -> bytes:
    """Return a PNG whose header claims side × side pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]


def no_height(jpeg: bytes) -> bytes:
    frame = jpeg.index(b"\xff\xc0")
    return jpeg[: frame + 5] + b"\0\0" + jpeg[frame + 7 :]


def dataset(folder, classes=None, window=1) -> TarDataset:
    shards = open_shards(f"{folder}/train-*.tar")
    transform = train_transform(Augment(), 24)
    order = Order([index.samples for index in shards], 5, window)
    return TarDataset(ShardReader(shards), order, lambda data, label: {"image": transform(data)}, classes)


IMAGES = {
    "greyscale JPEG": encoded(photo("L"), "JPEG"),
    "greyscale PNG": encoded(photo("L"), "PNG"),
    "grey with alpha": encoded(photo("LA"), "PNG"),
    "palette": encoded(photo("P"), "PNG"),
    "alpha": encoded(photo("RGBA"), "PNG"),
    "black and white": encoded(photo("1"), "PNG"),
    "CMYK TIFF": encoded(photo("CMYK"), "TIFF"),
    "palette GIF": encoded(photo(), "GIF"),
    "WebP": encoded(photo(), "WEBP", lossless=True),
    "BMP": encoded(photo(), "BMP"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_every_kind_of_image_is_decoded_as_by_pillow(name):
    reference = np.asarray(Image.open(io.BytesIO(IMAGES[name])).convert("RGB")).astype(int)
    assert np.abs(decode(IMAGES[name]).permute(1, 2, 0).numpy() - reference).max() <= 1


def test_cmyk_jpegs_are_converted_as_pillow_does():
    """Within 2 of 255: two decoders may round the conversion differently."""
    data = encoded(photo("CMYK"), "JPEG", quality=95)
    reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode(data).permute(1, 2, 0).numpy() - reference).max() <= 2


def test_transparent_palette_colours_keep_their_colour():
    image = photo().quantize(16)
    data = encoded(image, "PNG", transparency=3)
    assert np.array_equal(decode(data).permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB")))


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 40 * 40).reshape(40, 40).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        image = decode(encoded(Image.fromarray(ramp), kind))
        assert image.dtype == torch.uint8 and image.shape == (3, 40, 40)
        assert np.abs(image[0].numpy().astype(int) - (ramp // 257).astype(int)).max() <= 1, kind


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "green")]
    image = decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert image.shape == (3, 10, 20) and image[:, 0, 0].tolist() == [255, 0, 0]


def test_exif_orientation_is_not_applied():
    """As in torchvision's ImageFolder, with which the published models were trained."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert torch.equal(decode(encoded(photo(), "JPEG", exif=exif)), decode(encoded(photo(), "JPEG")))


def test_the_bytes_decide_the_format_not_the_name(tmp_path):
    write_index(write_tar(tmp_path / "train-000.tar", [("a.jpg", encoded(photo(), "PNG"))]))
    assert dataset(tmp_path)[0]["undecodable"] == []


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    jpeg = bytearray(encoded(photo(), "JPEG"))
    jpeg[(frame := jpeg.index(b"\xff\xc0")) + 5 : frame + 9] = struct.pack(">HH", 65_000, 65_000)
    gif = bytearray(encoded(photo(), "GIF"))
    gif[6:10] = struct.pack("<HH", 65_000, 65_000)
    for data in (bomb(10_000), bytes(jpeg)):
        with pytest.raises(Undecodable, match=f"{MAX_PIXELS} count as a decompression bomb"):
            decode(data)
    with pytest.raises(Undecodable, match="decompression bomb"):
        decode(bytes(gif))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("decoding", ["exact", "scaled"])
def test_random_damage_is_undecodable_or_decoded_and_nothing_else(kind, decoding):
    """No other exception is raised, and the process does not crash."""
    whole, chance = encoded(photo().resize((200, 150)), kind), random.Random(7)
    transform = train_transform(Augment(decode=decoding), 24)
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 3, 40])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        with suppress(Undecodable):
            assert transform(bytes(data[: chance.choice([len(data), len(data) // 2])])).shape == (3, 24, 24)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_sizes_are_read_from_the_header(kind):
    assert image_size(encoded(photo(), kind)) == (40, 48)
    assert image_size(encoded(photo(), "JPEG", exif=b"x" * 30_000, comment=b"y" * 900, progressive=True)) == (40, 48)


BAD_IMAGES = {
    "zero-length": (b"", "it is empty"),
    "text": (b"<html>not found</html>", "no known image format"),
    "cut JPEG": (encoded(photo().resize((300, 300)), "JPEG")[:1200], "truncated"),
    "bomb": (bomb(), "decompression bomb"),
    "PNG with a flipped bit": (flipped(encoded(photo().resize((300, 300)), "PNG"), 5000), ""),
    "JPEG without height": (no_height(encoded(photo(), "JPEG")), "48 × 0 pixels"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_replaced_and_no_other_sample_moves(tmp_path, name):
    data, why = BAD_IMAGES[name]
    good = [(f"k{i}.jpg", encoded(photo().rotate(40 * i), "JPEG")) for i in range(6)]
    write_index(write_tar(tmp_path / "good/train-000.tar", good))
    bad = write_tar(tmp_path / "bad/train-000.tar", [*good[:3], ("k3.jpg", data), *good[4:]])
    write_index(bad)
    reference, damaged = dataset(tmp_path / "good"), dataset(tmp_path / "bad")
    for position in range(6):
        a, b = reference[position], damaged[position]
        if a["key"] == "k3":
            assert b["key"] == "k4" and why in b["undecodable"][0] and "train-000.tar: k3.jpg" in b["undecodable"][0]
        else:
            assert a["key"] == b["key"] and torch.equal(a["image"], b["image"]) and not b["undecodable"]
    problems = verify_shard(str(bad), decode_images=True).problems
    assert len(problems) == 1 and "k3.jpg cannot be decoded" in problems[0] and why in problems[0]


def test_a_member_twice_and_a_key_twice_are_errors_at_indexing(tmp_path):
    with pytest.raises(ValueError, match=r"t\.tar: a\.jpg occurs twice"):
        write_index(write_tar(tmp_path / "t.tar", [("a.jpg", b"1"), ("a.cls", b"0"), ("a.jpg", b"2")]))
    with pytest.raises(ValueError, match="key 'a' occurs twice"):
        write_index(write_tar(tmp_path / "u.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"0")]))


def test_labels_that_only_a_part_of_the_samples_has_are_reported(tmp_path):
    tar = write_tar(tmp_path / "t.tar", [("a.png", image_bytes(0)), ("a.cls", b"1"), ("b.png", image_bytes(1))])
    write_index(tar)
    assert verify_shard(str(tar)).problems == [f"{tar}: 1 of 2 samples have no class number (KEY.cls), the first b"]


def test_a_shard_that_is_cut_during_training(tmp_path):
    path = make_shards(tmp_path, [30])[0]
    data = dataset(tmp_path)
    data[0]
    os.truncate(path, 3000)
    with pytest.raises(DataError, match=r"train-000\.tar: has shrunk since it was opened"):
        [data[position] for position in range(30)]
    with pytest.raises(DataError, match=r"has changed: 3000 bytes where \d+ were indexed"):
        TarDataset(ShardReader(data.reader.shards), data.order, data.transform, None)[0]
    with pytest.raises(ValueError, match="truncated"):
        open_shards(str(path))


def test_a_shard_that_is_overwritten_during_training(tmp_path):
    """In place and with the same size, so that neither the descriptor nor the size shows it."""
    path = make_shards(tmp_path, [30])[0]
    data = dataset(tmp_path)
    data[0]
    other = write_tar(tmp_path / "other.tar", [(f"x{i:05d}.png", image_bytes(7)) for i in range(60)]).read_bytes()
    with path.open("r+b") as file:
        file.write(other.ljust(path.stat().st_size, b"\0")[: path.stat().st_size])
    with pytest.raises(DataError, match=r"train-000\.tar: has changed since it was indexed: at byte \d+ is"):
        [data[position] for position in range(30)]


def test_a_shard_that_is_removed_while_it_is_open_can_still_be_read(tmp_path):
    """The descriptor keeps the old file; opening the shard again is an error."""
    path = make_shards(tmp_path, [10])[0]
    data = dataset(tmp_path)
    before = [data[position]["key"] for position in range(10)]
    path.unlink()
    assert [data[position]["key"] for position in range(10)] == before
    with pytest.raises(DataError, match=r"train-000\.tar: cannot be opened: No such file"):
        TarDataset(ShardReader(data.reader.shards), data.order, data.transform, None)[0]


def test_damage_in_a_worker_gives_one_message_and_does_not_hang(tmp_path):
    path = make_shards(tmp_path, [30])[0]
    data = dataset(tmp_path)
    os.truncate(path, 3000)
    with pytest.raises(DataError) as caught:
        list(train_loader(data, 0, 5, 6, 1, 1, 0, workers=2, pin=False))
    assert str(caught.value).startswith(f"{path}: has changed: 3000 bytes where")


def test_an_index_that_is_replaced_during_training(tmp_path):
    path = make_shards(tmp_path, [5])[0]
    data = dataset(tmp_path)
    sidecar, (other,) = path.with_name(path.name + ".dsmi"), make_shards(tmp_path / "other", [5], side=44)
    whole = sidecar.read_bytes()
    sidecar.write_bytes(other.with_name(other.name + ".dsmi").read_bytes())
    with pytest.raises(DataError, match=r"changed since it was opened \(it describes another tar\)"):
        data[0]
    sidecar.write_bytes(whole[:530])
    with pytest.raises(DataError, match=r"train-000\.tar\.dsmi: changed since it was opened"):
        data[0]


def test_the_pixel_limit_is_a_setting(tmp_path):
    """Of the data set and of verify; the limit of the process is as before afterwards."""
    side = 9500  # 90 million pixels, more than the default limit
    buffer = io.BytesIO()
    Image.new("L", (side, side), 40).save(buffer, "JPEG")
    tar = write_tar(tmp_path / "train-000.tar", [("a.jpg", buffer.getvalue()), ("b.jpg", encoded(photo(), "JPEG"))])
    write_index(tar)
    data = dataset(tmp_path)
    assert {data[position]["key"] for position in range(2)} == {"b"}
    data.reader.max_pixels = side * side
    before = Image.MAX_IMAGE_PIXELS
    assert {data[position]["key"] for position in range(2)} == {"a", "b"}
    assert before == Image.MAX_IMAGE_PIXELS
    report = tmp_path / "report.jsonl"
    assert len(verify_all([str(tar)], None, 1, True, report).problems) == 1
    assert verify_all([str(tar)], None, 1, True, report, max_pixels=side * side).problems == []
    settings = Data(train=str(tar), max_pixels=side * side)
    assert open_reader(settings, training_shards(settings), 1).max_pixels == side * side
