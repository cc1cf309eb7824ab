"""Real-size checkpoints with random weights, laid out as the published ones: what benchmarks serve without a download.

    python tools/make_random_model.py /tmp/qwen2-vl-2b --arch qwen2-vl-2b

Writes config.json, bf16 safetensors in shards with their index, generation and preprocessor configs, and a byte-level
tokenizer whose control tokens have their real ids: a BPE learned from generated text, filled up with words that no text
reaches. Names and shapes are asked of transformers, on the meta device. What such a model says is random; how fast it
says it is not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo_training.tokenizer import SPLIT, corpus
from published import (
    LLAMA_TEMPLATE,
    LLAMA_TOKENS,
    QWEN_TEMPLATE,
    QWEN_TOKENS,
    mllama_preprocessor,
    qwen2_vl_preprocessor,
)
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText

SHARD_BYTES = 2 << 30
NUM_DRAWN = (1 << 24) + 43  # numbers drawn once; tensors are cut from them, because drawing billions takes minutes
NUM_LEARNED = 4096  # tokens learned from text; the rest of the vocabulary is filled up

LLAMA_SPLIT = SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")


@dataclass(frozen=True)
class Checkpoint:
    """All files but weights and vocabulary."""

    config: dict[str, Any]
    generation_config: dict[str, Any]
    preprocessor_config: dict[str, Any]
    tokenizer_config: dict[str, Any]
    split: str
    special_tokens: dict[str, int]  # each with its id; plain tokens fill the ids below and between


def qwen2_vl(
    text: dict[str, Any], vision: dict[str, Any], *, vocab_size: int, first_special: int = 151643
) -> Checkpoint:
    """Qwen2-VL, or Qwen2.5-VL where `vision` has windows."""
    ids = {token: first_special + i for i, token in enumerate(QWEN_TOKENS)}
    is_2_5 = "window_size" in vision
    config = {
        "architectures": [f"Qwen2{'_5_' if is_2_5 else ''}VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 128000 if is_2_5 else 32768,
        "max_window_layers": text["num_hidden_layers"],
        "model_type": "qwen2_5_vl" if is_2_5 else "qwen2_vl",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": vocab_size,
        **text,
        "vision_config": {
            "depth": 32,
            "num_heads": 16,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            **vision,
        },
    }
    return Checkpoint(
        config=config,
        generation_config={
            "bos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "do_sample": True,
            "temperature": 0.01,
            "top_p": 0.001,
            "top_k": 1,
        },
        preprocessor_config=qwen2_vl_preprocessor(3136, 12845056),
        tokenizer_config={
            "add_prefix_space": False,
            "bos_token": None,
            "chat_template": QWEN_TEMPLATE,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 32768,
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
        split=SPLIT,
        special_tokens=ids,
    )


def llama_vision(text: dict[str, Any], vision: dict[str, Any], *, vocab_size: int = 128256) -> Checkpoint:
    """Llama-3.2-Vision: 256 control tokens end the vocabulary, <|image|> comes after it."""
    first = vocab_size - 256
    tokens = LLAMA_TOKENS + [f"<|reserved_special_token_{i}|>" for i in range(2, 2 + 256 - len(LLAMA_TOKENS))]
    ids = {token: first + i for i, token in enumerate(tokens)} | {"<|image|>": vocab_size}
    stops = [ids["<|end_of_text|>"], ids["<|eom_id|>"], ids["<|eot_id|>"]]
    bos, pad = ids["<|begin_of_text|>"], ids["<|finetune_right_pad_id|>"]
    config = {
        "architectures": ["MllamaForConditionalGeneration"],
        "image_token_index": vocab_size,
        "model_type": "mllama",
        "torch_dtype": "bfloat16",
        "text_config": {
            "bos_token_id": bos,
            "eos_token_id": stops,
            "pad_token_id": pad,
            "dropout": 0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": 131072,
            "model_type": "mllama_text_model",
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": vocab_size,
            **text,
        },
        "vision_config": {
            "hidden_act": "gelu",
            "image_size": 560,
            "max_num_tiles": 4,
            "model_type": "mllama_vision_model",
            "norm_eps": 1e-05,
            "num_channels": 3,
            "patch_size": 14,
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
            "torch_dtype": "bfloat16",
            **vision,
        },
    }
    return Checkpoint(
        config=config,
        generation_config={
            "bos_token_id": bos,
            "eos_token_id": stops,
            "pad_token_id": pad,
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.9,
        },
        preprocessor_config=mllama_preprocessor(config["vision_config"]["image_size"]),
        tokenizer_config={
            "bos_token": "<|begin_of_text|>",
            "chat_template": LLAMA_TEMPLATE,
            "eos_token": "<|eot_id|>",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 131072,
            "pad_token": "<|finetune_right_pad_id|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        split=LLAMA_SPLIT,
        special_tokens=ids,
    )


def decoder(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


def windowed_tower(out: int) -> dict[str, Any]:
    """Qwen2.5-VL's, the same at every size but for its output."""
    return {
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "out_hidden_size": out,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    }


