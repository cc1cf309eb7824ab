"""HF transformers as the oracle of a whole service: the same messages to both, logprobs and greedy tokens compared.

"The same" (shared design): float32, teacher-forced logprobs within 1e-3, and tokens equal up to the first step whose
two best tokens are closer than 2e-3.
"""

from __future__ import annotations

import base64
import copy
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import oracle as text_models
import tiny_models
import torch
from PIL import Image
from published import QWEN_TEMPLATE, QWEN_TOKENS

from lightvl.config import ServerConfig
from lightvl.core import Finish, ImagePart, Message, SamplingParams, TextPart, TokenLogprob
from lightvl.engine.build import LightVLService, build_service
from lightvl.metrics import Metrics

LOGPROB_TOLERANCE = 1e-3
NEAR_TIE = 2e-3
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "mllama", "llama", "qwen2")
IMAGE_FAMILIES = FAMILIES[:3]

Part = str | tuple[int, int, int]
"""A text, or a noise image as (width, height, seed)."""
Turns = list[tuple[str, list[Part]]]

SIZES = [(28, 28), (100, 57), (33, 160), (260, 40), (9, 11), (203, 190), (57, 58)]


def question(num_images: int, case: int, *, words: str = "What is in these pictures?") -> Turns:
    """Images of odd sizes at various places: first, between texts, after the text, two in a row."""
    images: list[Part] = [(*SIZES[(case + i) % len(SIZES)], 31 * case + i) for i in range(num_images)]
    layouts: list[list[Part]] = [
        [*images, words],
        [piece for image in images for piece in ("See", image)] + [words],
        [words, *images],
    ]
    turns: Turns = [("system", ["Be brief."])] if case % 2 else []
    return [*turns, ("user", layouts[case % 3])]


def noise_image(width: int, height: int, seed: int) -> Image.Image:
    """Noise in blocks of several sizes, so that resizing, tiling and cropping all show."""
    rng = np.random.default_rng(seed)
    fine = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)).resize((width, height))
    return Image.blend(Image.fromarray(fine), coarse, 0.6)


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def to_messages(turns: list[tuple[str, list[Part]]]) -> list[Message]:
    def to_part(part: Part) -> TextPart | ImagePart:
        return TextPart(part) if isinstance(part, str) else ImagePart(data_url(noise_image(*part)))

    return [Message(role, tuple(to_part(part) for part in parts)) for role, parts in turns]  # type: ignore[arg-type]


