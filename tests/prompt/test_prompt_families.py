"""Whole prompts of real families, from checkpoint folders, against HF's tokenizer, image processor and rope index."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from prompt_helpers import noise

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny_models

from lightvl.core import OPEN_END, ImagePart, Message, TextPart
from lightvl.images.fetch import ImageFetcher
from lightvl.models.families import build_family
from lightvl.prompt.build import PromptBuilder, PromptLimits
from lightvl.prompt.choice import choose_template
from lightvl.prompt.tokenizer import Tokenizer

SIZES = [(97, 61), (200, 90), (40, 130)]


def picture(number: int) -> Image.Image:
    return Image.fromarray(noise(f"picture {number}", *SIZES[number]))


def part(number: int) -> ImagePart:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return ImagePart(base64.b64encode(buffer.getvalue()).decode(), f"messages[0].content[{number}].image_url")


@pytest.fixture
async def executor() -> AsyncIterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


def builder_for(folder: Path, executor: ThreadPoolExecutor, template: str | None) -> PromptBuilder:
    config = json.loads((folder / "config.json").read_text())
    family: Any = build_family(config, folder, dtype=torch.float32, device=torch.device("cpu"), max_image_tokens=None)
    tokenizer = Tokenizer.load(str(folder), image_token_id=family.image_token_id)
    chosen, _ = choose_template(template, tokenizer, family_template=family.chat_template, takes_images=True)
    limits = PromptLimits(context_len=16384, vocab_size=config.get("vocab_size", 10**6))
    return PromptBuilder(family, tokenizer, chosen, ImageFetcher(executor=executor), executor, limits)


def talk(num_images: int) -> tuple[list[Message], list[dict[str, Any]]]:
    parts: list[TextPart | ImagePart] = [TextPart("Look: ")]
    for number in range(num_images):
        parts += [part(number), TextPart(f"then {number}, ")]
    parts.append(TextPart("what is it?"))
    messages = [Message("system", (TextPart("You are naïf."),)), Message("user", tuple(parts))]
    contents = [{"type": "image"} if isinstance(p, ImagePart) else {"type": "text", "text": p.text} for p in parts]
    return messages, [{"role": "system", "content": "You are naïf."}, {"role": "user", "content": contents}]


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
async def test_qwen_vl(kind: str, tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = getattr(tiny_models, f"tiny_{kind}")(tmp_path)
    hf = AutoTokenizer.from_pretrained(tmp_path)
    processor = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    own, built_in = builder_for(tmp_path, executor, None), builder_for(tmp_path, executor, "qwen2-vl")
    for num_images in range(4):
        messages, chat = talk(num_images)
        prompt = await own.build_chat(messages)
        text = hf.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        grids = torch.zeros(0, 3, dtype=torch.long)
        if num_images:
            pictures = [picture(n) for n in range(num_images)]
            grids = processor(pictures, return_tensors="pt")["image_grid_thw"]
        for grid in grids:
            text = text.replace("<|image_pad|>", "<|slot|>" * (int(grid.prod()) // 4), 1)
        expected = hf.encode(text.replace("<|slot|>", "<|image_pad|>"))
        assert prompt.token_ids.tolist() == expected
        assert (await built_in.build_chat(messages)).cache_key == prompt.cache_key
        if num_images:
            ids = torch.tensor([expected])
            kinds = (ids == model.config.image_token_id).int()
            positions, delta = model.model.get_rope_index(ids, image_grid_thw=grids, mm_token_type_ids=kinds)
            assert prompt.positions is not None and np.array_equal(prompt.positions, positions[:, 0].numpy())
            assert prompt.rope_delta == int(delta)
        assert [image.size for image in prompt.images] == [int(grid.prod()) // 4 for grid in grids]
    assert own.stop_token_ids == {hf.eos_token_id}


async def test_mllama(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    from transformers import AutoTokenizer

    tiny_models.tiny_mllama(tmp_path)
    hf = AutoTokenizer.from_pretrained(tmp_path)
    builder = builder_for(tmp_path, executor, None)
    for num_images in range(4):
        messages, chat = talk(num_images)
        prompt = await builder.build_chat(messages)
        expected = hf.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert prompt.token_ids.tolist() == expected and expected.count(hf.bos_token_id) == 1
        rows = [row for row, token_id in enumerate(expected) if token_id == hf.convert_tokens_to_ids("<|image|>")]
        assert [image.first_row for image in prompt.images] == rows
        assert [image.end_row for image in prompt.images] == [*rows[1:], OPEN_END][: len(rows)]
        keyed = [row for row, key in enumerate(prompt.cache_key) if key >= 1 << 128]
        assert keyed == rows and prompt.num_image_tokens == len(rows)
        assert all(1 <= image.size <= 4 for image in prompt.images)
    named = builder_for(tmp_path, executor, "llama_3_vision")
    messages, _ = talk(1)
    text = "".join(map(named.token_text, (await named.build_chat(messages)).token_ids.tolist()))
    assert text.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are na")
    assert "\n\nLook: <|image|>\nthen 0, what is it?<|eot_id|>" in text
    both = [Message("user", (part(0), part(1), TextPart("Compare.")))]
    first, second = (await named.build_chat(both)).images
    assert first.end_row == second.end_row == OPEN_END and second.first_row == first.first_row + 1