ARCHITECTURES = {
    "qwen2-vl-2b": qwen2_vl(
        decoder(28, 1536, 8960, 12, 2, tie_word_embeddings=True),
        {"embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4},
        vocab_size=151936,
    ),
    "qwen2-vl-7b": qwen2_vl(
        decoder(28, 3584, 18944, 28, 4, tie_word_embeddings=False),
        {"embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4},
        vocab_size=152064,
    ),
    "qwen2.5-vl-3b": qwen2_vl(
        decoder(36, 2048, 11008, 16, 2, tie_word_embeddings=True), windowed_tower(2048), vocab_size=151936
    ),
    "qwen2.5-vl-7b": qwen2_vl(
        decoder(28, 3584, 18944, 28, 4, tie_word_embeddings=False), windowed_tower(3584), vocab_size=152064
    ),
    "llama-3.2-11b-vision": llama_vision(
        decoder(40, 4096, 14336, 32, 8, cross_attention_layers=[3, 8, 13, 18, 23, 28, 33, 38]),
        {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_global_layers": 8,
            "attention_heads": 16,
            "intermediate_layers_indices": [3, 7, 15, 23, 30],
            "vision_output_dim": 7680,
        },
    ),
    # Small ones, to try the tools themselves in seconds.
    "qwen2-vl-tiny": qwen2_vl(
        decoder(2, 256, 512, 2, 1, tie_word_embeddings=True),
        {"depth": 2, "embed_dim": 128, "hidden_size": 256, "mlp_ratio": 4, "num_heads": 2},
        vocab_size=8192,
        first_special=8000,
    ),
    "llama-3.2-vision-tiny": llama_vision(
        decoder(4, 256, 512, 4, 2, cross_attention_layers=[1, 3]),
        {
            "hidden_size": 64,
            "image_size": 112,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_global_layers": 1,
            "attention_heads": 2,
            "intermediate_layers_indices": [0, 2],
            "vision_output_dim": 192,
        },
        vocab_size=8192,
    ),
}


def parameters(folder: Path) -> dict[str, torch.Size]:
    """Published name -> shape, of the model that config.json in `folder` describes."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    is_qwen = config.model_type.startswith("qwen2")
    is_tied = bool(json.loads((folder / "config.json").read_text()).get("tie_word_embeddings"))
    return {
        published_name(name, is_qwen): parameter.shape
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not (is_tied and name == "lm_head.weight")
    }


def published_name(name: str, is_qwen: bool) -> str:
    """transformers 5 keeps other names in memory than checkpoints have on disk."""
    if is_qwen:
        return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
    if name.startswith("model.language_model."):
        return "language_model." + name.replace("model.language_model.", "model.")
    return "language_model." + name if name.startswith("lm_head.") else name.removeprefix("model.")


def random_weight(name: str, shape: torch.Size, drawn: torch.Tensor, offset: int) -> torch.Tensor:
    """Norms 1, gates half open, all else cut from the `drawn` numbers, which are repeated where they do not suffice."""
    if name.endswith("norm.weight") or (".norm" in name and name.endswith(".weight")) or "layernorm" in name:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=drawn.dtype)
    if "gate" in name.rsplit(".", 1)[-1]:
        return torch.full(shape, 0.5, dtype=drawn.dtype)
    start = offset % drawn.numel()
    end = start + shape.numel()
    source = drawn if end <= drawn.numel() else drawn.repeat(-(-end // drawn.numel()))
    return source[start:end].clone().view(shape)


def save_weights(folder: Path, shapes: dict[str, torch.Size], seed: int) -> int:
    """Writes shards and index. Returns the number of bytes."""
    drawn = torch.empty(NUM_DRAWN).normal_(std=0.02, generator=torch.Generator().manual_seed(seed)).bfloat16()
    shards = list(split_shards(shapes))
    weight_map: dict[str, str] = {}
    offset = 0
    with tqdm(total=sum(shape.numel() for shape in shapes.values()), desc="weights", unit="", unit_scale=True) as bar:
        for i, names in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for name in names:
                tensors[name] = random_weight(name, shapes[name], drawn, offset)
                offset += shapes[name].numel()
                weight_map[name] = file
            save_file(tensors, folder / file, metadata={"format": "pt"})
            bar.update(sum(tensor.numel() for tensor in tensors.values()))
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": 2 * offset}, "weight_map": weight_map}
    )
    return 2 * offset


def split_shards(shapes: dict[str, torch.Size]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + 2 * shape.numel() > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * shape.numel()
    yield names


def build_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Byte-level BPE with plain tokens at every id below the last special one that is not special itself."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(checkpoint.split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    num_plain = min(checkpoint.special_tokens.values())
    trainer = trainers.BpeTrainer(
        vocab_size=min(NUM_LEARNED, num_plain),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(corpus(num_scenes=500), trainer)
    learned = json.loads(learner.to_str())["model"]
    vocab: dict[str, int] = learned["vocab"]
    number = 0
    while len(vocab) < num_plain:  # words that no merge makes, but that decode as words do
        vocab.setdefault("Ġ" + filler_word(number), len(vocab))
        number += 1
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge) for merge in learned["merges"]]))
    tokenizer.pre_tokenizer = learner.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    ordered = sorted(checkpoint.special_tokens, key=lambda token: checkpoint.special_tokens[token])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ordered])
    for token, token_id in checkpoint.special_tokens.items():
        assert tokenizer.token_to_id(token) == token_id, (
            f"{token} has id {tokenizer.token_to_id(token)}, not {token_id}"
        )
    return tokenizer


def filler_word(number: int) -> str:
    """A pronounceable word of three syllables or more: "bababa", "bababe"..."""
    syllables = ""
    for _ in range(3):
        number, vowel = divmod(number, 5)
        number, consonant = divmod(number, 18)
        syllables = "bcdfghjklmnprstvwz"[consonant] + "aeiou"[vowel] + syllables
    return syllables + (str(number) if number else "")


def save_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    build_tokenizer(checkpoint).save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(token_id): {"content": token, **flags} for token, token_id in checkpoint.special_tokens.items()}
    config = {"added_tokens_decoder": added, "clean_up_tokenization_spaces": False, **checkpoint.tokenizer_config}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "chat_template.json", {"chat_template": config["chat_template"]})


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.monotonic()
    checkpoint = ARCHITECTURES[args.arch]
    args.folder.mkdir(parents=True, exist_ok=True)
    if any(args.folder.glob("*.safetensors")):
        print(f"{args.folder} holds weights already", file=sys.stderr)
        return 2
    write_json(args.folder / "config.json", checkpoint.config)
    write_json(args.folder / "generation_config.json", checkpoint.generation_config)
    write_json(args.folder / "preprocessor_config.json", checkpoint.preprocessor_config)
    save_tokenizer(args.folder, checkpoint)
    num_bytes = save_weights(args.folder, parameters(args.folder), args.seed)
    print(f"{args.folder}: {args.arch}, {num_bytes / 1e9:.2f} GB in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
