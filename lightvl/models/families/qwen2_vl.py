"""Qwen2-VL and Qwen2.5-VL: an image replaces as many rows as its size asks for, and M-RoPE gives these rows a place in
time, height and width.

Built by `families.build_family`. Knows nothing about requests; what the two differ in is data in `QwenVisionConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightvl.attention.base import EncoderAttention
from lightvl.images.transforms import Pixels, patchify, resize, smart_size
from lightvl.models.config import decoder_config
from lightvl.models.family import Encoding, Expansion, ImageLayout
from lightvl.models.load import WeightPart, module_targets
from lightvl.models.vision.config import qwen_vision_config
from lightvl.models.vision.qwen_vl import QwenTower


class Qwen2VLFamily:
    chat_template: str | None = "qwen2-vl"
    cross_page_len = 0
    image_token_id: int | None

    def __init__(
        self,
        hf_config: dict[str, Any],
        checkpoint: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_image_tokens: int | None,
    ) -> None:
        """`max_image_tokens` lowers the checkpoint's own `max_pixels`; at least one token a side always remains."""
        vision = qwen_vision_config(hf_config, checkpoint)
        self._factor = vision.patch * vision.merge  # a token's side in pixels
        if max_image_tokens is not None:
            vision = replace(vision, max_pixels=min(vision.max_pixels, max_image_tokens * self._factor**2))
        self._vision = vision
        self._tower = QwenTower(vision, dtype=dtype, device=device)
        self.name = "Qwen2.5-VL" if vision.window else "Qwen2-VL"
        self.image_token_id = vision.image_token_id
        self.decoder_config = decoder_config(hf_config)

    def weight_parts(self) -> list[WeightPart]:
        return [WeightPart("vision tower", (r"(?:model\.)?visual\.(.+)",), module_targets(self._tower))]

    def plan_image(self, width: int, height: int, *, num_images: int) -> ImageLayout:
        vision = self._vision
        new_width, new_height = smart_size(
            width, height, factor=self._factor, min_pixels=vision.min_pixels, max_pixels=vision.max_pixels
        )
        return ImageLayout(
            num_tokens=new_width * new_height // self._factor**2,
            num_cross_pages=0,
            width=new_width,
            height=new_height,
            grid=(1, new_height // vision.patch, new_width // vision.patch),
            settings=repr((self.name, vision.pixels, new_width, new_height)).encode(),
        )

    def preprocess(self, rgb: Pixels, layout: ImageLayout) -> torch.Tensor:
        """(patches, patch * patch * 3) uint8."""
        resized = resize(rgb, layout.width, layout.height, self._vision.pixels.resample)
        return torch.from_numpy(patchify(resized, self._vision.patch, self._vision.merge))

    def expand(self, token_ids: Sequence[int], layouts: Sequence[ImageLayout]) -> Expansion:
        """Text counts on in all three axes. An image's rows stay at one time and count rows and columns from there; the
        text after it goes on behind the longer side."""
        ids = np.asarray(token_ids, np.int64)
        image_indices = np.flatnonzero(ids == self.image_token_id)
        assert len(image_indices) == len(layouts), "one image token per image"
        if not layouts:
            return Expansion(ids, [])
        pieces: list[tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]] = []
        image_rows = []
        begin = next_row = next_position = 0
        for index, layout in zip(image_indices.tolist(), layouts, strict=True):
            num_text = index - begin
            pieces.append((ids[begin:index], _text_positions(next_position, num_text)))
            next_row, next_position = next_row + num_text, next_position + num_text
            high, wide = layout.grid[1] // self._vision.merge, layout.grid[2] // self._vision.merge
            assert high * wide == layout.num_tokens
            image = np.full(layout.num_tokens, self.image_token_id, np.int64)
            pieces.append((image, next_position + np.indices((1, high, wide)).reshape(3, -1)))
            image_rows.append((next_row, next_row + layout.num_tokens))
            next_row, next_position = next_row + layout.num_tokens, next_position + max(high, wide)
            begin = index + 1
        num_text = len(ids) - begin
        pieces.append((ids[begin:], _text_positions(next_position, num_text)))
        return Expansion(
            token_ids=np.concatenate([piece for piece, _ in pieces]),
            image_rows=image_rows,
            positions=np.concatenate([positions for _, positions in pieces], axis=1),
            rope_delta=next_position - next_row,
        )

    def encode(self, images: Sequence[tuple[torch.Tensor, ImageLayout]], attention: EncoderAttention) -> Encoding:
        patches = torch.cat([pixels for pixels, _ in images])
        grids = [(layout.grid[1], layout.grid[2]) for _, layout in images]
        for features in self._tower.encode(patches, grids, attention):
            if features is None:
                yield None
            else:
                yield dict(enumerate(torch.split(features, [layout.num_tokens for _, layout in images])))


def _text_positions(begin: int, num: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.broadcast_to(np.arange(begin, begin + num), (3, num))
