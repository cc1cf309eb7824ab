"""Which of flashinfer's compiled modules LightVL calls: the one list, read by the build and by the check of a GPU.

A module is one .so that flashinfer loads when one of its functions is first called. Attention modules are made per head
size and dtype; causal or not, paged or not and any group size are in the same one.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

FLASHINFER = "0.6.12"
HEAD_DIMS = (64, 128)  # of every served decoder; flashinfer's kernels are silently wrong at 72, 80 and 96


@dataclass(frozen=True)
class KernelModule:
    """`maker` in `source` takes `arguments` and gives the JitSpec. A str that names a dtype of torch stands for it."""

    name: str
    source: str
    maker: str
    arguments: tuple[Any, ...] = ()
    functions: tuple[str, ...] = ()  # of flashinfer's, that need it
    headers: tuple[str, ...] = ()  # of CUDA, absent from small toolkits

    def spec(self) -> Any:
        """flashinfer.jit.JitSpec: `name`, `is_aot`, `build(verbose)`, `build_and_load()`. Needs flashinfer, and
        FLASHINFER_CUDA_ARCH_LIST where no GPU is visible."""
        import torch

        make = getattr(importlib.import_module(self.source), self.maker)
        return make(*(getattr(torch, item, item) if isinstance(item, str) else item for item in self.arguments))


def _simple(name: str, maker_of: str, functions: tuple[str, ...], headers: tuple[str, ...] = ()) -> KernelModule:
    return KernelModule(name, f"flashinfer.jit.{maker_of}", f"gen_{maker_of}_module", (), functions, headers)


def _prefill(name: str, head_dim: int, *, backend: str = "fa2", kv: str = "bfloat16") -> KernelModule:
    """Also serves decode with tensor cores. No rope inside, no window, no soft cap, no float16 product."""
    dtypes = ("bfloat16", kv, "bfloat16", "int32")
    functions = ("BatchPrefillWithPagedKVCacheWrapper", "BatchPrefillWithRaggedKVCacheWrapper")
    return KernelModule(
        name,
        "flashinfer.jit.attention",
        "gen_batch_prefill_module",
        (backend, *dtypes, head_dim, head_dim, 0, False, False, False),
        functions,
    )


def _decode(name: str, head_dim: int) -> KernelModule:
    """Without tensor cores: group sizes 1, 2, 3, 4 and 8."""
    dtypes = ("bfloat16", "bfloat16", "bfloat16", "int32")
    return KernelModule(
        name,
        "flashinfer.jit.attention",
        "gen_batch_decode_module",
        (*dtypes, head_dim, head_dim, 0, False, False),
        ("BatchDecodeWithPagedKVCacheWrapper", "CUDAGraphBatchDecodeWithPagedKVCacheWrapper", "fast_decode_plan"),
    )


NEEDED = (
    _simple("page", "page", ("append_paged_kv_cache",)),
    _simple("rope", "rope", ("apply_rope_with_cos_sin_cache_inplace", "apply_rope_with_cos_sin_cache")),
    _simple("norm", "norm", ("rmsnorm", "fused_add_rmsnorm", "layernorm"), ("cublasLt.h",)),
    KernelModule("silu", "flashinfer.jit.activation", "gen_act_and_mul_module", ("silu",), ("silu_and_mul",)),
    _simple(
        "sampling",
        "sampling",
        ("softmax", "top_k_renorm_probs", "top_p_renorm_probs", "top_k_mask_logits"),
        ("curand_kernel.h",),
    ),
    *(_prefill(f"fa2_{dim}", dim) for dim in HEAD_DIMS),
    *(_decode(f"decode_{dim}", dim) for dim in HEAD_DIMS),
)
"""Without these no model is served."""

LATER = (
    _simple("cascade", "cascade", ("merge_state", "merge_state_in_place", "merge_states")),
    _prefill("fa3_128", 128, backend="fa3"),
    _prefill("fa2_128_fp8", 128, kv="float8_e4m3fn"),
)
"""Not called yet; built on request, for what comes next (shared prefixes, Hopper's own kernels, 8-bit K,V)."""

MODULES = {module.name: module for module in NEEDED + LATER}


def modules_of(function: str) -> list[str]:
    """Names of the modules that one of flashinfer's functions may load."""
    return [module.name for module in MODULES.values() if function in module.functions]
