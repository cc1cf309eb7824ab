"""Part 4: every model family against HF transformers, through the whole service, on tiny random models whose heads have
the sizes that the kernels are for.

The error is that of our logprobs in bfloat16, of the tokens that we chose and their alternatives, against HF in float32
with the same bfloat16-rounded weights, teacher-forced; the bound is twice what HF itself errs in bfloat16 on the same
device. Models and oracles are those of the tests.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_helpers import LlavaOracle
from parity_helpers import IMAGE_FAMILIES, Bfloat16Errors, Oracle, ask, question, rounded_to_bfloat16, serving
from tiny_llava import ROWS

from gpu.rows import Context, Row

NUM_QUESTIONS = 6
BOUND = 2.0  # of HF's own error


def text(heads: int, kv_heads: int, dim: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": heads * dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": 256,
        **more,
    }


def mrope(heads: int, kv_heads: int, dim: int) -> dict[str, Any]:
    section = [dim // 8, 3 * dim // 16, 3 * dim // 16]
    return text(heads, kv_heads, dim, rope_scaling={"type": "mrope", "mrope_section": section})


@dataclass(frozen=True)
class Model:
    """`name` is a family of parity_helpers.Oracle or a row of tiny_llava."""

    name: str
    what: str
    sizes: dict[str, Any]


MODELS = (
    # groups of 7 and 6 as in the 7B and the 2B; towers with heads of 80, and 72 for SigLIP, as all real ones
    Model("qwen2_vl", "heads 7/1 of 64", {"text": mrope(7, 1, 64), "embed_dim": 160, "hidden_size": 448}),
    Model("qwen2_vl", "heads 6/1 of 128", {"text": mrope(6, 1, 128), "embed_dim": 160, "hidden_size": 768}),
    Model("qwen2_5_vl", "heads 8/1 of 128", {"text": mrope(8, 1, 128), "hidden_size": 160, "out_hidden_size": 1024}),
    Model("mllama", "heads 8/2 of 64", {"text": text(8, 2, 64), "hidden_size": 160, "vision_output_dim": 480}),
    Model("mllama", "heads 4/1 of 128", {"text": text(4, 1, 128), "hidden_size": 160, "vision_output_dim": 480}),
    Model("llama", "heads 4/1 of 128", text(4, 1, 128)),
    Model("qwen2", "heads 7/1 of 64", text(7, 1, 64)),
    Model("llava-v1.5-7b", "heads 4/4 of 64", {"text": text(4, 4, 64), "vision": {"hidden_size": 128}}),
    Model("llava-v1.6-mistral-7b-hf", "heads 4/1 of 128", {"text": text(4, 1, 128), "vision": {"hidden_size": 128}}),
    Model(
        "llava-onevision-qwen2-7b-ov-hf", "heads 7/1 of 64", {"text": text(7, 1, 64), "vision": {"hidden_size": 144}}
    ),
)


def run(context: Context) -> None:
    models = [model for model in MODELS if not context.is_dry or model.name in ("qwen2_vl", "llava-v1.5-7b")]
    with tempfile.TemporaryDirectory() as folder:
        for number, model in enumerate(models[:: 2 if context.is_dry else 1]):
            place = Path(folder) / str(number)
            context.check(
                f"{model.name}, {model.what}",
                lambda row, model=model, place=place: _check(context, model, place, row),
                seconds=8,
            )


async def _check(context: Context, model: Model, folder: Path, row: Row) -> None:
    oracle = make_oracle(model, folder)
    errors = Bfloat16Errors(oracle, oracle.model, context.device)
    all_turns = questions(model)[: 2 if context.is_dry else NUM_QUESTIONS]
    async with serving(oracle, **flags(context)) as service:
        for turns in all_turns:
            errors.add(turns, (await ask(service, turns, max_tokens=16))[0])
    tell(row, errors)


def make_oracle(model: Model, folder: Path) -> Any:
    """The checkpoint in `folder`, and HF's float32 model with the weights that a bfloat16 server reads from it."""
    folder.mkdir(parents=True, exist_ok=True)
    oracle: Any
    if model.name in ROWS:
        oracle = LlavaOracle(ROWS[model.name], folder, **model.sizes)
    else:
        oracle = Oracle(model.name, folder, **model.sizes)
    rounded_to_bfloat16(oracle.model).float()
    return oracle


def questions(model: Model) -> list[Any]:
    has_images = model.name in IMAGE_FAMILIES or model.name in ROWS
    return [question(case % 3 if has_images else 0, case) for case in range(NUM_QUESTIONS)]


def flags(context: Context) -> dict[str, Any]:
    """Few graphs are captured for so few sequences."""
    given = {"dtype": "bfloat16", "device": context.device, "max_running_requests": 8}
    # the tests' share of a CPU's memory would be less than CUDA itself takes
    return given if context.is_dry else given | {"mem_fraction_static": None}


def tell(row: Row, errors: Bfloat16Errors) -> None:
    """Ours over HF's."""
    row.at_most(errors.ours / errors.theirs, BOUND)
    row.note = f"mean error of logprobs {errors.ours:.4f}, HF's {errors.theirs:.4f}"
