"""Text-only models: Llama, Mistral, Qwen2. No image token, so nothing to lay out or encode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightvl.attention.base import EncoderAttention
from lightvl.errors import BadRequest
from lightvl.models.config import decoder_config
from lightvl.models.family import Encoding, Expansion, ImageLayout
from lightvl.models.load import WeightMap


class TextFamily:
    """`family.Family` of a model without images. Its own chat template is the only right one, so it names none."""

    name = "text"
    chat_template: str | None = None
    image_token_id: int | None = None
    cross_page_len = 0

    def __init__(
        self,
        hf_config: dict[str, Any],
        checkpoint: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_image_tokens: int | None,
    ) -> None:
        self.decoder_config = decoder_config(hf_config)

    def weight_parts(self) -> WeightMap:
        return []

    def plan_image(self, width: int, height: int, *, num_images: int) -> ImageLayout:
        raise BadRequest("this model takes no images", param="messages")

    def preprocess(self, rgb: np.ndarray[Any, np.dtype[np.uint8]], layout: ImageLayout) -> torch.Tensor:
        raise AssertionError("plan_image refuses every image")

    def expand(self, token_ids: Sequence[int], layouts: Sequence[ImageLayout]) -> Expansion:
        assert not layouts
        return Expansion(np.asarray(token_ids, dtype=np.int64), [])

    def encode(self, images: Sequence[tuple[torch.Tensor, ImageLayout]], attention: EncoderAttention) -> Encoding:
        raise AssertionError("plan_image refuses every image")
