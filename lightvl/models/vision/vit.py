"""What vision towers are made of: patch embedding from bytes, norms, MLPs, and the layer that they all stack.

Used by the towers beside it. Knows no checkpoint layout but for one rule: the pieces of a `Linear` carry their name
relative to the module that holds it (`"attn.qkv"`), and `container_targets` leaves the attribute's own name out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import nn
from torch.nn import functional as F

from lightvl.attention.base import EncoderAttention
from lightvl.attention.ops import Ops, RopeTable, ops_for
from lightvl.models.linear import Linear
from lightvl.models.load import Target, module_targets
from lightvl.models.vision.config import Activation, PixelConfig

MIDDLE_BYTE = 128
"""Taken from every byte before the patch embedding, so that less cancels out in its sums."""

ROW_CHUNK = 512
"""Rows that go through a chain of operations together on a CPU, so that what is between these stays in its caches: rope
is 8 times faster than over whole images, an MLP a tenth (measured at Qwen2-VL-2B's sizes, 4,000 rows)."""


PAUSE_ROWS = 1024
PAUSE_SCORES = 1 << 26
"""Rows through matmuls, and attention scores, after which an encode pauses on a CPU: less than 0.1 s of two cores."""


def container_targets(module: nn.Module) -> dict[str, Target]:
    """The targets of a module that holds some `Linear`s: these name theirs from here, all else goes by attribute."""
    targets = {
        name: Target(tuple(value.shape), _copy_into(value)) for name, value in module.named_parameters("", False)
    }
    for name, child in module.named_children():
        targets.update(child.weight_targets() if isinstance(child, Linear) else module_targets(child, f"{name}."))
    return targets


def _copy_into(value: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def fill(tensor: torch.Tensor) -> None:
        value.copy_(tensor)

    return fill


def parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel, as one linear straight from bytes: rescaling and normalising are folded
    into its weight and bias, and so is the repetition of a still image in time. Computed in float32, then cast: it is
    a thousandth of a tower's work, and bytes times rounded weights would cost accuracy."""

    def __init__(
        self,
        name: str,
        kernel: tuple[int, ...],
        size: int,
        pixels: PixelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`name` is the weight's in the checkpoint, where it has the shape (size, 3, *kernel); the kernel is
        (patch, patch) or (frames, patch, patch)."""
        super().__init__()
        self._name, self._kernel, self._size, self._pixels, self._dtype = name, kernel, size, pixels, dtype
        self._linear = Linear(
            3 * kernel[-1] * kernel[-2], {"patch": size}, bias=True, dtype=torch.float32, device=device
        )

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(..., patch * patch * 3) uint8, channels last, to (..., size)."""
        out: torch.Tensor = self._linear(patches.float().sub_(MIDDLE_BYTE))
        return out.to(self._dtype)

    def weight_targets(self) -> dict[str, Target]:
        return {self._name: Target((self._size, 3, *self._kernel), self._fill)}

    def _fill(self, weight: torch.Tensor) -> None:
        weight = weight.double()
        if weight.dim() == 5:
            weight = weight.sum(2)  # every frame is the same image
        weight = weight.permute(0, 2, 3, 1)  # (size, patch, patch, 3)
        scale, shift = weight.new_tensor(self._pixels.scale), weight.new_tensor(self._pixels.shift)
        fill = self._linear.weight_targets()
        fill["patch.bias"].fill((weight * (scale * MIDDLE_BYTE + shift)).sum((1, 2, 3)))
        fill["patch.weight"].fill((weight * scale).flatten(1))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = parameter(size, dtype=dtype, device=device)
        self._eps, self._ops = eps, ops_for(device, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, size) to the same."""
        return self._ops.rms_norm(x, self.weight, self._eps)


def layer_norm(size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> nn.LayerNorm:
    return nn.LayerNorm(size, eps=eps, dtype=dtype, device=device).requires_grad_(False)


_TORCH_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def activation(name: Activation, ops: Ops) -> Callable[[torch.Tensor], torch.Tensor]:
    """It may overwrite what it is given."""
    return ops.quick_gelu if name == "quick_gelu" else _TORCH_ACTIVATIONS[name]


class MLP(nn.Module):
    """`down(act(up(x)))`, or `down(act(gate(x)) * up(x))` when `ups` names two, gate first."""

    def __init__(
        self,
        in_size: int,
        inner_size: int,
        out_size: int,
        *,
        ups: tuple[str, ...],
        down: str,
        act_name: Activation,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.up = Linear(in_size, dict.fromkeys(ups, inner_size), bias=True, dtype=dtype, device=device)
        self.down = Linear(inner_size, {down: out_size}, bias=True, dtype=dtype, device=device)
        ops = ops_for(device, dtype)
        act = activation(act_name, ops)
        self._act = act if len(ups) == 1 else ops.silu_and_mul if act_name == "silu" else _gated_by(act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, in_size) to (T, out_size)."""
        return cast(torch.Tensor, self.down(self._act(self.up(x))))

    def weight_targets(self) -> dict[str, Target]:
        return container_targets(self)


def _gated_by(act: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def gated(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return act(gate.contiguous()).mul_(up)

    return gated


def row_chunks(x: torch.Tensor) -> list[slice]:
    """x's rows in pieces for chained operations; one piece on a device that wants large launches."""
    size = ROW_CHUNK if x.device.type == "cpu" else len(x)
    return [slice(begin, begin + size) for begin in range(0, len(x), size)]


def pauses_after(rows: slice) -> bool:
    """Whether an encode pauses once this chunk of `row_chunks` is done, though there may be more."""
    return bool(rows.stop % PAUSE_ROWS == 0)


def head_pieces(q: torch.Tensor, num_scores: int) -> list[slice]:
    """Heads of q (N, H, D) to attend with between two pauses, when each head has `num_scores`."""
    size = max(1, PAUSE_SCORES // num_scores) if q.device.type == "cpu" else q.shape[1]
    return [slice(begin, begin + size) for begin in range(0, q.shape[1], size)]


class Attend(Protocol):
    """Who attends to whom, in all layers of one kind: q, k, v (N, some heads, D) to (N, some heads, D)."""

    num_scores: int  # of one head

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor: ...


class WithinSegments:
    """Every row attends to the rows of its own segment."""

    def __init__(self, seg_lens: list[int], attention: EncoderAttention) -> None:
        self._seg_lens, self._attention = seg_lens, attention
        self.num_scores = sum(seg_len**2 for seg_len in seg_lens)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self._attention(q, k, v, self._seg_lens)


class Layer(nn.Module):
    """`x += attention(norm(x))`, then `x += mlp(norm(x))`, each by a gate of its own where `is_gated`."""

    def __init__(
        self,
        size: int,
        num_heads: int,
        mlp_size: int,
        *,
        norms: Mapping[str, nn.Module],
        qkv: Sequence[str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        proj: str,
        attention_bias: bool = True,
        is_gated: bool = False,
        ups: tuple[str, ...] = ("fc1",),
        down: str = "fc2",
        act_name: Activation,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Names are the checkpoint's: `norms`, `qkv` (one weight or three), `proj`; `ups` and `down` as in `MLP`."""
        super().__init__()
        self._num_heads, self._ops = num_heads, ops_for(device, dtype)
        self._norms = tuple(norms.values())
        for name, norm in norms.items():
            self.add_module(name, norm)
        self.qkv = Linear(
            size, dict.fromkeys(qkv, 3 * size // len(qkv)), bias=attention_bias, dtype=dtype, device=device
        )
        self.proj = Linear(size, {proj: size}, bias=attention_bias, dtype=dtype, device=device)
        self.mlp = MLP(size, mlp_size, size, ups=ups, down=down, act_name=act_name, dtype=dtype, device=device)
        self.gate_attn = parameter(1, dtype=dtype, device=device) if is_gated else None
        self.gate_ffn = parameter(1, dtype=dtype, device=device) if is_gated else None

    def steps(self, x: torch.Tensor, attend: Attend, rope_tables: Sequence[RopeTable] | None = None) -> Iterator[None]:
        """Advance x (N, size) in place, in bounded pieces. `rope_tables`: of each of x's `row_chunks`, to turn q and k
        by."""
        norm1, norm2 = self._norms
        chunks, pieces = row_chunks(x), []
        for chunk_idx, rows in enumerate(chunks):
            heads = self.qkv(norm1(x[rows])).view(-1, 3 * self._num_heads, x.shape[-1] // self._num_heads)
            qkv = heads.chunk(3, 1)
            if rope_tables is not None:
                qkv = self._ops.rope(heads, self._num_heads, self._num_heads, rope_tables[chunk_idx])
            pieces.append(qkv)
            if pauses_after(rows):
                yield
        q, k, v = (_joined(parts) for parts in zip(*pieces, strict=True))
        attended = []
        for some in head_pieces(q, attend.num_scores):
            attended.append(attend(q[:, some], k[:, some], v[:, some]))
            yield
        x += _gated(self.proj(_joined(attended, 1).flatten(1)), self.gate_attn)
        for rows in chunks:
            x[rows].add_(_gated(self.mlp(norm2(x[rows])), self.gate_ffn))
            if pauses_after(rows):
                yield
        yield

    def weight_targets(self) -> dict[str, Target]:
        return container_targets(self)


def _joined(parts: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _gated(x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    return x if gate is None else x * gate.tanh()
