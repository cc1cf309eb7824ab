"""The mllama model (Llama-3.2-Vision): its files as published, and a lean forward over transformers' own modules.

One tile, all of it always computed: an image is fitted into TILE x TILE pixels and shows 401 tokens (the class token
first) to the rows of its span. Rows before the first image get nothing from a cross layer, as in Meta's reference.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from published import mllama_preprocessor
from tokenizers import Tokenizer
from torch import Tensor
from transformers import MllamaConfig, MllamaForConditionalGeneration

from .labels import IGNORED
from .model import (
    NEIGHBOURS,
    attend,
    attention_mask,
    half,
    hidden_where,
    initialize,
    pixel_scale,
    self_layer,
    write_checkpoint,
)
from .pictures import Picture, resized
from .qwen2_vl import CONTEXT_LEN
from .samples import CARRIED_NAME_LAYER, CARRIED_NEXT_LAYER, COMPARED_LAYER, KEPT, MATCHED, Batch, Writer
from .tokenizer import LLAMA_SYSTEM, save_llama_tokenizer
from .views import PATCH, ImageGroup, image_group, make_group

TILE = 160
CROSS_LAYERS = (1, 3, 4)  # the guided ones: words, names, what is said next
CARRIED_LAYERS = {2: CARRIED_NAME_LAYER, 5: CARRIED_NEXT_LAYER}  # self-attention, guided where an image is seen no more
COMPARING_LAYER = 2
NUM_LAYERS = 6
HIDDEN, VISION_HIDDEN = 192, 96
ROPE_THETA = 10_000.0
# How firmly fresh heads of the tower look at a neighbour, and by which waves over rows and columns of patches.
LOOKING, LOOKING_FREQUENCIES, WAVE = 3.5, (1.0, 0.5, 0.2), 4.0


def config_dict(tokenizer: Tokenizer) -> dict:
    """config.json, as the published checkpoints have it."""
    token_id = tokenizer.token_to_id
    stops = [token_id(token) for token in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "image_token_index": token_id("<|image|>"),
        "model_type": "mllama",
        "torch_dtype": "bfloat16",
        "text_config": {
            "bos_token_id": token_id("<|begin_of_text|>"),
            "cross_attention_layers": list(CROSS_LAYERS),
            "eos_token_id": stops,
            "hidden_act": "silu",
            "hidden_size": HIDDEN,
            "intermediate_size": 288,
            "max_position_embeddings": CONTEXT_LEN,
            "model_type": "mllama_text_model",
            "num_attention_heads": HIDDEN // 64,
            "num_hidden_layers": NUM_LAYERS,
            "num_key_value_heads": HIDDEN // 64,
            "pad_token_id": token_id("<|finetune_right_pad_id|>"),
            "rms_norm_eps": 1e-05,
            "rope_scaling": {"rope_type": "default"},
            "rope_theta": ROPE_THETA,
            "tie_word_embeddings": False,
            "vocab_size": token_id("<|image|>"),
        },
        "vision_config": {
            "attention_heads": 3,
            "hidden_act": "gelu",
            "hidden_size": VISION_HIDDEN,
            "image_size": TILE,
            "intermediate_layers_indices": [2],
            "intermediate_size": 4 * VISION_HIDDEN,
            "max_num_tiles": 1,
            "model_type": "mllama_vision_model",
            "norm_eps": 1e-05,
            "num_channels": 3,
            "num_global_layers": 1,
            "num_hidden_layers": 4,
            "patch_size": PATCH,
            "supported_aspect_ratios": [[1, 1]],
            "vision_output_dim": 2 * VISION_HIDDEN,
        },
    }


class LlamaWriter(Writer):
    """Writes messages in the llama_3_vision chat template; an image is one token."""

    START, HEADER = "<|begin_of_text|>", "<|start_header_id|>{}<|end_header_id|>\n\n"
    END, AFTER_END = "<|eot_id|>", ""
    IMAGE = ("", "<|image|>", "")
    NEWLINE_SHARE = 0.5  # the built-in template has it, the published one has not
    LEAD_SHARE = 1.0  # images side by side share a span of rows, in which nothing tells their order
    CARRIES = True
    SYSTEM = LLAMA_SYSTEM
    NO_SYSTEM_SHARE = 0.45  # the published template adds none, the built-in one SYSTEM

    def fits(self, width: int, height: int) -> tuple[int, int]:
        """The size of an image within its tile."""
        scale = TILE / max(width, height)
        return max(1, int(width * scale)), max(1, int(height * scale))

    def num_slots(self, width: int, height: int) -> tuple[int, int]:
        return 1, 1

    def group(self, pictures: list[Picture]) -> ImageGroup:
        """Pictures on their tiles, black where nothing is; a patch names what its 2x2 block of patches shows."""
        tiled = []
        for picture in pictures:
            small = resized(picture, *self.fits(*picture.image.size))
            tile = Image.new("RGB", (TILE, TILE))
            tile.paste(small.image)
            tiled.append(Picture(small.facts, tile, small.marks))
        group = image_group(tiled)
        side = TILE // PATCH
        # the patches of views.image_group come in merged 2x2 blocks; here they go row by row
        patches = group.patches.numpy().reshape(len(tiled), side // 2, side // 2, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)

        def spread(table: np.ndarray, nothing: int) -> np.ndarray:
            blocks = table.reshape(len(tiled), side // 2, side // 2, -1).repeat(2, 1).repeat(2, 2)
            flat = blocks.reshape(len(tiled), side * side, -1)
            return np.concatenate([np.full_like(flat[:, :1], nothing), flat], 1)  # the class token first

        flat = patches.reshape(len(tiled), side * side, -1)
        return make_group((side, side), flat, spread(group.labels.numpy(), IGNORED), spread(group.shown.numpy(), -1))


def _seen_until(stands_at: Tensor, image_lens: list[int]) -> Tensor:
    """(rows, image tokens): the column of the next image that does not stand side by side with this one."""
    slots = [stands_at[:, end - 1] for end in np.cumsum(image_lens)]
    ends = [torch.full_like(slots[0], 1 << 30)]
    for slot, after in reversed(list(pairwise(slots))):
        ends.append(torch.where(after == slot + 1, ends[-1], after))
    return torch.cat([end[:, None].expand(-1, num) for end, num in zip(reversed(ends), image_lens, strict=True)], 1)


def _of_one_tile(table: torch.nn.Module) -> Tensor:
    """What is added to the patches of an image of one tile."""
    return table.gate.tanh() * table.embedding.weight[1]


def _vision_layer(layer: torch.nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """One layer of the tower for (images, patches, hidden)."""
    attn = layer.self_attn
    normed = layer.input_layernorm(x)
    query, key, value = (
        proj(normed).view(*x.shape[:2], -1, attn.head_dim).transpose(1, 2)
        for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    mixed, _ = attend(query, key, value, mask)
    mixed = attn.o_proj(mixed.transpose(1, 2).reshape(x.shape))
    x = x + (layer.gate_attn.tanh() * mixed if layer.is_gated else mixed)
    mixed = layer.mlp(layer.post_attention_layernorm(x))
    return x + (layer.gate_ffn.tanh() * mixed if layer.is_gated else mixed)


def _look_at_neighbours(vision: torch.nn.Module) -> None:
    """Places as waves in the first dimensions, to which nothing else writes at first, and heads that read them: each
    looks at one neighbour (see `NEIGHBOURS`). A key is turned so that it fits best where its patch is that far away."""
    side, frequencies = TILE // PATCH, torch.tensor(LOOKING_FREQUENCIES)
    angles = (
        torch.cartesian_prod(torch.arange(side), torch.arange(side))[..., None] * frequencies
    )  # (patches, 2, waves)
    waves = WAVE * torch.stack([angles.cos(), angles.sin()], -1).flatten(1)
    num_dims = waves.shape[1]
    places, before, after = (
        vision.gated_positional_embedding,
        vision.pre_tile_positional_embedding,
        vision.post_tile_positional_embedding,
    )
    with torch.no_grad():
        for table in (places.tile_embedding, before.embedding, after.embedding):  # there is one tile
            torch.nn.init.normal_(table.weight, 0, 0.02)
        torch.nn.init.zeros_(places.gate)
        torch.nn.init.normal_(places.embedding, 0, 0.2)
        places.embedding[:, :num_dims] = 0
        places.embedding[1:, :num_dims] = waves  # the class token is nowhere
        patch_weight = vision.patch_embedding.weight
        torch.nn.init.normal_(patch_weight, 0, patch_weight[0].numel() ** -0.5)
        patch_weight[:num_dims] = 0
        neighbours = iter(NEIGHBOURS)
        for layer in vision.transformer.layers:
            attn = layer.self_attn
            for writes in (attn.o_proj, layer.mlp.fc2):
                writes.weight[:num_dims] *= 0.1
            queries, keys = (proj.weight.unflatten(0, (attn.num_heads, -1)) for proj in (attn.q_proj, attn.k_proj))
            for query, key, away in zip(queries, keys, neighbours, strict=False):
                for weight in (query, key):
                    weight[:num_dims] = 0
                    weight[:, :num_dims] = 0
                    weight *= 0.5
                query[:num_dims, :num_dims] = LOOKING * torch.eye(num_dims)
                turns = (torch.tensor(away)[:, None] * frequencies).flatten()
                key[:num_dims, :num_dims] = LOOKING * torch.block_diag(*map(_turn, turns))


def _turn(angle: Tensor) -> Tensor:
    """The matrix that turns (cos a, sin a) back by this angle."""
    return torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()]).view(2, 2)


class Mllama:
    """A model with fresh weights, in float32, its gates open. `tower` sees (the projector belongs to it)."""

    def __init__(self, tokenizer: Tokenizer, seed: int = 0) -> None:
        self.tokenizer = tokenizer
        config = config_dict(tokenizer)
        torch.manual_seed(seed)
        self.model = MllamaForConditionalGeneration(
            MllamaConfig(
                vision_config=config["vision_config"],
                text_config=config["text_config"],
                image_token_index=config["image_token_index"],
            )
        ).float()
        inner = self.model.model
        self.tower = torch.nn.ModuleList([inner.vision_model, inner.multi_modal_projector])
        for part in (self.tower, inner.language_model):
            initialize(part)
        torch.nn.init.normal_(inner.language_model.embed_tokens.weight, 0, 0.03)
        torch.nn.init.normal_(self.model.lm_head.weight, 0, HIDDEN**-0.5)
        for name, weight in self.model.named_parameters():
            if "gate" in name and weight.numel() == 1:
                torch.nn.init.ones_(weight)  # the published models start closed; this one has no text to protect
        _look_at_neighbours(inner.vision_model)

    @property
    def feature_size(self) -> int:
        return HIDDEN

    def writer(self) -> LlamaWriter:
        return LlamaWriter(self.tokenizer)

    def encode(self, group: ImageGroup) -> Tensor:
        """Images -> (images, 401, hidden)."""
        vision, projector = self.tower
        images = len(group.patches)
        mean, std = pixel_scale(group.patches.device)
        pixels = (group.patches.float() - mean) / std
        x = F.linear(pixels, vision.patch_embedding.weight.flatten(1)).float()
        x = x + _of_one_tile(vision.pre_tile_positional_embedding)
        x = torch.cat([vision.class_embedding.expand(images, 1, -1), x], 1)
        places = vision.gated_positional_embedding
        gate = places.gate.tanh()
        tile = places.tile_embedding.weight[1].view_as(places.embedding)
        x = vision.layernorm_pre(x + (1 - gate) * places.embedding + gate * tile)
        num_tokens = x.shape[1]
        x = F.pad(x, (0, 0, 0, -num_tokens % 8))  # rows that transformers adds, and lets the others attend to
        is_added = torch.arange(x.shape[1], device=x.device) >= num_tokens
        mask = half(hidden_where(is_added[:, None] & is_added))
        kept = []
        for layer in vision.transformer.layers:
            x = _vision_layer(layer, x, mask)
            kept.append(x)
        x = vision.layernorm_post(x) + _of_one_tile(vision.post_tile_positional_embedding)
        for layer in vision.global_transformer.layers:
            x = _vision_layer(layer, x, mask)
        seen = torch.cat([x, *(kept[idx] for idx in vision.intermediate_layers_indices)], -1)
        return projector(seen[:, :num_tokens])

    def hidden_states(self, batch: Batch, views: list[Tensor], looks: dict[int, Tensor] | None = None) -> Tensor:
        """As of `Qwen2VL`; the keys of `looks` count the cross layers."""
        text = self.model.model.language_model
        x = text.embed_tokens(batch.ids)
        rows, length, _ = x.shape
        cos, sin = (half(table).unsqueeze(1) for table in text.rotary_emb(x, batch.positions[0]))
        mask = attention_mask(batch.branches)
        if views:
            features = torch.cat(views, 1)
            until = _seen_until(batch.stands_at, [view.shape[1] for view in views])
            columns = torch.arange(length, device=x.device)[:, None]
            seen = (batch.stands_at[:, None] <= columns) & (columns < until[:, None])
            any_seen = seen.any(-1, keepdim=True)
            # a row that sees nothing attends to everything, and is then multiplied by zero
            cross_mask = half(hidden_where(~seen & any_seen)).unsqueeze(1)

        for layer_idx, layer in enumerate(text.layers):
            if layer_idx not in CROSS_LAYERS:
                x, look = self_layer(layer, x, cos, sin, mask)
                if looks is not None and layer_idx in CARRIED_LAYERS:
                    looks[CARRIED_LAYERS[layer_idx]] = look[:, 0]
                if looks is not None and layer_idx == COMPARING_LAYER:
                    looks[COMPARED_LAYER], looks[MATCHED] = look[:, 1], x
            elif views:
                attn = layer.cross_attn
                query = attn.q_proj(layer.input_layernorm(x)).view(rows, length, -1, attn.head_dim).transpose(1, 2)
                key, value = (
                    proj(features).view(rows, features.shape[1], -1, attn.head_dim).transpose(1, 2)
                    for proj in (attn.k_proj, attn.v_proj)
                )
                mixed, look = attend(attn.q_norm(query), attn.k_norm(key).to(query.dtype), value, cross_mask)
                mixed = attn.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))
                x = x + layer.cross_attn_attn_gate.tanh() * mixed * any_seen
                x = x + layer.cross_attn_mlp_gate.tanh() * layer.mlp(layer.post_attention_layernorm(x)) * any_seen
                if looks is not None:
                    looks[CROSS_LAYERS.index(layer_idx)] = look[:, 0]
                if looks is not None and layer_idx == CROSS_LAYERS[0]:
                    looks[KEPT] = x
        return text.norm(x)

    def export(self, folder: Path) -> None:
        """Writes the checkpoint folder: bf16 weights under the published names, and every file of that family."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {}
        for name, tensor in self.model.state_dict().items():
            name = name.replace("model.language_model.", "language_model.model.")
            name = name.replace("lm_head.", "language_model.lm_head.").removeprefix("model.")
            weights[name] = tensor
        save_llama_tokenizer(self.tokenizer, folder)
        config = config_dict(self.tokenizer)
        text = config["text_config"]
        files = {
            "config.json": config,
            "generation_config.json": {
                "bos_token_id": text["bos_token_id"],
                "eos_token_id": text["eos_token_id"],
                "pad_token_id": text["pad_token_id"],
                "do_sample": False,
            },
            "preprocessor_config.json": mllama_preprocessor(TILE, max_tiles=1),
        }
        write_checkpoint(folder, weights, files)
