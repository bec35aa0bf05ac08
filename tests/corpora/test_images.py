"""Reading image files that nobody vouches for."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cmdlab.corpora import read_image
from cmdlab.errors import InputError


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def bomb(width: int, height: int) -> bytes:
    """A PNG file of some fifty bytes that promises this many pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def test_png_is_read_exactly_and_every_usual_mode_becomes_rgb(tmp_path, picture):
    picture.save(tmp_path / "x.png")
    pixels = read_image(tmp_path / "x.png")
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.asarray(picture))
    for mode in ("L", "1", "P", "RGBA", "LA"):
        picture.convert(mode).save(tmp_path / f"{mode}.png")
        assert read_image(tmp_path / f"{mode}.png").shape == (20, 30, 3)
    picture.convert("CMYK").save(tmp_path / "x.jpg")
    assert read_image(tmp_path / "x.jpg").shape == (20, 30, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_picture_is_turned_as_its_orientation_says(tmp_path, suffix):
    """Dark above and light below, as the camera stored it: 20 wide, 10 high."""
    stored = np.zeros((10, 20, 3), np.uint8)
    stored[5:] = 200
    light = {1: (8, 10), 3: (1, 10), 6: (10, 1), 8: (10, 8)}  # row and column of the light half
    for orientation, (row, column) in light.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(stored).save(tmp_path / f"x.{suffix}", exif=exif, quality=95)
        pixels = read_image(tmp_path / f"x.{suffix}")
        assert pixels.shape == ((10, 20, 3) if orientation < 5 else (20, 10, 3))
        assert pixels[row, column, 0] > 150
        assert pixels[-1 - row, -1 - column, 0] < 50


@pytest.mark.parametrize(
    ("sound", "damaged", "shape"),
    [
        (b"MM\0*", b"MM\0!", (20, 30, 3)),  # no header: it says nothing
        (b"\x01\x1a\0\x05", b"\x01\x1a\0\x02", (30, 20, 3)),  # a number that claims to be text
    ],
)
def test_damaged_exif_loses_no_picture(tmp_path, picture, sound, damaged, shape):
    """Some cameras write such; the pixels are sound."""
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0  # orientation, resolution
    assert sound in exif.tobytes()
    picture.save(tmp_path / "x.jpg", exif=exif.tobytes().replace(sound, damaged))
    assert read_image(tmp_path / "x.jpg").shape == shape


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "size", [(8_000, 8_000), (10_000, 10_000), (60_000, 60_000), (2**31 - 1,) * 2]
)
def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path, size):
    (tmp_path / "x.png").write_bytes(bomb(*size))
    with pytest.raises(InputError, match=r"x\.png: image .*over the limit of 50000000.*shrink it"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_image_is_refused(tmp_path, picture, suffix):
    path = tmp_path / f"x.{suffix}"
    picture.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"x\.{suffix}: is no readable .*; replace it"):
        read_image(path)


def test_what_is_no_image_is_refused(tmp_path, picture):
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    for name in ("BMP", "GIF", "WEBP", "TIFF"):
        picture.save(tmp_path / f"{name}.jpg", format=name)
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(tmp_path / "deep.png")
    for name, message in {
        "text.jpg": "no readable JPEG or PNG",
        "empty.jpg": "no readable JPEG or PNG",
        "BMP.jpg": "is a BMP image; save it as JPEG or PNG",
        "GIF.jpg": "is a GIF image; save it as JPEG or PNG",
        "WEBP.jpg": "is a WEBP image; save it as JPEG or PNG",
        "TIFF.jpg": "is a TIFF image; save it as JPEG or PNG",
        "folder.jpg": "is no file",
        "none.jpg": "is no file",
        "deep.png": "more than 8 bits",
    }.items():
        with pytest.raises(InputError, match=f"{name}: .*{message}") as refusal:
            read_image(tmp_path / name)
        assert str(refusal.value).count(name) == 1


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(["png", "jpg"]), st.data())
@pytest.mark.filterwarnings("ignore")
def test_any_damage_gives_an_image_or_a_clear_refusal(tmp_path, picture, suffix, data):
    path: Path = tmp_path / f"x.{suffix}"
    picture.save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    refusal = f"{path}: "
    try:
        assert read_image(path).shape[2] == 3
    except InputError as error:
        refusal = str(error)
    assert refusal.startswith(f"{path}: ")
    assert "\n" not in refusal
