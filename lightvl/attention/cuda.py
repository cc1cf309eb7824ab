"""`base.AttentionBackend` on CUDA: paged attention by flashinfer's kernels.

Made by `engine/cuda.py`, called on the lane thread's current stream; nothing here waits for the device. A step of one
token per row is a decode; any other is a prefill in one launch, decode rows among it (the scheduler keeps them apart,
since the decode kernel is faster for them). `fixed_decode` gives decode steps for CUDA graphs.
"""

from __future__ import annotations

import torch

from lightvl.attention.base import StepInputs
from lightvl.attention.cuda_graph import CudaFixedDecode, FixedMemory
from lightvl.attention.cuda_kernels import DecodeKernel, HeadLayout, Kernel, PrefillKernel, SlotTargets, SlotWriter
from lightvl.attention.cuda_plan import cross_decode_rows, cross_rows, self_rows, workspace_bytes
from lightvl.attention.store import KVShape, PagesFirstStore
from lightvl.errors import ConfigError

HEAD_DIMS = (64, 128, 256)
"""With others flashinfer compiles kernels whose results are wrong."""
DTYPES = (torch.bfloat16, torch.float16)


class CudaAttention:
    """Owns both stores, the workspaces and the kernels. Raises ConfigError when flashinfer does not serve the shape."""

    def __init__(
        self,
        shape: KVShape,
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        num_cross_pages: int = 0,
        cross_page_len: int = 0,
        max_decode_rows: int = 256,
        max_row_pages: int | None = None,
    ) -> None:
        """`max_decode_rows` bounds `fixed_decode`, and `max_row_pages` the self pages of one of its rows (None:
        `num_pages`). The device holds one page more than `num_pages`, for padding."""
        if shape.head_dim not in HEAD_DIMS:
            raise ConfigError(f"CUDA attention has kernels for head sizes of 64, 128 and 256, not {shape.head_dim}")
        if dtype not in DTYPES:
            raise ConfigError(
                f"CUDA attention computes in bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
            )
        assert shape.num_heads is not None, "kernels are planned by the number of query heads"
        self._heads = HeadLayout(shape.num_heads, shape.num_kv_heads, shape.head_dim, dtype)
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        size = workspace_bytes(shape.num_heads, shape.num_kv_heads, shape.head_dim, num_sms, max_decode_rows)
        self._workspace = torch.zeros(size, dtype=torch.uint8, device=device)  # flashinfer wants it zeroed once
        heads, dim = shape.num_kv_heads, shape.head_dim
        self.pages = PagesFirstStore(
            shape.num_layers, heads, num_pages, page_size, dim, dtype, device, has_scratch=True
        )
        self.cross_pages = PagesFirstStore(
            shape.num_cross_layers, heads, num_cross_pages, cross_page_len, dim, dtype, device
        )
        self._writer = SlotWriter()
        self._prefill = PrefillKernel(self._heads, page_size, self._workspace, causal=True)
        self._decode = DecodeKernel(self._heads, page_size, self._workspace)
        self._cross_prefill: Kernel | None = None
        self._cross_decode: Kernel | None = None
        if cross_page_len:
            self._cross_prefill = PrefillKernel(self._heads, cross_page_len, self._workspace, causal=False)
            self._cross_decode = DecodeKernel(self._heads, cross_page_len, self._workspace)
        self._max_decode_rows, self._max_row_pages = max_decode_rows, max_row_pages or num_pages
        self._fixed: FixedMemory | None = None
        self._prepared_for: StepInputs | None = None
        self._self_kernel: Kernel = self._decode  # of the prepared step, as are the next two
        self._cross_kernel: Kernel | None = None
        self._targets: SlotTargets | None = None

    def prepare(self, inputs: StepInputs) -> None:
        """Plan the step's kernels; every layer runs the same."""
        rows = inputs.self_attention
        num_tokens, is_decode = len(rows.slots), len(rows.q_lens) == len(rows.slots)
        self._self_kernel = self._decode if is_decode else self._prefill
        self._self_kernel.plan(self_rows(rows.q_lens, rows.kv_lens, rows.page_table.numpy(), self.pages.page_len))
        self._targets = self._writer.targets(rows.slots)
        if inputs.cross is not None:
            spans, page_len = inputs.cross.spans, self.cross_pages.page_len
            plan = cross_decode_rows if is_decode else cross_rows
            self._cross_kernel = self._cross_decode if is_decode else self._cross_prefill
            assert self._cross_kernel is not None, "there are no cross pages"
            self._cross_kernel.plan(plan(spans, num_tokens, page_len))
        self._prepared_for = inputs

    def paged_rows(self, inputs: StepInputs) -> None:
        """Layers are not computed by one kernel."""

    def attend(
        self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, inputs: StepInputs
    ) -> torch.Tensor:
        """`layer_idx` counts the self-attention layers only."""
        assert self._prepared_for is inputs and self._targets is not None, "prepare() was not called for this step"
        self._writer.write(k, v, self.pages.slots[layer_idx], self._targets)
        return self._self_kernel.run(q, self.pages.layers[layer_idx]).flatten(1)

    def cross_attend(self, cross_idx: int, q: torch.Tensor, inputs: StepInputs) -> torch.Tensor:
        assert self._prepared_for is inputs and self._cross_kernel is not None, "prepare() was not called for this step"
        return self._cross_kernel.run(q, self.cross_pages.layers[cross_idx]).flatten(1)

    def write_cross(self, cross_idx: int, k: torch.Tensor, v: torch.Tensor, pages: tuple[int, ...]) -> None:
        self.cross_pages.write_pages(cross_idx, pages, k, v)

    def copy_pages(self, pairs: tuple[tuple[int, int], ...]) -> None:
        self.pages.copy_pages(pairs)

    def fixed_decode(self, num_rows: int, *, with_cross: bool, multi_axis_positions: bool) -> CudaFixedDecode:
        """See `base.FixedDecode`. All share one block of memory, which the first one makes."""
        assert num_rows <= self._max_decode_rows
        if self._fixed is None:
            self._fixed = FixedMemory(
                self._max_decode_rows, self._max_row_pages, self.cross_pages.num_pages, self._workspace
            )
        cross_pages = self.cross_pages if with_cross else None
        return CudaFixedDecode(
            num_rows,
            self._heads,
            self.pages,
            cross_pages,
            self._fixed,
            self._writer,
            multi_axis_positions=multi_axis_positions,
        )
