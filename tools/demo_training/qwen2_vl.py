"""The Qwen2-VL model: its files as published, and a lean forward over transformers' own modules."""

from pathlib import Path

import torch
import torch.nn.functional as F
from published import qwen2_vl_preprocessor
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from .model import (
    NEIGHBOURS,
    attend,
    attention_mask,
    half,
    initialize,
    pixel_scale,
    rotate,
    self_layer,
    write_checkpoint,
)
from .pictures import MAX_PIXELS, MIN_PIXELS
from .samples import COMPARED_LAYER, MATCHED, Batch, Writer
from .tokenizer import save_tokenizer
from .views import MERGE, PATCH, ImageGroup

CONTEXT_LEN = 32768
COMPARING_LAYER = 1
# M-RoPE gives an image's columns the lowest frequencies: at the usual 1e6 the text model cannot tell left from right.
ROPE_THETA = 100.0
LOOKING, LOOKING_PAIRS = (
    4.5,
    3,
)  # how firmly fresh heads look at a neighbour, and by how many rotary frequencies an axis


def config_dict(tokenizer: Tokenizer) -> dict:
    """config.json, in the flat form of the published checkpoints."""
    token_id = {
        name: tokenizer.token_to_id(f"<|{name}|>")
        for name in ("endoftext", "im_end", "image_pad", "video_pad", "vision_start", "vision_end")
    }
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": token_id["endoftext"],
        "eos_token_id": token_id["im_end"],
        "pad_token_id": token_id["endoftext"],
        "vision_start_token_id": token_id["vision_start"],
        "vision_end_token_id": token_id["vision_end"],
        "vision_token_id": tokenizer.token_to_id("<|vision_pad|>"),
        "image_token_id": token_id["image_pad"],
        "video_token_id": token_id["video_pad"],
        "hidden_act": "silu",
        "hidden_size": 192,
        "initializer_range": 0.02,
        "intermediate_size": 384,
        "max_position_embeddings": CONTEXT_LEN,
        "max_window_layers": 4,
        "model_type": "qwen2_vl",
        "num_attention_heads": 3,
        "num_hidden_layers": 4,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-06,
        "rope_theta": ROPE_THETA,
        "sliding_window": CONTEXT_LEN,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 4,
            "embed_dim": 128,
            "hidden_act": "quick_gelu",
            "hidden_size": 192,
            "in_channels": 3,
            "in_chans": 3,
            "mlp_ratio": 4,
            "model_type": "qwen2_vl",
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "spatial_patch_size": PATCH,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
    }


