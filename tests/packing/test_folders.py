"""What a folder of images contains for a build, and what is left out and named."""

import io

import numpy as np
import pytest
from PIL import Image

from dsmim.data.decode import decode
from dsmim.packing.sources import read_sources
from dsmim.shards.extensions import IMAGE_EXTENSIONS, is_image
from tests.conftest import dsmim, image_bytes
from tests.packing.contents import samples_of


@pytest.fixture
def pics(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        path = tmp_path / "pics" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(len(name)))
    return tmp_path / "pics"


def keys(found) -> list[str]:
    return [source.key for source in found.sources]


def test_hidden_files_and_folders_are_left_out_and_named(pics, tmp_path):
    for name in (".ipynb_checkpoints/1-checkpoint.png", "__MACOSX/a/1.png", "a/@eaDir/1.png", "a/._1.png", ".DS_Store"):
        (pics / name).parent.mkdir(exist_ok=True, parents=True)
        (pics / name).write_bytes(image_bytes(1))
    found = read_sources(str(pics))
    assert keys(found) == ["a/1", "a/2", "b/1"] and found.classes == ["a", "b"] and found.left_out["hidden"][0] == 5
    done = dsmim("shards", "build", pics, tmp_path / "out")
    assert done.stdout.splitlines()[-1].startswith("5 left out: hidden 5 (")


def test_other_files_are_left_out_and_counted(pics, tmp_path):
    for name in ("a/notes.txt", "b/x.txt", "b/photo.heic", "b/paper.pdf", "b/film.mpg", "b/1"):
        (pics / name).write_bytes(b"x")
    (pics / "b/gone.png").symlink_to(tmp_path / "nowhere.png")
    done = dsmim("shards", "build", pics, tmp_path / "out")
    last = done.stdout.splitlines()[-1]
    assert last.startswith("7 left out: .txt 2 (") and f"links to missing files 1 ({pics}/b/gone.png)" in last
    assert all(f"{kind} 1 (" in last for kind in (".heic", ".pdf", ".mpg", "without extension"))
    assert "3 images in 1 shards" in done.stdout.splitlines()[-2]


def test_without_any_image_the_error_says_what_is_there(tmp_path):
    (tmp_path / "un/a").mkdir(parents=True)
    (tmp_path / "un/a/1").write_bytes(image_bytes(1))
    with pytest.raises(ValueError, match=r"un: no images found .*; 1 left out: without extension 1 \(.*/un/a/1\)"):
        read_sources(str(tmp_path / "un"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("1.pgm", "PPM"), ("2.jfif", "JPEG"), ("3.jp2", "JPEG2000"), ("4.avif", "AVIF"), ("5.JPE", "JPEG"),
     ("6.tga", "TGA"), ("7.ico", "ICO"), ("8.apng", "PNG"), ("9.pbm", "PPM"), ("10.qoi", "QOI"), ("11.mpo", "MPO"),
     ("12.dib", "DIB")],
)  # fmt: skip
def test_what_pillow_reads_is_packed_and_decoded(tmp_path, name, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    (tmp_path / "pics").mkdir()
    image = Image.fromarray(pixels).convert("1" if name.endswith("pbm") else "L" if name.endswith("pgm") else "RGB")
    image.save(tmp_path / "pics" / name, kind)
    dsmim("shards", "build", tmp_path / "pics", tmp_path / "out")
    ((extension, data),) = samples_of(tmp_path / "out")[name.partition(".")[0]].items()
    assert extension == name.partition(".")[2].lower()
    with Image.open(io.BytesIO((tmp_path / "pics" / name).read_bytes())) as image:
        assert decode(data).shape == (3, image.height, image.width)
    assert dsmim("shards", "verify", tmp_path / "out", "--decode").stdout == "all shards are as indexed\n"


def test_the_first_image_of_a_sample_is_as_before_and_no_documents_are_images():
    assert IMAGE_EXTENSIONS[:9] == ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
    assert not any(map(is_image, ("pdf", "eps", "ps", "mpg", "mpeg", "h5", "hdf", "txt", "json", "cls", "npy", "")))


def test_a_loop_of_links_is_read_once(pics):
    (pics / "a/again").symlink_to(pics)
    (pics / "b/inner").symlink_to("..")
    found = read_sources(str(pics))
    assert keys(found) == ["a/1", "a/2", "b/1"]
    assert found.left_out == {"folders that are read under another path already": (2, f"{pics}/a/again")}


def test_a_folder_keeps_its_own_path_before_that_of_a_link(pics, tmp_path):
    (pics / "A_link").symlink_to(pics / "b")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "9.png").write_bytes(image_bytes(9))
    (pics / "c").symlink_to(elsewhere)
    (pics / "a/more").symlink_to(elsewhere)
    found = read_sources(str(pics))
    assert keys(found) == ["a/1", "a/2", "b/1", "c/9"] and found.classes == ["a", "b", "c"]
    assert found.left_out["folders that are read under another path already"][0] == 2


def test_a_build_into_its_own_source_is_continued(pics):
    for _ in range(2):
        assert "3 images in 1 shards" in dsmim("shards", "build", pics, pics / "shards").stdout
    found = read_sources(str(pics))
    assert found.classes == ["a", "b"] and found.left_out == {"folders of shards": (1, f"{pics}/shards")}


def test_what_is_beside_tars_is_named(tars, tmp_path):
    (tars / "cat").mkdir()
    (tars / "stray.png").write_bytes(image_bytes(1))
    done = dsmim("shards", "build", tars, tmp_path / "out")
    assert "2 left out: " in done.stdout and f".png 1 ({tars}/stray.png)" in done.stdout
