"""The fetcher against a local server (allowed by name), fake resolvers, and strings that are not URLs."""

from __future__ import annotations

import asyncio
import base64
import gzip
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult

from lightvl.errors import BadRequest
from lightvl.images.addresses import is_public
from lightvl.images.fetch import FetchLimits, ImageFetcher

BODY = bytes(range(256)) * 40
LOCAL = ("127.0.0.1",)
PARAM = "messages[1].content[0].image_url"


class FakeResolver(AbstractResolver):
    """Gives the next list of addresses at each lookup, the last one for ever."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> list[ResolveResult]:
        self.asked.append(host)
        addresses = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return [
            ResolveResult(hostname=host, host=ip, port=port, family=socket.AF_INET, proto=0, flags=0)
            for ip in addresses
        ]

    async def close(self) -> None:
        pass


class Site:
    """A server on 127.0.0.1 that counts its requests."""

    def __init__(self) -> None:
        self.seen: list[web.Request] = []
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.port = 0

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(request)
        self.asked.set()
        path = request.path
        if path == "/ok":
            await self.gate.wait()
            return web.Response(body=BODY, headers={"Set-Cookie": "a=b"})
        if path == "/to":
            raise web.HTTPFound(request.query["where"])
        if path.startswith("/hops/"):
            left = int(path.removeprefix("/hops/"))
            raise web.HTTPFound(f"/hops/{left - 1}" if left > 1 else "/ok")
        if path == "/nowhere":
            return web.Response(status=302)
        if path == "/huge-told":
            return web.Response(body=bytes(200_000))
        if path == "/huge-untold":
            response = web.StreamResponse()
            response.enable_chunked_encoding()
            await response.prepare(request)
            for _ in range(1000):
                await response.write(bytes(10_000))
            return response
        if path == "/slow":
            response = web.StreamResponse()
            await response.prepare(request)
            for _ in range(100):
                await response.write(b"x")
                await asyncio.sleep(0.05)
            return response
        if path == "/gzip":
            return web.Response(body=gzip.compress(BODY), headers={"Content-Encoding": "gzip"})
        if path == "/empty":
            return web.Response()
        if path == "/cut":
            assert request.transport is not None
            request.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc")
            request.transport.close()
        return web.Response(status=404, text="secret words")


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    app = web.Application()
    app.router.add_get("/{tail:.*}", site.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    listener = web.TCPSite(runner, "127.0.0.1", 0)
    await listener.start()
    assert listener._server is not None
    site.port = listener._server.sockets[0].getsockname()[1]
    yield site
    await runner.cleanup()


Make = Callable[..., Any]


@asynccontextmanager
async def fetcher(**options: Any) -> AsyncIterator[ImageFetcher]:
    options.setdefault("allowed_domains", LOCAL)
    with ThreadPoolExecutor(2) as executor:
        made = ImageFetcher(executor=executor, **options)
        await made.start()
        try:
            yield made
        finally:
            await made.close()


async def refused(made: ImageFetcher, url: str) -> str:
    with pytest.raises(BadRequest) as caught:
        await made.fetch(url, param=PARAM)
    assert caught.value.param == PARAM and PARAM in caught.value.message
    return caught.value.message


async def test_downloads_and_caches(site: Site) -> None:
    async with fetcher() as made:
        first = await made.fetch(site.url("/ok"), param=PARAM)
        again = await made.fetch(" " + site.url("/ok") + "\n", param=PARAM)
        assert first.data == BODY and again is first and len(first.digest) == 16
        assert made.counters.downloads == 1 and made.counters.download_hits == 1 and len(site.seen) == 1
        assert "Cookie" not in site.seen[0].headers and site.seen[0].headers["User-Agent"] == "LightVL"


async def test_cookies_are_forgotten(site: Site) -> None:
    async with fetcher(allowed_domains=["a.example"], resolver=FakeResolver(["127.0.0.1"])) as made:
        for number in range(2):
            await made.fetch(site.url(f"/ok?v={number}", "a.example"), param=PARAM)
        assert len(site.seen) == 2 and "Cookie" not in site.seen[1].headers


async def test_simultaneous_requests_share_one_download(site: Site) -> None:
    site.gate.clear()
    async with fetcher() as made:
        callers = [asyncio.create_task(made.fetch(site.url("/ok"), param=PARAM)) for _ in range(8)]
        await site.asked.wait()
        callers[0].cancel()
        callers[3].cancel()
        await asyncio.sleep(0.02)
        site.gate.set()
        results = await asyncio.gather(*callers, return_exceptions=True)
        assert sum(isinstance(result, asyncio.CancelledError) for result in results) == 2
        assert all(result.data == BODY for result in results if not isinstance(result, BaseException))
        assert len(site.seen) == 1 and made.counters.downloads == 1 and made.counters.download_hits == 7


async def test_redirects(site: Site) -> None:
    async with fetcher() as made:
        assert (await made.fetch(site.url("/to?where=/ok%3Fraw=true"), param=PARAM)).data == BODY
        assert site.seen[-1].path_qs == "/ok?raw=true"
        assert (await made.fetch(site.url("/hops/5"), param=PARAM)).data == BODY
        assert "more than 5 times" in await refused(made, site.url("/hops/6"))
        assert "nowhere" in await refused(made, site.url("/nowhere"))
        assert "scheme" in await refused(made, site.url("/to?where=file:///etc/passwd"))
        assert "user name" in await refused(made, site.url(f"/to?where=http://u:p@127.0.0.1:{site.port}/ok"))
        num_seen = len(site.seen)
        message = await refused(made, site.url(f"/to?where=http://localhost:{site.port}/ok"))
        assert "this host" in message and len(site.seen) == num_seen + 1  # only the redirect itself was asked for


async def test_a_public_name_that_redirects_to_a_private_address(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """No list of hosts. Only what the resolver says of `public.example` is let through, as if 127.0.0.1 were public."""
    monkeypatch.setattr("lightvl.images.addresses.is_public", lambda text: text == "127.0.0.1" and lenient[0])
    lenient = [True]
    async with fetcher(allowed_domains=None, resolver=FakeResolver(["127.0.0.1"])) as made:
        assert (await made.fetch(site.url("/ok", "public.example"), param=PARAM)).data == BODY
        monkeypatch.undo()
        for where in ("http://169.254.169.254/latest", "http://10.0.0.1/", f"http://127.0.0.1:{site.port}/ok"):
            # The pooled connection to public.example stays in use, so the redirect itself still answers.
            message = await refused(made, site.url(f"/to?where={where}", "public.example"))
            assert "public addresses" in message


async def test_rebinding_names_are_never_connected_to(site: Site) -> None:
    """The lookup that is checked is the one that is used: there is no second lookup which could answer otherwise."""
    resolver = FakeResolver(["127.0.0.1"])
    async with fetcher(allowed_domains=None, resolver=resolver) as made:
        assert "public addresses" in await refused(made, site.url("/ok", "rebind.example"))
        assert resolver.asked == ["rebind.example"] and not site.seen
    resolver = FakeResolver(["93.184.216.34"], ["127.0.0.1"])
    async with fetcher(allowed_domains=None, resolver=resolver, limits=FetchLimits(timeout_s=0.3)) as made:
        await refused(made, site.url("/ok", "rebind.example"))  # cannot be reached from here, but was allowed
        assert resolver.asked == ["rebind.example"] and not site.seen


async def test_mixed_answers_lose_their_private_addresses() -> None:
    from lightvl.images.addresses import AddressGuard, GuardedResolver

    resolver = GuardedResolver(FakeResolver(["10.0.0.1", "93.184.216.34", "::1"]), AddressGuard())
    assert [result["host"] for result in await resolver.resolve("mixed.example", 80)] == ["93.184.216.34"]


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
     "224.0.0.1", "240.0.0.1", "255.255.255.255", "[::1]", "[::]", "[fe80::1]", "[fc00::1]", "[ff02::1]",
     "[::ffff:127.0.0.1]", "[::ffff:8.8.8.8]", "[64:ff9b::7f00:1]", "[64:ff9b::808:808]", "[2002:7f00:1::]",
     "[2001:0:7f00:1::]", "[::127.0.0.1]", "2130706433", "127.1", "0177.0.0.1", "0x7f.1", "0x7f000001", "0",
     "localhost.", "LOCALHOST", "[::1%25lo]", "192.0.0.8", "198.18.0.1", "192.0.2.1", "①②⑦.⓪.⓪.①"],
)  # fmt: skip
async def test_private_hosts_are_refused(host: str, site: Site) -> None:
    async with fetcher(allowed_domains=None) as made:
        message = await refused(made, f"http://{host}:{site.port}/ok")
        assert not site.seen and "127" not in message.replace(PARAM, "")


@pytest.mark.parametrize(
    ("address", "public"),
    [("8.8.8.8", True), ("93.184.216.34", True), ("2606:4700::1111", True), ("2001:4860:4860::8888", True),
     ("172.32.0.1", True), ("100.128.0.1", True), ("224.0.1.1", False), ("fec0::1", False), ("8.8.8", False),
     ("8.8.8.08", False), ("64:ff9b:1::1", False), ("2002:808:808::", False), ("64:ff9b::808:808", False),
     ("::ffff:0:8.8.8.8", False), ("", False)],
)  # fmt: skip
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


async def test_a_list_of_hosts_lets_in_only_these(site: Site) -> None:
    async with fetcher(allowed_domains=["Images.Example.", "127.0.0.1"], resolver=FakeResolver(["127.0.0.1"])) as made:
        assert (await made.fetch(site.url("/ok", "images.example"), param=PARAM)).data == BODY
        assert (await made.fetch(site.url("/ok"), param=PARAM)).data == BODY
        for host in ("example", "evil-images.example", "images.example.evil.org", "8.8.8.8", "sub.images.example"):
            assert "this host" in await refused(made, f"http://{host}/ok")


@pytest.mark.parametrize(
    ("path", "told"),
    [("/missing", "status 404"), ("/huge-told", "larger than"), ("/huge-untold", "larger than"), ("/gzip", "encoding"),
     ("/empty", "empty"), ("/cut", "could not be downloaded")],
)  # fmt: skip
async def test_bad_answers(path: str, told: str, site: Site) -> None:
    async with fetcher(limits=FetchLimits(max_bytes=100_000)) as made:
        message = await refused(made, site.url(path))
        assert told in message and "secret" not in message and "127.0.0.1" not in message
        assert made.cache.num_bytes == 0
        assert (await made.fetch(site.url("/ok"), param=PARAM)).data == BODY


async def test_time_is_limited_in_total(site: Site) -> None:
    async with fetcher(limits=FetchLimits(timeout_s=0.2)) as made:
        started = asyncio.get_running_loop().time()
        assert "longer than 0.2 s" in await refused(made, site.url("/slow"))
        assert asyncio.get_running_loop().time() - started < 1


async def test_nothing_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with fetcher() as made:
            message = await refused(made, f"http://127.0.0.1:{unused.getsockname()[1]}/x")
            assert message == f"{PARAM}: the image could not be downloaded"


async def test_proxies_of_the_environment_are_not_used(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with fetcher() as made:
        assert (await made.fetch(site.url("/ok"), param=PARAM)).data == BODY


ENCODED = base64.b64encode(BODY).decode()


@pytest.mark.parametrize(
    "text",
    [f"data:image/png;base64,{ENCODED}",
     f"DATA:image/svg+xml;charset=utf-8;BASE64,{ENCODED}", f"data:;base64,{ENCODED}",
     f"data:image/x-odd;name=a%20b.png;base64,{ENCODED}", ENCODED, "\n" + base64.encodebytes(BODY).decode(),
     "data:image/jpeg;base64," + base64.encodebytes(BODY).decode().replace("\n", "\r\n")],
)  # fmt: skip
async def test_base64(text: str) -> None:
    async with fetcher() as made:
        assert (await made.fetch(text, param=PARAM)).data == BODY


async def test_long_base64_leaves_the_loop() -> None:
    data = bytes(3_000_000)
    async with fetcher() as made:
        task = asyncio.create_task(made.fetch(base64.b64encode(data).decode(), param=PARAM))
        await asyncio.sleep(0)
        assert not task.done()
        assert (await task).data == data


@pytest.mark.parametrize(
    "text",
    ["", "data:image/png;base64,", "data:text/html;base64,aGk=", "data:image/png,abc", "data:image/png;base64",
     "/etc/passwd", "image.png", "aGk", "aGk=x", "aG-_", "a" * 70_001, "file:///etc/passwd", "ftp://a.b/c.png",
     "C:\\a.png",
     "gopher://x", "javascript:alert(1)", "http://", "http:///x", "http://[::1", "https://user@example.org/x.png",
     "http://a:99999/", "http:example.org", "http://" + "a" * 9000, "//example.org/x.png", "aGk=\0", "🎉"],
)  # fmt: skip
async def test_refused_strings(text: str) -> None:
    async with fetcher() as made:
        message = await refused(made, text)
        assert len(message) < 200


async def test_base64_is_limited() -> None:
    async with fetcher(limits=FetchLimits(max_bytes=1000)) as made:
        assert len((await made.fetch(base64.encodebytes(bytes(1000)).decode(), param=PARAM)).data) == 1000
        for num in (1001, 5000):
            assert "larger than" in await refused(made, base64.b64encode(bytes(num)).decode())
