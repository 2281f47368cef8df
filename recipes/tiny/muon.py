"""Muon for small matrices: orthogonal updates, computed for all matrices of a shape at once.

torch.optim.Muon iterates one matrix after the other in bfloat16. On CPUs without bfloat16 units
that takes twice as long as the forward and backward pass of a tiny model together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Quintic Newton-Schulz iteration of Muon (Jordan et al., 2024): pushes singular values towards 1.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
SCALE = 6.0  # rate of Muon over the rate of AdamW


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices with the same singular vectors and singular values near 1.

    Parameters
    ----------
    matrices : Tensor
        float32 (count, rows, columns).
    """
    a, b, c = _COEFFICIENTS
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x if wide is matrices else x.mT


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonal updates, decoupled weight decay; for 2-D parameters only.

    The update is scaled by sqrt(max(1, rows / columns)), as in torch.optim.Muon's default.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = orthogonal(torch.stack([self._momentum(p, group) for p in parameters]))
                rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-rate)

    def _momentum(self, parameter: Tensor, group: dict) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        gradient = parameter.grad
        assert gradient is not None
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(buffer, group["momentum"])


def optimizers(model: nn.Module, vision: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """AdamW for embeddings, heads, norms and biases; Muon for the matrices inside the blocks.

    Their groups know their `part` ("vision" or "text") and the `scale` of their learning rate.
    """
    seen = {id(p) for p in vision}
    inner = {
        id(p)
        for name, p in model.named_parameters()
        if p.ndim == 2 and not any(part in name for part in ("embed", "lm_head"))
    }
    parts = {"vision": vision, "text": [p for p in model.parameters() if id(p) not in seen]}
    groups: dict[bool, list[dict]] = {False: [], True: []}
    for part, parameters in parts.items():
        for muon, group in groups.items():
            group.append({"params": [p for p in parameters if (id(p) in inner) is muon]})
            group[-1] |= {"part": part, "scale": SCALE if muon else 1.0}
    return [
        torch.optim.AdamW(groups[False], lr=0.0, betas=(0.9, 0.98), weight_decay=0.01),
        Muon(groups[True], lr=0.0, weight_decay=0.01, momentum=0.95),
    ]
