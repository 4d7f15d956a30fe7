from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prepare_files import encode, jpg, picture, png

from distcnn.data.decode import DecodeError, decode
from distcnn.data.prepare.images import READ_FIRST, Checker, Policy, _scaled_jpeg, check, load, sniff
from distcnn.data.prepare.source import Slice
from distcnn.errors import UserError

KEEP = Policy()


def rotated(orientation: int, format: str = "JPEG", width: int = 96, height: int = 64) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(
        picture(1, width, height), format, exif=exif.tobytes(), **({"quality": 100} if format != "PNG" else {})
    )


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes whose header promises that many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(200_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def animated() -> bytes:
    frames = [Image.new("RGB", (12, 8), color) for color in ("red", "blue")]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:])


# what comes in -> (extension, whether the bytes are kept). The pixels are those of decode() in every case.
@pytest.mark.parametrize(
    ("data", "extension", "kept"),
    [
        (jpg(), "jpg", True),
        (png(), "png", True),
        (encode(picture(), "WEBP"), "webp", True),
        (encode(picture(mode="L"), "JPEG"), "jpg", True),
        (encode(picture().convert("CMYK"), "JPEG"), "jpg", True),
        (encode(picture(mode="P"), "PNG"), "png", True),
        (encode(picture(mode="RGBA"), "PNG"), "png", True),
        (encode(Image.fromarray(np.full((8, 12), 40000, np.uint16)), "PNG"), "png", True),
        (encode(picture(), "GIF"), "png", False),
        (animated(), "png", False),
        (encode(picture(), "BMP"), "png", False),
        (encode(picture(), "TIFF"), "png", False),
        (encode(picture(mode="L"), "TIFF"), "png", False),
    ],
)
def test_an_image_is_kept_or_becomes_png_and_its_pixels_stay(data: bytes, extension: str, kept: bool) -> None:
    image = check(data, KEEP)
    assert image.extension == extension == sniff(image.data)
    assert (image.data == data) is kept
    assert np.array_equal(image.pixels, decode(data))
    assert np.array_equal(image.pixels, decode(image.data))


def test_the_first_frame_of_an_animation_is_taken() -> None:
    assert (check(animated(), KEEP).pixels == (255, 0, 0)).all()


