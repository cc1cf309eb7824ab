"""Tokenizers of the kinds that checkpoints have, made in a moment, and a stub family. Shared by the tests of prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from lightvl.models.family import Expansion, ImageLayout

SENTENCES = [
    "You are a helpful assistant. What is in this image? Describe the picture in a few words.",
    "The quick brown fox jumps over the lazy dog, and the cat sat on the mat. 12 + 30 = 42",
    "Voilà un garçon très naïf; größer, straße. 日本語の文章です。 Привет, мир!",
]
LLAMA_3 = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|image|>",
]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]


def special(content: str) -> AddedToken:
    return AddedToken(content, special=True, normalized=False)


def byte_level(tokens: list[str], *, bos: str | None = None, eos: str, **fast: Any) -> PreTrainedTokenizerFast:
    """As Qwen2's and Llama-3's; <|wide|> takes white space with it, <tool_call> is not special."""
    backend = Backend(models.BPE(ignore_merges=bos is not None))
    backend.normalizer = normalizers.NFC() if bos is None else None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(SENTENCES * 3, trainer)
    backend.add_tokens([special(token) for token in tokens])
    backend.add_tokens([AddedToken("<|wide|>", special=True, normalized=False, lstrip=True, rstrip=True)])
    backend.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, **fast)


def sentencepiece(*, first_only: bool = False, normalized: bool = False, image: bool = True) -> PreTrainedTokenizerFast:
    """As Llama-2's, in its older form (a space before every section) and its newer one (only before the first);
    with byte fallback, and specials among the ordinary pieces."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    training = Backend(models.BPE())
    training.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    training.train_from_iterator(SENTENCES * 3, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    import json

    learned = json.loads(training.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    vocab = {piece: i for i, piece in enumerate(names + [piece for piece in pieces if piece not in names])}
    merges = [tuple(merge) for merge in learned["merges"]]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if first_only:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    added = [AddedToken(token, special=True, normalized=normalized) for token in ("<unk>", "<s>", "</s>")]
    backend.add_special_tokens([*added, *([special("<image>")] if image else [])])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    """A model that finds `</s>` in plain text by itself, and a decoder without a table (Metaspace)."""
    pieces = [("<unk>", 0.0), ("</s>", -1.0), *((char, -5.0) for char in "▁</s>abcdefghijklmnopqrt.,!")]
    backend = Backend(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([special("</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


class StubFamily:
    """Replacing features: an image takes width * height // 100 + 1 rows; several images in one prompt take one less.
    With `cross`, one row of its own and one page."""

    name = "stub"

    def __init__(self, image_token_id: int | None, *, template: str | None = "qwen2-vl", cross: bool = False) -> None:
        self.chat_template = template
        self.image_token_id = image_token_id
        self.cross_page_len = 5 if cross else 0
        self.num_preprocessed = 0

    def plan_image(self, width: int, height: int, *, num_images: int) -> ImageLayout:
        mode = b"several" if num_images > 1 else b"single"
        if self.cross_page_len:
            return ImageLayout(1, 2, width, height, settings=mode)
        num_tokens = width * height // 100 + (1 if num_images > 1 else 2)
        return ImageLayout(num_tokens, 0, width, height, settings=mode)

    def preprocess(self, rgb: np.ndarray[Any, np.dtype[np.uint8]], layout: ImageLayout) -> torch.Tensor:
        self.num_preprocessed += 1
        return torch.tensor(rgb)

    def expand(self, token_ids: Sequence[int], layouts: Sequence[ImageLayout]) -> Expansion:
        assert list(token_ids).count(self.image_token_id or -1) == len(layouts)
        rows: list[int] = []
        spans: list[tuple[int, int]] = []
        left = list(layouts)
        for token_id in token_ids:
            num = left.pop(0).num_tokens if token_id == self.image_token_id else 1
            if token_id == self.image_token_id:
                spans.append((len(rows), len(rows) + num))
            rows += [token_id] * num
        if self.cross_page_len:
            spans = [(first, len(rows)) for first, _ in spans]
        return Expansion(np.array(rows, dtype=np.int64), spans)

    def encode(self, pixels: torch.Tensor, layout: ImageLayout, attention: Any) -> Iterator[torch.Tensor | None]:
        raise NotImplementedError


def noise(seed: str, width: int, height: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little"))
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
