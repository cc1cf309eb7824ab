"""Part 5: a CUDA graph computes bit by bit what the same padded step computes kernel by kernel; and chunks, company and
preemption leave the error within the bound of `families`.

A dry run takes the tests' stand-ins for graphs, and the CPU's attention.
"""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from oracle import Drive, DriveRow
from parity_helpers import IMAGE_FAMILIES, Bfloat16Errors, ask, question, serving

from gpu.devices import make_graph_attention, make_graphs_pool, wait
from gpu.families import MODELS, Model, flags, make_oracle, tell
from gpu.rows import Context, Row
from lightvl.attention.base import StepInputs
from lightvl.engine.graphs import DecodeGraphs
from lightvl.models.model import build_model

PLAIN_BOUND = 3e-2  # of logits against the same step launched another way: bfloat16 rounds otherwise
SIZES = (1, 8)
PAGE_SIZE = 16
NUM_PAGES, NUM_CROSS_PAGES = 64, 8
CHOSEN = tuple(
    model
    for model in MODELS
    if (model.name, model.what)
    in {
        ("qwen2_vl", "heads 7/1 of 64"),
        ("mllama", "heads 8/2 of 64"),
        ("llama", "heads 4/1 of 128"),
    }
)


def run(context: Context) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number, model in enumerate(CHOSEN):
            place = Path(folder) / str(number)
            for with_cross in (False, True) if model.name == "mllama" else (False,):
                context.check(
                    f"{model.name}: graph equals eager{', with images' if with_cross else ''}",
                    lambda row, model=model, place=place, with_cross=with_cross: _graph(
                        context, model, place, with_cross, row
                    ),
                    seconds=5,
                )
        for number, model in enumerate(CHOSEN[:1] if context.is_dry else CHOSEN):
            checked = Checked(context, model, Path(folder) / f"served {number}")
            for name in CASES:
                context.check(
                    f"{model.name}: {name}", lambda row, checked=checked, name=name: checked.check(name, row), seconds=6
                )


# --- graph against eager --------------------------------------------------------------------------------------------


@torch.inference_mode()
def _graph(context: Context, tiny: Model, folder: Path, with_cross: bool, row: Row) -> None:
    """Elements of the logits that differ, over steps of several batch sizes one after the other."""
    make_oracle(tiny, folder)
    device = torch.device(context.device)
    model = build_model(folder, dtype=torch.bfloat16, device=device)
    model.load(folder)
    shape, page_len = model.config.kv_shape, model.family.cross_page_len
    attention = make_graph_attention(context.device)(
        shape,
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        dtype=torch.bfloat16,
        num_cross_pages=NUM_CROSS_PAGES if page_len else 0,
        cross_page_len=page_len,
    )
    torch.manual_seed(0)
    for cross_idx in range(shape.num_cross_layers):
        kv = torch.randn(2, NUM_CROSS_PAGES * page_len, shape.num_kv_heads, shape.head_dim).to(device, torch.bfloat16)
        attention.write_cross(cross_idx, *kv, tuple(range(NUM_CROSS_PAGES)))
    drive = DriveOn(device, model.decoder, attention, page_size=PAGE_SIZE, num_pages=NUM_PAGES)
    names = [f"sequence {i}" for i in range(SIZES[-1])]
    for i, name in enumerate(names):
        drive.step([DriveRow(name, [(7 * i + j) % 300 for j in range(3 + 9 * i)])])
    graphs = DecodeGraphs(model, attention, SIZES, make_graphs_pool(context.device), lambda: 0)
    multi_axis = model.config.mrope_section is not None
    fixed = {
        size: attention.fixed_decode(size, with_cross=with_cross, multi_axis_positions=multi_axis) for size in SIZES
    }
    num_different, error = 0, 0.0
    for step, num_rows in enumerate((3, 8, 5, 1, 8, 2)):
        seen = [[(0, 1, (i % 3, 3 + i % 5))] if with_cross and i != 1 else [] for i in range(num_rows)]
        inputs = drive.inputs([DriveRow(names[i], [step + i], cross=seen[i]) for i in range(num_rows)])
        step_of = fixed[1 if num_rows == 1 else SIZES[-1]]
        step_of.load(inputs)
        eager = _logits(model.decoder.forward(step_of.inputs, step_of))[:num_rows].clone()
        captured = graphs.forward(inputs).clone()
        attention.prepare(inputs)
        plain = _logits(model.decoder.forward(inputs, attention)).float()
        num_different += int((captured != eager).sum())
        error = max(error, ((captured.float() - plain).norm() / plain.norm()).item())
    wait(context.device)
    row.at_most(num_different, 0, "elements")
    row.note = f"against a step that is not padded: {error:.4f}"
    assert error <= PLAIN_BOUND, f"the padded step differs from the plain one by {error:.4f}"


