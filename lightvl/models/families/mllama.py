"""Llama-3.2-Vision: text rows attend to an image's real tiles; in the prompt an image is one token.

Built by `families.build_family`. Knows nothing about requests. Which rows see which image is decided in `expand`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightvl.attention.base import EncoderAttention
from lightvl.core import OPEN_END
from lightvl.images.transforms import Pixels, best_grid, fit_size, patchify, resize, split_tiles
from lightvl.models.config import decoder_config
from lightvl.models.family import Encoding, Expansion, ImageLayout
from lightvl.models.linear import Linear
from lightvl.models.load import WeightPart, module_targets
from lightvl.models.vision.config import mllama_vision_config
from lightvl.models.vision.mllama import MllamaTower
from lightvl.models.vision.vit import pauses_after, row_chunks


class MllamaFamily:
    name = "Llama-3.2-Vision"
    chat_template: str | None = "llama_3_vision"
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
        """`max_image_tokens` bounds the rows that an image is attended to by: only grids with few enough tiles are
        used; one tile is always allowed."""
        vision = mllama_vision_config(hf_config, checkpoint)
        self._vision = vision
        self.cross_page_len = vision.tile_len
        max_tiles = vision.max_tiles
        if max_image_tokens is not None:
            max_tiles = max(1, max_image_tokens // vision.tile_len)
        self._grids = [(high, wide) for high, wide in vision.grids if high * wide <= max_tiles]
        self._tower = MllamaTower(vision, dtype=dtype, device=device)
        self._projector = Linear(
            vision.feature_size, {"projector": vision.out_size}, bias=True, dtype=dtype, device=device
        )
        self.image_token_id = vision.image_token_id
        self.decoder_config = decoder_config(hf_config)

    def weight_parts(self) -> list[WeightPart]:
        projector = self._projector.weight_targets()
        return [
            WeightPart("vision tower", (r"(?:model\.)?vision_model\.(.+)",), module_targets(self._tower)),
            WeightPart(
                "projector",
                (r"(?:model\.)?multi_modal_projector\.(.+)",),
                {name.removeprefix("projector."): target for name, target in projector.items()},
            ),
        ]

    def plan_image(self, width: int, height: int, *, num_images: int) -> ImageLayout:
        tile = self._vision.tile
        grid = best_grid(width, height, self._grids, tile)
        new_width, new_height = fit_size(width, height, grid, tile)
        return ImageLayout(
            num_tokens=1,
            num_cross_pages=grid[0] * grid[1],
            width=new_width,
            height=new_height,
            grid=(self._vision.grids.index(grid) + 1, *grid),
            settings=repr((self.name, self._vision.pixels, new_width, new_height, grid)).encode(),
        )

    def preprocess(self, rgb: Pixels, layout: ImageLayout) -> torch.Tensor:
        """(real tiles, patches of a tile, patch * patch * 3) uint8."""
        tile, patch = self._vision.tile, self._vision.patch
        resized = resize(rgb, layout.width, layout.height, self._vision.pixels.resample)
        _, high, wide = layout.grid
        tiles = split_tiles(resized, (high, wide), tile)
        stacked = patchify(tiles.reshape(-1, tile, 3), patch)
        return torch.from_numpy(stacked.reshape(len(tiles), -1, patch * patch * 3))

    def expand(self, token_ids: Sequence[int], layouts: Sequence[ImageLayout]) -> Expansion:
        """Nothing grows. An image is seen from its own row until the next image's row, or for good; images that follow
        each other directly share one end. Their own rows see those before them only."""
        ids = np.asarray(token_ids, np.int64)
        rows = np.flatnonzero(ids == self.image_token_id).tolist()
        assert len(rows) == len(layouts), "one image token per image"
        image_rows: list[tuple[int, int]] = []
        end = next_row = OPEN_END
        for row in reversed(rows):
            if row + 1 != next_row:
                end = next_row
            image_rows.append((row, end))
            next_row = row
        return Expansion(ids, image_rows[::-1])

    def encode(self, images: Sequence[tuple[torch.Tensor, ImageLayout]], attention: EncoderAttention) -> Encoding:
        for features in self._tower.encode([(pixels, layout.grid[0]) for pixels, layout in images], attention):
            if features is None:
                yield None
                continue
            projected = features.new_empty(len(features), self._vision.out_size)
            for rows in row_chunks(features):
                projected[rows] = self._projector(features[rows])
                if pauses_after(rows):
                    yield None
            num_rows = [layout.num_cross_pages * self.cross_page_len for _, layout in images]
            yield dict(enumerate(torch.split(projected, num_rows)))
