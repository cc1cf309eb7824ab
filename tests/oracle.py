"""Shared between test areas: tiny random text models by transformers, and a Decoder driven without the engine.

    tiny_llama(dir)  tiny_qwen2(dir)  tiny_mistral(dir)      weights and config only; returns the HF model, float32
    load_model(dir)                                          ours, built and filled
    Drive(decoder, attention, page_size).step(rows)          one step over any mixture of rows, pages given at random
Complete vision-language checkpoints (with tokenizer and processor files) are made by tiny_models.py.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightvl.attention.base import AttentionBackend, CrossInputs, CrossSpan, FeatureRows, SelfInputs, StepInputs
from lightvl.models.config import DecoderConfig
from lightvl.models.decoder import Decoder
from lightvl.models.load import LoadFormat
from lightvl.models.model import Model, build_model

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def tiny_llama(folder: Path, *, seed: int = 0, **sizes: Any) -> Any:
    """3 layers of 64, 4 heads of 16, 2 K,V heads. `sizes` overrides config fields."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return save_tiny(LlamaForCausalLM, LlamaConfig(**SIZES | sizes), folder, seed)


def tiny_qwen2(folder: Path, *, seed: int = 0, **sizes: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return save_tiny(Qwen2ForCausalLM, Qwen2Config(**SIZES | sizes), folder, seed)


def tiny_mistral(folder: Path, *, seed: int = 0, **sizes: Any) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return save_tiny(MistralForCausalLM, MistralConfig(**SIZES | {"sliding_window": None} | sizes), folder, seed)


def save_tiny(model_class: Any, config: Any, folder: Path, seed: int = 0, **save: Any) -> Any:
    """Build, widen and save_pretrained a float32 model: norms near one, biases and gates that matter, sharp logits."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("_gate"):
                value.fill_(0.7)
            elif value.dim() == 1:
                value.add_(0.2 * torch.randn_like(value))
            else:
                value.normal_(std=0.5 if "embed" in name or "lm_head" in name else value.shape[-1] ** -0.5)
    model.tie_weights()
    model.save_pretrained(folder, **save)
    return model


def load_model(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    load_format: LoadFormat = "auto",
    max_image_tokens: int | None = None,
) -> Model:
    """Ours, on the CPU. Raises ConfigError."""
    model = build_model(folder, dtype=dtype, device=torch.device("cpu"), max_image_tokens=max_image_tokens)
    model.load(folder, load_format)
    return model


def correct_to_metas_rule(text_model: Any) -> None:
    """transformers' Mllama text model by the rule of Meta's reference: rows that see no image get nothing from the
    attention branch of a cross layer either."""
    for layer in text_model.layers:
        if not hasattr(layer, "cross_attn"):
            continue
        rows: dict[str, torch.Tensor] = {}

        def remember(_: Any, __: Any, kwargs: Any, rows: dict[str, torch.Tensor] = rows) -> None:
            rows["mask"] = kwargs["full_text_row_masked_out_mask"][:, 0]

        def zero(_: Any, __: Any, output: Any, rows: dict[str, torch.Tensor] = rows) -> Any:
            return (output[0] * rows["mask"], *output[1:])

        layer.register_forward_pre_hook(remember, with_kwargs=True)
        layer.cross_attn.register_forward_hook(zero)


def random_decoder(config: DecoderConfig) -> Decoder:
    """In bfloat16 on the CPU, with the same weights each time."""
    with torch.inference_mode():
        decoder = Decoder(config, torch.bfloat16, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        for target in decoder.weight_part().targets.values():
            target.fill(torch.randn(target.shape, generator=generator) * target.shape[-1] ** -0.5)
    return decoder


@dataclass
class DriveRow:
    """`ids` come after what the sequence `name` has computed so far. `positions`: (3, len) for M-RoPE."""

    name: str
    ids: list[int]
    positions: torch.Tensor | None = None
    features: list[tuple[int, torch.Tensor]] = field(default_factory=list)  # (offset in ids, rows)
    cross: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)  # (from, to, pages), offsets in ids


class Drive:
    """Stands in for scheduler and inputs: keeps each sequence's pages (taken in random order) and length."""

    def __init__(
        self, decoder: Decoder, attention: AttentionBackend, *, page_size: int, num_pages: int, seed: int = 0
    ) -> None:
        self.decoder, self.attention, self.page_size = decoder, attention, page_size
        self._free = list(range(num_pages))
        random.Random(seed).shuffle(self._free)
        self._pages: dict[str, list[int]] = {}
        self._lens: dict[str, int] = {}

    def step(self, rows: list[DriveRow]) -> list[torch.Tensor]:
        """Logits (len, vocab) float32 of all tokens of each row."""
        inputs = self.inputs(rows)
        with torch.inference_mode():
            self.attention.prepare(inputs)
            logits = self.decoder.forward(inputs, self.attention)
        assert logits is not None
        return list(logits.float().split([len(row.ids) for row in rows]))

    def inputs(self, rows: list[DriveRow]) -> StepInputs:
        mrope = self.decoder.config.mrope_section is not None
        places = [self._place(row) for row in rows]
        return step_inputs(rows, places, self.page_size, mrope=mrope, dtype=self.decoder.dtype)

    def _place(self, row: DriveRow) -> tuple[int, list[int]]:
        start = self._lens.get(row.name, 0)
        pages = self._pages.setdefault(row.name, [])
        while len(pages) * self.page_size < start + len(row.ids):
            pages.append(self._free.pop())
        self._lens[row.name] = start + len(row.ids)
        return start, pages


def step_inputs(
    rows: list[DriveRow],
    places: list[tuple[int, list[int]]],
    page_size: int,
    *,
    mrope: bool = False,
    dtype: torch.dtype = torch.float32,
) -> StepInputs:
    """`places`: (first index, pages) of each row. All logits are wanted; a token in no cross span sees no image."""
    slots, positions, features, spans = [], [], [], []
    num_tokens = sum(len(row.ids) for row in rows)
    sees_image = torch.zeros(num_tokens, 1, dtype=dtype)
    first = 0
    for row, (start, pages) in zip(rows, places, strict=True):
        own = torch.arange(start, start + len(row.ids))
        slots += [pages[int(i) // page_size] * page_size + int(i) % page_size for i in own]
        positions.append(own.expand(3, -1) if row.positions is None else row.positions)
        features += [FeatureRows(first + offset, feature) for offset, feature in row.features]
        for begin, end, cross_pages in row.cross:
            spans.append(CrossSpan(first + begin, first + end, cross_pages))
            sees_image[first + begin : first + end] = 1
        first += len(row.ids)
    joined = torch.cat(positions, 1)
    width = max(len(pages) for _, pages in places)
    table = torch.tensor([pages + [0] * (width - len(pages)) for _, pages in places])
    return StepInputs(
        token_ids=torch.tensor([token for row in rows for token in row.ids]),
        positions=joined if mrope else joined[0],
        self_attention=SelfInputs(
            q_lens=[len(row.ids) for row in rows],
            kv_lens=[start + len(row.ids) for row, (start, _) in zip(rows, places, strict=True)],
            slots=torch.tensor(slots),
            page_table=table,
        ),
        cross=CrossInputs(spans, sees_image) if spans else None,
        features=features,
        logits_idx=torch.arange(num_tokens),
    )
