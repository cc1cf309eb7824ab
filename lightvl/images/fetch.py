"""An image as a client names it (http(s) URL, data URL, raw base64) to its encoded bytes, within limits.

Called by prompt/media.py on the event loop. Owns the HTTP session and the download cache. Anything that a client may
have wrong is a BadRequest that names the request's field and tells nothing of this machine or its network."""

from __future__ import annotations

import asyncio
import binascii
import hashlib
import re
from collections.abc import Collection
from concurrent.futures import Executor
from dataclasses import dataclass

import aiohttp
import pybase64
from aiohttp.abc import AbstractResolver
from yarl import URL

from lightvl.errors import BadRequest
from lightvl.images.addresses import AddressGuard, AddressRefused, GuardedResolver
from lightvl.images.cache import ByteLRU, MediaCounters, SharedWork

_INLINE_CHARS = 64 * 1024  # longer base64 is decoded and hashed in a thread
_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.\-]*):")
_DATA_URL_HEAD = re.compile(r"\s*data:([^,;]*)((?:;[^,]*)?),", re.IGNORECASE)
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_URL_CHARS = 8192
_MAX_DOWNLOADS_AT_ONCE = 64
_CACHE_TTL_S = 300.0  # what a URL shows may change; content, not the URL, is an image's identity


@dataclass(frozen=True, slots=True)
class EncodedImage:
    data: bytes
    digest: bytes  # 16 bytes over data

    @staticmethod
    def of(data: bytes) -> EncodedImage:
        return EncodedImage(data, hashlib.blake2b(data, digest_size=16).digest())


@dataclass(frozen=True, slots=True)
class FetchLimits:
    max_bytes: int = 32 << 20  # of one encoded image
    timeout_s: float = 10.0  # of one download, redirects and name lookups included
    max_redirects: int = 5
    cache_bytes: int = 256 << 20


class _DownloadFailed(Exception):
    """Shared by all who wait for a download; each turns it into a BadRequest with its own param."""


