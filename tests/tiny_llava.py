"""Checkpoint folders of tiny random LLaVA models in the layouts that are published, and HF's twin of each: the oracle.

    tiny_llava(parent, ROWS["llava-v1.5-7b"]) -> Twin        fills parent/<name>, and the tower's folder beside it

Original-format folders are made from the twin's weights by the inverse of transformers' conversion scripts. They know
nothing of lightvl. Decoders have 2 layers of 64, towers 3 layers of 32; a view has 4 x 4 patches.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tiny_models
import torch
from published import CLIP_MEAN, CLIP_STD, LLAMA_TOKENS, QWEN_TOKENS
from tiny_models import SENTENCES

SIDE = {"clip": 56, "siglip": 60}  # 60: 4 pixels at the end belong to no patch, as in SigLIP's 384
CLIP_FOLDER, SIGLIP_FOLDER = "clip-vit-large-patch14-336", "siglip-so400m-patch14-384"
GRIDS_NEXT = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
GRIDS_ONEVISION = [[high, wide] for high in range(1, 7) for wide in range(1, 7)]
YI_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB = 448

OWN_1_5 = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
OWN_ONEVISION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\\n' + content['text'] }}"
    "{% endfor %}{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% endif %}"
)


@dataclass(frozen=True)
class Row:
    """One line of the table of served checkpoints. `name` is the folder's."""

    name: str
    twin: Literal["llava", "next", "onevision"]
    text: Literal["llama", "mistral", "qwen2"]
    tokenizer: Literal["vicuna", "yi", "llama3", "qwen", "qwen_image"]
    template: str  # what must be chosen
    vision: Literal["clip", "siglip"] = "clip"
    architecture: str | None = None  # original format; None: HF's
    weights: Literal["one", "shards", "bin"] = "shards"
    tower_inside: bool = True
    aspect: str | None = None
    merge: str = "spatial_unpad"
    projector: str = "mlp2x_gelu"
    tied: bool = False
    own_template: str | None = None
    in_memory_names: bool = False
    has_processor: bool = True
    pinpoints_as_text: bool = False


