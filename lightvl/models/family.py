"""What a model family is: a few functions around the one decoder. A family knows nothing about requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from lightvl.attention.base import EncoderAttention
from lightvl.models.config import DecoderConfig
from lightvl.models.load import WeightPart


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """How one image enters the model. The one place where an image's token count is computed.

    `settings` joins the image's identity: equal content under equal settings has equal features.
    """

    num_tokens: int  # prompt rows that the image takes (1 for a cross-attention image)
    num_cross_pages: int  # real tiles, for a cross-attention family; else 0
    width: int  # after resizing, in pixels
    height: int
    # the family's own: Qwen2-VL (t, h, w) in patches; mllama (aspect ratio id, tiles high, wide); LLaVA (tiles high,
    # wide, patches left out at both ends of its height, width, rows and columns shown), or nothing for a single view
    grid: tuple[int, ...] = ()
    settings: bytes = b""


@dataclass(frozen=True, slots=True)
class Expansion:
    """A prompt after each image token has become `num_tokens` rows."""

    token_ids: np.ndarray[Any, np.dtype[np.int64]]  # (len,)
    image_rows: list[tuple[int, int]]  # per image: (first_row, end_row) that need it; see core.PromptImage
    positions: np.ndarray[Any, np.dtype[np.int64]] | None = None  # (3, len) for M-RoPE
    rope_delta: int = 0


Encoding = Iterator[dict[int, torch.Tensor] | None]
"""A generator: yields None between bounded pieces of work (a layer or so), and once for each image, by its place among
the images, its features: (num_tokens, hidden) to replace rows, or (num_cross_pages * cross_page_len, hidden) to be
attended to. Several may come together; they may be views of a larger tensor."""


class Family(Protocol):
    """Image side of a model. `plan_image`, `preprocess` and `expand` are called from worker threads and are pure;
    `encode` runs on the lane thread in inference mode."""

    name: str
    chat_template: str | None  # name of the built-in template that fits
    image_token_id: int | None  # None: text only
    cross_page_len: int  # K,V rows of one cross page; 0: features replace rows
    decoder_config: DecoderConfig  # of the decoder that this family stands around

    def weight_parts(self) -> list[WeightPart]:
        """Where the weights of tower and projector go; the decoder's are its own."""
        ...

    def plan_image(self, width: int, height: int, *, num_images: int) -> ImageLayout:
        """Size after EXIF orientation; `num_images` of the prompt decides the view mode in some families. Within
        `max_image_tokens`, which the family was built with. Raises BadRequest for sizes it cannot take."""
        ...

    def preprocess(self, rgb: np.ndarray[Any, np.dtype[np.uint8]], layout: ImageLayout) -> torch.Tensor:
        """(height, width, 3) uint8 to what `encode` takes, (..., bytes of a patch) uint8: resized, padded, tiled and
        patchified as the HF PIL-backed processor does. Normalising happens in `encode`, on the device."""
        ...

    def expand(self, token_ids: Sequence[int], layouts: Sequence[ImageLayout]) -> Expansion:
        """`token_ids` holds one image token per image, in order."""
        ...

    def encode(self, images: Sequence[tuple[torch.Tensor, ImageLayout]], attention: EncoderAttention) -> Encoding:
        """Pixels, on the model's device, and layout of each image. All go through the tower together, but for what is
        too much at once on a CPU; each one's features are what they would be alone."""
        ...
