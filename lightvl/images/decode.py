"""Encoded bytes to RGB pixels with Pillow. Pure functions, called from worker threads; no caches and no resizing here.

Never JPEG draft mode: pixels must equal those that HF's PIL-backed processors start from."""

from __future__ import annotations

import hashlib
import io
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

from lightvl.errors import BadRequest

RGB = np.ndarray[Any, np.dtype[np.uint8]]

DEFAULT_MAX_PIXELS = 50_000_000
_STRIP_PIXELS = 1 << 18
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "ICO", "PPM", "AVIF", "JPEG2000")

Image.init()
_FORMATS_HERE = tuple(name for name in _FORMATS if name in Image.OPEN)  # some need libraries that a build may lack

# Pillow warns of odd files on stderr. Clients send these; what matters of them is an error here, or our own pixel cap.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode_image(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> RGB:
    """(height, width, 3) uint8: the first frame, upright by EXIF, alpha composited on white.

    Raises BadRequest, the field to be named by the caller, for what is not an image, is truncated, or has more than
    `max_pixels` (told from the header)."""
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS_HERE)
        if image.width * image.height > max_pixels:
            raise _too_large(image.size, max_pixels)
        image.load()
        return to_rgb(_upright(image))
    except (BadRequest, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(None, max_pixels) from None
    except Exception:  # Pillow's plugins raise nearly anything on garbage
        raise BadRequest("this is not an image that can be read") from None


def content_digest(rgb: RGB) -> bytes:
    """16 bytes that identify decoded content: equal size and pixels, equal digest, whatever the file format."""
    digest = hashlib.blake2b(np.array(rgb.shape, dtype="<u8").tobytes(), digest_size=16)
    digest.update(np.ascontiguousarray(rgb).data)
    return digest.digest()


def to_rgb(image: Image.Image) -> RGB:
    """Any Pillow mode to RGB: alpha on white, deeper channels scaled down to 8 bits, colour spaces converted."""
    mode = image.mode
    if mode.startswith("I") or mode == "F":
        grey = _to_8_bits(np.asarray(image))
        return np.repeat(grey[:, :, None], 3, axis=2)
    if mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        # "La" has no direct way to RGBA; a palette or grey image with a transparent colour has.
        image = image.convert("LA") if mode == "La" else image
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    elif mode == "LAB":
        to_srgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        converted = ImageCms.applyTransform(image, to_srgb)
        assert converted is not None  # only None when done in place
        image = converted
    return _to_array(image if image.mode == "RGB" else image.convert("RGB"))


def _to_array(image: Image.Image) -> RGB:
    """In strips: Pillow copies pixels out without letting other threads run, 30 ms for a 12-megapixel photo."""
    rgb = np.empty((image.height, image.width, 3), dtype=np.uint8)
    strip_len = max(1, _STRIP_PIXELS // max(1, image.width))
    for top in range(0, image.height, strip_len):
        bottom = min(top + strip_len, image.height)
        rgb[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return rgb


def _to_8_bits(values: np.ndarray[Any, Any]) -> RGB:
    """16 bits keep their scale; 32-bit integers and floats have none, so the largest value tells it."""
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        narrow: RGB = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        return narrow
    wide = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0.0)
    largest = float(wide.max())
    if values.dtype.kind == "f" and largest <= 1.0:
        scale = 255.0
    elif largest <= 255.0:
        scale = 1.0
    elif largest <= 65535.0:
        scale = 1.0 / 257.0
    else:
        scale = 255.0 / largest
    scaled: RGB = (wide * scale).round().astype(np.uint8)
    return scaled


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF in a good image
        return image


def _too_large(size: tuple[int, int] | None, max_pixels: int) -> BadRequest:
    told = f" ({size[0]}x{size[1]})" if size is not None else ""
    return BadRequest(f"the image has too many pixels{told}: at most {max_pixels:,} are allowed")
