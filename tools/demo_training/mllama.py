"""The mllama model (Llama-3.2-Vision): its files as published, and a lean forward over transformers' own modules.

One tile, all of it always computed: an image is fitted into TILE x TILE pixels and shows 401 tokens (the class token
first) to the rows of its span. Rows before the first image get nothing from a cross layer, as in Meta's reference.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from published import mllama_preprocessor
from tokenizers import Tokenizer
from torch import Tensor
from transformers import MllamaConfig, MllamaForConditionalGeneration

from .labels import IGNORED
from .model import attend, attention_mask, half, hidden_where, initialize, pixel_scale, rotate, write_checkpoint
from .pictures import Picture, resized
from .qwen2_vl import CONTEXT_LEN
from .samples import CARRIED_NAME_LAYER, CARRIED_NEXT_LAYER, COMPARED_LAYER, Batch, Writer
from .tokenizer import LLAMA_SYSTEM, save_llama_tokenizer
from .views import PATCH, ImageGroup, image_group, make_group

TILE = 160
CROSS_LAYERS = (1, 3, 4)  # the guided ones: words, names, what is said next
CARRIED_LAYERS = {2: CARRIED_NAME_LAYER, 5: CARRIED_NEXT_LAYER}  # self-attention, guided where an image is seen no more
COMPARING_LAYER = 2
NUM_LAYERS = 6
HIDDEN, VISION_HIDDEN = 192, 96
ROPE_THETA = 10_000.0


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
        side = TILE // PATCH
        pixels = pixels.view(images, side, side, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
        pixels = pixels.reshape(images, 1, 1, 3, TILE, TILE)
        ones = torch.ones(images, 1, dtype=torch.long, device=pixels.device)
        seen = vision(pixels, aspect_ratio_ids=ones, aspect_ratio_mask=ones[..., None]).last_hidden_state
        return projector(seen.flatten(1, 3))

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
            attn = layer.cross_attn if layer_idx in CROSS_LAYERS else layer.self_attn
            normed = layer.input_layernorm(x)
            query = attn.q_proj(normed).view(rows, length, -1, attn.head_dim).transpose(1, 2)
            if layer_idx in CROSS_LAYERS:
                if not views:
                    continue
                key, value = (
                    proj(features).view(rows, features.shape[1], -1, attn.head_dim).transpose(1, 2)
                    for proj in (attn.k_proj, attn.v_proj)
                )
                mixed, look = attend(attn.q_norm(query), attn.k_norm(key).to(query.dtype), value, cross_mask)
                if looks is not None:
                    looks[CROSS_LAYERS.index(layer_idx)] = look[:, 0]
                mixed = attn.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))
                x = x + layer.cross_attn_attn_gate.tanh() * mixed * any_seen
                x = x + layer.cross_attn_mlp_gate.tanh() * layer.mlp(layer.post_attention_layernorm(x)) * any_seen
                continue
            key, value = (
                proj(normed).view(rows, length, -1, attn.head_dim).transpose(1, 2)
                for proj in (attn.k_proj, attn.v_proj)
            )
            mixed, look = attend(rotate(query, cos, sin), rotate(key, cos, sin), value, mask)
            if looks is not None and layer_idx in CARRIED_LAYERS:
                looks[CARRIED_LAYERS[layer_idx]] = look[:, 0]
            if looks is not None and layer_idx == COMPARING_LAYER:
                looks[COMPARED_LAYER] = look[:, 1]
            x = x + attn.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
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