def test_gray_stays_gray_when_it_is_encoded_again() -> None:
    image = check(encode(picture(mode="L"), "BMP"), KEEP)
    assert Image.open(io.BytesIO(image.data)).mode == "L"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"this is no image" * 100, "not an image"),
        (jpg(width=60, height=60)[:-200], "truncated"),
        (png(width=60, height=60)[:-200], "truncated"),
        (encode(Image.new("RGB", (1, 1)), "PNG"), "1x1 pixels"),
        (encode(Image.new("RGB", (1, 1)), "GIF"), "1x1 pixels"),
        (encode(Image.new("RGB", (1, 300)), "JPEG"), "1x300 pixels"),
        (bomb(40_000, 40_000), "pixels"),
        (bomb(10_000, 10_000), "pixels"),
        (b"\xff\xd8\xff" + b"\0" * 500, "damaged|not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
@pytest.mark.parametrize("policy", [KEEP, Policy(max_side=4), Policy(format="jpg")])
def test_what_cannot_be_used_is_refused_with_a_reason(data: bytes, reason: str, policy: Policy) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with pytest.raises(DecodeError, match=reason):
            check(data, policy)


def test_a_pixel_bomb_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(bomb(40_000, 40_000))
    code = (
        "import resource, sys; from distcnn.data.prepare.work import Task, pack;"
        "from distcnn.data.prepare.images import Policy;"
        f"run = lambda: pack(Task(['k'], ['n'], [0], ['bomb.png'], {str(tmp_path)!r}), Policy(max_side=400), True);"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "before = peak(); part = run(); assert part.bad == [0], part; print(peak() - before)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 50_000  # KiB; its pixels would be 4.8 GB


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_is_applied_by_turning_the_pixels(format: str, orientation: int) -> None:
    data = rotated(orientation, format)
    image = check(data, Policy(quality=100))
    turned = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: x[::-1].swapaxes(0, 1),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: x.swapaxes(0, 1)[::-1],
    }[orientation](decode(data))
    assert image.pixels.shape == turned.shape
    assert np.abs(image.pixels.astype(int) - turned).mean() < (0.01 if format == "PNG" else 6)
    assert (image.data == data) is (orientation == 1)
    again = Image.open(io.BytesIO(image.data))
    again.load()
    assert orientation == 1 or again.getexif().get(0x0112, 1) == 1  # nobody turns it a second time


def test_exif_can_be_left_alone_and_damaged_exif_counts_as_upright() -> None:
    assert check(rotated(6), Policy(exif="ignore")).data == rotated(6)
    damaged = rotated(6).replace(b"Exif\0\0MM", b"Exif\0\0??").replace(b"Exif\0\0II", b"Exif\0\0??")
    assert damaged != rotated(6)
    assert check(damaged, KEEP).data == damaged
    assert check(rotated(9), KEEP).data == rotated(9)  # no such orientation


@pytest.mark.parametrize(
    ("size", "expected"),
    [((400, 300), (40, 30)), ((300, 400), (30, 40)), ((41, 41), (40, 40)), ((40, 7), None), ((2000, 30), None)],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_max_side_shrinks_only_what_is_larger(
    size: tuple[int, int], expected: tuple[int, int] | None, format: str
) -> None:
    data = encode(picture(3, *size), format)
    if size == (2000, 30):  # would become 40 x 0.6: a strip of 1 pixel shows nothing
        with pytest.raises(DecodeError, match="40x1 pixels"):
            check(data, Policy(max_side=40))
        return
    image = check(data, Policy(max_side=40))
    assert (image.data == data) is (expected is None)
    width, height = expected or size
    assert image.pixels.shape == (height, width, 3)
    if expected is None:
        return
    wanted = np.asarray(picture(3, *size).resize((width, height), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(image.pixels - wanted).mean() < 4


@pytest.mark.parametrize(("max_side", "decoded"), [(40, (100, 75)), (50, (100, 75)), (51, (150, 113)), (101, None)])
def test_a_large_jpeg_is_decoded_small_but_at_least_twice_as_large_as_wanted(
    max_side: int, decoded: tuple[int, int] | None
) -> None:
    pixels = _scaled_jpeg(jpg(width=400, height=300), max_side)
    assert (None if pixels is None else (pixels.shape[1], pixels.shape[0])) == decoded


def test_shrinking_turns_first_and_keeps_gray() -> None:
    image = check(rotated(6), Policy(max_side=6))
    assert image.pixels.shape == (6, 4, 3)  # of 96 x 64, lying
    gray = check(encode(picture(1, 90, 60, mode="L"), "JPEG"), Policy(max_side=30))
    assert Image.open(io.BytesIO(gray.data)).mode == "L"


@pytest.mark.parametrize("format", ["jpg", "png", "webp"])
def test_format_makes_all_the_same(format: str) -> None:
    for data in (jpg(), png(), encode(picture(), "WEBP"), encode(picture(), "GIF")):
        image = check(data, Policy(format=format))  # type: ignore[arg-type]
        assert image.extension == format == sniff(image.data)
        assert (image.data == data) is (sniff(data) == format)
        assert np.array_equal(image.pixels, decode(image.data))


@pytest.mark.parametrize("shape", [(8, 12), (8, 12, 3)])
def test_pixels_become_png_without_loss(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    image = check(pixels, KEEP)
    back = decode(image.data)
    assert image.extension == "png"
    assert np.array_equal(back, pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2))


@pytest.mark.parametrize("size", [0, 1, READ_FIRST - 1, READ_FIRST, READ_FIRST + 1, 5 * READ_FIRST])
def test_files_and_slices_are_read_whole(tmp_path: Path, size: int) -> None:
    data = np.random.default_rng(0).bytes(size)
    (tmp_path / "a").write_bytes(data)
    assert load("a", str(tmp_path)) == load(str(tmp_path / "a"), "") == load(data, "") == data
    assert load(Slice(str(tmp_path / "a"), size // 3, size // 2), "") == data[size // 3 : size // 3 + size // 2]


def test_a_file_that_cannot_be_read_is_a_bad_image(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match="cannot be read: No such file"):
        load("gone.jpg", str(tmp_path))


@pytest.mark.parametrize("settings", [{"quality": 0}, {"quality": 101}, {"max_side": -1}, {"max_side": 1}])
def test_a_policy_that_makes_no_sense_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"--quality|--max-side"):
        Policy(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", [Policy(), Policy(exif="ignore"), Policy(max_side=10), Policy(format="png")])
def test_one_image_after_another_is_checked_as_each_by_itself(policy: Policy) -> None:
    """Whatever the quick way is offered: the size of the one before, but turned, damaged, progressive, a PNG ..."""
    grey = encode(picture(mode="L"), "JPEG")
    same = [
        jpg(1),
        jpg(2),
        rotated(6, width=12, height=8),
        jpg(3)[:-60],
        encode(picture(4), "JPEG", progressive=True),
        jpg(5) + b"more",
    ]
    given = [jpg(0), *same, png(6), jpg(7), grey, grey, jpg(8, 8, 12), jpg(9, 8, 12), rotated(3), b"", jpg(1)]
    checker = Checker(policy)
    for data in given:
        try:
            expected = check(data, policy)
        except DecodeError as error:
            with pytest.raises(DecodeError, match=re.escape(str(error))):
                checker(data)
            continue
        got = checker(data)
        assert (got.data, got.extension) == (expected.data, expected.extension)
        assert np.array_equal(got.pixels, expected.pixels)


def test_the_quick_way_is_taken_for_images_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    checker = Checker(Policy())
    first = checker(jpg(0))
    monkeypatch.setattr("distcnn.data.prepare.images.check", None)
    assert np.array_equal(checker(jpg(1)).pixels, decode(jpg(1)))
    assert np.array_equal(first.pixels, decode(jpg(0)))
