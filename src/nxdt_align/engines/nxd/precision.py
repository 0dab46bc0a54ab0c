"""float32 weights above those of a lower precision that are computed with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class MasterWeights:
    """float32 master weights and gradients of parameters in a lower precision."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._pairs: list[tuple[str, nn.Parameter, nn.Parameter]] = []
        for name, parameter in parameters:
            master = nn.Parameter(parameter.detach().float().clone())
            self._pairs.append((name, parameter, master))

            def add(low: Tensor, master: nn.Parameter = master) -> None:
                assert low.grad is not None
                master.grad = low.grad.float() if master.grad is None else master.grad + low.grad
                low.grad = None

            parameter.register_post_accumulate_grad_hook(add)  # type: ignore[no-untyped-call]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, master) for name, _, master in self._pairs]

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the weights that are computed with."""
        for _, parameter, master in self._pairs:
            parameter.copy_(master)
