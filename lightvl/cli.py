"""The `lightvl` command: flags to a checked ServerConfig, then the service, then the server.

Everything that is heavy to import (torch above all) is imported after the flags have been checked. Wrong flags, wrong
checkpoints and busy ports are one line on stderr and exit status 2."""

from __future__ import annotations

import argparse
import gc
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from lightvl import __version__, log
from lightvl.config import NO_CHUNKING, ServerConfig
from lightvl.errors import ConfigError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?\Z")
_DOMAIN = re.compile(r"[A-Za-z0-9_.:-]+\Z")


def main(argv: Sequence[str] | None = None) -> None:
    """Does not return but by `sys.exit` when something is wrong: 2 for what the operator can mend, 130 for Ctrl-C."""
    started = time.monotonic()
    config = parse(sys.argv[1:] if argv is None else argv)
    log.setup_logging(config.log_level)
    try:
        _serve(config, started)
    except ConfigError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _serve(config: ServerConfig, started: float) -> None:
    from lightvl.server.app import bind, run_server  # after the flags: they bring aiohttp

    sockets = bind(config.host, config.port)  # before the model is loaded: a busy port is told at once

    import uvloop

    from lightvl.engine.build import build_service  # brings torch
    from lightvl.metrics import Metrics

    sys.setswitchinterval(0.001)  # seconds; a thread in Python code lets the event loop wait no longer than this
    metrics = Metrics()
    service = build_service(config, metrics)
    gc.freeze()  # what is loaded stays; collections on the event loop need not walk it
    uvloop.run(run_server(config, service, metrics, sockets, started=started))


def _fail(message: str) -> NoReturn:
    """One line on stderr, exit status 2."""
    print("lightvl: error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _fail(f"{message} (see lightvl --help)")


def parse(argv: Sequence[str]) -> ServerConfig:
    """Exits with status 2 on a bad value."""
    args = vars(_parser().parse_args(argv))
    domains = args["allowed_media_domains"] or ()
    args["allowed_media_domains"] = tuple(dict.fromkeys(domain.lower() for group in domains for domain in group))
    config = ServerConfig(**args)
    if config.dtype == "float16" and config.device == "cpu":
        _fail("argument --dtype: float16 needs a CUDA device; CPUs are very slow at it")
    if config.disable_cuda_graph and config.cuda_graph_max_bs is not None:
        _fail("argument --cuda-graph-max-bs: does nothing with --disable-cuda-graph")
    if config.context_length and config.max_total_tokens and config.context_length > config.max_total_tokens:
        _fail(
            f"argument --context-length: {config.context_length} tokens do not fit in "
            f"--max-total-tokens {config.max_total_tokens}"
        )
    return config


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lightvl",
        description="Serve a vision-language model over the OpenAI API.",
        epilog="Without --model-path it serves a small embedded model.",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
    )
    parser.add_argument("--version", action="version", version=f"lightvl {__version__}")
    _add_model(parser.add_argument_group("model"))
    _add_device(parser.add_argument_group("device, memory and scheduling"))
    _add_images(parser.add_argument_group("images"))
    _add_http(parser.add_argument_group("HTTP"))
    _add_logging(parser.add_argument_group("logging"))
    return parser


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model-path",
        type=_model_path,
        metavar="DIR|HUB_ID",
        help="checkpoint folder or Hugging Face id; 'demo' (default): the embedded model, 'demo:mllama': its sibling",
    )
    group.add_argument(
        "--tokenizer-path", type=_model_path, metavar="DIR|HUB_ID", help="tokenizer (default: the model's)"
    )
    group.add_argument(
        "--chat-template",
        type=_chat_template,
        metavar="NAME|FILE",
        help="built-in template, such as llama_3_vision or qwen2-vl, or a Jinja file (default: the model's own)",
    )
    group.add_argument(
        "--served-model-name",
        type=_text,
        metavar="NAME",
        help="the model's name in the API (default: --model-path)",
    )
    group.add_argument(
        "--load-format",
        choices=("auto", "safetensors", "dummy"),
        default="auto",
        help="format of the weights; dummy: random ones, for benchmarks (default: auto)",
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of weights and activations; auto: the fastest that the device is good at (default: auto)",
    )
    group.add_argument(
        "--context-length",
        type=_integer(1),
        metavar="TOKENS",
        help="longest prompt and answer together (default: the model's own)",
    )


