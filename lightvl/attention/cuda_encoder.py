"""`base.EncoderAttention` on CUDA: all segments of all images in one launch, by torch's variable-length attention.

Called by the vision towers. (flashinfer compiles kernels for their head sizes of 72 and 80 whose results are wrong;
torch's take every multiple of 8.) mllama's padding rows are segments with fewer keys than rows.
"""

from __future__ import annotations

import functools

import torch
from torch.nn.attention.varlen import varlen_attn

from lightvl.attention.cuda_kernels import send
from lightvl.attention.cuda_plan import indptr


def encoder_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seg_lens: list[int], kv_lens: list[int] | None = None
) -> torch.Tensor:
    """bfloat16 or float16; rows may be strided."""
    q_ends = _ends(tuple(seg_lens), q.device)
    kv_ends = q_ends if kv_lens is None else _ends(tuple(kv_lens), q.device)
    # these seven arguments are the same in all versions of torch from 2.10 on
    out = varlen_attn(q, k, v, q_ends, kv_ends, max(seg_lens), max(kv_lens or seg_lens))
    assert isinstance(out, torch.Tensor)
    return out


@functools.lru_cache(maxsize=64)
def _ends(lens: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(segments + 1,) int32. All layers of a tower ask for the same."""
    return send(indptr(lens), device)
