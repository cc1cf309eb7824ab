"""CudaAttention over a stand-in for flashinfer, against dense attention over unpaged K,V and against CpuAttention.

All that no sequence owns is NaN, so that one wrong page, or one key too many, is seen."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import torch
from attention_helpers import Dense, assert_pairs_close, cross_pairs, dense_attention, encoder_pair, make_inputs
from flashinfer_helpers import installed_signatures, recorded_signatures

from lightvl.attention import cuda_encoder, cuda_library
from lightvl.attention.base import CrossInputs, CrossSpan, StepInputs
from lightvl.attention.cpu import CpuAttention
from lightvl.attention.cuda import CudaAttention
from lightvl.attention.store import KVShape
from lightvl.errors import ConfigError

CPU = torch.device("cpu")
DTYPE = torch.bfloat16
make_cuda = partial(CudaAttention, device=CPU)
pytestmark = pytest.mark.usefixtures("flashinfer")


def poisoned(backend: CudaAttention) -> CudaAttention:
    for store in (backend.pages, backend.cross_pages):
        store.keys.fill_(torch.nan)
        store.values.fill_(torch.nan)
    return backend


def make_dense(**changes: Any) -> Dense:
    sizes: dict[str, Any] = {"groups": 2, "kv_heads": 2, "dim": 64, "page_size": 4, "dtype": DTYPE, "seed": 1}
    dense = Dense(**sizes | changes, make=make_cuda)
    poisoned(dense.backend)
    return dense


@pytest.mark.parametrize("groups", range(1, 9))
@pytest.mark.parametrize(("page_size", "dim"), [(1, 64), (16, 128)])
def test_steps_equal_dense_attention(groups: int, page_size: int, dim: int) -> None:
    """Chunks, prefix hits, decode rows, and all of them in one step."""
    dense = make_dense(groups=groups, page_size=page_size, dim=dim, seed=groups)
    dense.check_step([(0, 37), (1, 16), (2, 1)])
    dense.check_step([(3, 5)])
    dense.check_step([(seq, 1) for seq in range(4)])
    dense.check_step([(1, 9), (4, 33), (0, 1)])
    dense.check_step([(4, 1), (0, 1), (2, 1)])


def test_many_rows() -> None:
    dense = make_dense(groups=7, kv_heads=1, num_tokens=1500, layers=1)
    dense.check_step([(seq, 1 + seq % 7) for seq in range(100)])
    dense.check_step([(seq, 1) for seq in reversed(range(100))])


def test_copied_pages_hold_the_same_keys() -> None:
    dense = make_dense()
    dense.check_step([(0, 11)])
    copy = [dense.free.pop() for _ in dense.pages[0]]
    dense.backend.copy_pages(tuple(zip(dense.pages[0], copy, strict=True)))
    dense.pages[1] = copy
    for layer in range(dense.layers):
        dense.kv[1, layer] = dense.kv[0, layer]
    dense.check_step([(0, 3), (1, 1)])
    dense.check_step([(0, 1), (1, 1)])


def test_rows_share_the_pages_of_a_prefix() -> None:
    """In one launch: a sequence, and another that hit two of its full pages and goes on by itself."""
    dense = make_dense(groups=3, page_size=4)
    dense.check_step([(0, 11)])
    dense.pages[1] = dense.pages[0][:2]
    for layer in range(dense.layers):
        k, v = dense.kv[0, layer]
        dense.kv[1, layer] = k[:8], v[:8]
    dense.check_step([(1, 6), (0, 2)])
    dense.check_step([(0, 1), (1, 1)])


@pytest.mark.full
@pytest.mark.parametrize("seed", range(30))
def test_random_steps_equal_dense_attention(seed: int) -> None:
    choose = Random(seed).choice
    dense = make_dense(
        groups=choose(range(1, 9)),
        kv_heads=choose([1, 2, 3]),
        dim=choose([64, 128]),
        page_size=choose([1, 2, 5, 16]),
        dtype=choose([torch.bfloat16, torch.float16]),
        seed=seed,
    )
    dense.check_step([(seq, choose([1, 4, 30])) for seq in range(6)])
    fixed = Fixed(dense, [1, 3, 6, 9])
    for _ in range(12):
        seqs = dense.random.sample(range(6), dense.random.randint(1, 6))
        if choose([True, False]):
            fixed.check_step(choose([size for size in fixed.steps if size >= len(seqs)]), seqs)
        else:
            dense.check_step([(seq, choose([1, 1, 2, 9])) for seq in seqs])


@pytest.mark.parametrize("groups", [1, 2, 4, 7])
def test_cross_spans_equal_dense_attention(groups: int) -> None:
    assert_pairs_close(cross_pairs(groups=groups, dim=64, page_len=5, dtype=DTYPE, make=make_cuda))


def decode_inputs(dense: Dense, seqs: list[int]) -> StepInputs:
    inputs = dense._inputs([(seq, 1) for seq in seqs])
    ids = torch.arange(1, len(seqs) + 1)
    return replace(inputs, token_ids=ids, positions=ids)


class Fixed:
    """The sequences of a Dense, decoded in a fixed number of rows."""

    def __init__(self, dense: Dense, sizes: list[int]) -> None:
        self.dense = dense
        make = partial(dense.backend.fixed_decode, with_cross=False, multi_axis_positions=False)
        self.steps = {size: make(size) for size in sizes}
        for step in self.steps.values():
            step.load(None)
            self._run(step)

    def _run(self, step: Any) -> list[tuple[torch.Tensor, ...]]:
        dense, results = self.dense, []
        for layer in range(dense.layers):
            fused = torch.randn(step.num_rows, dense.heads + 2 * dense.kv_heads, dense.dim).to(dense.dtype)
            q, k, v = fused.split([dense.heads, dense.kv_heads, dense.kv_heads], 1)
            got = step.attend(layer, q, k, v, step.inputs)
            assert torch.isfinite(got).all(), "padding rows are finite too"
            results.append((q, k, v, got))
        return results

    def check_step(self, size: int, seqs: list[int]) -> None:
        dense, step = self.dense, self.steps[size]
        inputs = decode_inputs(dense, seqs)
        step.load(inputs)
        num, pad = len(seqs), size - len(seqs)
        assert step.inputs.token_ids.tolist() == [*range(1, num + 1), *[0] * pad]
        assert step.inputs.positions.tolist() == [*range(1, num + 1), *[0] * pad]
        scratch = dense.num_pages * dense.page_size
        assert step.inputs.self_attention.slots.tolist() == [*inputs.self_attention.slots.tolist(), *[scratch] * pad]
        for layer, (q, k, v, got) in enumerate(self._run(step)):
            for row, seq in enumerate(seqs):
                old = dense.kv[seq, layer]
                dense.kv[seq, layer] = torch.cat((old[0], k[[row]])), torch.cat((old[1], v[[row]]))
                want = dense_attention(q[[row]], *dense.kv[seq, layer], causal=True).flatten(1)
                assert_pairs_close([(got[[row]], want)])


@pytest.mark.parametrize("groups", [1, 3, 7])
def test_fixed_decode_equals_dense_attention(groups: int) -> None:
    """Batch sizes in turn, growing, shrinking and padded, beside steps that are not fixed."""
    dense = make_dense(groups=groups, page_size=4)
    dense.check_step([(seq, 3 + 5 * seq) for seq in range(6)])
    fixed = Fixed(dense, [1, 4, 8])
    fixed.check_step(8, [0, 1, 2, 3, 4, 5])
    fixed.check_step(8, [5, 2])
    fixed.check_step(1, [3])
    dense.check_step([(0, 4), (6, 9)])
    fixed.check_step(4, [6, 0, 1])
    dense.check_step([(6, 1), (1, 1)])
    fixed.check_step(4, [4, 5, 0, 6])
    fixed.check_step(8, [6])


def test_fixed_decode_takes_positions_of_several_axes() -> None:
    dense = make_dense()
    dense.check_step([(0, 3), (1, 6)])
    step = dense.backend.fixed_decode(4, with_cross=False, multi_axis_positions=True)
    step.load(replace(decode_inputs(dense, [0, 1]), positions=torch.arange(6).view(3, 2)))
    assert step.inputs.positions.tolist() == [[0, 1, 0, 0], [2, 3, 0, 0], [4, 5, 0, 0]]
    step.load(replace(decode_inputs(dense, [0]), positions=torch.full((3, 1), 9)))
    assert step.inputs.positions.tolist() == [[9, 0, 0, 0]] * 3


@pytest.mark.parametrize("groups", [1, 4])
def test_fixed_decode_sees_images(groups: int) -> None:
    """Rows that see one image, two, a shared one or none, and padding; then a step in which nobody sees any."""
    page_len, dim = 5, 64
    heads = 2 * groups
    shape = KVShape(1, 2, dim, num_cross_layers=1, num_heads=heads)
    sizes: dict[str, Any] = {"num_pages": 8, "page_size": 4, "num_cross_pages": 9, "cross_page_len": page_len}
    backend = poisoned(make_cuda(shape, dtype=DTYPE, **sizes))
    kv = {}
    for pages in ((3,), (5, 6), (8,)):
        k, v = torch.randn(2, len(pages) * page_len, 2, dim).to(DTYPE)
        backend.write_cross(0, k, v, pages)
        for i, page in enumerate(pages):
            part = slice(i * page_len, (i + 1) * page_len)
            kv[page] = k[part], v[part]
    step = backend.fixed_decode(8, with_cross=True, multi_axis_positions=False)
    step.load(None)
    views = [None, (3,), (5, 6, 8), (3,), None, (8,)]
    for rows in (views, views[2:4], [None]):
        num = len(rows)
        inputs = make_inputs(
            q_lens=[1] * num,
            kv_lens=[1] * num,
            slots=torch.arange(num) * 4,
            page_table=torch.arange(num)[:, None],
        )
        inputs.token_ids = inputs.positions = torch.zeros(num, dtype=torch.int64)
        spans = [CrossSpan(row, row + 1, pages) for row, pages in enumerate(rows) if pages]
        if spans:
            sees = torch.tensor([[float(pages is not None)] for pages in rows]).to(DTYPE)
            inputs.cross = CrossInputs(spans, sees)
        step.load(inputs)
        padded = [*rows, *[None] * (8 - num)]
        assert step.inputs.cross.sees_image.flatten().tolist() == [float(pages is not None) for pages in padded]
        q, k, v = torch.randn(8, heads, dim).to(DTYPE), *torch.randn(2, 8, 2, dim).to(DTYPE)
        step.attend(0, q, k, v, step.inputs)
        got = step.cross_attend(0, q, step.inputs)
        for row, pages in enumerate(padded):
            if pages is None:
                assert not got[row].any(), "nothing but zero, and no NaN"
                continue
            seen = [torch.cat(parts) for parts in zip(*(kv[page] for page in pages), strict=True)]
            assert_pairs_close([(got[[row]], dense_attention(q[[row]], *seen, causal=False).flatten(1))])


def test_decode_sees_images_without_a_graph() -> None:
    """One token per row, kernel by kernel: the same as on a CPU."""
    torch.manual_seed(3)
    shape = KVShape(1, 2, 64, num_cross_layers=1, num_heads=8)
    sizes: dict[str, Any] = {"num_pages": 4, "page_size": 4, "num_cross_pages": 4, "cross_page_len": 6}
    backends = [poisoned(make_cuda(shape, dtype=DTYPE, **sizes)), CpuAttention(shape, dtype=DTYPE, **sizes)]
    inputs = make_inputs(
        q_lens=[1] * 3, kv_lens=[1] * 3, slots=torch.tensor([0, 4, 8]), page_table=torch.arange(3)[:, None]
    )
    spans = [CrossSpan(0, 1, (2, 1)), CrossSpan(2, 3, (1,))]
    inputs.cross = CrossInputs(spans, torch.tensor([[1.0], [0.0], [1.0]]).to(DTYPE))
    image_kv, q, kv = torch.randn(2, 12, 2, 64).to(DTYPE), torch.randn(3, 8, 64).to(DTYPE), torch.randn(2, 3, 2, 64)
    results = []
    for backend in backends:
        backend.write_cross(0, *image_kv, (1, 2))
        backend.prepare(inputs)
        results.append((backend.attend(0, q, *kv.to(DTYPE), inputs), backend.cross_attend(0, q, inputs)))
    for ours, on_cpu in zip(*results, strict=True):
        torch.testing.assert_close(ours, on_cpu, rtol=0, atol=2e-2)


@pytest.mark.parametrize("dim", [64, 72, 80])
def test_tower_segments_are_told_by_their_ends(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def varlen_attn(q: Any, k: Any, v: Any, q_ends: Any, k_ends: Any, max_q: int, max_k: int) -> torch.Tensor:
        assert q_ends.dtype == k_ends.dtype == torch.int32
        assert (max_q, max_k) == (q_ends.diff().max(), k_ends.diff().max())
        parts = zip(*(x.split(e.diff().tolist()) for x, e in ((q, q_ends), (k, k_ends), (v, k_ends))), strict=True)
        return torch.cat([dense_attention(*part, causal=False) for part in parts]).to(q.dtype)

    monkeypatch.setattr(cuda_encoder, "varlen_attn", varlen_attn)
    sizes: dict[str, Any] = {"heads": 2, "dim": dim, "dtype": DTYPE}
    assert_pairs_close([encoder_pair(cuda_encoder.encoder_attention, [7, 12, 7, 1], **sizes)])
    assert_pairs_close([encoder_pair(cuda_encoder.encoder_attention, [9, 0, 3], [12, 4, 9], **sizes)])


def test_torch_takes_these_arguments() -> None:
    from inspect import signature

    from torch.nn.attention.varlen import varlen_attn

    first = list(signature(varlen_attn).parameters)[:7]
    assert first == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]


def test_a_step_must_be_prepared() -> None:
    dense = make_dense()
    dense.check_step([(0, 3)])
    other = make_inputs(q_lens=[1], kv_lens=[4], slots=torch.tensor([0]), page_table=torch.zeros(1, 1).long())
    x = torch.zeros(1, 2, 64, dtype=DTYPE)
    with pytest.raises(AssertionError, match="prepare"):
        dense.backend.attend(0, x, x, x, other)


def test_bytes_are_those_of_the_tensors_and_of_one_page_of_padding() -> None:
    shape = KVShape(num_layers=3, num_kv_heads=2, head_dim=64, num_cross_layers=2, num_heads=4)
    backend = make_cuda(shape, num_pages=5, page_size=4, dtype=DTYPE, num_cross_pages=6, cross_page_len=7)
    assert 2 * backend.pages.keys.nbytes == (5 + 1) * 4 * shape.bytes_per_token(DTYPE)
    assert 2 * backend.cross_pages.keys.nbytes == 6 * shape.bytes_per_cross_page(7, DTYPE)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "told"), [(80, DTYPE, "64, 128 and 256, not 80"), (64, torch.float32, "not float32")]
)
def test_what_there_are_no_kernels_for_is_refused(head_dim: int, dtype: torch.dtype, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make_cuda(KVShape(1, 1, head_dim, num_heads=1), num_pages=1, page_size=1, dtype=dtype)


@pytest.mark.parametrize(("version", "told"), [(None, "import"), ("0.7.1", "not 0.7.1")])
def test_a_missing_flashinfer_is_one_line(version: str | None, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library: Any = None if version is None else ModuleType("flashinfer")
    if version is not None:
        library.__version__ = version
    monkeypatch.setitem(sys.modules, "flashinfer", library)
    cuda_library.flashinfer.cache_clear()
    with pytest.raises(ConfigError, match=told) as caught:
        cuda_library.flashinfer()
    assert "pip install 'lightvl[cuda]'" in str(caught.value) and "\n" not in str(caught.value)


def test_recorded_signatures_are_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "flashinfer")
    library = pytest.importorskip("flashinfer")
    assert library.__version__.startswith(cuda_library.FLASHINFER)
    assert installed_signatures(library) == {name: str(each) for name, each in recorded_signatures().items()}


def test_kernels_that_cannot_be_had_are_told_at_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cuda_library.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="flashinfer-jit-cache"):
        cuda_library.require_kernels()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").touch()
    cuda_library.require_kernels()
