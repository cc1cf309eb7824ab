"""Exact answers of an exported checkpoint through transformers' own classes, in float32."""

import time
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .cases import Case, held_out_case

MAX_NEW_TOKENS = 96


class Oracle:
    """A checkpoint folder as transformers runs it."""

    def __init__(self, folder: Path) -> None:
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)

    @torch.inference_mode()
    def answer(self, case: Case) -> str:
        """The greedy answer to the last message."""
        images = [part for _, parts in case.messages for part in parts if isinstance(part, Image.Image)]
        prompt: str = self.tokenizer.apply_chat_template(as_chat(case), tokenize=False, add_generation_prompt=True)
        inputs: dict[str, torch.Tensor] = {}
        if images:
            inputs = dict(self.processor(images, return_tensors="pt"))
            for grid in inputs["image_grid_thw"].tolist():
                prompt = prompt.replace("<|image_pad|>", "<|taken|>" * (grid[1] * grid[2] // 4), 1)
        prompt = prompt.replace("<|taken|>", "<|image_pad|>")
        ids = torch.tensor([self.tokenizer.encode(prompt, add_special_tokens=False)])
        if images:
            inputs["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()
        done = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
        )
        return self.tokenizer.decode(done[0, ids.shape[1] :], skip_special_tokens=True)


def as_chat(case: Case) -> list[dict]:
    """The case as transformers' chat messages."""
    return [
        {
            "role": role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts
            ],
        }
        for role, parts in case.messages
    ]


def evaluate(folder: Path, numbers: Iterable[int], max_seconds: float = 1e9) -> dict[str, tuple[int, int]]:
    """Kind -> (right, asked), over the held-out cases of these numbers, or as many as time allows."""
    oracle, end = Oracle(folder), time.monotonic() + max_seconds
    scores: dict[str, tuple[int, int]] = {}
    for number in numbers:
        if time.monotonic() > end:
            break
        case = held_out_case(number)
        right, asked = scores.get(case.kind, (0, 0))
        scores[case.kind] = (right + (oracle.answer(case) == case.answer), asked + 1)
    return scores


def table(scores: dict[str, tuple[int, int]]) -> str:
    """Scores as a Markdown table with a row for all."""
    total = (sum(right for right, _ in scores.values()), sum(asked for _, asked in scores.values()))
    rows = [*sorted(scores.items()), ("all", total)]
    lines = ["| kind | right | asked | % |", "| --- | --- | --- | --- |"]
    return "\n".join(
        lines + [f"| {kind} | {right} | {asked} | {100 * right / max(asked, 1):.1f} |" for kind, (right, asked) in rows]
    )
