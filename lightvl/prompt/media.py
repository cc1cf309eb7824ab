"""Images of a prompt: fetched, measured, laid out by the family and made into pixels, each step once per image.

Called by build.py on the event loop; decoding, hashing and preprocessing run in its threads. Owns what is known of
images (records) and their pixels. Knows nothing of messages and tokens.

    bytes' digest -> record (content digest, size)      the same bytes are decoded once (and once more where shrunk)
    content digest + layout -> image key -> pixels      the same picture in other bytes shares everything from here on
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightvl.core import ImagePart
from lightvl.errors import BadRequest
from lightvl.images.cache import ByteLRU, MediaCounters, SharedWork
from lightvl.images.decode import DEFAULT_MAX_PIXELS, RGB, content_digest, decode_image
from lightvl.images.fetch import EncodedImage, ImageFetcher
from lightvl.images.transforms import shrink

if TYPE_CHECKING:
    import torch

    from lightvl.models.family import Family, ImageLayout

_RECORD_BYTES = 1024  # about what one record takes
_RECORDS_BYTES = 32 << 20


@dataclass(slots=True)
class _Record:
    """What is known of an image from its bytes. `made_keys`: layouts whose pixels were made at some time."""

    content: bytes
    width: int
    height: int
    made_keys: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Source:
    """What a client wants to be seen: an image as fetched, no side of it over `max_side` pixels."""

    data: bytes  # still encoded
    digest: bytes  # of both
    max_side: int | None

    @staticmethod
    def of(image: EncodedImage, max_side: int | None) -> _Source:
        return _Source(image.data, image.digest + str(max_side).encode(), max_side)


class Media:
    """`PromptImage.media`: all that is needed to make an image's pixels, as long as its sequence lives."""

    __slots__ = ("_store", "key", "layout", "param", "source")

    def __init__(self, store: MediaLoader, source: _Source, layout: ImageLayout, key: int, param: str) -> None:
        self._store = store
        self.source = source
        self.layout = layout
        self.key = key
        self.param = param

    def pixels(self) -> torch.Tensor:
        """What `family.encode` takes. From the cache; decoded again, on the caller's thread, only if it was dropped."""
        return self._store.pixels(self)


class MediaLoader:
    def __init__(
        self,
        family: Family,
        fetcher: ImageFetcher,
        executor: Executor,
        counters: MediaCounters,
        *,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        pixel_cache_bytes: int = 512 << 20,
    ) -> None:
        self.counters = counters
        self.pixel_cache: ByteLRU[int, Any] = ByteLRU(pixel_cache_bytes, lambda pixels: int(pixels.nbytes))
        self._family = family
        self._fetcher = fetcher
        self._executor = executor
        self._max_pixels = max_pixels
        self._records: ByteLRU[bytes, _Record] = ByteLRU(_RECORDS_BYTES, lambda _: _RECORD_BYTES)
        self._work: SharedWork[bytes, None] = SharedWork()

    async def load(self, parts: Sequence[ImagePart]) -> list[Media]:
        """All images of one prompt at once, in order. Raises BadRequest that names the first part found wrong."""
        tasks = [asyncio.create_task(self._load_one(part, num_images=len(parts))) for part in parts]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def pixels(self, media: Media) -> torch.Tensor:
        pixels: torch.Tensor | None = self.pixel_cache.get(media.key)
        if pixels is not None:
            self.counters.add("pixel_hits")
            return pixels
        return self._preprocess(self._decode(media.source), media.layout, media.key)

    async def _load_one(self, part: ImagePart, *, num_images: int) -> Media:
        source = _Source.of(await self._fetcher.fetch(part.url, param=part.param), part.max_side)
        is_known = True
        while True:
            record = self._records.get(source.digest)
            if record is not None:
                layout = self._plan(record, part, num_images)
                key = _image_key(record.content, layout)
                if key in record.made_keys:
                    if is_known:
                        self.counters.add("decode_hits")
                    return Media(self, source, layout, key, part.param)
            if source.digest not in self._work:
                is_known = False
            try:
                # Whoever else works on these bytes now may want another layout: then the next turn makes ours.
                await self._work.run(source.digest, lambda: self._make_in_thread(source, num_images))
            except BadRequest as error:
                raise BadRequest(f"{part.param}: {error.message}", param=part.param) from None

    async def _make_in_thread(self, source: _Source, num_images: int) -> None:
        await asyncio.get_running_loop().run_in_executor(self._executor, self._make, source, num_images)

    def _make(self, source: _Source, num_images: int) -> None:
        """Decode and preprocess in one go: the full-size pixels are dropped right after."""
        rgb = self._decode(source)
        record = self._records.get(source.digest)
        if record is None:
            record = _Record(content_digest(rgb), width=rgb.shape[1], height=rgb.shape[0])
        layout = self._family.plan_image(record.width, record.height, num_images=num_images)
        key = _image_key(record.content, layout)
        if key not in self.pixel_cache:  # it may be there from the same picture in other bytes
            self._preprocess(rgb, layout, key)
        record.made_keys.add(key)
        self._records.put(source.digest, record)

    def _decode(self, source: _Source) -> RGB:
        rgb = decode_image(source.data, max_pixels=self._max_pixels)
        self.counters.add("decodes")
        return rgb if source.max_side is None else shrink(rgb, source.max_side)

    def _preprocess(self, rgb: RGB, layout: ImageLayout, key: int) -> torch.Tensor:
        pixels = self._family.preprocess(rgb, layout)
        self.counters.add("preprocesses")
        self.pixel_cache.put(key, pixels)
        return pixels

    def _plan(self, record: _Record, part: ImagePart, num_images: int) -> ImageLayout:
        try:
            return self._family.plan_image(record.width, record.height, num_images=num_images)
        except BadRequest as error:
            raise BadRequest(f"{part.param}: {error.message}", param=part.param) from None


def _image_key(content: bytes, layout: ImageLayout) -> int:
    """128 bits over what the model gets to see of the image."""
    shape = repr((layout.width, layout.height, layout.grid, layout.num_tokens, layout.num_cross_pages))
    digest = hashlib.blake2b(digest_size=16)
    for part in (content, shape.encode(), layout.settings):
        digest.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(digest.digest(), "little")
