"""flashinfer's attention wrappers, each planned once per step and run once per layer.

PrefillKernel    rows of any number of queries, causal or not
DecodeKernel     one query per row
FixedKernel      one query per row, a fixed number of rows, in buffers that never move: fit for a CUDA graph
SlotWriter       new K,V to their slots

Made by `cuda.py` and `cuda_graph.py`; they know pages and rows, not steps. All use flashinfer's "fa2" kernels: "fa3"
does not split keys. `plan` gets its lengths as host tensors, so that nothing waits for the device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from lightvl.attention import transfer
from lightvl.attention.cuda_library import flashinfer
from lightvl.attention.cuda_plan import Ints, PagedRows

INT_WORKSPACE_BYTES = 1 << 20
"""For a plan of fixed size: a few arrays as long as twice its rows. (The wrappers' own are 8 MiB.)"""
KVPages = tuple[torch.Tensor, torch.Tensor]
"""K and V of a layer, each (pages, page_len, G, D)."""


@dataclass(frozen=True, slots=True)
class HeadLayout:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def uses_tensor_cores(self) -> bool:
        """In decode. The other kernel exists for 1, 2, 3, 4 and 8 query heads per K,V head, and is faster up to 3."""
        return self.num_heads // self.num_kv_heads > 3

    def plan_arguments(self, page_len: int) -> dict[str, Any]:
        """Of both `plan`s; without the dtypes they would mean float16."""
        return {
            "num_qo_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "page_size": page_len,
            "q_data_type": self.dtype,
            "kv_data_type": self.dtype,
        }


class Kernel(Protocol):
    def plan(self, rows: PagedRows) -> None:
        """Once per step."""
        ...

    def run(self, q: torch.Tensor, kv: KVPages) -> torch.Tensor:
        """q (T, H, D), whose rows may be strided, to the same, contiguous."""
        ...


class PrefillKernel:
    def __init__(self, heads: HeadLayout, page_len: int, workspace: torch.Tensor, *, causal: bool) -> None:
        self._wrapper = flashinfer().BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
        self._arguments = {**heads.plan_arguments(page_len), "head_dim_qk": heads.head_dim, "causal": causal}
        self._device, self._staging = workspace.device, Staging(workspace.device)

    def plan(self, rows: PagedRows) -> None:
        self._staging.wait()
        self._wrapper.plan(
            qo_indptr=pinned(rows.q_indptr, self._device),
            paged_kv_indptr=pinned(rows.kv_indptr, self._device),
            paged_kv_indices=send(rows.indices, self._device),
            paged_kv_last_page_len=pinned(rows.last_page_len, self._device),
            max_token_per_sequence=int(np.diff(rows.q_indptr).max()),  # or it is sought in a loop over the rows
            **self._arguments,
        )
        self._staging.record()

    def run(self, q: torch.Tensor, kv: KVPages) -> torch.Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)  # left to flashinfer, it would be zeroed
        self._wrapper.run(q, kv, out=out)
        return out


class DecodeKernel:
    def __init__(self, heads: HeadLayout, page_len: int, workspace: torch.Tensor) -> None:
        self._wrapper = flashinfer().BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=heads.uses_tensor_cores, backend="fa2"
        )
        self._arguments = {**heads.plan_arguments(page_len), "head_dim": heads.head_dim}
        self._device, self._staging = workspace.device, Staging(workspace.device)

    def plan(self, rows: PagedRows) -> None:
        self._staging.wait()
        self._wrapper.plan(
            indptr=pinned(rows.kv_indptr, self._device),
            indices=send(rows.indices, self._device),
            last_page_len=pinned(rows.last_page_len, self._device),
            **self._arguments,
        )
        self._staging.record()

    def run(self, q: torch.Tensor, kv: KVPages) -> torch.Tensor:
        out: torch.Tensor = self._wrapper.run(q, kv)
        return out