def _add_device(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--device",
        type=_device,
        default="auto",
        metavar="DEVICE",
        help="cpu, cuda or cuda:N; auto: the first GPU that torch can use, else the CPU (default: auto)",
    )
    group.add_argument(
        "--mem-fraction-static",
        type=_fraction,
        metavar="FRACTION",
        help="share of the memory for weights and K,V pages, above 0 and below 1 (default: chosen at start)",
    )
    group.add_argument(
        "--max-total-tokens",
        type=_integer(1),
        metavar="TOKENS",
        help="size of the K,V page pool (default: from the memory)",
    )
    group.add_argument(
        "--max-running-requests",
        type=_integer(1),
        metavar="N",
        help="sequences that run at once; further ones wait (default: chosen at start)",
    )
    group.add_argument(
        "--chunked-prefill-size",
        type=_chunk_size,
        metavar="TOKENS",
        help="prompt tokens computed per step, -1: whole prompts (default: chosen at start)",
    )
    group.add_argument(
        "--page-size",
        type=_integer(1, 4096),
        metavar="TOKENS",
        help="tokens per K,V page, the grain of the prefix cache (default: chosen at start)",
    )
    group.add_argument(
        "--disable-radix-cache", action="store_true", help="do not reuse prefixes of earlier requests (default: reuse)"
    )
    group.add_argument(
        "--cuda-graph-max-bs",
        type=_integer(1),
        metavar="N",
        help="decode steps of up to N sequences are captured as CUDA graphs (default: all that may run)",
    )
    group.add_argument(
        "--disable-cuda-graph", action="store_true", help="launch every kernel of a decode step by itself (default: no)"
    )
    group.add_argument(
        "--watchdog-timeout",
        type=_seconds,
        metavar="SECONDS",
        help="a step of the device that takes longer ends the process, for a restart (default: chosen at start)",
    )
    group.add_argument(
        "--random-seed",
        type=_integer(0, (1 << 63) - 1),
        metavar="N",
        help="for requests that set no seed (default: a new one at each start)",
    )


def _add_images(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-image-tokens",
        type=_integer(1),
        metavar="TOKENS",
        help="larger images are scaled down to this many tokens (default: 1280 for Qwen2-VL on a CPU)",
    )
    group.add_argument(
        "--allowed-media-domains",
        type=_domains,
        nargs="+",
        metavar="HOST",
        help="fetch images from these hosts only, private ones included (default: any public host)",
    )


def _add_http(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--host", type=_text, default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    group.add_argument(
        "--port",
        type=_integer(0, 65535),
        default=30000,
        help="port to listen on, 0: any free one (default: 30000)",
    )
    group.add_argument(
        "--api-key", type=_text, metavar="KEY", help="clients must send it as a bearer token (default: none)"
    )


def _add_logging(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--log-level", choices=log.LEVELS, default="info", help="least level logged (default: info)")
    group.add_argument(
        "--log-requests",
        action="store_true",
        help="log one line of numbers per request, never its contents (default: off)",
    )


def _integer(least: int, most: int | None = None) -> Callable[[str], int]:
    def parse_integer(text: str) -> int:
        expected = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {value}")
        return value

    return parse_integer


def _chunk_size(text: str) -> int:
    return NO_CHUNKING if text == "-1" else _integer(1)(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and below 1, got {text!r}")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value


def _text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda or cuda:N, got {text!r}")
    return text


def _model_path(text: str) -> str:
    """A folder that exists, or what can be a hub id; whether the hub knows it is found out when it is asked."""
    if text == "demo" or text.startswith("demo:"):
        return text
    path = Path(text).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise argparse.ArgumentTypeError(f"{text} is a file; the folder of a checkpoint is expected")
    if not _HUB_ID.match(text):
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return text


def _chat_template(text: str) -> str:
    """A name is looked up when the service is built; a file must be there now."""
    if ("/" in text or text.endswith((".jinja", ".json"))) and not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return _text(text)


def _domains(text: str) -> list[str]:
    domains = [domain for domain in text.split(",") if domain]
    if not domains or not all(_DOMAIN.match(domain) for domain in domains):
        raise argparse.ArgumentTypeError(f"expected host names without scheme or path, got {text!r}")
    return domains
