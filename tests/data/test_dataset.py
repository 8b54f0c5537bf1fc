"""What a worker does with a sample: decoding, its random stream, replacement, labels, transforms."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import encode_png
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from dsmim.data.dataset import EvalDataset, collate
from dsmim.data.decode import Undecodable, decode
from dsmim.data.loader import eval_loader, train_loader
from dsmim.data.normalisation import IMAGENET
from dsmim.data.reader import DataError, ShardReader
from dsmim.data.streams import seeded
from dsmim.data.transforms import eval_transform, train_transform
from dsmim.recipe import Augment
from dsmim.shards.index import write_index
from dsmim.shards.opening import open_shards
from tests.conftest import image_bytes, write_tar
from tests.data.loading import dataset


def test_repeats_differ_in_their_augmentation(shards):
    data = dataset(shards, repeats=3, batch=12)
    batch = [data[position] for position in range(12)]
    assert len({sample["key"] for sample in batch}) == 4
    for place in range(4):
        copies = batch[place::4]
        assert len({sample["key"] for sample in copies}) == 1
        assert len({sample["image"].numpy().tobytes() for sample in copies}) == 3


def test_the_caller_s_random_streams_do_not_change(shards):
    def state():
        return (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            np.random.get_state()[2],
            torch.get_rng_state().tolist(),
        )

    before = state()
    for position in range(8):
        dataset(shards)[position]
    assert state() == before
    with seeded(3):
        a = torch.rand(2)
    with seeded(3):
        assert torch.equal(a, torch.rand(2))


def broken_folder(tmp_path, bad=(4,), n=8):
    members = [(f"k{i:05d}.png", b"damage" if i in bad else image_bytes(i)) for i in range(n)]
    write_index(write_tar(tmp_path / "train-000.tar", members))
    return tmp_path


def test_an_undecodable_image_is_replaced_by_the_next_one(tmp_path):
    data = dataset(broken_folder(tmp_path), classes=None)
    samples = {data.order[p].row: data[p] for p in range(8)}
    assert samples[4]["key"] == "k00005" and "k00004.png cannot be decoded" in samples[4]["undecodable"][0]
    assert all(samples[row]["key"] == f"k{row:05d}" and not samples[row]["undecodable"] for row in samples if row != 4)
    whole = tmp_path / "whole"
    write_index(write_tar(whole / "train-000.tar", [(f"k{i:05d}.png", image_bytes(i)) for i in range(8)]))
    reference = dataset(whole, classes=None)
    assert all(torch.equal(data[p]["image"], reference[p]["image"]) for p in range(8) if data.order[p].row != 4)


def test_replacement_wraps_around_and_ends_after_ten_attempts(tmp_path):
    data = dataset(broken_folder(tmp_path, bad=(7,)), classes=None)
    position = next(p for p in range(8) if data.order[p].row == 7)
    assert data[position]["key"] == "k00000"
    hopeless = dataset(broken_folder(tmp_path / "all", bad=range(8)), classes=None)
    with pytest.raises(DataError, match="10 undecodable images in a row"):
        hopeless[0]


def test_evaluation_does_not_count_undecodable_images(tmp_path):
    folder = broken_folder(tmp_path)
    transform = eval_transform(Augment(), 24)
    reader = ShardReader(open_shards(f"{folder}/train-*.tar"))
    data = EvalDataset(reader, lambda image, label: {"image": transform(image)}, None)
    batch = collate([data[(i, 1.0)] for i in range(8)])
    assert batch["weight"].tolist() == [1, 1, 1, 1, 0, 1, 1, 1] and len(batch["undecodable"]) == 1


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_evaluation_counts_every_sample_once_in_the_same_batches(shards, world):
    shard_indexes = open_shards(f"{shards}/val-*.tar", None, "data.val")
    data = EvalDataset(ShardReader(shard_indexes), lambda image, label: {"label": label}, 3)
    ranks = [list(eval_loader(data, 4, world, rank, 0, pin=False)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for batches in ranks for batch in batches]
    counted = sorted(k for b in batches for k, w in zip(b["key"], b["weight"].tolist(), strict=True) if w)
    assert counted == sorted(f"k{i:05d}" for i in range(13))
    whole = [tuple(f"k{i:05d}" for i in range(begin, min(begin + 4, 13))) for begin in (0, 4, 8, 12)]
    assert {tuple(batch["key"]) for batch in batches} == set(whole)


@pytest.mark.parametrize(
    ("label", "message"),
    [(None, "no label"), (b"two", "no integer"), (b"3", "is 3; task.num_classes 3 allows 0 to 2")],
)
def test_bad_labels_name_the_sample(tmp_path, label, message):
    members = [("a.png", image_bytes(0))] + ([("a.cls", label)] if label else [])
    write_index(write_tar(tmp_path / "train-000.tar", members))
    with pytest.raises(DataError, match=rf"train-000\.tar: .*a.*{message}"):
        dataset(tmp_path)[0]


def test_errors_of_a_worker_reach_the_rank_without_a_traceback(tmp_path):
    write_index(write_tar(tmp_path / "train-000.tar", [("a.png", image_bytes(0))]))
    with pytest.raises(DataError) as caught:
        next(iter(train_loader(dataset(tmp_path), 0, 1, 1, 1, 1, 0, workers=1, pin=False)))
    assert str(caught.value) == f"{tmp_path}/train-000.tar: sample a has no label (a.cls)"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF"])
def test_decoders(kind):
    assert decode(image_bytes(3, kind=kind)).shape == (3, 40, 43)


def test_seeding_a_sample_does_not_seed_a_gpu(monkeypatch):
    """torch.manual_seed would reseed every GPU: all ranks would then draw the same drop path."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU was reseeded"))
    with seeded(7):
        torch.rand(1)


