"""The model: transformers' own Qwen2-VL modules, and a lean forward over them that is several times faster on a CPU.

`build_model` makes the modules, `answer_loss` runs a whole batch (images of one grid are one dense tensor, the branches
of a sequence see only their shared prefix), `export` writes the folder that is served. tests/tools holds the lean
forward against transformers' own.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import rotate_half

from .samples import Batch, ImageGroup
from .tokenizer import save_tokenizer

PATCH, MERGE = 14, 2
MIN_PIXELS, MAX_PIXELS = 56 * 56, 336 * 336  # larger images are shrunk to what training has seen
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
CONTEXT_LEN = 32768
# M-RoPE gives an image's columns the lowest frequencies: at the usual 1e6 the text model cannot tell left from right.
ROPE_THETA = 100.0


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
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "max_position_embeddings": CONTEXT_LEN,
        "max_window_layers": 4,
        "model_type": "qwen2_vl",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
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
            "hidden_size": 256,
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


def build_model(tokenizer: Tokenizer, seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """A model with fresh weights, in float32."""
    torch.manual_seed(seed)
    config = Qwen2VLConfig(**{**config_dict(tokenizer), "torch_dtype": "float32"})
    model = Qwen2VLForConditionalGeneration(config).float()
    _initialize(model)
    return model


def _initialize(model: Qwen2VLForConditionalGeneration) -> None:
    """Weights by fan-in: the usual 0.02 is for wide models; a tower this narrow went unread for 600 steps with it."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            std = module.in_features**-0.5
            if name.endswith(("o_proj", "down_proj", "attn.proj", "fc2")):  # they write to a residual of 4 layers
                std *= 8**-0.5
            torch.nn.init.normal_(module.weight, 0, std)
    patch_weight = model.model.visual.patch_embed.proj.weight
    torch.nn.init.normal_(patch_weight, 0, patch_weight[0].numel() ** -0.5)
    torch.nn.init.normal_(model.model.language_model.embed_tokens.weight, 0, 0.03)


