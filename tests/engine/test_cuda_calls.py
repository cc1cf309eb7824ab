"""Calls of torch.cuda, which no test here can make: each names something that the installed torch has, with arguments
that it takes."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

PACKAGE = Path(__file__).parents[2] / "lightvl"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "torch.cuda." in path.read_text())


def torch_cuda_name(node: ast.expr) -> str | None:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    dotted = ".".join([node.id, *parts]) if isinstance(node, ast.Name) else ""
    return dotted if dotted.startswith("torch.cuda.") else None


def resolve(dotted: str) -> Any:
    found: Any = torch
    for part in dotted.split(".")[1:]:
        found = getattr(found, part)
    return found


def wrong_calls(source: str) -> list[str]:
    wrong = []
    for node in ast.walk(ast.parse(source)):
        name = torch_cuda_name(node) if isinstance(node, ast.Attribute) else None
        if name is not None:
            try:
                resolve(name)
            except AttributeError:
                wrong.append(f"{node.lineno}: {name} does not exist")
        if not isinstance(node, ast.Call) or (name := torch_cuda_name(node.func)) is None:
            continue
        try:
            signature = inspect.signature(resolve(name))
        except (AttributeError, ValueError):  # told above; a builtin without a signature
            continue
        try:
            signature.bind(*node.args, **{keyword.arg: keyword.value for keyword in node.keywords if keyword.arg})
        except TypeError as error:
            wrong.append(f"{node.lineno}: {name}: {error}")
    return wrong


def test_there_are_calls_to_check() -> None:
    assert {"engine/cuda.py", "engine/stream.py", "models/staging.py"} <= {
        str(path.relative_to(PACKAGE)) for path in FILES
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_calls_of_torch_cuda_fit_the_installed_torch(path: Path) -> None:
    assert wrong_calls(path.read_text()) == []


@pytest.mark.parametrize(
    "call",
    [
        "torch.cuda.no_such()",
        "torch.cuda.Event(timing=True)",
        "torch.cuda.graph(g, pools=p)",
        "torch.cuda.empty_cache(1)",
    ],
)
def test_a_wrong_call_is_seen(call: str) -> None:
    assert len(wrong_calls(call)) == 1
