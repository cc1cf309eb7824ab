"""The tokenizer: a small byte-level BPE (any text can be written), plus the control tokens of the model's family."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

from published import LLAMA_TEMPLATE, LLAMA_TOKENS, QWEN_TEMPLATE, QWEN_TOKENS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from . import dialogues, questions
from .pictures import KINDS as PICTURE_KINDS
from .pictures import draw_facts

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_CONTROL = (*LLAMA_TOKENS, "<|image|>")  # <|image|>: the first id past the text vocabulary, as published
SYSTEM = "You are a helpful assistant."
LLAMA_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
OTHER_SYSTEMS = (
    "Answer briefly.",
    "You are a friendly assistant.",
    "Answer in one sentence.",
    "Be concise.",
    "You describe images.",
    "You are a vision model.",
)
PRINTED = re.compile('"[A-Z0-9]*"')


def corpus(seed: int = 0, num_scenes: int = 6000) -> list[str]:
    """The text the tokenizer learns from: questions, answers, fixed sentences and the headers of the template.

    What is printed in pictures is left out, so that words are spelled letter by letter.
    """
    rng = random.Random(f"corpus {seed}")
    texts = ["system", "user", "assistant", SYSTEM, LLAMA_SYSTEM, *OTHER_SYSTEMS] * 50
    for _ in range(num_scenes):
        several = dialogues.draw_many([(168, 168)] * 2, rng)
        asked = [dialogues.talk(rng), dialogues.ask_many(several, rng)]
        for kind in PICTURE_KINDS:
            facts = draw_facts(kind, 168, 168, rng)
            asked += [questions.ask_any(facts, rng) for _ in range(2 if kind == "scene" else 1)]
        for question, answer in asked:
            texts += [questions.plain(question), PRINTED.sub('""', questions.plain(answer))]
    return texts


def train_tokenizer(control_tokens: Sequence[str] = QWEN_TOKENS, vocab_size: int = 896) -> Tokenizer:
    """Bytes first, then merges learned from `corpus`, then the control tokens; the same at every call."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control_tokens])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.json as the published Qwen2-VL has them."""
    config = {
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": QWEN_TEMPLATE,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    _save(tokenizer, folder, QWEN_TOKENS, config)


def save_llama_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """The same files as the published Llama-3.2-Vision has them; its tokenizer puts a BOS before each text."""
    bos = LLAMA_TOKENS[0]
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    with_bos = Tokenizer.from_str(tokenizer.to_str())
    with_bos.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    config = {
        "bos_token": bos,
        "chat_template": LLAMA_TEMPLATE,
        "eos_token": "<|eot_id|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "pad_token": "<|finetune_right_pad_id|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _save(with_bos, folder, LLAMA_CONTROL, config)


def _save(tokenizer: Tokenizer, folder: Path, control_tokens: Sequence[str], config: dict) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(tokenizer.token_to_id(token)): {"content": token, **flags} for token in control_tokens}
    config |= {
        "added_tokens_decoder": added,
        "additional_special_tokens": list(control_tokens[1:]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": config["chat_template"]}, indent=2) + "\n")