class ImageFetcher:
    """`start` and `close` on the loop that calls `fetch`. `allowed_domains`: these hosts and no others, private ones
    included."""

    def __init__(
        self,
        *,
        executor: Executor,
        allowed_domains: Collection[str] | None = None,
        limits: FetchLimits = FetchLimits(),
        counters: MediaCounters | None = None,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self.limits = limits
        self.counters = counters if counters is not None else MediaCounters()
        self.cache: ByteLRU[str, EncodedImage] = ByteLRU(
            limits.cache_bytes, lambda image: len(image.data), ttl_s=_CACHE_TTL_S
        )
        self._executor = executor
        self._guard = AddressGuard(allowed_domains)
        self._resolver = resolver
        self._downloads: SharedWork[str, EncodedImage] = SharedWork()
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        resolver = self._resolver if self._resolver is not None else aiohttp.ThreadedResolver()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=GuardedResolver(resolver, self._guard), limit=_MAX_DOWNLOADS_AT_ONCE
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),  # one timeout spans all redirects, in _download
            headers={"User-Agent": "LightVL", "Accept": "image/*", "Accept-Encoding": "identity"},
            auto_decompress=False,  # a small compressed body could unpack beyond any limit
            trust_env=False,
        )

    async def close(self) -> None:
        await self._downloads.close()
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def fetch(self, url: str, *, param: str) -> EncodedImage:
        """The bytes behind `url`. Simultaneous calls for one URL share one download. Raises BadRequest."""
        scheme = _SCHEME.match(url[:64])
        name = scheme[1].lower() if scheme else ""
        if name in ("http", "https"):
            return await self._fetch_http(url.strip(), param)
        if name == "data":
            head = _DATA_URL_HEAD.match(url[:1024])
            if head is None or not _is_base64_image(head[1], head[2]):
                raise BadRequest(f"{param} is a data URL, but not of a base64-encoded image", param=param)
            return await self._decode_base64(url, head.end(), param)
        if name:
            raise BadRequest(f"{param} has a scheme that is not served: use http, https or data", param=param)
        return await self._decode_base64(url, 0, param)

    async def _decode_base64(self, text: str, start: int, param: str) -> EncodedImage:
        # A line break in 76 characters is the most that encoders add, so this bound never refuses a permitted image.
        if (len(text) - start) * 3 // 4 > self.limits.max_bytes * 1.04 + 64:
            raise self._too_many_bytes(param)
        try:
            if len(text) <= _INLINE_CHARS:
                image = _from_base64(text, start)
            else:
                loop = asyncio.get_running_loop()
                image = await loop.run_in_executor(self._executor, _from_base64, text, start)
        except (binascii.Error, ValueError):
            raise BadRequest(f"{param} is neither an http(s) URL, a data URL nor valid base64", param=param) from None
        if not image.data:
            raise BadRequest(f"{param} is empty", param=param)
        if len(image.data) > self.limits.max_bytes:
            raise self._too_many_bytes(param)
        return image

    async def _fetch_http(self, text: str, param: str) -> EncodedImage:
        cached = self.cache.get(text)
        if cached is not None:
            self.counters.add("download_hits")
            return cached
        if text in self._downloads:
            self.counters.add("download_hits")
        try:
            return await self._downloads.run(text, lambda: self._download(text))
        except _DownloadFailed as error:
            raise BadRequest(f"{param}: {error}", param=param) from None

    async def _download(self, text: str) -> EncodedImage:
        self.counters.add("downloads")
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                data = await self._get(self._checked_url(text))
        except TimeoutError:
            raise _DownloadFailed(f"the image took longer than {self.limits.timeout_s:g} s to download") from None
        except AddressRefused as error:
            raise _DownloadFailed(str(error)) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            refused = _find_refusal(error)
            raise _DownloadFailed(str(refused) if refused else "the image could not be downloaded") from None
        if len(data) > _INLINE_CHARS:
            image = await asyncio.get_running_loop().run_in_executor(self._executor, EncodedImage.of, data)
        else:
            image = EncodedImage.of(data)
        self.cache.put(text, image)
        return image

    async def _get(self, url: URL) -> bytes:
        assert self._session is not None, "ImageFetcher.start was not awaited"
        for _ in range(self.limits.max_redirects + 1):
            async with self._session.get(url, allow_redirects=False) as response:
                if response.status in _REDIRECTS:
                    location = response.headers.get("Location")
                    if not location:
                        raise _DownloadFailed("the image's address redirects to nowhere")
                    url = self._checked_url(str(url.join(URL(location))))
                    continue
                if response.status != 200:
                    raise _DownloadFailed(f"the image could not be downloaded (HTTP status {response.status})")
                if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                    raise _DownloadFailed("the image was sent with a content encoding that was not asked for")
                return await self._read(response)
        raise _DownloadFailed(f"the image's address redirects more than {self.limits.max_redirects} times")

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        too_large = _DownloadFailed(f"the image is larger than {self.limits.max_bytes:,} bytes")
        if (response.content_length or 0) > self.limits.max_bytes:
            raise too_large
        body = bytearray()
        async for block in response.content.iter_any():
            body += block
            if len(body) > self.limits.max_bytes:
                raise too_large
        if not body:
            raise _DownloadFailed("the image is empty")
        return bytes(body)

    def _checked_url(self, text: str) -> URL:
        """Checks all that needs no name lookup; the resolver checks the rest, for the addresses really used."""
        if len(text) > _MAX_URL_CHARS:
            raise _DownloadFailed(f"the URL is longer than {_MAX_URL_CHARS} characters")
        try:
            url = URL(text).with_fragment(None)
            host = url.host
            is_whole = bool(host) and url.port is not None
        except ValueError:
            raise _DownloadFailed("the URL is malformed") from None
        if url.scheme not in ("http", "https"):
            raise _DownloadFailed("the URL redirects to a scheme that is not served")
        if not is_whole or host is None:
            raise _DownloadFailed("the URL is malformed")
        if url.raw_user is not None or url.raw_password is not None:
            raise _DownloadFailed("a URL with a user name or password is not served")
        self._guard.check_host(host)
        return url

    def _too_many_bytes(self, param: str) -> BadRequest:
        return BadRequest(f"{param} is larger than {self.limits.max_bytes:,} bytes", param=param)


def _from_base64(text: str, start: int) -> EncodedImage:
    payload = text[start:] if start else text
    if any(space in payload for space in "\n\r \t"):
        payload = "".join(payload.split())
    return EncodedImage.of(pybase64.b64decode(payload, validate=True))


def _is_base64_image(mime: str, parameters: str) -> bool:
    is_image = mime.strip().lower().startswith("image/") or mime.strip().lower() in ("", "application/octet-stream")
    return is_image and parameters.strip().lower().endswith(";base64")


def _find_refusal(error: BaseException | None) -> AddressRefused | None:
    while error is not None and not isinstance(error, AddressRefused):
        error = error.__cause__
    return error