class FixedKernel:
    """`buffer` (int32, device) and `int_workspace` may be shared with other FixedKernels, since a plan is followed by
    its run before another's plan:

        buffer:  | kv_indptr (R + 1) | last_page_len (R) | indices (up to the end) |
    """

    def __init__(
        self,
        heads: HeadLayout,
        page_len: int,
        num_rows: int,
        workspace: torch.Tensor,
        int_workspace: torch.Tensor,
        buffer: torch.Tensor,
    ) -> None:
        library = flashinfer()
        indptr, last_page_len, indices = buffer.tensor_split((num_rows + 1, 2 * num_rows + 1))
        self._wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=heads.uses_tensor_cores,
            paged_kv_indptr_buffer=indptr,
            paged_kv_indices_buffer=indices,
            paged_kv_last_page_len_buffer=last_page_len,
            backend="fa2",
        )
        self._wrapper.reset_workspace_buffer(workspace, int_workspace)
        self._fast_plan = functools.partial(library.fast_decode_plan, self._wrapper)
        self._arguments = {**heads.plan_arguments(page_len), "head_dim": heads.head_dim}
        self._num_rows, self._buffer, self._indices = num_rows, buffer, indices
        self._staging = Staging(workspace.device)
        self._is_first = True

    def plan(self, rows: PagedRows) -> None:
        """`rows` are `num_rows`, one query each. Writes the buffer, and after the first time has no loop over rows."""
        assert len(rows.last_page_len) == self._num_rows and len(rows.indices) <= len(self._indices)
        packed = np.concatenate((rows.kv_indptr, rows.last_page_len, rows.indices))
        self._buffer[: len(packed)].copy_(pinned(packed, self._buffer.device), non_blocking=True)
        indices = self._indices[: len(rows.indices)]
        indptr, last_page_len = host(rows.kv_indptr), host(rows.last_page_len)
        self._staging.wait()
        if self._is_first:  # loads the kernel; the fast plan finds it in the wrapper
            self._wrapper.plan(indptr, indices, last_page_len, **self._arguments)
            self._is_first = False
        else:
            self._fast_plan(indptr, indices, last_page_len, global_override_indptr_cpu=indptr, **self._arguments)
        self._staging.record()

    def run(self, q: torch.Tensor, kv: KVPages) -> torch.Tensor:
        out: torch.Tensor = self._wrapper.run(q, kv)
        return out


class SlotTargets(NamedTuple):
    """T tokens as flashinfer's append wants them: token t is a row of its own, whose only page is its slot. int32."""

    batch_indices: torch.Tensor  # (T,) the row of each token
    positions: torch.Tensor  # (T,) in its row: 0
    slots: torch.Tensor  # (T,) the page of each row
    indptr: torch.Tensor  # (T + 1,)
    last_page_len: torch.Tensor  # (T,) 1


class SlotWriter:
    """K and V of all heads in one launch."""

    def __init__(self) -> None:
        self._append = flashinfer().append_paged_kv_cache

    def targets(self, slots: torch.Tensor) -> SlotTargets:
        """Once per step."""
        num, device = len(slots), slots.device
        indptr = torch.arange(num + 1, dtype=torch.int32, device=device)
        zeros, ones = torch.zeros_like(indptr[:num]), torch.ones_like(indptr[:num])
        return SlotTargets(indptr[:num], zeros, slots.to(torch.int32), indptr, ones)

    def write(self, k: torch.Tensor, v: torch.Tensor, kv_slots: KVPages, to: SlotTargets) -> None:
        """k, v (T, G, D), whose rows may be strided; `kv_slots` are a layer's pages of one token, (slots, 1, G, D)."""
        self._append(k, v, to.batch_indices, to.positions, kv_slots, to.slots, to.indptr, to.last_page_len, "NHD")


class Staging:
    """Guards a wrapper's pinned memory: `plan` writes there what the device copies later."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Before a plan: until the copies of the one before it are done. They were asked for a step ago."""
        if self._event is not None:
            self._event.synchronize()  # sync: only with the copies of an earlier step

    def record(self) -> None:
        if self._event is not None:
            self._event.record()


def host(array: Ints) -> torch.Tensor:
    return torch.from_numpy(array)


def pinned(array: Ints, device: torch.device) -> torch.Tensor:
    return transfer.pinned(host(array), device)


def send(array: Ints, device: torch.device) -> torch.Tensor:
    return transfer.to_device(host(array), device)
