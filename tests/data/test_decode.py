from __future__ import annotations

import io
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shard_files import encode, jpg, picture

from distcnn.data.decode import DecodeError, decode

RED, GRAY = (200, 30, 40), 120


def flat(mode: str, color: object, **info: object) -> Image.Image:
    return Image.new(mode, (6, 4), color)  # type: ignore[arg-type]


def png(width: int, height: int, depth: int = 8, color: int = 2, pixels: bytes = b"") -> bytes:
    """A PNG by hand: its header may promise what its data do not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def jpeg_claiming(width: int, height: int) -> bytes:
    """A real JPEG whose frame header says another size."""
    data = bytearray(encode(picture(0, 16, 16), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_claiming(width: int, height: int) -> bytes:
    """An animated WebP of a 4x4 frame on a canvas of any size."""
    canvas = b"VP8X" + struct.pack("<I", 10) + bytes([2, 0, 0, 0])
    canvas += struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    frame = bytes(6) + struct.pack("<I", 3)[:3] * 2 + bytes(4) + encode(picture(0, 4, 4), "WEBP", lossless=True)[12:]
    body = (
        b"WEBP" + canvas + b"ANIM" + struct.pack("<I", 6) + bytes(6) + b"ANMF" + struct.pack("<I", len(frame)) + frame
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def palette_with_alpha() -> bytes:
    image = Image.new("P", (6, 4), 1)
    image.putpalette([0, 0, 0, *RED])
    return encode(image, "PNG", transparency=bytes([255, 0]))


def gray16(value: int) -> bytes:
    return encode(np.full((4, 6), value, np.uint16))


def rgb16(value: int) -> bytes:
    row = b"\0" + struct.pack(">HHH", value, 0, 0) * 6
    return png(6, 4, depth=16, pixels=row * 4)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(flat("RGB", RED), "JPEG", exif=exif, quality=100)


def two_frames(kind: str) -> bytes:
    return encode(flat("RGB", RED), kind, save_all=True, append_images=[flat("RGB", (0, 0, 0))])


@pytest.mark.parametrize(
    ("data", "expected", "tolerance"),
    [
        (encode(flat("RGB", RED), "JPEG", quality=100), RED, 3),
        (encode(flat("RGB", RED), "JPEG", quality=95, progressive=True), RED, 3),
        (encode(flat("L", GRAY), "JPEG"), (GRAY,) * 3, 1),
        (encode(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0), 3),
        (encode(flat("RGB", RED)), RED, 0),
        (encode(flat("L", GRAY)), (GRAY,) * 3, 0),
        (encode(flat("1", 1)), (255,) * 3, 0),
        (encode(flat("1", 0)), (0,) * 3, 0),
        (encode(flat("RGB", RED).quantize(4)), RED, 0),
        (palette_with_alpha(), (255,) * 3, 0),
        (encode(flat("RGBA", (*RED, 255))), RED, 0),
        (encode(flat("RGBA", (*RED, 0))), (255,) * 3, 0),
        (encode(flat("RGBA", (0, 0, 0, 51))), (204,) * 3, 1),
        (encode(flat("LA", (GRAY, 255))), (GRAY,) * 3, 0),
        (encode(flat("LA", (GRAY, 0))), (255,) * 3, 0),
        (encode(flat("RGB", RED), transparency=RED), (255,) * 3, 0),
        (encode(flat("L", GRAY), transparency=GRAY), (255,) * 3, 0),
        (gray16(0), (0,) * 3, 0),
        (gray16(65535), (255,) * 3, 0),
        (gray16(0x7FFF), (0x7F,) * 3, 0),
        (rgb16(0x7FFF), (0x7F, 0, 0), 0),
        (encode(Image.fromarray(np.full((4, 6), 70_000, np.int32)), "TIFF"), (255,) * 3, 0),
        (encode(flat("RGB", RED), "WEBP", lossless=True), RED, 0),
        (encode(flat("RGBA", (*RED, 0)), "WEBP", lossless=True), (255,) * 3, 0),
        (two_frames("GIF"), RED, 0),
        (two_frames("PNG"), RED, 0),
        (two_frames("WEBP"), RED, 8),
        (encode(flat("RGB", RED), "BMP"), RED, 0),
        (encode(flat("RGB", RED), "TIFF"), RED, 0),
        (rotated(), RED, 3),  # (4, 6, 3) still: EXIF is not applied
    ],
)
def test_every_kind_of_image_gives_one_documented_rgb(data: bytes, expected: tuple[int, ...], tolerance: int) -> None:
    pixels = decode(data)
    assert pixels.shape == (4, 6, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - np.array(expected)).max() <= tolerance


def test_fast_and_slow_way_agree() -> None:
    """simplejpeg and Pillow give the same pixels of an ordinary JPEG, but for the rounding of their upsampling."""
    data = jpg(3, 64, 48)
    fast = decode(data).astype(int)
    slow = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    assert np.abs(fast - slow).mean() < 1


def test_one_pixel() -> None:
    assert decode(encode(np.full((1, 1, 3), 9, np.uint8))).tolist() == [[[9, 9, 9]]]
    assert decode(encode(np.full((1, 1, 3), 9, np.uint8), "JPEG")).shape == (1, 1, 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes"),
        (b"this is text that is named .jpg", "not an image"),
        (b"\xff\xd8\xff", "not an image"),
        (b"\xff\xd8\xff" + bytes(100), "not an image|damaged"),
        (jpg(0, 64, 64)[:200], "not an image|damaged"),
        (jpg(0, 64, 64)[:-300], "truncated"),
        (encode(picture(0, 64, 64))[:-200], "truncated|damaged"),
        (encode(picture(0, 64, 64), "WEBP")[:-50], "damaged|not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (jpeg_claiming(40_000, 40_000), "40000x40000 pixels"),
        (jpeg_claiming(65_500, 65_500), "65500x65500 pixels"),
        (png(40_000, 40_000), "pixels"),
        (png(10_000, 9_000), "10000x9000 pixels|more pixels"),
        (png(9_000, 9_000), "truncated|damaged"),
        (png(0, 5), "damaged|not an image"),
        (webp_claiming(16_384, 16_384), "pixels"),
        (encode(Image.new("F", (4, 4)), "TIFF"), "floating-point"),
    ],
)
def test_what_cannot_be_used_says_why(data: bytes, message: str) -> None:
    with pytest.raises(DecodeError, match=message) as raised:
        decode(data)
    assert "\n" not in str(raised.value)


def test_the_limit_is_the_caller_s_too() -> None:
    for data in (jpg(0, 20, 30), encode(picture(0, 20, 30))):
        assert decode(data, max_pixels=600).shape == (20, 30, 3)
        with pytest.raises(DecodeError, match="30x20 pixels, more than 599"):
            decode(data, max_pixels=599)


def test_more_bytes_than_any_image_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distcnn.data.decode.MAX_BYTES", 100)
    with pytest.raises(DecodeError, match="more than 100"):
        decode(jpg())


def test_bombs_take_no_memory(tmp_path: Path) -> None:
    """40,000 x 40,000 pixels would be 4.8 GB: each kind of bomb, in a process of its own, stays below 200 MiB."""
    bombs = {
        "jpg": jpeg_claiming(40_000, 40_000),
        "png": png(40_000, 40_000, pixels=bytes(1 << 24)),
        "webp": webp_claiming(16_384, 16_384),
        "gif": encode(Image.new("P", (8, 8)), "GIF")[:6] + struct.pack("<HH", 65535, 65535) + bytes(50),
    }
    for kind, data in bombs.items():
        (tmp_path / kind).write_bytes(data)
    script = """
        import re, sys, warnings
        from pathlib import Path
        from distcnn.data.decode import DecodeError, decode
        warnings.simplefilter("ignore")
        for path in sys.argv[1:]:
            try:
                decode(Path(path).read_bytes())
            except DecodeError:
                continue
            raise SystemExit(f"{path} was decoded")
        print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), *(str(tmp_path / kind) for kind in bombs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200 * 1024


SEEDS = [
    encode(picture(1, 12, 9), kind, **options)
    for kind, options in [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("GIF", {}),
        ("BMP", {}),
    ]
] + [encode(flat("CMYK", 0), "JPEG"), gray16(7), palette_with_alpha()]


@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6), st.data())
@settings(max_examples=400, deadline=None)
def test_damaged_bytes_raise_nothing_else(data: bytes, changes: list[tuple[int, int]], draw: st.DataObject) -> None:
    damaged = bytearray(data[: draw.draw(st.integers(len(data) // 2, len(data)))])
    for place, value in changes:
        damaged[place % len(damaged)] = value
    try:
        pixels = decode(bytes(damaged), max_pixels=1 << 20)
    except DecodeError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
