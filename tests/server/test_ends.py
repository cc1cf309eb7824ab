"""Every request ends with one last event, and what nobody waits for is aborted at once: errors at each stage, clients
that leave or read slowly, draining and signals."""

from __future__ import annotations

import asyncio
import json
import logging
import time

import pytest
from server_fakes import ERRORS, Broken, FakeService
from server_helpers import Running, Start, chat_body, until

from lightvl.config import ServerConfig
from lightvl.core import Delta, Finish, Prompt, SamplingParams
from lightvl.errors import BadRequest, Overloaded
from lightvl.metrics import Metrics
from lightvl.server.app import bind, run_server


def told(reply: dict[str, object], error: Exception) -> bool:
    """The body is OpenAI's, tells what may be told and nothing else."""
    (body,) = reply.values()
    assert isinstance(body, dict) and set(body) == {"message", "type", "param", "code"}
    assert "secret" not in str(reply) and "Broken" not in str(reply)
    return ("request id req-" in body["message"]) if isinstance(error, Broken) else body["message"] == str(error)


@pytest.mark.parametrize("error, status", ERRORS, ids=lambda it: type(it).__name__)
@pytest.mark.parametrize("stage", ["build", "submit", "first", "later"])
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate"])
async def test_each_stage_breaks(
    server: Running,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    status: int,
    stage: str,
    streams: bool,
    path: str,
) -> None:
    service = server.service
    if stage == "build":
        service.prompts.error = error
    elif stage == "submit":
        service.engine.submit_error = error
    else:
        service.engine.error, service.engine.break_after = error, 0 if stage == "first" else 3
    body = {**({"text": "Hello"} if path == "/generate" else chat_body()), "stream": streams}
    if streams and stage in ("first", "later"):
        *before, last = await server.events(path, body)
        assert told(json.loads(last), error), "the error is the last event, [DONE] does not follow"
        assert len(before) == (0 if path == "/generate" else 1) + (0 if stage == "first" else 3)
    else:
        got, reply = await server.post(path, body)
        assert got == status and told(reply, error)
    assert ("secret" in caplog.text) == isinstance(error, Broken), "the trace is in the log, and only there"
    assert not server.context.lifecycle.num_requests
    # and the server goes on
    service.prompts.error = service.engine.submit_error = service.engine.error = None
    assert (await server.chat())[0] == 200


async def test_bad_image_names_its_field(server: Running) -> None:
    server.service.prompts.error = BadRequest("not an image", param="messages[0].content[0].image_url.url")
    status, reply = await server.chat(stream=True)
    assert status == 400 and reply["error"]["param"] == "messages[0].content[0].image_url.url"


async def raw(server: Running, body: dict[str, object]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 16)
    data = json.dumps(body).encode()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data))
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("streams", [False, True])
async def test_client_leaves_while_the_engine_works(server: Running, streams: bool) -> None:
    server.service.engine.delay_s = 0.02
    reader, writer = await raw(server, chat_body("x" * 1000, stream=streams))
    if streams:
        await reader.readuntil(b'"content":"x"')
    await until(lambda: server.service.engine.generations)
    writer.close()
    await asyncio.wait_for(server.service.engine.generations[0].aborted.wait(), 1)
    await asyncio.sleep(0.05)
    assert server.service.engine.num_aborted == 1 and not server.context.lifecycle.num_requests
    assert server.context.metrics.value("requests_broken_off_total") == 1


async def test_client_leaves_while_images_are_fetched(server: Running) -> None:
    server.service.prompts.gate = asyncio.Event()
    _, writer = await raw(server, chat_body())
    await until(lambda: server.context.lifecycle.num_requests)
    writer.transport.abort()
    await until(lambda: server.service.prompts.num_cancelled)
    assert not server.context.lifecycle.num_requests


async def test_slow_client_holds_nobody_up(server: Running) -> None:
    """One client stops reading a large stream: its handler waits, others are answered, and the rest comes complete
    once it reads on."""
    produced = 0

    async def script(prompt: Prompt, params: SamplingParams):  # type: ignore[no-untyped-def]
        nonlocal produced
        for _ in range(500):
            produced += 1
            yield Delta(0, "y" * 50_000, [1])
            await asyncio.sleep(0)
        yield Delta(0, finish=Finish("stop", None, 1, 500, 0))

    engine = server.service.engine
    engine.script = script
    reader, writer = await raw(server, chat_body(stream=True))
    await reader.readuntil(b"yyy")
    await asyncio.sleep(0.3)
    stuck = produced
    assert stuck < 400, "the server must not buffer without bound"
    engine.script = engine.echo
    started = time.monotonic()
    assert (await server.chat())[0] == 200
    assert time.monotonic() - started < 0.5
    num = 3
    while data := await reader.read(1 << 16):
        num += data.count(b"y")
        if data.endswith(b"0\r\n\r\n"):
            break
    assert num >= 500 * 50_000 and produced == 500 and engine.num_aborted == 0
    writer.close()