class Oracle:
    """One tiny random model in a folder, and HF's answers for it."""

    def __init__(self, name: str, folder: Path, **sizes: Any) -> None:
        """`sizes`: of the tiny model's builder."""
        self.name, self.folder = name, folder
        if name in IMAGE_FAMILIES:
            self.model = getattr(tiny_models, f"tiny_{name}")(folder, **sizes)
        else:
            self.model = getattr(text_models, f"tiny_{name}")(folder, **{"vocab_size": 384} | sizes)
            _add_text_tokenizer(folder)
        if name == "mllama":
            text_models.correct_to_metas_rule(self.model.model.language_model)
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        config = self.model.config
        self.image_token_id = getattr(config, "image_token_id", getattr(config, "image_token_index", None))

    def prepare(self, turns: list[tuple[str, list[Part]]]) -> tuple[list[int], dict[str, Any]]:
        """Prompt ids, and the model's further inputs, by HF's own template, tokenizer and PIL image processor."""
        chat = [
            {
                "role": role,
                "content": [
                    {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts
                ]
                if self.name in IMAGE_FAMILIES
                else "".join(part for part in parts if isinstance(part, str)),
            }
            for role, parts in turns
        ]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        images = [noise_image(*part) for _, parts in turns for part in parts if not isinstance(part, str)]
        extra: dict[str, Any] = {}
        if images and self.name == "mllama":
            from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

            processed = MllamaImageProcessorPil.from_pretrained(self.folder)([images], return_tensors="pt")
            extra = dict(processed)
        elif images:
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

            extra = dict(Qwen2VLImageProcessorPil.from_pretrained(self.folder)(images, return_tensors="pt"))
            for grid in extra["image_grid_thw"].tolist():
                text = text.replace("<|image_pad|>", "<|?|>" * (grid[0] * grid[1] * grid[2] // 4), 1)
            text = text.replace("<|?|>", "<|image_pad|>")
        return self.tokenizer.encode(text, add_special_tokens=False), extra

    @torch.no_grad()
    def logprobs(
        self, prompt_ids: list[int], output_ids: list[int], extra: dict[str, Any], model: Any = None
    ) -> torch.Tensor:
        """(len(output_ids), vocab): teacher-forced log-softmax before each output token, by `model` or the oracle's."""
        model = self.model if model is None else model
        ids = torch.tensor([prompt_ids + output_ids])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra}
        num_tiles = inputs.pop("num_tiles", None)
        if self.name == "mllama" and extra:
            inputs["cross_attention_mask"] = self._cross_mask(ids[0].tolist(), num_tiles)
        if "image_grid_thw" in extra:
            inputs["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()
        logits = model(**inputs_for(model, inputs), use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
        return logits.float().log_softmax(-1).cpu()

    def _cross_mask(self, ids: list[int], num_tiles: list[list[int]]) -> torch.Tensor:
        from transformers.models.mllama.processing_mllama import (
            convert_sparse_cross_attention_mask_to_dense,
            get_cross_attention_token_mask,
        )

        sparse = get_cross_attention_token_mask(ids, self.model.config.image_token_index)
        dense = convert_sparse_cross_attention_mask_to_dense(
            [sparse], num_tiles=[list(map(int, num_tiles[0]))], max_num_tiles=4, length=len(ids)
        )
        return torch.from_numpy(dense)


def inputs_for(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """On the model's device, pixels in its dtype."""
    moved = {name: x.to(model.device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    if "pixel_values" in moved:
        moved["pixel_values"] = moved["pixel_values"].to(model.dtype)
    return moved


def _add_text_tokenizer(folder: Path) -> None:
    """Text-only tiny models come without tokenizer files: they get Qwen's, whose ids fit their vocabulary."""
    tokenizer = tiny_models._train_tokenizer(QWEN_TOKENS[:3], bos=None)
    tiny_models._save_tokenizer(
        folder,
        tokenizer,
        QWEN_TOKENS[:3],
        tokenizer_class="PreTrainedTokenizerFast",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=QWEN_TEMPLATE,
    )


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None


@asynccontextmanager
async def serving(oracle: Oracle, **flags: Any) -> AsyncIterator[LightVLService]:
    """A whole service but for HTTP; at the end all its pools are checked and empty."""
    flags = {"dtype": "float32", "max_total_tokens": 4096, "mem_fraction_static": 0.05} | flags
    service = build_service(ServerConfig(model_path=str(oracle.folder), **flags), Metrics())
    await service.start()
    try:
        yield service
        scheduler = service.engine._scheduler
        scheduler.check()
        assert not scheduler.has_work
    finally:
        await service.close()


async def ask(
    service: LightVLService, turns: list[tuple[str, list[Part]]], *, max_tokens: int = 12, **params: Any
) -> list[Answer]:
    """All choices of one request. Greedy, with five alternatives, unless `params` says otherwise."""
    prompt = await service.prompts.build_chat(to_messages(turns))
    given: dict[str, Any] = {"temperature": 0.0, "top_logprobs": 5} | params
    answers = [Answer() for _ in range(given.get("n", 1))]
    async for delta in service.engine.submit(prompt, SamplingParams(max_tokens=max_tokens, **given)):
        answer = answers[delta.choice]
        assert answer.finish is None
        answer.token_ids += delta.token_ids
        answer.logprobs += delta.logprobs
        answer.text += delta.text
        answer.finish = delta.finish
    return answers


def assert_same(oracle: Oracle, turns: list[tuple[str, list[Part]]], answer: Answer) -> None:
    """Greedy `answer` against the oracle, teacher-forced on the answer's own tokens."""
    prompt_ids, extra = oracle.prepare(turns)
    assert answer.finish is not None
    assert answer.finish.prompt_tokens == len(prompt_ids), "the prompt has other tokens than HF's"
    assert len(answer.token_ids) == len(answer.logprobs)
    output_ids = answer.token_ids
    if oracle.image_token_id in output_ids:  # a random model may say it, and HF takes it for one more image
        output_ids = output_ids[: output_ids.index(oracle.image_token_id)]
    want = oracle.logprobs(prompt_ids, output_ids, extra)
    for step, (token_id, told) in enumerate(zip(output_ids, answer.logprobs, strict=False)):
        told_ids = [token_id, *(top_id for top_id, _ in told.top)]
        told_logprobs = torch.tensor([told.logprob, *(logprob for _, logprob in told.top)])
        off = (want[step, told_ids] - told_logprobs).abs().max().item()
        assert off < LOGPROB_TOLERANCE, f"{oracle.name}: logprobs of output {step} are off by {off:.2e}"
        best = want[step].topk(2)
        if best.values[0] - best.values[1] > NEAR_TIE:
            assert token_id == best.indices[0], f"{oracle.name}: output {step} is another token"


class Bfloat16Errors:
    """Our errors of logprobs against float32, of tokens and alternatives of several answers, beside those of HF's model
    in bfloat16."""

    def __init__(self, oracle: Any, model: Any, device: str = "cpu") -> None:
        """`model`: HF's in float32. `device`: where HF computes in bfloat16."""
        self._oracle = oracle
        # hooks are copied with the layers that they belong to
        self._rounded = rounded_to_bfloat16(copy.deepcopy(model)).to(device)
        self._ours: list[torch.Tensor] = []
        self._theirs: list[torch.Tensor] = []

    def add(self, turns: list[tuple[str, list[Part]]], answer: Answer) -> None:
        prompt_ids, extra = self._oracle.prepare(turns)
        output_ids = answer.token_ids
        if self._oracle.image_token_id in output_ids:  # as in assert_same
            output_ids = output_ids[: output_ids.index(self._oracle.image_token_id)]
        if not output_ids:
            return
        exact = self._oracle.logprobs(prompt_ids, output_ids, extra)
        hf = self._oracle.logprobs(prompt_ids, output_ids, extra, model=self._rounded)
        for step, told in enumerate(answer.logprobs[: len(output_ids)]):
            ids = [told.token_id, *(top_id for top_id, _ in told.top)]
            logprobs = torch.tensor([told.logprob, *(logprob for _, logprob in told.top)])
            self._ours.append((logprobs - exact[step, ids]).abs())
            self._theirs.append((hf[step, ids] - exact[step, ids]).abs())

    @property
    def ours(self) -> float:
        return torch.cat(self._ours).mean().item()

    @property
    def theirs(self) -> float:
        return torch.cat(self._theirs).mean().item()

    def check(self) -> None:
        message = f"{self._oracle.name}: bfloat16 is off by {self.ours:.4f}, HF's by {self.theirs:.4f}"
        assert self.ours <= 2 * self.theirs, message


def rounded_to_bfloat16(model: Any) -> Any:
    """In place, as `from_pretrained(dtype=torch.bfloat16)` leaves it: parameters only. `model.to` would round rope's
    frequencies too, and HF would look worse than it is."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


async def assert_bfloat16_errs_like_hf(oracle: Any, model: Any, all_turns: list[list[tuple[str, list[Part]]]]) -> None:
    """Our mean error is at most twice that of HF's `model` rounded to bfloat16."""
    errors = Bfloat16Errors(oracle, model)
    async with serving(oracle, dtype="bfloat16") as service:
        for turns in all_turns:
            errors.add(turns, (await ask(service, turns, max_tokens=16))[0])
    errors.check()