def _logits(logits: torch.Tensor | None) -> torch.Tensor:
    assert logits is not None
    return logits


class DriveOn(Drive):
    """The tests' driver with its tensors on a device; page tables stay on the host."""

    def __init__(self, device: torch.device, *args: Any, **sizes: Any) -> None:
        super().__init__(*args, **sizes)
        self._device = device

    def inputs(self, rows: list[DriveRow]) -> StepInputs:
        made = super().inputs(rows)
        rows_of = dataclasses.replace(made.self_attention, slots=made.self_attention.slots.to(self._device))
        cross = made.cross and dataclasses.replace(made.cross, sees_image=made.cross.sees_image.to(self._device))
        moved = {name: getattr(made, name).to(self._device) for name in ("token_ids", "positions", "logits_idx")}
        return dataclasses.replace(made, self_attention=rows_of, cross=cross, **moved)


# --- the same, however it is served (each alone and whole is in `families`) ------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "in chunks": {"chunked_prefill_size": 32},
    "together": {},
    "after preemption": {"chunked_prefill_size": 32, "page_size": 4},
    "without graphs": {"disable_cuda_graph": True},
}


class Checked:
    """One tiny model, its oracle and its questions, made when first needed."""

    def __init__(self, context: Context, model: Model, folder: Path) -> None:
        self._context, self._model, self._folder = context, model, folder
        self._oracle: Any = None

    async def check(self, name: str, row: Row) -> None:
        if self._context.is_dry and "disable_cuda_graph" in CASES[name]:
            row.verdict, row.note = "told", "a CPU has no graphs"
            return
        if self._oracle is None:
            self._oracle = make_oracle(self._model, self._folder)
        oracle, is_preempted = self._oracle, name == "after preemption"
        has_images = self._model.name in IMAGE_FAMILIES
        words = "Tell me more. " * 3 if is_preempted else "What is in these pictures?"
        num = 3 if self._context.is_dry and not is_preempted else 6
        all_turns = [question(1 if has_images else 0, case, words=words) for case in range(num)]
        given = flags(self._context) | CASES[name]
        if is_preempted:
            given["max_total_tokens"] = max(len(oracle.prepare(turns)[0]) for turns in all_turns) + 96
        max_tokens = 40 if is_preempted else 16
        errors = Bfloat16Errors(oracle, oracle.model, self._context.device)
        async with serving(oracle, **given) as service:
            if name in ("together", "after preemption"):
                answers = await asyncio.gather(*(ask(service, turns, max_tokens=max_tokens) for turns in all_turns))
            else:
                answers = [await ask(service, turns, max_tokens=max_tokens) for turns in all_turns]
            num_preempted = service.engine._scheduler.num_preempted
        for turns, (answer,) in zip(all_turns, answers, strict=True):
            errors.add(turns, answer)
        tell(row, errors)
        if is_preempted:
            row.note += f"; preempted {num_preempted} times"
            assert num_preempted > 0, "nothing was preempted"