async def test_draining_refuses_new_requests(server: Running) -> None:
    server.context.lifecycle.draining = True
    status, reply = await server.get("/health")
    assert status == 503 and reply["error"]["code"] == "shutting_down"
    for path, body in (("/v1/chat/completions", chat_body()), ("/generate", {"text": "x"})):
        status, reply = await server.post(path, body)
        assert status == 503 and reply["error"]["type"] == "service_unavailable"


async def test_log_requests(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    server = await start(log_requests=True)
    content = [{"type": "text", "text": "Hello"}, {"type": "image_url", "image_url": {"url": "data:,SECRET"}}]
    with caplog.at_level(logging.INFO):
        _, reply = await server.post(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": content}], "n": 2}
        )
        server.service.engine.error = Overloaded("no")
        await server.chat()
    lines = [record.getMessage() for record in caplog.records if record.name == "lightvl.server.run"]
    assert lines[0].startswith(f"request {reply['id']}: prompt 9 tokens, images 1, cached 3, ttft ")
    assert lines[0].endswith("finish stop,stop") and "generated 10 tokens" in lines[0]
    assert lines[1].endswith("finish Overloaded") and "ttft -" in lines[1]
    assert "Hello" not in caplog.text and "SECRET" not in caplog.text


class Life:
    """`run_server` itself, with the signals replaced by calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **flags: object) -> None:
        self.service = FakeService()
        self.receive: list[object] = []
        monkeypatch.setattr(
            asyncio.get_running_loop(),
            "add_signal_handler",
            lambda number, call: self.receive.append(call),
            raising=False,
        )
        self.sockets = bind("127.0.0.1", 0)
        self.port = self.sockets[0].getsockname()[1]
        config = ServerConfig(port=self.port, **flags)  # type: ignore[arg-type]
        self.task = asyncio.create_task(run_server(config, self.service, Metrics(), self.sockets, started=0.0))

    async def ready(self) -> None:
        await until(lambda: self.receive)

    def signal(self) -> None:
        self.receive[0]()  # type: ignore[operator]


async def test_first_signal_lets_requests_finish(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import aiohttp

    life = Life(monkeypatch)
    life.service.engine.delay_s = 0.05
    await life.ready()
    url = f"http://127.0.0.1:{life.port}"
    assert f"curl -s {url}/v1/chat/completions" in capsys.readouterr().out
    async with aiohttp.ClientSession() as session:

        async def ask() -> str:
            async with session.post(
                url + "/v1/chat/completions", json=chat_body("0123456789", stream=True)
            ) as response:
                return await response.text()

        running = asyncio.create_task(ask())
        await until(lambda: life.service.engine.generations)
        life.signal()
        await asyncio.sleep(0.01)
        async with session.get(url + "/health") as response:
            assert response.status == 503
        async with session.post(url + "/v1/chat/completions", json=chat_body()) as response:
            assert response.status == 503
        assert (await running).endswith("data: [DONE]\n\n")
        await asyncio.wait_for(life.task, 2)
    assert life.service.events == ["start", "drain", "close"]
    assert life.service.engine.num_aborted == 0


@pytest.mark.parametrize("by", ["second signal", "time"])
async def test_the_end_is_bounded(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    monkeypatch.setattr("lightvl.server.app.CLOSE_S", 0.1)
    if by == "time":
        monkeypatch.setattr("lightvl.server.app.DRAIN_S", 0.1)
    life = Life(monkeypatch)
    life.service.engine.delay_s = 60
    await life.ready()
    _, writer = await asyncio.open_connection("127.0.0.1", life.port)
    data = json.dumps(chat_body()).encode()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data))
    await until(lambda: life.service.engine.generations)
    life.signal()
    if by == "second signal":
        await asyncio.sleep(0.05)
        assert not life.task.done()
        life.signal()
    await asyncio.wait_for(life.task, 2)
    assert life.service.engine.num_aborted == 1 and life.service.events[-1] == "close"
    writer.close()
