"""Request bodies and images. The same seed gives the same request; two seeds share no prefix and no image."""

from __future__ import annotations

import base64
import io
import random
from typing import Any

import numpy as np
from PIL import Image

TEXT = (
    "red green blue large small round square bright dark left right above below near far old new quick slow quiet "
    "circle triangle table window river mountain garden street market station letter picture colour number answer "
    "shows holds finds keeps turns moves stands describes counts compares between under over behind before after"
)
WORDS = TEXT.split()


def random_words(num_words: int, seed: str) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(num_words))


def random_jpeg(width: int, height: int, seed: str) -> bytes:
    """A colour gradient with shapes and grain: no flat areas, and of a photograph's size when encoded."""
    rng = np.random.default_rng(list(seed.encode()))
    corners = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    rgb = np.asarray(Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR), dtype=np.int16)
    for _ in range(12):
        top, left = rng.integers(0, height), rng.integers(0, width)
        bottom, right = top + rng.integers(8, height // 3 + 9), left + rng.integers(8, width // 3 + 9)
        rgb[top:bottom, left:right] = rng.integers(0, 256, 3)
    rgb = rgb + rng.integers(-12, 13, (*rgb.shape[:2], 1))
    out = io.BytesIO()
    Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def chat_body(text: str, *, max_tokens: int, jpeg: bytes | None = None, **more: Any) -> dict[str, Any]:
    """Greedy, to its full length, streamed with usage."""
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if jpeg is not None:
        url = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }
