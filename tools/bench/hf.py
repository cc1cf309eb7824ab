"""HF transformers' `generate` on the same weights and prompts: the yardstick of `bench_serve.py --hf`."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.generation.streamers import BaseStreamer


class Clock(BaseStreamer):
    """Notes when each step's tokens come; the first call brings the prompt. Takes batches, unlike TextStreamer."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def decode_s(self) -> float:
        """From the first sampled token to the last."""
        return self.times[-1] - self.times[1]


class HFModel:
    """bf16, HF's default attention, the PIL-backed image processor."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.image_processor: Any = None
        if self.model.config.model_type.startswith("qwen2"):
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

            self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)

    def decode_tok_s(self, texts: list[str], num_tokens: int) -> float:
        """Tokens a second after the first, all rows together."""
        prompts = [self._prompt(text, with_image=False) for text in texts]
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        clock = self._generate(dict(inputs), num_tokens)
        return len(texts) * (num_tokens - 1) / clock.decode_s

    def image_ttft(self, text: str, jpeg: bytes) -> float:
        """Seconds from the bytes of the image to the first token."""
        if self.image_processor is None:
            raise RuntimeError("TTFT of an image is measured for Qwen2-VL and Qwen2.5-VL only")
        start = time.perf_counter()
        images = self.image_processor(images=[Image.open(io.BytesIO(jpeg)).convert("RGB")], return_tensors="pt")
        num_rows = int(images["image_grid_thw"][0].prod()) // self.image_processor.merge_size**2
        prompt = self._prompt(text, with_image=True).replace("<|image_pad|>", "<|image_pad|>" * num_rows)
        inputs = dict(self.tokenizer([prompt], return_tensors="pt", add_special_tokens=False))
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.model.config.image_token_id).long()
        clock = self._generate({**inputs, **images}, 1)
        return clock.times[1] - start

    def _prompt(self, text: str, with_image: bool) -> str:
        content = [{"type": "image"}] if with_image else []
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
        prompt: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return prompt

    def _generate(self, inputs: dict[str, torch.Tensor], num_tokens: int) -> Clock:
        clock = Clock()
        with torch.inference_mode():
            self.model.generate(
                **inputs,
                streamer=clock,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
            )
        return clock
