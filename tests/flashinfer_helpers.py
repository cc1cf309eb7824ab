"""A stand-in for flashinfer that keeps its contract on a CPU, in dense torch: what its wrappers demand of `plan` and
`run` is asserted, their results are computed in float32, and only keys that a row owns are read.

Every call is bound to the real library's signatures, recorded in `flashinfer_signatures.json`; to record them anew:
    PYTHONPATH=<where flashinfer is>:. python tests/flashinfer_helpers.py
Host and device are both the CPU here; `Places` tells their tensors apart.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

SIGNATURES = Path(__file__).parent / "flashinfer_signatures.json"
RECORDED = [
    "BatchPrefillWithPagedKVCacheWrapper.__init__",
    "BatchPrefillWithPagedKVCacheWrapper.plan",
    "BatchPrefillWithPagedKVCacheWrapper.run",
    "BatchDecodeWithPagedKVCacheWrapper.__init__",
    "BatchDecodeWithPagedKVCacheWrapper.reset_workspace_buffer",
    "BatchDecodeWithPagedKVCacheWrapper.plan",
    "BatchDecodeWithPagedKVCacheWrapper.run",
    "fast_decode_plan",
    "append_paged_kv_cache",
    "apply_rope_with_cos_sin_cache_inplace",
    "rmsnorm",
    "fused_add_rmsnorm",
    "silu_and_mul",
]
HALF = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128, 256)


def installed_signatures(library: ModuleType) -> dict[str, str]:
    """Of the library as it is: "(self, q, *args, out=None)", without annotations."""
    signatures = {}
    for name in RECORDED:
        call: Any = functools.reduce(getattr, name.split("."), library)
        signature = inspect.signature(inspect.unwrap(call))
        parameters = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
        signatures[name] = str(inspect.Signature(parameters))
    return signatures


@functools.cache
def recorded_signatures() -> dict[str, inspect.Signature]:
    signatures = {}
    for name, text in json.loads(SIGNATURES.read_text()).items():
        (function,) = ast.parse(f"def f{text}: ...").body
        scope: dict[str, Any] = {}
        exec(compile(ast.Module([function], []), name, "exec"), scope)
        signatures[name] = inspect.signature(scope["f"])
    return signatures


def as_recorded(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The decorated function gets the call's arguments by the library's names, defaults filled in, as one dict."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = recorded_signatures()[name].bind(*args, **kwargs)
            bound.apply_defaults()
            given = dict(bound.arguments)
            first = [given.pop("self")] if "self" in given else []
            return function(*first, given)

        return call

    return decorate


class Places:
    """Which tensors stand for memory of the host. A fixture puts `host`, `pinned` and `send` in place of
    `cuda_kernels`' own."""

    def __init__(self) -> None:
        self._hosts: dict[int, torch.Tensor] = {}  # by storage; kept, so that no address is used twice

    def host(self, array: Any) -> torch.Tensor:
        tensor = torch.from_numpy(array.copy())
        self._hosts[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def pinned(self, array: Any, device: torch.device) -> torch.Tensor:
        return self.host(array)

    def send(self, array: Any, device: torch.device) -> torch.Tensor:
        return torch.from_numpy(array.copy())

    def is_host(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._hosts


def fake_flashinfer(places: Places) -> ModuleType:
    library: Any = ModuleType("flashinfer")
    library.__version__ = "0.6.12"
    library.append_paged_kv_cache = _append
    library.apply_rope_with_cos_sin_cache_inplace = _rope
    library.rmsnorm, library.fused_add_rmsnorm, library.silu_and_mul = _rmsnorm, _fused_add_rmsnorm, _silu_and_mul

    def check_indices(indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, page_size: int) -> None:
        for tensor in (indptr, indices, last_page_len):
            assert tensor.dtype == torch.int32 and tensor.dim() == 1 and tensor.is_contiguous()
        assert places.is_host(indptr) and places.is_host(last_page_len), "plan would wait for the device"
        assert not places.is_host(indices), "page indices belong on the device"
        num_pages = indptr.diff()
        assert indptr[0] == 0 and (num_pages >= 0).all() and indptr[-1] == len(indices)
        assert len(last_page_len) == len(num_pages)
        owns = num_pages > 0
        assert (last_page_len[owns] >= 1).all() and (last_page_len <= page_size).all()
        assert not last_page_len[~owns].any(), "flashinfer adds last_page_len even where there is no page"

    class Wrapper:
        def _init(self, given: dict[str, Any], use_tensor_cores: bool) -> None:
            assert given["kv_layout"] == "NHD" and given["backend"] == "fa2" and given["jit_args"] is None
            workspace = given["float_workspace_buffer"]
            assert workspace.dtype == torch.uint8 and not workspace.any()
            self._ints = torch.zeros(16, dtype=torch.uint8)
            self._stamp = 0
            self._tensor_cores = use_tensor_cores

        def _plan(self, given: dict[str, Any], head_dim: int) -> None:
            group, rest = divmod(given["num_qo_heads"], given["num_kv_heads"])
            assert rest == 0 and head_dim in HEAD_DIMS
            assert self._tensor_cores or group in (1, 2, 3, 4, 8), "there is no such kernel"
            assert given["q_data_type"] in HALF and given["kv_data_type"] == given["q_data_type"]
            for name in ("sm_scale", "logits_soft_cap", "fixed_split_size"):
                assert given[name] is None
            assert given["window_left"] == -1 and not given["disable_split_kv"] and given["non_blocking"]
            self._heads = given["num_qo_heads"], given["num_kv_heads"], head_dim
            self._page_size, self._dtype = given["page_size"], given["q_data_type"]
            Wrapper.num_plans += 1
            self._stamp = Wrapper.num_plans
            self._ints[:8].copy_(torch.tensor([self._stamp]).view(torch.uint8))

        def _attend(self, given: dict[str, Any], rows: tuple[torch.Tensor, ...], *, causal: bool) -> torch.Tensor:
            """rows: q_indptr, kv_indptr, indices, last_page_len."""
            assert self._ints[:8].view(torch.int64).item() == self._stamp, "planned over before it was run"
            q, (keys, values) = given["q"], given["paged_kv_cache"]
            num_heads, num_kv_heads, head_dim = self._heads
            assert q.shape[1:] == (num_heads, head_dim) and q.dtype == keys.dtype == values.dtype == self._dtype
            assert keys.shape[1:] == values.shape[1:] == (self._page_size, num_kv_heads, head_dim)
            assert keys.stride() == values.stride() and q.stride(-1) == keys.stride(-1) == 1
            q_indptr, kv_indptr, indices, last_page_len = (x.tolist() for x in rows)
            assert q_indptr[-1] == len(q)
            out = given["out"]
            if out is None:
                out = torch.full(q.shape, torch.nan, dtype=q.dtype)
            assert out.is_contiguous() and out.shape == q.shape and out.dtype == q.dtype
            for r, last in enumerate(last_page_len):
                part = slice(q_indptr[r], q_indptr[r + 1])
                pages = indices[kv_indptr[r] : kv_indptr[r + 1]]
                kv_len = max(0, len(pages) - 1) * self._page_size + last
                k, v = (x[pages].flatten(0, 1)[:kv_len].float() for x in (keys, values))
                out[part] = _dense(q[part].float(), k, v, causal=causal).to(q.dtype)
            return out

        num_plans = 0

    class BatchPrefillWithPagedKVCacheWrapper(Wrapper):
        @as_recorded("BatchPrefillWithPagedKVCacheWrapper.__init__")
        def __init__(self, given: dict[str, Any]) -> None:
            assert not given["use_cuda_graph"]
            self._init(given, use_tensor_cores=True)

        @as_recorded("BatchPrefillWithPagedKVCacheWrapper.plan")
        def plan(self, given: dict[str, Any]) -> None:
            q_indptr, kv_indptr = given["qo_indptr"], given["paged_kv_indptr"]
            indices, last_page_len = given["paged_kv_indices"], given["paged_kv_last_page_len"]
            check_indices(kv_indptr, indices, last_page_len, given["page_size"])
            assert q_indptr.dtype == torch.int32 and places.is_host(q_indptr) and len(q_indptr) == len(kv_indptr)
            q_lens = q_indptr.diff()
            assert q_indptr[0] == 0 and (q_lens > 0).all()
            assert given["max_token_per_sequence"] == q_lens.max() and given["max_sequence_kv"] is None
            assert given["custom_mask"] is None and given["pos_encoding_mode"] == "NONE"
            self._causal = given["causal"]
            self._plan(given, given["head_dim_qk"])
            self._rows = q_indptr, kv_indptr, indices, last_page_len

        @as_recorded("BatchPrefillWithPagedKVCacheWrapper.run")
        def run(self, given: dict[str, Any]) -> torch.Tensor:
            assert given["out"] is not None, "without it, the output is zeroed first"
            return self._attend(given, self._rows, causal=self._causal)

    class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
        @as_recorded("BatchDecodeWithPagedKVCacheWrapper.__init__")
        def __init__(self, given: dict[str, Any]) -> None:
            self._init(given, given["use_tensor_cores"])
            self.is_graph, self.is_planned = given["use_cuda_graph"], False
            names = ("indptr", "indices", "last_page_len")
            self._buffers = [given[f"paged_kv_{name}_buffer"] for name in names]
            assert all((buffer is not None) == self.is_graph for buffer in self._buffers)
            if self.is_graph:
                assert all(
                    x.dtype == torch.int32 and x.is_contiguous() and not places.is_host(x) for x in self._buffers
                )
                assert len(self._buffers[0]) == len(self._buffers[2]) + 1

        @as_recorded("BatchDecodeWithPagedKVCacheWrapper.reset_workspace_buffer")
        def reset_workspace_buffer(self, given: dict[str, Any]) -> None:
            self._ints = given["int_workspace_buffer"]
            assert self._ints.dtype == torch.uint8

        @as_recorded("BatchDecodeWithPagedKVCacheWrapper.plan")
        def plan(self, given: dict[str, Any]) -> None:
            self.plan_rows(given)
            assert given["data_type"] is given["seq_lens"] is given["o_data_type"] is None
            if self.is_graph:
                for buffer, tensor in zip(self._buffers, self._planned, strict=True):
                    buffer[: len(tensor)].copy_(tensor)
            self.is_planned = True

        def plan_rows(self, given: dict[str, Any]) -> None:
            indptr, indices, last_page_len = (given[name] for name in ("indptr", "indices", "last_page_len"))
            check_indices(indptr, indices, last_page_len, given["page_size"])
            if self.is_graph:
                assert len(last_page_len) == len(self._buffers[2]), "the batch size is fixed"
                assert len(indices) <= len(self._buffers[1])
            self._plan(given, given["head_dim"])
            self._planned = indptr, indices, last_page_len

        @as_recorded("BatchDecodeWithPagedKVCacheWrapper.run")
        def run(self, given: dict[str, Any]) -> torch.Tensor:
            indptr, indices, last_page_len = self._planned
            if self.is_graph:  # the kernel reads the buffers; the work was divided by what was planned
                assert torch.equal(self._buffers[0], indptr) and torch.equal(self._buffers[2], last_page_len)
                indices = self._buffers[1][: len(indices)]
            q_indptr = torch.arange(len(indptr), dtype=torch.int32)
            return self._attend(given, (q_indptr, indptr, indices, last_page_len), causal=False)

    @as_recorded("fast_decode_plan")
    def fast_decode_plan(wrapper: Any, given: dict[str, Any]) -> None:
        assert wrapper.is_graph and wrapper.is_planned, "it finds the kernel where an earlier plan put it"
        assert torch.equal(given["global_override_indptr_cpu"], given["indptr"])
        wrapper.plan_rows(given)

    library.BatchPrefillWithPagedKVCacheWrapper = BatchPrefillWithPagedKVCacheWrapper
    library.BatchDecodeWithPagedKVCacheWrapper = BatchDecodeWithPagedKVCacheWrapper
    library.fast_decode_plan = fast_decode_plan
    return library


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """q (n, H, D) over k, v (L, G, D); query i is key L - n + i. Zero where there are no keys."""
    if not len(k):
        return torch.zeros_like(q)
    assert not causal or len(q) <= len(k)
    size = q.shape[1] // k.shape[1]
    scores = torch.einsum("nhd,lhd->hnl", q, k.repeat_interleave(size, 1)) * q.shape[-1] ** -0.5
    if causal:
        first = len(k) - len(q)
        later = torch.arange(len(k)) > torch.arange(first, len(k))[:, None]
        scores = scores.masked_fill(later, -torch.inf)
    return torch.einsum("hnl,lhd->nhd", scores.softmax(-1), v.repeat_interleave(size, 1))


@as_recorded("append_paged_kv_cache")
def _append(given: dict[str, Any]) -> None:
    k, v, (keys, values) = given["append_key"], given["append_value"], given["paged_kv_cache"]
    names = ("batch_indices", "positions", "kv_indices", "kv_indptr", "kv_last_page_len")
    rows, positions, indices, indptr, last_page_len = (given[name] for name in names)
    for tensor in (rows, positions, indices, indptr, last_page_len):
        assert tensor.dtype == torch.int32 and tensor.dim() == 1 and tensor.is_contiguous()
    assert given["kv_layout"] == "NHD" and len(rows) == len(positions) == len(k) == len(v)
    assert len(indptr) == len(last_page_len) + 1 and indptr[-1] == len(indices)
    assert k.dim() == v.dim() == 3 and keys.dim() == 4 and keys.shape[2:] == k.shape[1:] == v.shape[1:]
    assert k.dtype == v.dtype == keys.dtype == values.dtype and k.shape[2] in HEAD_DIMS
    assert keys.stride() == values.stride() and k.stride(-1) == v.stride(-1) == keys.stride(-1) == 1
    page_size = keys.shape[1]
    assert (positions // page_size < indptr.diff()[rows]).all()
    pages = indices[indptr[rows] + positions // page_size].long()
    keys[pages, positions.long() % page_size] = k
    values[pages, positions.long() % page_size] = v


@as_recorded("apply_rope_with_cos_sin_cache_inplace")
def _rope(given: dict[str, Any]) -> None:
    table, dim = given["cos_sin_cache"], given["head_size"]
    assert table.dtype == torch.float32 and table.is_contiguous() and table.dim() == 2 and given["is_neox"]
    assert given["positions"].dtype in (torch.int32, torch.int64) and given["positions"].is_contiguous()
    assert dim in (64, 128, 256, 512), "other sizes take a kernel that is wrong"
    cos, sin = table[given["positions"].long()][:, None].chunk(2, -1)
    for x in (given["query"], given["key"]):
        heads = x.view(len(x), -1, dim)  # raises where it would be a copy
        assert x.dtype in HALF and heads.stride(-1) == 1
        low, high = heads.float().chunk(2, -1)
        heads.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), -1))


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    assert weight.dim() == 1 and weight.is_contiguous()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


@as_recorded("rmsnorm")
def _rmsnorm(given: dict[str, Any]) -> torch.Tensor:
    x = given["input"]
    assert x.dtype == given["weight"].dtype and x.dtype in HALF and x.dim() in (2, 3) and x.stride(-1) == 1
    assert given["out"] is None
    return _normed(x.float(), given["weight"], given["eps"]).to(x.dtype).contiguous()


@as_recorded("fused_add_rmsnorm")
def _fused_add_rmsnorm(given: dict[str, Any]) -> None:
    x, residual = given["input"], given["residual"]
    assert x.dtype == residual.dtype == given["weight"].dtype and x.dtype in HALF
    assert x.shape == residual.shape and x.dim() == 2 and x.stride(-1) == residual.stride(-1) == 1
    total = x.float() + residual.float()
    residual.copy_(total)
    x.copy_(_normed(total, given["weight"], given["eps"]))


@as_recorded("silu_and_mul")
def _silu_and_mul(given: dict[str, Any]) -> torch.Tensor:
    x = given["input"]
    assert x.dtype in HALF and x.is_contiguous() and x.shape[-1] * x.dtype.itemsize % 16 == 0 and given["out"] is None
    gate, up = x.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


if __name__ == "__main__":
    import flashinfer

    SIGNATURES.write_text(json.dumps(installed_signatures(flashinfer), indent=1) + "\n")
