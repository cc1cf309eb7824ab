"""A request's messages, text or token ids, with images, to the `Prompt` that a sequence starts from.

The server calls `PromptBuilder` on the event loop; whatever is long (tokenizing, images) runs in its threads. Knows
the family only as functions, and nothing of scheduling, sampling or HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from lightvl.core import Grammar, GrammarKind, ImagePart, Message, Prompt, PromptImage, TextPart
from lightvl.errors import BadRequest, ContextLengthExceeded
from lightvl.images.cache import MediaCounters
from lightvl.images.decode import DEFAULT_MAX_PIXELS
from lightvl.images.fetch import ImageFetcher
from lightvl.prompt.builtin_templates import BUILTIN_TEMPLATES
from lightvl.prompt.media import Media, MediaLoader
from lightvl.prompt.structured import Grammars
from lightvl.prompt.template import Control, ImageSlot, Segment, Template
from lightvl.prompt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lightvl.models.family import Expansion, Family

__all__ = ["Media", "PromptBuilder", "PromptLimits"]

T = TypeVar("T")

_INLINE_CHARS = 2048  # shorter text is rendered and tokenized on the loop: under 1 ms
_IMAGE_KEY_BIT = 1 << 128  # keeps image keys apart from token ids


@dataclass(frozen=True, slots=True)
class PromptLimits:
    context_len: int  # tokens; a prompt must be shorter
    vocab_size: int  # ids that the model can take, besides the image token's
    max_images: int = 32  # per request
    max_pixels: int = DEFAULT_MAX_PIXELS  # per image, before resizing
    pixel_cache_bytes: int = 512 << 20


class PromptBuilder:
    def __init__(
        self,
        family: Family,
        tokenizer: Tokenizer,
        template: Template | None,
        fetcher: ImageFetcher,
        executor: Executor,
        limits: PromptLimits,
        *,
        counters: MediaCounters | None = None,
        generation_eos_ids: Collection[int] = (),
    ) -> None:
        """`template` None: the model has none, chat is refused. `generation_eos_ids`: generation_config.json's."""
        self.tokenizer = tokenizer
        self.counters = counters if counters is not None else fetcher.counters
        self.media = MediaLoader(
            family,
            fetcher,
            executor,
            self.counters,
            max_pixels=limits.max_pixels,
            pixel_cache_bytes=limits.pixel_cache_bytes,
        )
        self._family = family
        self._template = template
        self._executor = executor
        self._limits = limits
        self._max_token_len = max(map(len, tokenizer.vocabulary.token_bytes), default=1)
        stops = {text: tokenizer.control_id(text) for text in (template.stop if template is not None else ())}
        eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        by_template = [token_id for token_id in stops.values() if token_id is not None]
        self.stop_strings: tuple[str, ...] = tuple(text for text, token_id in stops.items() if token_id is None)
        self.stop_token_ids: frozenset[int] = frozenset({*eos, *generation_eos_ids, *by_template})
        self._grammars = Grammars(tokenizer, limits.vocab_size, self.stop_token_ids)

    @property
    def vocab_size(self) -> int:
        return self._limits.vocab_size

    async def build_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> Prompt:
        """Raises BadRequest for what is wrong with the messages or their images, naming the field."""
        template = self._template
        if template is None:
            raise BadRequest("this model has no chat template: use /v1/completions or /generate", param="messages")
        if not messages:
            raise BadRequest("messages is empty", param="messages")
        images = [part for message in messages for part in message.parts if isinstance(part, ImagePart)]
        self._check_images(images)
        num_chars = sum(len(part.text) for message in messages for part in message.parts if isinstance(part, TextPart))

        def encode() -> list[int]:
            segments = template.render(
                messages, add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message
            )
            return self._encode(segments, "messages", bos=template.starts_with_bos)

        return await self._with_images(await self._off_loop_if(num_chars > _INLINE_CHARS, encode), images, "messages")

    async def build_text(self, text: str, images: Sequence[ImagePart] = (), *, param: str = "text") -> Prompt:
        """A prompt as its client wrote it, special tokens included: image tokens in it are the images' slots. Without
        any, the images come first, as the family's template writes them. `param`: the field it came in, for errors."""
        self._check_images(images)
        if not text and not images:
            raise BadRequest("the prompt is empty", param=param)
        image_token = self.tokenizer.image_token
        pieces = text.split(image_token) if image_token is not None else [text]
        if len(pieces) == 1 and images:
            start, rest = self._split_bos(text)
            segments: list[Segment] = [Control(start), *self._images_in_front(len(images)), Control(rest)]
        else:
            self._check_slots(len(pieces) - 1, images, param=param)
            segments = [Control(pieces[0])]
            for piece in pieces[1:]:
                segments += [ImageSlot(), Control(piece)]
        ids = await self._off_loop_if(len(text) > _INLINE_CHARS, lambda: self._encode(segments, param, bos=False))
        return await self._with_images(ids, images, param)

    async def build_ids(
        self, token_ids: Sequence[int], images: Sequence[ImagePart] = (), *, param: str = "input_ids"
    ) -> Prompt:
        """Taken as they are, but for images without a slot, which come first (after BOS)."""
        self._check_images(images)
        ids = list(token_ids)
        image_token_id = self._family.image_token_id
        if any(not 0 <= token_id < self.vocab_size for token_id in set(ids) - {image_token_id}):
            raise BadRequest(f"{param} must be from 0 to {self.vocab_size - 1}", param=param)
        num_slots = 0 if image_token_id is None else ids.count(image_token_id)
        if num_slots == 0 and images:
            front = self._encode(self._images_in_front(len(images)), param, bos=False)
            front = [token_id for token_id in front if token_id != self.tokenizer.bos_token_id]
            num_bos = 1 if ids and ids[0] == self.tokenizer.bos_token_id else 0
            ids[num_bos:num_bos] = front
        else:
            self._check_slots(num_slots, images, param=param)
        return await self._with_images(ids, images, param)

    async def grammar(self, kind: GrammarKind, source: str, *, param: str) -> Grammar:
        """See `Grammars.compile`. The first one takes a second for a large vocabulary, others milliseconds."""
        return await self._off_loop_if(True, lambda: self._grammars.compile(kind, source, param=param))

    def text_of(self, prompt: Prompt) -> str:
        """As the model reads it, control tokens spelled out and each image as one image token."""
        keep = np.ones(len(prompt), dtype=bool)
        for image in prompt.images:
            if not self._family.cross_page_len:
                keep[image.first_row + 1 : image.end_row] = False
        return self.tokenizer.decode(prompt.token_ids[keep].tolist(), skip_special=False)

    async def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Special tokens in the text are taken as such. `add_special_tokens`: BOS, where the tokenizer puts one."""
        is_long = len(text) > _INLINE_CHARS
        ids = await self._off_loop_if(is_long, lambda: self._encode([Control(text)], "prompt", bos=False))
        has_own_bos = self._split_bos(text)[0] != ""
        starts_with_bos = ids[:1] == [self.tokenizer.bos_token_id]
        return ids[1:] if starts_with_bos and not has_own_bos and not add_special_tokens else ids

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return self.tokenizer.decode(token_ids, skip_special=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        return self.tokenizer.token_text(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokenizer.token_bytes(token_id)

    async def _with_images(self, ids: list[int], images: Sequence[ImagePart], param: str) -> Prompt:
        """`param`: the request field that the text came in, for errors."""
        if not ids:
            raise BadRequest("the prompt is empty", param=param)
        self._check_len(len(ids), param)
        if not images:
            return Prompt(np.array(ids, dtype=np.int64), ids)
        media = await self.media.load(images)
        self._check_len(len(ids) + sum(item.layout.num_tokens - 1 for item in media), param)
        expansion = await self._off_loop_if(True, lambda: self._family.expand(ids, [item.layout for item in media]))
        return _assemble(expansion, media, self._family)

    def _encode(self, segments: Sequence[Segment], param: str, *, bos: bool) -> list[int]:
        num_chars = sum(len(segment.text) for segment in segments if not isinstance(segment, ImageSlot))
        if num_chars > self._limits.context_len * self._max_token_len:  # hopeless: not worth tokenizing
            raise self._too_long(f"more than {num_chars // self._max_token_len}", param)
        return self.tokenizer.encode(segments, bos=bos)

    def _images_in_front(self, num_images: int) -> list[Segment]:
        template = BUILTIN_TEMPLATES.get(self._family.chat_template or "")
        if template is None:
            return [ImageSlot()] * num_images
        return [segment for _ in range(num_images) for segment in template.render_image(is_only_one=num_images == 1)]

    def _split_bos(self, text: str) -> tuple[str, str]:
        bos = self.tokenizer.special_tokens.get("bos_token")
        return (bos, text[len(bos) :]) if bos and text.startswith(bos) else ("", text)

    def _check_images(self, images: Sequence[ImagePart]) -> None:
        if not images:
            return
        param = images[0].param
        if self._family.image_token_id is None:
            raise BadRequest(f"{param}: this model takes no images", param=param)
        if len(images) > self._limits.max_images:
            raise BadRequest(
                f"{len(images)} images in one request: at most {self._limits.max_images} are allowed",
                param=images[self._limits.max_images].param,
            )

    def _check_slots(self, num_slots: int, images: Sequence[ImagePart], *, param: str) -> None:
        if num_slots != len(images):
            raise BadRequest(
                f"{param} has places for {num_slots} images, but the request has {len(images)} images", param=param
            )

    def _check_len(self, num_tokens: int, param: str) -> None:
        if num_tokens >= self._limits.context_len:
            raise self._too_long(str(num_tokens), param)

    def _too_long(self, told: str, param: str) -> ContextLengthExceeded:
        return ContextLengthExceeded(
            f"This model's maximum context length is {self._limits.context_len} tokens, and the prompt has {told}",
            param=param,
        )

    async def _off_loop_if(self, is_long: bool, work: Callable[[], T]) -> T:
        if not is_long:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


def _assemble(expansion: Expansion, media: Sequence[Media], family: Family) -> Prompt:
    """Adds the radix cache's key. Rows that an image itself stands in are keyed by it; for cross-attention that is its
    token's row alone: the rows that attend to the image differ already by coming after it."""
    ids = expansion.token_ids
    key = ids.tolist()
    is_cross = family.cross_page_len > 0
    token_rows = np.flatnonzero(ids == family.image_token_id).tolist() if is_cross else []
    images: list[PromptImage] = []
    for image_idx, (item, (first_row, end_row)) in enumerate(zip(media, expansion.image_rows, strict=True)):
        layout = item.layout
        own_row = token_rows[image_idx] if is_cross else first_row
        num_own = 1 if is_cross else layout.num_tokens
        key[own_row : own_row + num_own] = [_IMAGE_KEY_BIT | item.key] * num_own
        size = layout.num_cross_pages if is_cross else layout.num_tokens
        images.append(PromptImage(item.key, first_row, end_row, size, item))
    return Prompt(
        token_ids=ids,
        cache_key=key,
        images=tuple(images),
        positions=expansion.positions,
        rope_delta=expansion.rope_delta,
        num_image_tokens=sum(item.layout.num_tokens for item in media),
    )
