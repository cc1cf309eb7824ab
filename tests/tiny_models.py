"""Complete checkpoint folders of tiny random models, as published ones are laid out: config, weights, image processor,
generation config and a byte-level tokenizer with the family's real special tokens. They know nothing of lightvl.

    tiny_qwen2_vl(dir)  tiny_qwen2_5_vl(dir)  tiny_mllama(dir)

Each fills `dir` and returns the HF model in float32 (the oracle). The same `seed` gives the same bytes. Weights are
drawn wide (gates open, logits spread over several units), so that a wrong mask or a lost term changes tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from published import LLAMA_TEMPLATE, QWEN_TEMPLATE, QWEN_TOKENS, mllama_preprocessor, qwen2_vl_preprocessor
from published import LLAMA_TOKENS as LLAMA_TEXT_TOKENS

Names = Literal["published", "memory"]
"""Checkpoint style: as the published checkpoints have it (Qwen2-VL's flat config and `visual.…` names, mllama's
`language_model.model.…`), or transformers 5's in-memory names with nested configs."""

LLAMA_TOKENS = [*LLAMA_TEXT_TOKENS, "<|image|>"]  # the first id past the text vocabulary, as published
SENTENCES = [
    "You are a helpful assistant. What is in this image? Describe the picture in a few words.",
    "The quick brown fox jumps over the lazy dog, and the cat sat on the mat.",
    "system user assistant: a red circle above a blue square; two green triangles on the left.",
    'How many are there? One, two, three, 4, 5. {"colour": "red", "count": 2}\n\n',
]


def tiny_qwen2_vl(
    folder: Path,
    *,
    seed: int = 0,
    names: Names = "published",
    max_pixels: int = 28 * 28 * 256,
    text: dict[str, Any] | None = None,
    **vision: Any,
) -> Any:
    """2 layers of 64 (4 heads of 16, 2 K,V heads), tied head; tower 3 layers of 32. `text` and `vision` override their
    configs."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    ids = _save_qwen_files(folder, max_pixels)
    vision_config = {
        "depth": 3,
        "embed_dim": 32,
        "hidden_size": 64,
        "num_heads": 2,
        "mlp_ratio": 4,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        **vision,
    }
    config = Qwen2VLConfig(text_config=_qwen_text(ids, tied=True) | (text or {}), vision_config=vision_config, **ids)
    config.tie_word_embeddings = True
    return _save_model(folder, Qwen2VLForConditionalGeneration, config, seed, names)


def tiny_qwen2_5_vl(
    folder: Path,
    *,
    seed: int = 0,
    names: Names = "published",
    max_pixels: int = 28 * 28 * 256,
    text: dict[str, Any] | None = None,
    **vision: Any,
) -> Any:
    """As tiny_qwen2_vl with an untied head; tower 4 layers of 32: windows of 112 pixels, full attention in 1 and 3."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = _save_qwen_files(folder, max_pixels)
    vision_config = {
        "depth": 4,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "intermediate_size": 48,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
        **vision,
    }
    text_config = _qwen_text(ids, tied=False) | (text or {})
    config = Qwen2_5_VLConfig(text_config=text_config, vision_config=vision_config, **ids)
    return _save_model(folder, Qwen2_5_VLForConditionalGeneration, config, seed, names)


def tiny_mllama(
    folder: Path,
    *,
    seed: int = 0,
    names: Names = "published",
    image_size: int = 28,
    text: dict[str, Any] | None = None,
    **vision: Any,
) -> Any:
    """4 text layers of 64 (4 heads of 16, 2 K,V heads), cross attention in 1 and 3; tower 3 local and 2 global layers
    of 32, up to 4 tiles of `image_size` (28: 5 tokens a tile)."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(LLAMA_TOKENS, bos="<|begin_of_text|>")
    token_id = tokenizer.token_to_id
    _save_tokenizer(
        folder,
        tokenizer,
        LLAMA_TOKENS,
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        chat_template=LLAMA_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
    )
    _write(folder / "preprocessor_config.json", mllama_preprocessor(image_size))
    stops = [token_id("<|end_of_text|>"), token_id("<|eom_id|>"), token_id("<|eot_id|>")]
    _write_generation_config(folder, token_id("<|begin_of_text|>"), stops, token_id("<|finetune_right_pad_id|>"))
    text_config = {
        "vocab_size": token_id("<|image|>"),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "cross_attention_layers": [1, 3],
        "max_position_embeddings": 16384,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 2048,
        },
        "bos_token_id": token_id("<|begin_of_text|>"),
        "eos_token_id": stops,
        "pad_token_id": token_id("<|finetune_right_pad_id|>"),
        **(text or {}),
    }
    vision_config = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_global_layers": 2,
        "attention_heads": 2,
        "image_size": image_size,
        "patch_size": 14,
        "intermediate_layers_indices": [0, 2],
        "vision_output_dim": 32 * 3,
        **vision,
    }
    config = MllamaConfig(text_config=text_config, vision_config=vision_config, image_token_index=token_id("<|image|>"))
    return _save_model(folder, MllamaForConditionalGeneration, config, seed, names)


def _qwen_text(ids: dict[str, int], *, tied: bool) -> dict[str, Any]:
    return {
        "vocab_size": 384,  # more rows than the tokenizer has tokens, as in the real ones
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": tied,
        "bos_token_id": ids["bos_token_id"],
        "eos_token_id": ids["eos_token_id"],
    }


def _save_qwen_files(folder: Path, max_pixels: int) -> dict[str, int]:
    """All but config and weights. Returns the token ids of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(QWEN_TOKENS, bos=None)
    token_id = tokenizer.token_to_id
    _save_tokenizer(
        folder,
        tokenizer,
        QWEN_TOKENS,
        tokenizer_class="Qwen2Tokenizer",
        add_prefix_space=False,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        errors="replace",
        chat_template=QWEN_TEMPLATE,
    )
    processor = qwen2_vl_preprocessor(56 * 56, max_pixels)
    _write(folder / "preprocessor_config.json", processor)
    stops = [token_id("<|im_end|>"), token_id("<|endoftext|>")]
    _write_generation_config(folder, token_id("<|endoftext|>"), stops, token_id("<|endoftext|>"))
    return {
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
    }