class Qwen2VL:
    """A model with fresh weights, in float32. `tower` sees, `model` is all of it; the tower's weights do not depend on
    the tokenizer."""

    def __init__(self, tokenizer: Tokenizer, seed: int = 0) -> None:
        self.tokenizer = tokenizer
        config = Qwen2VLConfig(**{**config_dict(tokenizer), "torch_dtype": "float32"})
        self.model = Qwen2VLForConditionalGeneration(config).float()
        self.tower = self.model.model.visual
        torch.manual_seed(seed)
        initialize(self.tower)
        patch_weight = self.tower.patch_embed.proj.weight
        torch.nn.init.normal_(patch_weight, 0, patch_weight[0].numel() ** -0.5)
        _look_at_neighbours(self.tower)
        initialize(self.model.model.language_model)
        torch.nn.init.normal_(self.model.model.language_model.embed_tokens.weight, 0, 0.03)

    @property
    def feature_size(self) -> int:
        return self.model.config.vision_config.hidden_size

    def writer(self) -> Writer:
        return Writer(self.tokenizer)

    def encode(self, group: ImageGroup) -> Tensor:
        """Images of one grid -> (images, tokens of one, hidden)."""
        tower = self.tower
        mean, std = pixel_scale(group.patches.device)
        pixels = (group.patches.float() - mean) / std
        # A still image is its own second frame: both frames' kernels see the same pixels.
        x = F.linear(pixels, tower.patch_embed.proj.weight.sum(2).flatten(1)).float()
        cos, sin = _vision_rope(tower.rotary_pos_emb.inv_freq, group.grid)
        num_images, num_patches, width = x.shape
        for block in tower.blocks:
            heads = block.attn.num_heads
            qkv = block.attn.qkv(block.norm1(x)).view(num_images, num_patches, 3, heads, -1).permute(2, 0, 3, 1, 4)
            query, key, value = qkv.unbind(0)
            mixed, _ = attend(rotate(query, cos, sin), rotate(key, cos, sin), value)
            x = x + block.attn.proj(mixed.transpose(1, 2).reshape(num_images, num_patches, width))
            x = x + block.mlp(block.norm2(x))
        merger = tower.merger
        return merger.mlp(merger.ln_q(x).view(num_images, num_patches // MERGE**2, -1))

    def hidden_states(self, batch: Batch, views: list[Tensor], looks: dict[int, Tensor] | None = None) -> Tensor:
        """The text model's last hidden states (rows, length, hidden); `views` are the encoded images of each group.

        Fills `looks` with the attention (rows, length, image tokens of a row) of each layer's first head.
        """
        text = self.model.model.language_model
        x = text.embed_tokens(batch.ids)
        rows, length, _ = x.shape
        stands_at = batch.stands_at
        if views:
            features = torch.cat(views, 1).to(x.dtype)
            slots = (stands_at + torch.arange(rows, device=x.device)[:, None] * length).flatten()
            x = x.flatten(0, 1).index_copy(0, slots, features.flatten(0, 1)).view(x.shape)
        cos, sin = (half(table).unsqueeze(1) for table in text.rotary_emb(x, batch.positions))
        mask = attention_mask(batch.branches)
        for layer_idx, layer in enumerate(text.layers):
            x, look = self_layer(layer, x, cos, sin, mask)
            if looks is not None and views:
                looks[layer_idx] = look[:, 0].gather(2, stands_at[:, None].expand(-1, length, -1))
            if looks is not None and layer_idx == COMPARING_LAYER:
                looks[COMPARED_LAYER], looks[MATCHED] = look[:, 1], x
        return text.norm(x)

    def export(self, folder: Path) -> None:
        """Writes the checkpoint folder: bf16 weights under the published names, and every file of that family."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {}
        for name, tensor in self.model.state_dict().items():
            if name != "lm_head.weight":  # tied to the embedding
                name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
                weights[name] = tensor
        save_tokenizer(self.tokenizer, folder)
        eos = [self.tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
        files = {
            "config.json": config_dict(self.tokenizer),
            "generation_config.json": {
                "bos_token_id": eos[1],
                "eos_token_id": eos,
                "pad_token_id": eos[1],
                "do_sample": False,
            },
            "preprocessor_config.json": qwen2_vl_preprocessor(MIN_PIXELS, MAX_PIXELS, patch=PATCH, merge=MERGE),
        }
        write_checkpoint(folder, weights, files)


def _look_at_neighbours(tower: torch.nn.Module) -> None:
    """Biases of queries and keys that rotary positions turn into a look at one neighbour (see `NEIGHBOURS`).

    A query of (1, 0) in each of the highest frequencies f fits a key of (cos f*d, -sin f*d) best where the key's patch
    is d further.
    """
    neighbours = iter(NEIGHBOURS)
    frequencies = tower.rotary_pos_emb.inv_freq
    num_pairs = 2 * len(frequencies)
    with torch.no_grad():
        for block in tower.blocks:
            torch.nn.init.zeros_(block.attn.qkv.bias)
            queries, keys, _ = block.attn.qkv.bias.view(3, block.attn.num_heads, 2, num_pairs).unbind()
            for head, neighbour in zip(range(block.attn.num_heads), neighbours, strict=False):
                for axis, away in enumerate(neighbour):
                    pairs = slice(axis * len(frequencies), axis * len(frequencies) + LOOKING_PAIRS)
                    angles = away * frequencies[:LOOKING_PAIRS]
                    queries[head, 0, pairs] = LOOKING
                    keys[head, 0, pairs], keys[head, 1, pairs] = LOOKING * angles.cos(), -LOOKING * angles.sin()


def _vision_rope(inv_freq: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """cos and sin (patches, head_dim) in the order of merged 2x2 blocks."""
    rows, columns = torch.meshgrid(*(torch.arange(side, device=inv_freq.device) for side in grid), indexing="ij")

    def blocks(index: Tensor) -> Tensor:
        return index.view(grid[0] // MERGE, MERGE, grid[1] // MERGE, MERGE).transpose(1, 2).flatten()

    angles = torch.cat([blocks(rows)[:, None] * inv_freq, blocks(columns)[:, None] * inv_freq], -1)
    angles = torch.cat([angles, angles], -1)
    return half(angles.cos()), half(angles.sin())
