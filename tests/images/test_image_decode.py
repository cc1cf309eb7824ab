from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lightvl.errors import BadRequest
from lightvl.images.decode import content_digest, decode_image, to_rgb

RNG = np.random.default_rng(3)
NOISE = RNG.integers(0, 256, (23, 37, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "GIF", "JPEG", "WEBP", "ICO"])
def test_formats_decode_as_pillow_does(format: str) -> None:
    image = Image.fromarray(NOISE)
    data = encoded(image, format)
    rgb = decode_image(data)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert rgb.dtype == np.uint8 and rgb.shape == expected.shape and np.array_equal(rgb, expected)
    if format in ("PNG", "BMP", "TIFF", "PPM"):
        assert np.array_equal(rgb, NOISE)


def test_large_images_are_copied_whole() -> None:
    for width, height in ((900, 700), (1 << 19, 3), (3, 1 << 18)):
        pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
        assert np.array_equal(decode_image(encoded(Image.fromarray(pixels), "BMP")), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    rgb = decode_image(encoded(Image.fromarray(NOISE), "PNG", exif=exif))
    expected = {
        1: NOISE,
        2: NOISE[:, ::-1],
        3: NOISE[::-1, ::-1],
        4: NOISE[::-1],
        5: NOISE.transpose(1, 0, 2),
        6: NOISE.transpose(1, 0, 2)[:, ::-1],
        7: NOISE.transpose(1, 0, 2)[::-1, ::-1],
        8: NOISE.transpose(1, 0, 2)[::-1],
    }[orientation]
    assert np.array_equal(rgb, expected)


def test_broken_exif_does_not_matter() -> None:
    data = encoded(Image.fromarray(NOISE), "PNG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff garbage")
    assert np.array_equal(decode_image(data), NOISE)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(mode: str) -> None:
    alpha = RNG.integers(0, 256, (23, 37), dtype=np.uint8)
    grey = NOISE[:, :, 0]
    pixels = np.dstack([NOISE, alpha]) if mode == "RGBA" else np.dstack([grey, alpha])
    rgb = decode_image(encoded(Image.fromarray(pixels, mode), "PNG")).astype(float)
    base = NOISE if mode == "RGBA" else np.dstack([grey] * 3)
    share = alpha[:, :, None] / 255
    assert np.abs(rgb - (base * share + 255 * (1 - share))).max() <= 1
    opaque = np.broadcast_to(share == 1, rgb.shape)
    assert np.array_equal(rgb[opaque], base[opaque])


def test_transparent_colours() -> None:
    palette = Image.fromarray(NOISE).quantize(8)
    index = int(np.asarray(palette)[0, 0])
    for image, key in ((palette, index), (Image.fromarray(NOISE), tuple(int(v) for v in NOISE[0, 0]))):
        rgb = decode_image(encoded(image, "PNG", transparency=key))
        assert tuple(rgb[0, 0]) == (255, 255, 255)
        shown = np.asarray(image.convert("RGB"))
        hidden = (shown == shown[0, 0]).all(axis=2)
        assert np.array_equal(rgb[~hidden], shown[~hidden])


def test_16_bits_are_scaled() -> None:
    deep = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    rgb = decode_image(encoded(Image.fromarray(deep), "PNG"))
    assert rgb.shape == (1, 6, 3) and rgb[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    assert decode_image(encoded(Image.fromarray(deep), "TIFF"))[0, :, 2].tolist() == [0, 0, 1, 1, 128, 255]


def test_every_mode() -> None:
    base = Image.fromarray(NOISE)
    rgb = {mode: to_rgb(base.convert(mode)) for mode in ("1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX", "RGBa")}
    for mode, pixels in rgb.items():
        assert pixels.shape == NOISE.shape and pixels.dtype == np.uint8, mode
    assert set(np.unique(rgb["1"])) == {0, 255}
    assert np.array_equal(rgb["L"], np.dstack([np.asarray(base.convert("L"))] * 3))
    for mode in ("CMYK", "YCbCr", "RGBX", "RGBa"):
        assert np.abs(rgb[mode].astype(int) - NOISE).max() <= 3, mode
    for mode in ("I;16", "I;16B", "I;16L"):
        assert to_rgb(base.convert("I").convert(mode)).shape == NOISE.shape
    for mode in ("La", "PA", "LAB"):
        image = base.convert("LA").convert("La") if mode == "La" else Image.new(mode, (4, 5))
        assert to_rgb(image).shape == (image.height, image.width, 3)
    white = Image.merge("LAB", [Image.new("L", (2, 2), level) for level in (255, 128, 128)])
    assert to_rgb(white).min() >= 253


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.4, 255.0], [0, 100, 255]),
        ([0.0, 5e5, 1e6], [0, 128, 255]),
        ([float("nan"), -3.0, 1.0], [0, 0, 255]),
    ],
)
def test_floats(values: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert image.mode == "F" and to_rgb(image)[0, :, 1].tolist() == expected


def test_32_bit_integers() -> None:
    for values, expected in (([0, 7, 255], [0, 7, 255]), ([0, 257, 65535], [0, 1, 255]), ([0, 1 << 30], [0, 255])):
        assert to_rgb(Image.fromarray(np.array([values], dtype=np.int32)))[0, :, 0].tolist() == expected


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert tuple(decode_image(data)[0, 0]) == (255, 0, 0)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated(format: str) -> None:
    data = encoded(Image.fromarray(RNG.integers(0, 256, (80, 80, 3), dtype=np.uint8)), format)
    with pytest.raises(BadRequest, match="not an image that can be read"):
        decode_image(data[: len(data) // 2])


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"II*\0"])
)
def test_garbage(data: bytes, head: bytes) -> None:
    try:
        decode_image(head + data, max_pixels=10_000)
    except BadRequest:
        pass


@pytest.mark.parametrize("side", [8_000, 60_000])
def test_bombs_are_refused_by_their_header(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """60,000 squared is over Pillow's own limit as well. No pixel may be decoded: loading fails the test."""
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(BadRequest, match="too many pixels"):
        decode_image(data)


def test_formats_off_the_list_are_refused() -> None:
    for data in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", encoded(Image.fromarray(NOISE), "TGA")):
        with pytest.raises(BadRequest):
            decode_image(data)


def test_content_digest() -> None:
    first = content_digest(NOISE)
    assert len(first) == 16 and first == content_digest(np.asfortranarray(NOISE))
    assert first != content_digest(NOISE.reshape(37, 23, 3))
    other = NOISE.copy()
    other[-1, -1, -1] ^= 1
    assert first != content_digest(other)