ROWS = {
    row.name: row
    for row in (
        Row("llava-onevision-qwen2-0.5b-ov", "onevision", "qwen2", "qwen_image", "chatml-llava", "siglip",
            "LlavaQwenForCausalLM", "one", aspect="anyres_max_9", tied=True),
        Row("llava-onevision-qwen2-7b-ov-chat", "onevision", "qwen2", "qwen", "chatml-llava", "siglip",
            "LlavaQwenForCausalLM", aspect="anyres_max_9", pinpoints_as_text=True),
        Row("llava-onevision-qwen2-7b-ov-hf", "onevision", "qwen2", "qwen_image", "chatml-llava", "siglip"),
        Row("llava-onevision-qwen2-0.5b-ov-hf", "onevision", "qwen2", "qwen_image", "the model's own", "siglip",
            tied=True, own_template=OWN_ONEVISION, in_memory_names=True),
        Row("llava-next-72b", "next", "qwen2", "qwen", "chatml-llava", "clip", "LlavaQwenForCausalLM",
            aspect="anyres"),
        Row("llava-next-interleave-qwen-7b", "llava", "qwen2", "qwen", "chatml-llava", "siglip",
            "LlavaQwenForCausalLM", aspect="pad", merge="flat"),
        Row("llama3-llava-next-8b", "next", "llama", "llama3", "llava_llama_3", "clip", "LlavaLlamaForCausalLM",
            aspect="anyres"),
        Row("llava-v1.5-7b", "llava", "llama", "vicuna", "vicuna_v1.1", "clip", "LlavaLlamaForCausalLM", "bin",
            tower_inside=False, aspect="pad", merge="flat"),
        Row("llava-v1.6-vicuna-7b", "next", "llama", "vicuna", "vicuna_v1.1", "clip", "LlavaLlamaForCausalLM",
            aspect="anyres"),
        Row("llava-v1.6-34b", "next", "llama", "yi", "chatml-llava", "clip", "LlavaLlamaForCausalLM",
            aspect="anyres"),
        Row("llava-v1.6-mistral-7b", "next", "mistral", "vicuna", "mistral-llava", "clip", "LlavaMistralForCausalLM",
            aspect="anyres"),
        Row("llava-1.5-7b-hf", "llava", "llama", "vicuna", "vicuna_v1.1"),
        Row("llava-1.5-13b-hf", "llava", "llama", "vicuna", "the model's own", own_template=OWN_1_5,
            has_processor=False),
        Row("llava-v1.6-vicuna-7b-hf", "next", "llama", "vicuna", "vicuna_v1.1", in_memory_names=True),
        Row("llava-v1.6-mistral-7b-hf", "next", "mistral", "vicuna", "mistral-llava", weights="bin"),
        Row("llava-v1.6-34b-hf", "next", "llama", "yi", "chatml-llava"),
        Row("llama3-llava-next-8b-hf", "next", "llama", "llama3", "llava_llama_3"),
        Row("llava-interleave-qwen-7b-hf", "llava", "qwen2", "qwen", "chatml-llava", "siglip"),
        # not published so, but in the original code
        Row("llava-square", "llava", "llama", "vicuna", "vicuna_v1.1", "clip", "LlavaLlamaForCausalLM", "one",
            aspect="square", merge="flat", projector="linear"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Twin:
    row: Row
    folder: Path
    model: Any  # HF, float32
    tokenizer: Any  # of transformers, with <image>
    processor: Any  # PIL-backed
    num_logits: int  # the checkpoint's head has so many rows; the twin's may have more


def tiny_llava(
    parent: Path,
    row: Row,
    *,
    seed: int = 0,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
) -> Twin:
    """`text` and `vision` override their configs."""
    folder = parent / row.name
    folder.mkdir(parents=True)
    tokenizer = _save_tokenizer(folder, row)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    # an original checkpoint whose tokenizer lacks <image> has no embedding for it; the twin needs one
    if row.architecture is not None and row.tokenizer != "qwen_image":
        image_token_id = VOCAB
    num_rows = max(VOCAB, image_token_id + 1)
    model = _twin(row, num_rows, image_token_id, text or {}, vision or {})
    tiny_models._randomize(model, seed)
    model.tie_weights()
    processor = _processor(row)
    if row.architecture is None:
        _save_hf(folder, row, model, processor)
    else:
        _save_original(folder, row, model)
    stops = [tokenizer.eos_token_id]
    tiny_models._write(folder / "generation_config.json", {"eos_token_id": stops, "do_sample": False})
    return Twin(row, folder, model, tokenizer, processor, VOCAB if row.architecture else num_rows)


def _twin(row: Row, vocab_size: int, image_token_id: int, own_text: dict[str, Any], own_vision: dict[str, Any]) -> Any:
    import transformers as hf

    text = {
        "model_type": row.text,
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": row.tied,
        "pad_token_id": None,
        **own_text,
    }
    if row.text == "mistral":
        text["sliding_window"] = None
    vision = {
        "model_type": f"{row.vision}_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIDE[row.vision],
        "patch_size": 14,
        **own_vision,
    }
    if row.vision == "siglip":
        vision["vision_use_head"] = False
    options: dict[str, Any] = {"image_token_index": image_token_id, "tie_word_embeddings": row.tied}
    if row.vision == "siglip":
        options |= {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    if row.twin != "llava":
        options["image_grid_pinpoints"] = pinpoints(row)
    kinds = {"llava": "Llava", "next": "LlavaNext", "onevision": "LlavaOnevision"}
    config = getattr(hf, kinds[row.twin] + "Config")(text_config=text, vision_config=vision, **options)
    config.architectures = [kinds[row.twin] + "ForConditionalGeneration"]
    config.dtype = torch.float32
    model = getattr(hf, kinds[row.twin] + "ForConditionalGeneration")(config).eval()
    if row.projector == "linear":
        model.model.multi_modal_projector.act = torch.nn.Identity()
        model.model.multi_modal_projector.linear_2 = torch.nn.Identity()
    return model


def pinpoints(row: Row) -> list[list[int]]:
    grids = GRIDS_ONEVISION if row.twin == "onevision" else GRIDS_NEXT
    return [[high * SIDE[row.vision], wide * SIDE[row.vision]] for high, wide in grids]


def _processor(row: Row) -> Any:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    side = SIDE[row.vision]
    square = {"height": side, "width": side}
    if row.vision == "clip":
        pixels: dict[str, Any] = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "size": {"shortest_edge": side}}
        pixels |= {"crop_size": square, "do_center_crop": True}
    else:
        pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": square, "do_center_crop": False}
    if row.twin == "onevision":
        return LlavaOnevisionImageProcessorPil(image_grid_pinpoints=pinpoints(row), **pixels)
    if row.twin == "next":
        return LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints(row), **pixels)
    return LlavaImageProcessorPil(do_pad=row.aspect == "pad", **pixels)


def _save_hf(folder: Path, row: Row, model: Any, processor: Any) -> None:
    config = model.config.to_dict()
    for side in ("text_config", "vision_config"):
        config[side] = {key: value for key, value in config[side].items() if key != "transformers_version"}
    if not row.in_memory_names:  # as transformers 4 wrote it
        rope = config["text_config"].pop("rope_parameters")
        config["text_config"]["rope_theta"] = rope["rope_theta"]
    tiny_models._write(folder / "config.json", config)
    if row.has_processor:
        tiny_models._write(folder / "preprocessor_config.json", processor.to_dict())
    if row.own_template:
        tiny_models._write(folder / "chat_template.json", {"chat_template": row.own_template})
    weights = _weights(model, row)
    if not row.in_memory_names:
        weights = {published_name(name): value for name, value in weights.items()}
    _save_weights(folder, row, weights)


def published_name(name: str) -> str:
    """transformers 5 in memory -> llava-hf/* on disk."""
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    name = name.removeprefix("model.")
    name = name.replace("language_model.", "language_model.model.", 1) if name.startswith("language_model.") else name
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1) if name.startswith("vision_tower.") else name


def original_name(name: str, row: Row) -> str:
    """transformers 5 in memory -> liuhaotian/*, lmms-lab/*."""
    if row.projector == "linear":
        name = name.replace("model.multi_modal_projector.linear_1.", "model.mm_projector.")
    for ours, theirs in (
        ("model.language_model.", "model."),
        ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _weights(model: Any, row: Row) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if not (row.tied and name == "lm_head.weight")}


def _save_original(folder: Path, row: Row, model: Any) -> None:
    text = model.config.text_config.to_dict()
    config: dict[str, Any] = {
        name: text[name]
        for name in (
            *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
            *("max_position_embeddings", "rms_norm_eps", "hidden_act", "tie_word_embeddings"),
        )
    }
    config |= {
        "architectures": [row.architecture],
        "model_type": "llava_llama" if row.tokenizer == "llama3" else "llava",
        "vocab_size": VOCAB,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "torch_dtype": "float16",
        "image_aspect_ratio": row.aspect,
        "image_crop_resolution": 224,
        "image_split_resolution": 224,
        "mm_hidden_size": 32,
        "mm_patch_merge_type": row.merge,
        "mm_projector_type": row.projector,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"openai/{CLIP_FOLDER}" if row.vision == "clip" else f"google/{SIGLIP_FOLDER}",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tokenizer_model_max_length": 4096,
        "unfreeze_mm_vision_tower": row.tower_inside,
        "image_grid_pinpoints": "(1x1),...,(6x6)" if row.pinpoints_as_text else pinpoints(row),
    }
    if row.text == "mistral":
        config["sliding_window"] = None
    if row.tokenizer == "qwen_image":
        config["image_token_index"] = model.config.image_token_index
    tiny_models._write(folder / "config.json", config)
    weights = _weights(model, row)
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = weights[name][:VOCAB].clone()
    tower = {name: value for name, value in weights.items() if name.startswith("model.vision_tower.")}
    if row.merge == "flat":
        weights.pop("model.image_newline", None)
    if row.vision == "siglip":  # the last layer is cut off, and what comes after it is of no use
        weights = {name: value for name, value in weights.items() if "vision_tower.post_layernorm" not in name}
    if not row.tower_inside:
        weights = {name: value for name, value in weights.items() if name not in tower}
    weights = {original_name(name, row): value for name, value in weights.items()}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    if row.tower_inside:
        weights["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    _save_weights(folder, row, weights)
    _save_tower(folder.parent, row, model, tower)


def _save_tower(parent: Path, row: Row, model: Any, tower: dict[str, torch.Tensor]) -> None:
    """The tower's own repository: config and processor of the whole CLIP or SigLIP, and with a tower outside the
    checkpoint all its weights. Inside one they win, so there the weights here are other ones."""
    vision = model.config.vision_config.to_dict()
    folder = parent / (CLIP_FOLDER if row.vision == "clip" else SIGLIP_FOLDER)
    folder.mkdir(exist_ok=True)
    if row.vision == "siglip":
        vision |= {"num_hidden_layers": 4, "vision_use_head": True}
    tiny_models._write(
        folder / "config.json", {"model_type": row.vision, "vision_config": vision, "text_config": {"hidden_size": 16}}
    )
    side = SIDE[row.vision]
    processor: dict[str, Any] = {"crop_size": side, "size": side, "do_center_crop": True, "resample": 3}
    processor |= {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    if row.vision == "siglip":
        processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": side, "width": side}}
        processor["resample"] = 3
    tiny_models._write(folder / "preprocessor_config.json", processor)
    weights = {name.replace("model.vision_tower.", "vision_model."): value for name, value in tower.items()}
    if row.tower_inside:
        weights = {name: torch.randn_like(value) for name, value in weights.items()}
    weights |= {"text_model.final_layer_norm.weight": torch.ones(16), "logit_scale": torch.tensor(1.0)}
    torch.save(weights, folder / "pytorch_model.bin")


def _save_weights(folder: Path, row: Row, weights: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    weights = {name: value.contiguous().clone() for name, value in weights.items()}
    if row.weights == "one":
        save_file(weights, folder / "model.safetensors")
        return
    suffix = ".bin" if row.weights == "bin" else ".safetensors"
    stem = "pytorch_model" if row.weights == "bin" else "model"
    names = sorted(weights)
    weight_map = {}
    for number in range(2):
        shard = f"{stem}-{number + 1:05d}-of-00002{suffix}"
        own = {name: weights[name] for name in names[number::2]}
        weight_map |= dict.fromkeys(own, shard)
        (torch.save if row.weights == "bin" else save_file)(own, folder / shard)
    tiny_models._write(folder / f"{stem}{suffix}.index.json", {"metadata": {}, "weight_map": weight_map})
    if row.weights == "bin":  # as liuhaotian/llava-v1.5-7b has it, from its first stage of training
        projector = {name: value for name, value in weights.items() if "mm_projector" in name}
        torch.save(projector, folder / "mm_projector.bin")


def _save_tokenizer(folder: Path, row: Row) -> Any:
    """Into `folder`, as published; returns transformers' tokenizer for the prompts of the oracle, with <image>."""
    from transformers import AddedToken, AutoTokenizer, LlamaTokenizer

    image = AddedToken("<image>", special=True, normalized=False)
    if row.tokenizer in ("vicuna", "yi"):
        _save_sentencepiece(folder, row)
        tokenizer = LlamaTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([image], special_tokens=True)
        if row.architecture is None:  # fast, with <image> inside
            (folder / "tokenizer.model").unlink()
            tokenizer.save_pretrained(folder)
            (folder / "chat_template.jinja").unlink(missing_ok=True)
        return tokenizer
    tokens = LLAMA_TOKENS if row.tokenizer == "llama3" else QWEN_TOKENS[:3]
    if row.tokenizer == "qwen_image" or row.architecture is None:
        tokens = [*tokens, "<image>"]
    bos = "<|begin_of_text|>" if row.tokenizer == "llama3" else None
    text_only = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    tiny_models._save_tokenizer(
        folder,
        tiny_models._train_tokenizer(tokens, bos=bos),
        tokens,
        tokenizer_class="PreTrainedTokenizerFast" if bos else "Qwen2Tokenizer",
        **({"bos_token": bos} if bos else {}),
        eos_token="<|eot_id|>" if bos else "<|im_end|>",
        pad_token=tokens[1] if bos else "<|endoftext|>",
        chat_template=text_only,
    )
    (folder / "chat_template.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if "<image>" not in tokens:
        tokenizer.add_tokens([image], special_tokens=True)
    return tokenizer


def _save_sentencepiece(folder: Path, row: Row) -> None:
    """A slow tokenizer: tokenizer.model and its settings, nothing else."""
    import sentencepiece

    is_yi = row.tokenizer == "yi"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=model,
        vocab_size=384,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        user_defined_symbols=YI_TOKENS if is_yi else [],
        minloglevel=2,
        num_threads=1,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config: dict[str, Any] = {
        "add_bos_token": not is_yi,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "<|im_end|>" if is_yi else "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 4096,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    if is_yi:
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        config["added_tokens_decoder"] = {str(3 + i): {"content": name, **flags} for i, name in enumerate(YI_TOKENS)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
