"""Muon as `torch.optim.Muon` has it (with Nesterov's momentum), for all matrices of one shape at once: on a GPU a step
of so small a model is the host's calls, and torch makes thirty for each matrix."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

MOMENTUM = 0.95
# of the Newton-Schulz iteration, https://kellerjordan.github.io/posts/muon/
COEFFICIENTS, ITERATIONS, EPSILON = (3.4445, -4.7750, 2.0315), 5, 1e-7


class Muon(torch.optim.Optimizer):
    """Updates as large as AdamW's (adjust_lr_fn="match_rms_adamw"), so that one learning rate fits both."""

    def __init__(self, weights: Iterable[Tensor], weight_decay: float, lr: float = 1e-3) -> None:
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            of_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    of_shape[weight.shape].append(weight)
            for shape, weights in of_shape.items():
                grads = [weight.grad for weight in weights]
                momenta = [self._momentum(weight) for weight in weights]
                torch._foreach_lerp_(momenta, grads, 1 - MOMENTUM)
                updates = orthogonal(torch.stack(torch._foreach_lerp(grads, momenta, MOMENTUM)))
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, updates.float().unbind(), alpha=-0.2 * max(shape) ** 0.5 * group["lr"])

    def _momentum(self, weight: Tensor) -> Tensor:
        if "momentum_buffer" not in self.state[weight]:
            self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        return self.state[weight]["momentum_buffer"]


def orthogonal(matrices: Tensor) -> Tensor:
    """(matrices, rows, columns) -> the same with singular values of about 1, in bfloat16."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if is_tall else matrices).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPSILON)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
