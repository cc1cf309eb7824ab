"""The decoder with the fused operations and attention of CUDA, over a stand-in for flashinfer, against the same decoder
in float32 on a CPU: chunks, decode, decode in a fixed number of rows, M-RoPE and cross layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_helpers import make_inputs

from lightvl.attention.base import AttentionBackend, CrossInputs, CrossSpan, StepInputs
from lightvl.attention.cpu import CpuAttention
from lightvl.attention.cuda import CudaAttention
from lightvl.attention.cuda_ops import FlashinferOps
from lightvl.attention.ops import TorchOps
from lightvl.models import decoder as decoder_module
from lightvl.models.config import DecoderConfig, RopeScaling
from lightvl.models.decoder import Decoder

CPU = torch.device("cpu")
PAGE, TILE = 4, 6
QWEN = DecoderConfig(
    hidden_size=128,
    num_layers=3,
    num_heads=7,
    num_kv_heads=1,
    head_dim=64,
    intermediate_size=96,
    vocab_size=160,
    embedding_rows=160,
    rms_eps=1e-6,
    qkv_bias=True,
    tied_head=True,
    rope_theta=1e4,
    rope_scaling=None,
    mrope_section=(8, 12, 12),
    cross_layers=(),
    max_positions=512,
    stored_dtype=None,
)
MLLAMA = replace(
    QWEN,
    num_layers=5,
    num_heads=8,
    num_kv_heads=2,
    qkv_bias=False,
    tied_head=False,
    mrope_section=None,
    cross_layers=(0, 3),  # the first layer of all has no branch to add
    rope_scaling=RopeScaling("llama3", 8.0, original_max_positions=64),
)
pytestmark = pytest.mark.usefixtures("flashinfer")


def make_decoder(config: DecoderConfig, dtype: torch.dtype) -> Decoder:
    decoder = Decoder(config, dtype, CPU)
    torch.manual_seed(0)
    for name, target in decoder.weight_part().targets.items():
        shape = target.shape
        value = torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.2)
        if "norm" in name or "gate" in name.rsplit(".", 1)[-1]:
            value += 1
        target.fill(value.bfloat16().float())
    return decoder


def make_steps(config: DecoderConfig, dtype: torch.dtype) -> list[StepInputs]:
    """Two sequences: a chunk of each, one that goes on beside a decode row, and a decode of both."""
    steps, starts = [], [0, 0]
    torch.manual_seed(1)
    for rows in ([(0, 19)], [(1, 6)], [(0, 5), (1, 1)], [(1, 1), (0, 1)]):
        slots, positions = [], []
        for seq, num in rows:
            index = range(starts[seq], starts[seq] + num)
            slots += [seq * 10 * PAGE + i for i in index]
            positions += list(index)
            starts[seq] += num
        at = torch.tensor(positions)
        inputs = make_inputs(
            q_lens=[num for _, num in rows],
            kv_lens=[starts[seq] for seq, _ in rows],
            slots=torch.tensor(slots),
            page_table=torch.stack([torch.arange(10) + seq * 10 for seq, _ in rows]),
        )
        inputs.token_ids = torch.randint(0, config.vocab_size, (len(slots),))
        inputs.positions = torch.stack((at, at // 2, at // 3 + 1)) if config.mrope_section else at
        inputs.logits_idx = torch.arange(len(slots))
        steps.append(inputs)
    return see_images(steps, dtype) if config.cross_layers else steps


def see_images(steps: list[StepInputs], dtype: torch.dtype) -> list[StepInputs]:
    """The second sequence sees nothing; of the first one, the tokens from the fifth on see two tiles, then another."""
    spans = [[CrossSpan(4, 12, (3, 1)), CrossSpan(12, 19, (2,))], [], [CrossSpan(0, 5, (2,))], [CrossSpan(1, 2, (2,))]]
    seeing = []
    for inputs, step_spans in zip(steps, spans, strict=True):
        sees = torch.zeros(len(inputs.token_ids), 1, dtype=dtype)
        for span in step_spans:
            sees[span.q_start : span.q_end] = 1
        seeing.append(replace(inputs, cross=CrossInputs(step_spans, sees) if step_spans else None))
    return seeing


@torch.inference_mode()
def run(decoder: Decoder, attention: AttentionBackend, steps: list[StepInputs]) -> list[torch.Tensor]:
    if decoder.config.cross_layers:
        torch.manual_seed(2)
        image = torch.randn(3 * TILE, decoder.config.hidden_size).bfloat16().to(decoder.dtype)
        decoder.write_cross(image, (3, 1, 2), attention)
    logits = []
    for inputs in steps:
        attention.prepare(inputs)
        got = decoder.forward(inputs, attention)
        assert got is not None
        logits.append(got)
    return logits


SIZES = {"num_pages": 20, "page_size": PAGE, "num_cross_pages": 4, "cross_page_len": TILE}


@pytest.mark.parametrize("config", [QWEN, MLLAMA], ids=["mrope", "cross"])
def test_the_decoder_is_the_same(config: DecoderConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def logits(dtype: torch.dtype, attention: type) -> list[torch.Tensor]:
        backend = attention(
            config.kv_shape, dtype=dtype, **SIZES, **({} if attention is CpuAttention else {"device": CPU})
        )
        return run(make_decoder(config, dtype), backend, make_steps(config, dtype))

    def worst(got: list[torch.Tensor]) -> float:
        pairs = zip(got, exact, strict=True)
        return max((a.float().log_softmax(-1) - b.log_softmax(-1)).abs().max().item() for a, b in pairs)

    exact = logits(torch.float32, CpuAttention)
    plain = worst(logits(torch.bfloat16, CpuAttention))
    monkeypatch.setattr(decoder_module, "ops_for", lambda *_: FlashinferOps())
    fused = worst(logits(torch.bfloat16, CudaAttention))
    assert 0 < plain < 0.1 and fused < 2 * plain


@pytest.mark.parametrize("config", [QWEN, MLLAMA], ids=["mrope", "cross"])
@torch.inference_mode()
def test_a_fixed_decode_is_the_same(config: DecoderConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "ops_for", lambda *_: FlashinferOps())
    decoder = make_decoder(config, torch.bfloat16)
    backend = CudaAttention(config.kv_shape, dtype=torch.bfloat16, device=CPU, **SIZES)
    *chunks, decode = make_steps(config, torch.bfloat16)
    *_, want = run(decoder, backend, [*chunks, decode])
    seeing = {"with_cross": bool(config.cross_layers), "multi_axis_positions": config.mrope_section is not None}
    for num_rows in (2, 8):
        fixed = backend.fixed_decode(num_rows, **seeing)
        fixed.load(None)
        decoder.forward(fixed.inputs, fixed)
        fixed.load(decode)
        got = decoder.forward(fixed.inputs, fixed)
        assert got is not None and got.shape == (num_rows, config.vocab_size)
        torch.testing.assert_close(got[:2], want, rtol=0, atol=5e-2)


@pytest.mark.parametrize("shape", [(5, 96), (5, 3, 64)])
def test_fused_norms_are_those_of_torch(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, branch, weight = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16(), torch.randn(shape[-1]).bfloat16()
    fused, plain = FlashinferOps(), TorchOps()
    torch.testing.assert_close(fused.rms_norm(x, weight, 1e-5), plain.rms_norm(x, weight, 1e-5), rtol=2e-2, atol=2e-2)
    if x.dim() == 2:
        got = fused.add_rms_norm(branch.clone(), x.clone(), weight, 1e-5)
        want = plain.add_rms_norm(branch.clone(), x.clone(), weight, 1e-5)
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_fused_rope_is_that_of_torch() -> None:
    torch.manual_seed(0)
    heads, angles = torch.randn(9, 5 + 2, 64).bfloat16(), torch.rand(9, 32) * 100
    results = []
    for ops in (FlashinferOps(), TorchOps()):
        results.append(ops.rope(heads.clone(), 5, 1, ops.rope_table(angles.cos(), angles.sin())))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
