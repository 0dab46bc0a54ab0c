"""AdamW with float32 states and arithmetic for parameters of any float type."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.adamw import adamw

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class AdamWFP32OptState(AdamW):
    """``adamw_fp32OptState``: AdamW (https://arxiv.org/abs/1711.05101), states and update in float32.

    For float32 parameters it is ``torch.optim.AdamW``, bit for bit. For bf16 and fp16 parameters the
    update is computed on a float32 copy of one parameter at a time and rounded back; no other copy
    is kept. Updates below half a rounding step (about 0.2% of a bf16 weight) are then lost: use master
    weights, as the native engine does, or Neuron's stochastic rounding.

    Defaults: ``eps`` 1e-6, as in the neuronx-distributed class that NxDT registers under this name;
    ``weight_decay`` 0.01, as in NxDT's parameter groups.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, capturable=capturable, fused=fused
        )
        # torch sets this with ``fused``: a GradScaler would then leave unscaling to this step, which does
        # not.
        self._step_supports_amp_scaling = False
        keep_saved_dtypes(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            wide = [p for p in with_gradient if not _is_narrow(p)]
            if wide:
                self._update(group, wide, wide)
            for parameter in with_gradient:
                if _is_narrow(parameter):
                    # One at a time: float32 copies of all parameters at once would be master weights in all
                    # but name.
                    values = parameter.float()
                    self._update(group, [parameter], [values])
                    parameter.copy_(values)
        return loss

    def _update(self, group: dict[str, Any], parameters: list[Tensor], values: list[Tensor]) -> None:
        """One AdamW step on ``values``, copies of ``parameters`` or themselves, with the parameters'
        states."""
        states = [self._state_of(group, p) for p in parameters]
        gradients = [
            p.grad.to(v.dtype) for p, v in zip(parameters, values, strict=True) if p.grad is not None
        ]
        if _is_recorded(parameters):
            for value, gradient, state in zip(values, gradients, states, strict=True):
                update_in_graph(value, gradient, state, group)
            return
        beta1, beta2 = group["betas"]
        adamw(
            values,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            [state["step"] for state in states],
            foreach=group["foreach"],
            capturable=group["capturable"],
            fused=group["fused"],
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def _state_of(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            # As torch: the count is on the host, unless the step runs as one kernel or graph and must not
            # sync.
            on_device = group["fused"] or group["capturable"]
            state["step"] = torch.zeros((), device=parameter.device if on_device else "cpu")
            dtype = torch.float32 if _is_narrow(parameter) else parameter.dtype
            for name in MOMENTS if group["amsgrad"] else MOMENTS[:2]:
                state[name] = torch.zeros_like(parameter, dtype=dtype)
        return state


class AdamWInGraph(AdamW):
    """torch's AdamW for a device whose step is a compiled graph, see ``update_in_graph``."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                # A parameter at a time: it makes the state, and tells whether there is one.
                lists: list[list[Tensor]] = [[] for _ in range(6)]
                self._init_group({**group, "params": [parameter]}, *lists)  # type: ignore[no-untyped-call]
                update_in_graph(parameter, parameter.grad, self.state[parameter], group)
        return loss


def update_in_graph(value: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """One AdamW step on ``value``, in place, of operations that Trainium has.

    torch's capturable step raises the betas to the power of a tensor, and computes with a number of 64 bits:
    1 - beta2. Powers are exponentials here, beta ** t = exp(t ln beta); the largest difference is in their
    last digit.
    """
    beta1, beta2 = group["betas"]
    rate, first, second = group["lr"], state["exp_avg"], state["exp_avg_sq"]
    if group["maximize"]:
        gradient = -gradient
    state["step"] += 1
    share1, share2 = (1 - torch.exp(state["step"] * math.log(beta)) for beta in (beta1, beta2))
    value.mul_(1 - rate * group["weight_decay"])
    first.mul_(beta1).add_(gradient * (1 - beta1))
    second.mul_(beta2).add_(gradient * gradient * (1 - beta2))
    largest = second
    if group["amsgrad"]:
        largest = torch.maximum(state["max_exp_avg_sq"], second)
        state["max_exp_avg_sq"].copy_(largest)
    value.sub_(first / (largest.sqrt() / share2.sqrt() + group["eps"]) * (rate / share1))


def _is_recorded(parameters: list[Tensor]) -> bool:
    return all(parameter.device.type == "xla" for parameter in parameters)


def keep_saved_dtypes(optimizer: Optimizer) -> None:
    """Have ``load_state_dict`` keep the saved float type of each state.

    torch casts states to the parameter's type, which would round float32 states of bf16 parameters.
    """
    loading: list[dict[str, Any]] = []

    def remember(_: Optimizer, state_dict: dict[str, Any]) -> None:
        loading[:] = [state_dict]

    def restore(loaded: Optimizer) -> None:
        saved = loading.pop()
        keys = [key for group in saved["param_groups"] for key in group["params"]]
        parameters = [p for group in loaded.param_groups for p in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            for name, value in saved["state"].get(key, {}).items():
                current = loaded.state[parameter][name]
                # torch's load_state_dict leaves "step" alone, so it needs no repair.
                if isinstance(value, Tensor) and name != "step" and current.dtype != value.dtype:
                    loaded.state[parameter][name] = value.to(current.device, copy=True)

    optimizer.register_load_state_dict_pre_hook(remember)
    optimizer.register_load_state_dict_post_hook(restore)


def _is_narrow(parameter: Tensor) -> bool:
    return parameter.dtype in (torch.bfloat16, torch.float16)
