from __future__ import annotations

import asyncio
import base64
import copy
import io
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prompt_helpers import CHATML, StubFamily, byte_level, noise

from lightvl.core import ImagePart, Message, Prompt, TextPart
from lightvl.errors import BadRequest, ContextLengthExceeded
from lightvl.images.cache import MediaCounters
from lightvl.images.fetch import ImageFetcher
from lightvl.prompt.build import Media, PromptBuilder, PromptLimits
from lightvl.prompt.builtin_templates import BUILTIN_TEMPLATES
from lightvl.prompt.tokenizer import Tokenizer

HF = byte_level([*CHATML, "<stop>"], eos="<|im_end|>")
IMAGE_ID = HF.convert_tokens_to_ids("<|image_pad|>")
VOCAB = 512


def url(seed: str, width: int = 20, height: int = 10, format: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.fromarray(noise(seed, width, height)).save(buffer, format)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def user(*parts: str | ImagePart) -> Message:
    return Message("user", tuple(TextPart(part) if isinstance(part, str) else part for part in parts))


def image(seed: str, param: str = "messages[0].content[0].image_url", **options: Any) -> ImagePart:
    return ImagePart(url(seed, **options), param)


Make = Callable[..., PromptBuilder]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    with ThreadPoolExecutor(4) as executor:
        fetchers: list[ImageFetcher] = []

        def make(family: Any = None, **options: Any) -> PromptBuilder:
            family = family if family is not None else StubFamily(IMAGE_ID)
            fetcher = ImageFetcher(executor=executor)
            fetchers.append(fetcher)
            tokenizer = Tokenizer(copy.deepcopy(HF), image_token_id=family.image_token_id)
            limits = PromptLimits(**{"context_len": 4096, "vocab_size": VOCAB, **options.pop("limits", {})})
            template = options.pop("template", BUILTIN_TEMPLATES["qwen2-vl"])
            return PromptBuilder(family, tokenizer, template, fetcher, executor, limits, **options)

        yield make
        for fetcher in fetchers:
            await fetcher.close()


def counts(builder: PromptBuilder) -> tuple[int, int, int]:
    return builder.counters.decodes, builder.counters.decode_hits, builder.counters.preprocesses


async def test_text_only(make: Make) -> None:
    builder = make()
    prompt = await builder.build_chat([user("Hello <|image_pad|>")])
    assert IMAGE_ID not in prompt.token_ids and prompt.token_ids.dtype == np.int64
    assert prompt.cache_key == prompt.token_ids.tolist() and not prompt.images and prompt.num_image_tokens == 0
    expected = HF.encode("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n")
    assert (await builder.build_chat([user("Hi")], add_generation_prompt=False)).cache_key == expected


async def test_images_that_replace_rows(make: Make) -> None:
    builder = make()
    prompt = await builder.build_chat([user("A", image("a"), "B", image("b", width=30), "C")])
    first, second = prompt.images
    assert (first.size, second.size) == (3, 4) and prompt.num_image_tokens == 7
    for item in prompt.images:
        assert item.end_row - item.first_row == item.size
        rows = range(item.first_row, item.end_row)
        assert {prompt.cache_key[row] for row in rows} == {1 << 128 | item.key} and 0 <= item.key < 1 << 128
        assert {int(prompt.token_ids[row]) for row in rows} == {IMAGE_ID}
    others = [row for row in range(len(prompt)) if not any(i.first_row <= row < i.end_row for i in prompt.images)]
    assert [prompt.cache_key[row] for row in others] == [int(prompt.token_ids[row]) for row in others]
    assert len(prompt) == len(prompt.token_ids) and first.key != second.key
    media = first.media
    assert isinstance(media, Media) and media.param == "messages[0].content[0].image_url"
    assert np.array_equal(media.pixels().numpy(), noise("a", 20, 10))


async def test_images_that_are_attended_to(make: Make) -> None:
    family = StubFamily(IMAGE_ID, cross=True)
    builder = make(family)
    prompt = await builder.build_chat([user("A", image("a"), image("b"), "C")])
    rows = np.flatnonzero(prompt.token_ids == IMAGE_ID).tolist()
    assert [(i.first_row, i.end_row, i.size) for i in prompt.images] == [(row, len(prompt), 2) for row in rows]
    assert [row for row, key in enumerate(prompt.cache_key) if key >= 1 << 128] == rows
    assert [prompt.cache_key[row] for row in rows] == [1 << 128 | i.key for i in prompt.images]
    assert prompt.num_image_tokens == 2
    alone = await builder.build_chat([user(image("a"))])  # of equal shape, but shown in another mode
    assert alone.images[0].key != prompt.images[0].key


async def test_the_same_image_is_worked_on_once(make: Make) -> None:
    family = StubFamily(IMAGE_ID)
    builder = make(family)
    prompts = await asyncio.gather(*(builder.build_chat([user(image("a"), f"Question {n}")]) for n in range(8)))
    assert counts(builder) == (1, 7, 1) and len({p.images[0].key for p in prompts}) == 1
    again = await builder.build_chat([user(image("a"))])
    assert counts(builder) == (1, 8, 1)
    again.images[0].media.pixels()
    assert counts(builder) == (1, 8, 1) and builder.counters.pixel_hits == 1
    both = await builder.build_chat([user(image("b"), image("b"))])
    assert both.images[0].key == both.images[1].key and counts(builder) == (2, 9, 2)


async def test_the_same_picture_in_other_bytes(make: Make) -> None:
    builder = make()
    prompts = [await builder.build_chat([user(image("a", format=format))]) for format in ("PNG", "BMP", "TIFF")]
    assert len({p.images[0].key for p in prompts}) == 1 and counts(builder) == (3, 0, 1)


async def test_the_view_mode_is_part_of_the_identity(make: Make) -> None:
    builder = make()
    one = await builder.build_chat([user(image("a"))])
    two = await builder.build_chat([user(image("a"), image("b"))])
    assert one.images[0].key != two.images[0].key and one.images[0].size == two.images[0].size + 1
    assert counts(builder)[2] == 3
    await builder.build_chat([user(image("b"), image("a"))])
    assert counts(builder)[2] == 3
    mixed = await asyncio.gather(
        builder.build_chat([user(image("c"))]), builder.build_chat([user(image("c"), image("a"))])
    )
    assert mixed[0].images[0].key != mixed[1].images[0].key and counts(builder)[2] == 5


async def test_an_image_of_low_detail_is_the_shrunk_picture(make: Make) -> None:
    builder = make(limits={"pixel_cache_bytes": 700})
    part = image("a", width=40, height=20)
    whole = (await builder.build_chat([user(part)])).images[0]
    low = (await builder.build_chat([user(replace(part, max_side=20))])).images[0]
    shrunk = np.asarray(Image.fromarray(noise("a", 40, 20)).resize((20, 10), Image.Resampling.BICUBIC))
    assert low.key != whole.key and (whole.media.layout.width, low.media.layout.width) == (40, 20)
    await builder.build_chat([user(image("b"))])  # and its pixels are dropped
    assert np.array_equal(low.media.pixels().numpy(), shrunk)
    larger = (await builder.build_chat([user(replace(part, max_side=40))])).images[0]
    assert larger.key == whole.key, "it is no larger, so it is the same picture"


async def test_dropped_pixels_are_made_again(make: Make) -> None:
    builder = make(limits={"pixel_cache_bytes": 700})  # one image of 20x10x3
    first = (await builder.build_chat([user(image("a"))])).images[0].media
    await builder.build_chat([user(image("b"))])
    assert counts(builder) == (2, 0, 2)
    await builder.build_chat([user(image("a"))])  # known, so nothing is decoded before the pixels are wanted
    assert counts(builder) == (2, 1, 2)
    assert np.array_equal(first.pixels().numpy(), noise("a", 20, 10)) and counts(builder) == (3, 1, 3)
    first.pixels()
    assert builder.counters.pixel_hits == 1


async def test_a_cancelled_request_does_not_harm_another(make: Make) -> None:
    entered, go = threading.Event(), threading.Event()

    class Slow(StubFamily):
        def preprocess(self, rgb: Any, layout: Any) -> Any:
            entered.set()
            assert go.wait(30)
            return super().preprocess(rgb, layout)

    builder = make(Slow(IMAGE_ID))
    tasks = [asyncio.create_task(builder.build_chat([user(image("a"))])) for _ in range(3)]
    await asyncio.to_thread(entered.wait)
    tasks[0].cancel()
    await asyncio.sleep(0)
    go.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert all(isinstance(result, Prompt) for result in results[1:]) and builder.counters.decodes == 1


async def test_errors_name_the_image(make: Make) -> None:
    builder = make()
    bad = ImagePart(base64.b64encode(b"no image").decode(), "messages[0].content[3].image_url")
    worse = ImagePart(bad.url, "messages[0].content[9].image_url")
    with pytest.raises(BadRequest, match="not an image that can be read") as caught:
        await builder.build_chat([user(image("a"), bad)])
    assert caught.value.param == bad.param and caught.value.message.startswith(bad.param)
    results = await asyncio.gather(*(builder.build_chat([user(part)]) for part in (bad, worse)), return_exceptions=True)
    assert [getattr(result, "param", None) for result in results] == [bad.param, worse.param]

    class Picky(StubFamily):
        def plan_image(self, width: int, height: int, *, num_images: int) -> Any:
            raise BadRequest("the image is too long and thin")

    for _ in range(2):
        with pytest.raises(BadRequest, match="too long and thin") as caught:
            await make(Picky(IMAGE_ID)).build_chat([user(image("a", param="P"))])
        assert caught.value.param == "P"


async def test_refusals(make: Make) -> None:
    builder = make(limits={"max_images": 2})
    with pytest.raises(BadRequest, match="at most 2") as caught:
        await builder.build_chat([user(image("a"), image("a"), image("a", param="third"))])
    assert caught.value.param == "third"
    text_model = make(StubFamily(None, template=None))
    with pytest.raises(BadRequest, match="takes no images") as caught:
        await text_model.build_chat([user("x", image("a", param="p"))])
    assert caught.value.param == "p"
    for build in (text_model.build_text("x", [image("a")]), text_model.build_ids([1], [image("a")])):
        with pytest.raises(BadRequest, match="takes no images"):
            await build
    with pytest.raises(BadRequest, match="no chat template"):
        await make(template=None).build_chat([user("x")])
    for build in (builder.build_text(""), builder.build_ids([]), builder.build_chat([])):
        with pytest.raises(BadRequest, match="empty"):
            await build


async def test_context_length(make: Make) -> None:
    builder = make(limits={"context_len": 64})
    for build, param in (
        (builder.build_chat([user("word " * 100)]), "messages"),
        (builder.build_chat([user("w" * 100_000)]), "messages"),
        (builder.build_text("a", [image("big", width=100, height=80)]), "text"),
        (builder.build_ids([1] * 64), "input_ids"),
    ):
        with pytest.raises(ContextLengthExceeded) as caught:
            await build
        assert caught.value.param == param
        assert caught.value.code == "context_length_exceeded" and "64 tokens" in caught.value.message
    assert len(await builder.build_ids([1] * 63)) == 63


async def test_build_text(make: Make) -> None:
    builder = make()
    text = "<|im_start|>user\nA<|vision_start|><|image_pad|><|vision_end|>B<|image_pad|>"
    prompt = await builder.build_text(text, [image("a"), image("b")])
    assert prompt.token_ids.tolist().count(IMAGE_ID) == 6 and prompt.images[0].first_row > 3
    assert (await builder.build_text(text.replace("<|image_pad|>", ""))).cache_key == HF.encode(
        text.replace("<|image_pad|>", "")
    )
    front = await builder.build_text("What?", [image("a"), image("b")])
    around = HF.encode("<|vision_start|>")[0], HF.encode("<|vision_end|>")[0]
    assert front.cache_key[0] == around[0] and front.images[0].first_row == 1
    assert front.token_ids.tolist()[4:6] == [around[1], around[0]] and HF.decode(front.token_ids[-2:]) in "What?"
    for bad, images in ((text, [image("a")]), ("<|image_pad|>", [])):
        with pytest.raises(BadRequest, match="places for"):
            await builder.build_text(bad, images)


async def test_build_ids(make: Make) -> None:
    builder = make()
    prompt = await builder.build_ids([5, IMAGE_ID, 6], [image("a")])
    assert prompt.token_ids.tolist() == [5, *[IMAGE_ID] * 4, 6]
    front = await builder.build_ids([5, 6], [image("a")])
    assert front.token_ids.tolist()[-3:] == [HF.convert_tokens_to_ids("<|vision_end|>"), 5, 6]
    beyond = make(limits={"vocab_size": IMAGE_ID})  # as mllama's, which has no logit
    assert len(await beyond.build_ids([5, IMAGE_ID], [image("a")])) == 5
    for ids in ([-1], [VOCAB], [3, 1 << 40]):
        with pytest.raises(BadRequest, match="input_ids"):
            await builder.build_ids(ids)
    for ids, images in (([IMAGE_ID], []), ([IMAGE_ID, 1, IMAGE_ID], [image("a")])):
        with pytest.raises(BadRequest, match="places for"):
            await builder.build_ids(ids, images)


async def test_stops(make: Make) -> None:
    end = HF.convert_tokens_to_ids("<|im_end|>")
    builder = make(generation_eos_ids=[7, 8])
    assert builder.stop_token_ids == {7, 8, end} and builder.stop_strings == ()
    builder = make(template=BUILTIN_TEMPLATES["llama_3_vision"])
    assert builder.stop_token_ids == {end} and builder.stop_strings == ("<|end_of_text|>", "<|eot_id|>")


async def test_counters_may_be_shared(make: Make) -> None:
    counters = MediaCounters()
    builder = make(counters=counters)
    await builder.build_chat([user(image("a"))])
    assert builder.counters is counters and counters.decodes == 1


async def test_long_prompts_and_large_images_leave_the_loop_free(make: Make) -> None:
    """Longest time between two turns of the loop. Generous: other work shares this machine's cores."""
    builder = make(limits={"context_len": 1 << 20})
    data = image("big", width=1500, height=1200, format="BMP")
    text = "The quick brown fox jumps over the lazy dog. " * 8000
    worst, running = 0.0, True

    async def watch() -> None:
        nonlocal worst
        while running:
            started = time.perf_counter()
            await asyncio.sleep(0)
            worst = max(worst, time.perf_counter() - started)

    watcher = asyncio.create_task(watch())
    await builder.build_chat([user(data, text)])
    running = False
    await watcher
    print(f"longest block {worst * 1e3:.1f} ms")
    assert worst < 0.25


async def test_a_prompt_as_text(make: Make) -> None:
    builder = make()
    text = "<|im_start|>user\nA<|vision_start|><|image_pad|><|vision_end|>B<|image_pad|>"
    prompt = await builder.build_text(text, [image("a"), image("b")])
    assert len(prompt) > len(await builder.tokenize(text, add_special_tokens=True))
    assert builder.text_of(prompt) == text
    ids = await builder.tokenize(text, add_special_tokens=False)
    assert builder.detokenize(ids, skip_special_tokens=False) == text
    assert builder.detokenize(ids, skip_special_tokens=True) == "user\nAB"
