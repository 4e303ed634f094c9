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
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[torch.Tensor], group: dict) -> None:
        gradients, states = [parameter.grad for parameter in parameters], []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)  # on the host, where it is read
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] += 1
            states.append(state)
        (first, second), times = group["betas"], [state["step"].item() for state in states]
        means, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - second)
        roots = torch._foreach_div(squares, [1 - second**time for time in times])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        steps = torch._foreach_div(means, [1 - first**time for time in times])
        torch._foreach_div_(steps, roots)
        if group["weight_decay"]:
            torch._foreach_add_(steps, parameters, alpha=group["weight_decay"])
            lengths, reaches = torch._foreach_norm(parameters), torch._foreach_norm(steps)
            ratios = [
                torch.where((length > 0) & (reach > 0), length / reach, torch.ones_like(length))
                for length, reach in zip(lengths, reaches)
            ]
            torch._foreach_mul_(steps, ratios)
        torch._foreach_mul_(steps, group["lr"])
        torch._foreach_sub_(parameters, steps)