def encode_images(model: Qwen2VLForConditionalGeneration, group: ImageGroup) -> Tensor:
    """Images of one grid -> (images, tokens of one, hidden)."""
    tower = model.model.visual
    mean = torch.tensor(IMAGE_MEAN).repeat_interleave(PATCH * PATCH) * 255
    std = torch.tensor(IMAGE_STD).repeat_interleave(PATCH * PATCH) * 255
    pixels = (torch.from_numpy(group.patches).float() - mean) / std
    # A still image is its own second frame: both frames' kernels see the same pixels.
    x = F.linear(pixels, tower.patch_embed.proj.weight.sum(2).flatten(1)).float()
    cos, sin = _vision_rope(tower.rotary_pos_emb.inv_freq, group.grid)
    num_images, num_patches, width = x.shape
    for block in tower.blocks:
        heads = block.attn.num_heads
        qkv = block.attn.qkv(block.norm1(x)).view(num_images, num_patches, 3, heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query, key = query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin
        mixed, _ = attend(query, key, value)
        x = x + block.attn.proj(mixed.transpose(1, 2).reshape(num_images, num_patches, width))
        x = x + block.mlp(block.norm2(x))
    merger = tower.merger
    return merger.mlp(merger.ln_q(x).view(num_images, num_patches // MERGE**2, -1))


def _vision_rope(inv_freq: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """cos and sin (patches, head_dim) in the order of merged 2x2 blocks."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")

    def blocks(index: Tensor) -> Tensor:
        return index.view(grid[0] // MERGE, MERGE, grid[1] // MERGE, MERGE).transpose(1, 2).flatten()

    angles = torch.cat([blocks(rows)[:, None] * inv_freq, blocks(columns)[:, None] * inv_freq], -1)
    angles = torch.cat([angles, angles], -1)
    return _half(angles.cos()), _half(angles.sin())


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Plain attention (rows, heads, length, head_dim) and its weights: 3 times faster than the fused kernel."""
    rows, heads, length, head_dim = query.shape
    groups = heads // key.shape[1]
    query = (query * head_dim**-0.5).reshape(rows * key.shape[1], groups * length, head_dim)
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    scores = torch.bmm(query, key.transpose(1, 2))
    if mask is not None:
        scores = (scores.view(rows, heads, length, -1) + mask).view(scores.shape)
    look = scores.softmax(-1)
    mixed = torch.bmm(look, value).view(rows, heads, length, head_dim)
    return mixed, look.view(rows, heads, length, -1)


def _half(table: Tensor) -> Tensor:
    return table.to(torch.bfloat16) if torch.is_autocast_enabled("cpu") else table


def hidden_states(
    model: Qwen2VLForConditionalGeneration, batch: Batch, views: list[Tensor], looks: dict[int, Tensor] | None = None
) -> Tensor:
    """The text model's last hidden states (rows, length, hidden); `views` are the encoded images of each group.

    Fills `looks` with the attention (rows, heads, length, length) of each layer.
    """
    text = model.model.language_model
    ids = torch.from_numpy(batch.ids)
    x = text.embed_tokens(ids)
    if views:
        features = torch.cat([view.flatten(0, 1) for view in views]).to(x.dtype)
        x = x.flatten(0, 1).index_copy(0, torch.from_numpy(batch.image_slots), features).view(x.shape)
    cos, sin = (_half(table).unsqueeze(1) for table in text.rotary_emb(x, torch.from_numpy(batch.positions)))
    mask = attention_mask(torch.from_numpy(batch.branches))
    rows, length, _ = x.shape
    for layer_idx, layer in enumerate(text.layers):
        attn = layer.self_attn
        normed = layer.input_layernorm(x)
        query, key, value = (
            proj(normed).view(rows, length, -1, attn.head_dim).transpose(1, 2)
            for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        query, key = query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin
        mixed, look = attend(query, key, value, mask)
        if looks is not None:
            looks[layer_idx] = look
        x = x + attn.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return text.norm(x)


def attention_mask(branches: Tensor) -> Tensor:
    """(rows, 1, length, length), added to scores: a token sees what precedes it in the prefix and in its branch."""
    same = (branches[:, :, None] == branches[:, None, :]) | (branches[:, None, :] == 0)
    seen = same & torch.ones(same.shape[-2:], dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf")).unsqueeze(1)
    return _half(mask)


def answer_loss(
    model: Qwen2VLForConditionalGeneration, batch: Batch, views: list[Tensor], looks: dict[int, Tensor] | None = None
) -> Tensor:
    """Mean cross entropy over answers (with the token that ends each), every answer as heavy as any other."""
    hidden = hidden_states(model, batch, views, looks).flatten(0, 1)[torch.from_numpy(batch.answer_slots)]
    weights = torch.from_numpy(batch.answer_weights)
    losses = F.cross_entropy(model.lm_head(hidden).float(), torch.from_numpy(batch.answer_ids), reduction="none")
    return (losses * weights).sum() / weights.sum()


def export(model: Qwen2VLForConditionalGeneration, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the checkpoint folder: bf16 weights under Qwen2-VL's published names, and every file of that family."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # tied to the embedding
            name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
            weights[name] = tensor.detach().to(torch.bfloat16).contiguous()
    partial = folder / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    save_tokenizer(tokenizer, folder)
    eos = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    files = {
        "config.json": config_dict(tokenizer),
        "generation_config.json": {
            "bos_token_id": eos[1],
            "eos_token_id": eos,
            "pad_token_id": eos[1],
            "do_sample": False,
        },
        "preprocessor_config.json": {
            "min_pixels": MIN_PIXELS,
            "max_pixels": MAX_PIXELS,
            "patch_size": PATCH,
            "temporal_patch_size": 2,
            "merge_size": MERGE,
            "image_mean": IMAGE_MEAN,
            "image_std": IMAGE_STD,
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    partial.chmod(0o644)
    partial.rename(folder / "model.safetensors")
