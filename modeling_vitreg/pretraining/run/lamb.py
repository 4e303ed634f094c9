"""LAMB: Adam whose step of each tensor is as long as the tensor, up to the learning rate.

Source: You et al. 2019, arXiv 1904.00962; DeiT-III (Touvron et al. 2022, arXiv 2204.07118) trains with it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class Lamb(torch.optim.Optimizer):
    """for each tensor w with gradient g, at step t:

        m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
        u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + decay * w
        w = w - lr * r * u,  r = |w| / |u|; 1 if either norm is 0, or where nothing decays (biases, norms, tokens)

    Args:
        params: parameters, or groups as `parameter_groups` makes them.
        lr: learning rate.
        betas: betas of the moments.
        eps: in the denominator.
        weight_decay: decoupled.
    """

    def __init__(self, params, *, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Take a step; returns what the closure returns, as optimisers do."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        time, (first, second) = state["step"].item(), group["betas"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        step = (mean / (1 - first**time)) / ((square / (1 - second**time)).sqrt() + group["eps"])
        ratio = 1.0
        if group["weight_decay"]:
            step.add_(parameter, alpha=group["weight_decay"])
            length, reach = parameter.norm(), step.norm()
            ratio = torch.where((length > 0) & (reach > 0), length / reach, torch.ones_like(length))
        parameter.sub_(step * ratio * group["lr"])


__all__ = ["Lamb"]
