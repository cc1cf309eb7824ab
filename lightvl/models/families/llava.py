"""LLaVA 1.5, NeXT and OneVision, in HF's format and in the original one: an image is one square view, or a view of the
whole and a grid of tiles, whose features replace rows of the prompt.

Built by `families.build_family`. Knows nothing about requests; what the models and formats differ in is data in
`LlavaConfig`. Which tiles, and what of them is shown, is in llava_anyres.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightvl.attention.base import EncoderAttention
from lightvl.errors import BadRequest
from lightvl.images.transforms import MAX_ASPECT_RATIO, Pixels, patchify, resize
from lightvl.models.config import decoder_config
from lightvl.models.families import llava_anyres as anyres
from lightvl.models.family import Encoding, Expansion, ImageLayout
from lightvl.models.load import WeightPart, module_targets
from lightvl.models.vision.clip_siglip import ViewTower
from lightvl.models.vision.llava_config import llava_config, template_name
from lightvl.models.vision.projector import Newline, Projector


class LlavaFamily:
    image_token_id: int | None
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
        """`max_image_tokens`: grids that would take more are not used; one view is always allowed."""
        config = llava_config(hf_config, checkpoint)
        self._config, self._max_tokens = config, max_image_tokens
        self.name = "LLaVA-OneVision" if config.one_view_each else "LLaVA-NeXT" if config.grids else "LLaVA"
        self.image_token_id = config.image_token_id
        self.decoder_config = decoder_config(hf_config)
        self.chat_template: str | None = template_name(hf_config, checkpoint)
        self._tower = ViewTower(config.tower, dtype=dtype, device=device)
        self._projector = Projector(config, dtype=dtype, device=device)
        self._newline = Newline(config, dtype=dtype, device=device)
        self._view_len = config.tower.view_len - config.first_row

    def weight_parts(self) -> list[WeightPart]:
        config, prefix = self._config, r"(?:model\.)?vision_tower\.(?:vision_tower\.)?"
        if config.tower_folder is not None:
            prefix = ""
        behind = "|".join(str(i) for i in range(max(config.tower.kept_states), config.tower.num_layers))
        unused = rf"encoder\.layers\.(?:{behind or '(?!)'})\..+|post_layernorm\..+|head\..+"
        text_side = r"|text_model\..+|visual_projection\..+|text_projection\..+|logit_scale|logit_bias"
        return [
            WeightPart(
                "vision tower",
                (rf"{prefix}(?:vision_model\.)?(.+)",),
                module_targets(self._tower),
                excused=unused + (text_side if config.tower_folder is not None else ""),
                folder=config.tower_folder,
            ),
            WeightPart(
                "projector",
                (r"(?:model\.)?(?:multi_modal_projector|mm_projector)\.(.+)",),
                self._projector.weight_targets(),
            ),
            WeightPart(
                "newline",
                (r"(?:model\.)?(image_newline)",),
                module_targets(self._newline),
                excused="image_newline",
            ),
        ]

    def plan_image(self, width: int, height: int, *, num_images: int) -> ImageLayout:
        config, side = self._config, self._config.tower.side
        if config.grids and not (config.one_view_each and num_images > 1):
            layout = self._plan_grid(width, height)
            if layout is not None:
                return layout
        new_width = new_height = side
        if config.fit == "crop":
            if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                raise BadRequest(f"an image of {width}x{height} pixels is too narrow", param="messages")
            short, long = config.edge, int(config.edge * max(width, height) / min(width, height))
            new_width, new_height = (short, long) if width <= height else (long, short)
        num_tokens = self._view_len + (self._newline.image_newline is not None)
        return ImageLayout(num_tokens, 0, new_width, new_height, settings=self._settings())

    def _plan_grid(self, width: int, height: int) -> ImageLayout | None:
        """The best grid within the budget; None when there is none."""
        config, side, patches = self._config, self._config.tower.side, self._config.tower.patches
        layouts = {}
        for grid in config.grids:
            shown = anyres.shown_part(width, height, grid, patches, config.max_tiles)
            num_tokens = self._view_len * (1 + grid[0] * grid[1])
            if config.merge == "spatial_unpad":
                num_tokens = self._view_len + shown.size[0] * (shown.size[1] + 1)
            if self._max_tokens is None or num_tokens <= self._max_tokens:
                layouts[grid] = (num_tokens, shown)
        if not layouts:
            return None
        grid_or_none = anyres.best_grid(width, height, list(layouts), side)
        if grid_or_none is None:
            raise BadRequest(f"an image of {width}x{height} pixels is too narrow", param="messages")
        num_tokens, shown = layouts[grid_or_none]
        new_width, new_height = anyres.fit_in_grid(width, height, grid_or_none, side)
        return ImageLayout(
            num_tokens, 0, new_width, new_height, (*grid_or_none, *shown.skip, *shown.size), self._settings()
        )

    def _settings(self) -> bytes:
        config = self._config
        return repr((self.name, config.tower.pixels, config.fit, config.background, config.merge)).encode()

    def preprocess(self, rgb: Pixels, layout: ImageLayout) -> torch.Tensor:
        """(views, patches of a view, patch * patch * 3) uint8, the view of the whole first."""
        tower, resample = self._config.tower, self._config.tower.pixels.resample
        side = tower.side
        if layout.grid:
            whole = resize(rgb, side, side, resample)[None]
            resized = resize(rgb, layout.width, layout.height, resample)
            views = np.concatenate((whole, anyres.cut_tiles(resized, layout.grid[0], layout.grid[1], side)))
        elif self._config.fit == "pad":
            views = anyres.padded_view(rgb, side, self._config.background, resample)[None]
        else:
            resized = resize(rgb, layout.width, layout.height, resample)
            top, left = (layout.height - side) // 2, (layout.width - side) // 2
            views = resized[None, top : top + side, left : left + side]
        edge = tower.patches * tower.patch
        cut = [patchify(np.ascontiguousarray(view[:edge, :edge]), tower.patch) for view in views]
        return torch.from_numpy(np.stack(cut))

    def expand(self, token_ids: Sequence[int], layouts: Sequence[ImageLayout]) -> Expansion:
        ids = np.asarray(token_ids, np.int64)
        image_indices = np.flatnonzero(ids == self.image_token_id)
        assert len(image_indices) == len(layouts), "one image token per image"
        lens = np.ones(len(ids), np.int64)
        lens[image_indices] = [layout.num_tokens for layout in layouts]
        ends = np.cumsum(lens)[image_indices]
        rows = [(int(end) - layout.num_tokens, int(end)) for end, layout in zip(ends, layouts, strict=True)]
        return Expansion(np.repeat(ids, lens), rows)

    def encode(self, images: Sequence[tuple[torch.Tensor, ImageLayout]], attention: EncoderAttention) -> Encoding:
        """The views of all images go through the tower one behind the other; an image is done with its last view."""
        waiting = deque((image_idx, len(pixels), layout) for image_idx, (pixels, layout) in enumerate(images))
        views: list[torch.Tensor] = []  # (view_len, hidden) each, of the images that wait
        for features in self._tower.encode(torch.cat([pixels for pixels, _ in images]), attention):
            if features is None:
                yield None
                continue
            views.extend(self._projector(features[:, self._config.first_row :]))
            done = {}
            while waiting and waiting[0][1] <= len(views):
                image_idx, num_views, layout = waiting.popleft()
                done[image_idx] = self._merge(torch.stack(views[:num_views]), layout)
                assert len(done[image_idx]) == layout.num_tokens
                del views[:num_views]
            yield done

    def _merge(self, views: torch.Tensor, layout: ImageLayout) -> torch.Tensor:
        """(views, view_len, hidden) to (num_tokens, hidden)."""
        newline = self._newline.image_newline
        if not layout.grid or self._config.merge == "flat":
            rows = views.flatten(0, 1)
            return rows if newline is None else torch.cat((rows, newline[None]))
        tiles_high, tiles_wide, skip_high, skip_wide, high, wide = layout.grid
        picture = anyres.join_tiles(views[1:], (tiles_high, tiles_wide), self._config.tower.patches)
        if newline is not None:
            picture = anyres.show(picture, anyres.Shown((skip_high, skip_wide), (high, wide)))
            picture = torch.cat((picture, newline.expand(high, 1, -1)), 1)
        return torch.cat((views[0], picture.flatten(0, 1)))
