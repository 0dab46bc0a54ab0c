"""float32 weights above those of a lower precision that are computed with; the same on every engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn


class MasterWeights:
    """float32 master weights and gradients of a model that computes in a lower precision.

    Each micro-batch's gradient is added to the master's in float32 as soon as it is complete, so
    that accumulation over micro-batches loses nothing. Without ``float32_sums`` gradients add up in the
    lower precision, which takes half of the memory, until ``take_gradients``.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], *, float32_sums: bool = True
    ) -> None:
        self._pairs: list[tuple[str, nn.Parameter, nn.Parameter]] = []
        for name, parameter in named_parameters:
            is_trained = parameter.requires_grad
            master = nn.Parameter(parameter.detach().float().clone(), requires_grad=is_trained)
            master.grad = None
            self._pairs.append((name, parameter, master))
            if float32_sums and is_trained:
                parameter.register_post_accumulate_grad_hook(_Adder(master))  # type: ignore[no-untyped-call]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, _, master in self._pairs:
            yield name, master

    def take_gradients(self) -> None:
        """Move complete sums of gradients from the lower precision to the masters."""
        for _, parameter, master in self._pairs:
            if parameter.grad is not None:
                master.grad = parameter.grad.float()
                parameter.grad = None

    @torch.no_grad()
    def sync_weights(self) -> None:
        """Copy the masters into the weights that are computed with."""
        for _, parameter, master in self._pairs:
            parameter.copy_(master)


class _Adder:
    """Moves a complete low-precision gradient into its master's float32 gradient."""

    def __init__(self, master: nn.Parameter) -> None:
        self._master = master

    def __call__(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        if self._master.grad is None:
            self._master.grad = parameter.grad.float()
        else:
            self._master.grad += parameter.grad
        parameter.grad = None