def test_damaged_bytes_are_undecodable():
    with pytest.raises(Undecodable):
        decode(b"damage")
    with pytest.raises(Undecodable):
        decode(b"")
    with pytest.raises(Undecodable):
        decode(image_bytes(0, kind="JPEG")[:60])


def test_normalise_is_imagenet_s():
    images = torch.tensor([[124, 116, 104], [0, 255, 128]], dtype=torch.uint8).view(2, 3, 1, 1)
    expected = (images.float() / 255 - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(1, 3, 1, 1)
    assert torch.allclose(IMAGENET(images), expected, atol=1e-6)


def test_eval_transform_is_resize_and_centre_crop():
    image = torch.arange(3 * 40 * 60, dtype=torch.int64).remainder(251).byte().view(3, 40, 60)
    transform = eval_transform(Augment(eval_crop_ratio=0.8), 32)
    data = encode_png(image).numpy().tobytes()
    assert torch.equal(transform(data), image[:, 4:36, 14:46])  # short side 40 already: only the crop is left


def test_rand_augment_works_at_its_greatest_strength():
    """timm's Posterize then passes 0 bits to Pillow, which newer versions refuse."""
    transform = train_transform(Augment(rand_augment="rand-m10-inc1"), 24)
    data = image_bytes(1)
    for key in range(300):
        with seeded(key):
            assert transform(data).shape == (3, 24, 24)


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (40, 400), (500, 30), (7, 7)])
@pytest.mark.parametrize(("scale", "ratio"), [((0.67, 1.0), (3 / 4, 4 / 3)), ((0.08, 1.0), (0.5, 2.0))])
def test_crops_have_the_distribution_of_torchvision_s(shape, scale, ratio):
    """Fallbacks included: for top, left, height and width the Kolmogorov-Smirnov distance of two samples of 2,000."""
    ours = train_transform(Augment(crop_scale=scale, crop_ratio=ratio), 24).steps[0]
    theirs = v2.RandomResizedCrop(24, scale, ratio)
    image = torch.empty(3, *shape)
    with seeded(0):
        a = np.array([ours.box(*shape) for _ in range(2000)])
        b = np.array([list(theirs.make_params([image]).values()) for _ in range(2000)])
    assert np.all(a[:, :2] >= 0) and np.all(a[:, 0] + a[:, 2] <= shape[0]) and np.all(a[:, 1] + a[:, 3] <= shape[1])
    for ours_sorted, theirs_sorted in zip(np.sort(a, 0).T, np.sort(b, 0).T, strict=True):
        values = np.unique(np.concatenate([ours_sorted, theirs_sorted]))
        shares = [np.searchsorted(part, values, side="right") / 2000 for part in (ours_sorted, theirs_sorted)]
        assert np.abs(shares[0] - shares[1]).max() < 0.065  # 99.97 % quantile: 2.05 / sqrt(1000)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_resized_pixels_equal_torchvision_s(mode):
    image = torch.randint(256, (3, 90, 130), dtype=torch.uint8)
    transform = train_transform(Augment(interpolation=mode, hflip=0.5), 24)
    data, flips = encode_png(image).numpy().tobytes(), 0
    for key in range(20):
        with seeded(key):
            ours = transform(data)
        with seeded(key):
            top, left, height, width = transform.steps[0].box(90, 130)
            size, flip = [24, 24], random.random() < 0.5
        theirs = TF.resized_crop(image, top, left, height, width, size, v2.InterpolationMode(mode), antialias=True)
        assert torch.equal(ours, theirs.flip(-1) if flip else theirs)
        flips += flip
    assert 0 < flips < 20


def test_scaled_decoding_gives_almost_the_same_crops():
    """Crops with twice the side of the network's input are decoded smaller; images too small for that stay exact."""
    y, x = np.mgrid[0:260, 0:300]
    waves = np.stack([127 + 120 * np.sin(x / 23 + c) * np.cos(y / 31) for c in range(3)], axis=-1).astype(np.uint8)
    for shape, differs in (((260, 300), True), ((60, 60), False)):
        buffer = io.BytesIO()
        Image.fromarray(waves[: shape[0], : shape[1]]).save(buffer, "JPEG", quality=95)
        exact, scaled = (train_transform(Augment(decode=how), 48) for how in ("exact", "scaled"))
        for key in range(10):
            with seeded(key):
                a = exact(buffer.getvalue()).int()
            with seeded(key):
                b = scaled(buffer.getvalue()).int()
            assert a.shape == b.shape == (3, 48, 48)
            assert torch.equal(a, b) != differs and (a - b).abs().float().mean() < 8


def test_scaled_decoding_names_damage(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(buffer, "JPEG")
    transform = train_transform(Augment(decode="scaled"), 24)
    with pytest.raises(Undecodable, match="truncated"):
        transform(buffer.getvalue()[:3000])
    assert transform(image_bytes(3, side=90)).shape == (3, 24, 24)  # PNG: decoded exactly