def _train_tokenizer(special_tokens: list[str], bos: str | None) -> Any:
    """Byte-level BPE of 320 tokens, then the special ones; any text can be written. `bos` is put before each text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    byte_level = processors.ByteLevel(trim_offsets=False)
    if bos is None:
        tokenizer.post_processor = byte_level
    else:
        template = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
        tokenizer.post_processor = processors.Sequence([byte_level, template])
    return tokenizer


def _save_tokenizer(folder: Path, tokenizer: Any, special_tokens: list[str], **config: Any) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(tokenizer.token_to_id(token)): {"content": token, **flags} for token in special_tokens}
    config |= {
        "added_tokens_decoder": added,
        "additional_special_tokens": special_tokens[1:],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 16384,
    }
    _write(folder / "tokenizer_config.json", config)
    _write(folder / "chat_template.json", {"chat_template": config["chat_template"]})


def _write_generation_config(folder: Path, bos: int, stops: list[int], pad: int) -> None:
    config = {"bos_token_id": bos, "eos_token_id": stops, "pad_token_id": pad, "do_sample": False}
    _write(folder / "generation_config.json", config)


def _save_model(folder: Path, model_class: Any, config: Any, seed: int, names: Names) -> Any:
    from safetensors.torch import save_file

    config.architectures = [model_class.__name__]
    config.dtype = torch.float32
    model = model_class(config).eval()
    _randomize(model, seed)
    model.tie_weights()
    tied = getattr(config, "tie_word_embeddings", False)  # mllama's has no such field
    weights = {name: value for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    data = config.to_dict()
    if names == "published":
        weights = {_published_name(name, config.model_type): value for name, value in weights.items()}
        data = _published_config(data)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    _write(folder / "config.json", data)
    return model


def _randomize(model: torch.nn.Module, seed: int) -> None:
    """Wide enough that every part matters: unit variance through linears, norms near 1, gates about half open."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        last = name.rsplit(".", 2)[-1]
        if "gate" in name and value.numel() == 1:
            new = 0.6 + 0.1 * noise
        elif last == "bias":
            new = 0.2 * noise
        elif value.ndim == 1 and last == "weight":
            new = 1 + 0.2 * noise
        elif "embed_tokens" in name or ("embedding" in name and "patch_embedding" not in name):
            new = 0.5 * noise
        else:
            width = 4.0 if name == "lm_head.weight" else 1.2
            new = noise * (width / value[0].numel() ** 0.5)
        value.data.copy_(new)


def _published_name(name: str, model_type: str) -> str:
    if model_type == "mllama":
        if name == "lm_head.weight":
            return "language_model.lm_head.weight"
        name = name.removeprefix("model.")
        return (
            name.replace("language_model.", "language_model.model.", 1) if name.startswith("language_model.") else name
        )
    return name.replace("model.visual.", "visual.", 1).replace("model.language_model.", "model.", 1)


def _published_config(data: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` as they were before transformers 5; Qwen2-VL's text fields at top level."""
    text = dict(data.pop("text_config"))
    rope = dict(text.pop("rope_parameters"))
    text["rope_theta"] = rope.pop("rope_theta")
    if data["model_type"] == "mllama":
        return {**data, "text_config": {**text, "rope_scaling": rope}}
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    text = {
        name: value for name, value in text.items() if value is not None and name not in ("model_type", "layer_types")
    }
    vision = dict(data["vision_config"])
    vision["model_type"] = data["model_type"]
    vision.pop("rope_parameters", None)
    return {**text, **data, "vision_config": vision}


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, default=str) + "\n")
