"""Flags, exit statuses and the process as a whole, with a fake service behind it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from lightvl import __version__, cli
from lightvl.config import NO_CHUNKING, ModelInfo, ServerConfig, sampling_defaults
from lightvl.errors import ConfigError
from lightvl.server.app import bind
from lightvl.server.greeting import base_url, curl_command, greeting

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def test_no_flags_is_the_default_config() -> None:
    assert cli.parse([]) == ServerConfig()


def test_all_flags(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("x")
    argv = (
        f"--model-path {tmp_path} --tokenizer-path org/tok --chat-template {tmp_path}/t.jinja --served-model-name m "
        "--load-format dummy --dtype bfloat16 --device cpu --context-length 4096 --mem-fraction-static 0.5 "
        "--max-total-tokens 8192 --max-running-requests 8 --chunked-prefill-size 256 --page-size 32 "
        "--cuda-graph-max-bs 64 --watchdog-timeout 12.5 "
        "--disable-radix-cache --random-seed 5 --max-image-tokens 640 --allowed-media-domains a.org,B.org c.org "
        "--host 0.0.0.0 --port 0 --api-key k --log-level debug --log-requests"
    )
    assert cli.parse(argv.split()) == ServerConfig(
        model_path=str(tmp_path),
        tokenizer_path="org/tok",
        chat_template=f"{tmp_path}/t.jinja",
        served_model_name="m",
        load_format="dummy",
        dtype="bfloat16",
        device="cpu",
        context_length=4096,
        mem_fraction_static=0.5,
        max_total_tokens=8192,
        max_running_requests=8,
        chunked_prefill_size=256,
        page_size=32,
        disable_radix_cache=True,
        cuda_graph_max_bs=64,
        watchdog_timeout=12.5,
        random_seed=5,
        max_image_tokens=640,
        allowed_media_domains=("a.org", "b.org", "c.org"),
        host="0.0.0.0",
        port=0,
        api_key="k",
        log_level="debug",
        log_requests=True,
    )


def test_no_chunking() -> None:
    assert cli.parse(["--chunked-prefill-size", "-1"]).chunked_prefill_size == NO_CHUNKING


@pytest.mark.parametrize("path", ["demo", "demo:qwen2-vl", "Qwen/Qwen2-VL-2B-Instruct", "gpt2"])
def test_paths_that_need_not_exist(path: str) -> None:
    assert cli.parse(["--model-path", path]).model_path == path


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--port 70000", "--port 65535 70000"),
        ("--port x", "--port integer x"),
        ("--mem-fraction-static 1.0", "--mem-fraction-static below"),
        ("--mem-fraction-static nan", "--mem-fraction-static nan"),
        ("--context-length 0", "--context-length at least 1"),
        ("--page-size -1", "--page-size"),
        ("--chunked-prefill-size 0", "--chunked-prefill-size"),
        ("--max-running-requests 0", "--max-running-requests"),
        ("--random-seed -1", "--random-seed"),
        ("--dtype int8", "--dtype bfloat16"),
        ("--dtype float16 --device cpu", "--dtype CUDA"),
        ("--device cuda1", "--device cuda:N cuda1"),
        ("--device tpu", "--device tpu"),
        ("--watchdog-timeout 0", "--watchdog-timeout above 0"),
        ("--cuda-graph-max-bs 8 --disable-cuda-graph", "--cuda-graph-max-bs --disable-cuda-graph"),
        ("--load-format gguf", "--load-format gguf"),
        ("--model-path /no/such/place", "--model-path /no/such/place"),
        ("--model-path ./nowhere", "--model-path ./nowhere"),
        ("--model-path a/b/c", "--model-path a/b/c"),
        (f"--model-path {__file__}", "--model-path file"),
        ("--chat-template ./none.jinja", "--chat-template none.jinja"),
        ("--allowed-media-domains https://a.org", "--allowed-media-domains https://a.org"),
        ("--log-level loud", "--log-level loud"),
        ("--context-length 100 --max-total-tokens 50", "--context-length 100 50"),
        ("--tp-size 2", "--tp-size"),
        ("--model demo", "--model"),
        ("extra", "extra"),
    ],
)
def test_bad_flags(argv: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.parse(argv.split())
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert output.err.startswith("lightvl: error: ") and output.err.count("\n") == 1 and not output.out
    assert all(word in output.err for word in words.split()), output.err


@pytest.mark.parametrize("flag", ["--api-key", "--served-model-name", "--host"])
def test_empty_texts(flag: str) -> None:
    with pytest.raises(SystemExit):
        cli.parse([flag, ""])


def test_help_tells_groups_units_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.parse(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    for word in ("model:", "HTTP:", "images:", "logging:", "TOKENS", "(default: 30000)", "(default: 127.0.0.1)"):
        assert word in text
    flags = [action for action in cli._parser()._actions if action.dest not in ("help", "version")]
    assert {action.dest for action in flags} == set(ServerConfig.__dataclass_fields__)
    assert all("default:" in (action.help or "") or "(default)" in (action.help or "") for action in flags)


def test_sampling_defaults() -> None:
    assert sampling_defaults({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 3}) == {
        "temperature": 0.6,
        "top_p": 0.9,
    }
    assert sampling_defaults({"do_sample": False}) == {"temperature": 0.0}
    assert sampling_defaults({"do_sample": False, "temperature": None, "top_k": 1}) == {"temperature": 0.0, "top_k": 1}
    assert sampling_defaults({}) == {}


def info(**fields: object) -> ModelInfo:
    return ModelInfo(
        **{"served_name": "m", "model_path": "/m", "family": "f", "context_len": 9, "created": 1, **fields}
    )  # type: ignore[arg-type]


def test_greeting(tmp_path: Path) -> None:
    assert base_url("0.0.0.0", 1) == "http://127.0.0.1:1" and base_url("::", 1) == "http://[::1]:1"
    assert base_url("example.org", 1) == "http://example.org:1"
    text = greeting(info(takes_images=False), "127.0.0.1", 1, needs_key=True)
    assert "http://127.0.0.1:1/v1" in text and "image_url" not in text and "Bearer" in text
    assert "https://" in greeting(info(), "127.0.0.1", 1, needs_key=False)


def test_the_curl_command_can_be_pasted(tmp_path: Path) -> None:
    """Run by a shell, with `curl` replaced by one that shows its input."""
    sample = tmp_path / "it's a sample.png"
    sample.write_bytes(bytes(range(256)) * 2)
    command = curl_command(info(sample_image=str(sample), sample_question='What is "this"?'), "http://h:1", False)
    assert command.startswith("curl -s http://h:1/v1/chat/completions -d @- <<END\n")
    shown = subprocess.check_output(["sh", "-c", f"curl() {{ cat; }}\n{command}"], text=True)
    content = json.loads(shown)["messages"][0]["content"]
    import base64

    assert content[0]["image_url"]["url"] == "data:image/png;base64," + base64.b64encode(sample.read_bytes()).decode()
    assert content[1]["text"] == 'What is "this"?'


def test_bind_tells_a_busy_port_and_a_bad_host() -> None:
    (sock,) = bind("127.0.0.1", 0)
    sock.listen()
    port = sock.getsockname()[1]
    with pytest.raises(ConfigError, match=f"port {port} .*in use"):
        bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match="in use"):
        bind("localhost", port)
    sock.close()
    with pytest.raises(ConfigError, match="no-such-host"):
        bind("no-such-host.invalid", 0)
    with pytest.raises(ConfigError, match="cannot listen"):
        bind("192.0.2.1", 0)


def test_bind_takes_every_address_on_one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{i}", 0)) for i in (1, 2)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    sockets = bind("localhost", 0)
    assert len(sockets) == 2 and len({sock.getsockname()[1] for sock in sockets}) == 1
    for sock in sockets:
        sock.close()


def command(*argv: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{HERE}", "PYTHONUNBUFFERED": "1"}
    argv = (sys.executable, str(HERE / "run_with_fake.py"), *argv)
    return subprocess.Popen(argv, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_process_serves_and_stops(number: signal.Signals) -> None:
    port = free_port()
    process = command("--port", str(port), "--log-requests")
    try:
        for _ in range(500):
            try:
                health = requests.get(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except requests.ConnectionError:
                time.sleep(0.02)
        assert health.status_code == 200
        body = {"messages": [{"role": "user", "content": "Hello"}]}
        reply = requests.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=5).json()
        assert reply["choices"][0]["message"]["content"] == "Hello" and reply["model"] == "demo"
        process.send_signal(number)
        out, err = process.communicate(timeout=5)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "heavy: []" in out and f"curl -s http://127.0.0.1:{port}/v1/chat/completions" in out
    lines = err.splitlines()
    assert all(line.startswith("[20") for line in lines), err
    for words in ("pages: 12, because", "ready after", '"POST /v1/chat/completions" 200', "finish stop", "stopped"):
        assert any(words in line for line in lines), (words, err)
    assert not any("/health" in line for line in lines)


def test_a_busy_port_is_told_before_the_model_is_loaded() -> None:
    (sock,) = bind("127.0.0.1", 0)
    sock.listen()
    process = command("--port", str(sock.getsockname()[1]))
    out, err = process.communicate(timeout=10)
    sock.close()
    assert process.returncode == 2 and "heavy" not in out
    assert err.startswith("lightvl: error: port ") and err.count("\n") == 1


def test_a_wrong_checkpoint_is_one_line() -> None:
    process = command("--port", "0", "--model-path", "broken/model")
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (2, "lightvl: error: the hub knows no broken/model\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0 and capsys.readouterr().out == f"lightvl {__version__}\n"
    # bad flags are told quickly: nothing heavy is imported for them
    code = (
        "import sys, lightvl.cli; print([m for m in ('torch', 'aiohttp', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"
