"""Adapters beside NxD's parallel layers, whose own weights are frozen.

NxD's layers end in one call, ``_forward_impl``, of this rank's inputs and weight: before it stands what they
do with a whole input, behind it what they do with a partial output. Ours takes its place, and adds the
factors' term there:

- outputs are divided (q, k, v, gate, up): B is divided with them, A is on every rank. The input, which is
  gathered once for weight and factors, gets its gradient reduced once for both.
- inputs are divided (o, down): A is divided with them, B is on every rank. The term is added to the partial
  output *before* that is reduced: another, narrow reduction of x A' in each layer and micro-batch would cost
  more time to start than B's product over all tokens, of which each rank then does its part.

Either way what is on every rank has the gradient of that rank's outputs, or inputs, alone:
``Shards.partial_gradients`` has them summed, once per step.

Legend: ``B`` rows, ``S`` tokens, ``D`` hidden, ``I`` inputs, ``O`` outputs of a rank's part of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from neuronx_distributed.parallel_layers import mappings, parallel_state
from torch import Tensor, nn
from torch.nn import functional as F

from nxdt_align.engines.nxd.qkv import CoalescedProjection, SharedKVProjection, whole_input
from nxdt_align.engines.scoring import on_device
from nxdt_align.models.adapters import AdaptedLinear, AdapterSpec, Drop, Switch, add_adapters
from nxdt_align.models.decoder import Decoder
from nxdt_align.models.partition import Partition
from nxdt_align.models.sharding import LORA_A, LORA_B, split_of

FACTORS = "factors"
"""Name of the module that holds a layer's factors, where that layer is one projection alone."""


class Factors(AdaptedLinear):
    """A rank's factors of a projection whose weight is in one of NxD's layers: ``lora_A`` (r, I), ``lora_B``
    (O, r), with DoRA ``magnitude`` (O,)."""

    def __init__(self, inputs: int, outputs: int, spec: AdapterSpec, switch: Switch, *, is_row: bool) -> None:
        super().__init__(nn.Linear(inputs, outputs, bias=False), spec, switch)
        self.register_parameter("weight", None)
        self._is_row = is_row

    def add_to(self, plain: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """``plain``, x W', with what the adapter adds; as it is where that is off.

        Args:
            weight: W, this rank's rows or columns, (O, I).
        """
        factors = self.factors()
        return plain if factors is None else self.added(plain, x, weight, *factors)

    def row_squares(self, rows: Tensor) -> Tensor:
        squares = super().row_squares(rows)
        if not self._is_row:
            return squares
        summed: Tensor = mappings.reduce_from_tensor_model_parallel_region(squares)
        return summed


class StartOfGradients(nn.Module):
    """What comes out of the embedding, as the first tensor of the backward pass where no weight before it is
    trained. A recomputed layer, or a stage's output, has none otherwise."""

    def __init__(self, scaled_embedding: nn.Module) -> None:
        super().__init__()
        self.scaled_embedding = scaled_embedding

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.scaled_embedding(x)
        if scaled.requires_grad or not torch.is_grad_enabled():
            return scaled
        return scaled.detach().requires_grad_(True)


def adapt(decoder: Decoder, partition: Partition, spec: AdapterSpec, switch: Switch) -> None:
    """Give a decoder of NxD's layers, on the meta device, its adapters; freezes all else."""
    dtype = next(decoder.parameters()).dtype
    # Modules that are trained whole; linear layers of torch's there are none any more.
    add_adapters(decoder, spec, switch)
    modules = dict(decoder.named_modules())
    with torch.device("meta"):
        for path in spec.targets:
            holder, name = _holder(modules, path)
            inputs = partition.local_shape(f"{path}.{LORA_A}")[1]
            outputs = partition.local_shape(f"{path}.{LORA_B}")[0]
            is_row = split_of(f"{path}.weight").dim == 1
            made = Factors(inputs, outputs, spec, switch, is_row=is_row).to(dtype=dtype)
            made.drop = _drop(partition.tp, holder, is_row=is_row)
            holder.add_module(name, made)
    for layer in modules.values():
        _take_over(layer)
    decoder.model.scaled_embedding = StartOfGradients(decoder.model.scaled_embedding)


def _holder(modules: dict[str, nn.Module], path: str) -> tuple[nn.Module, str]:
    """The layer that has a projection's weight, and the name of the module of its factors there."""
    if path in modules:
        return modules[path], FACTORS
    parent, _, name = path.rpartition(".")
    return modules[parent], name


def plain_name(name: str) -> str:
    """A parameter's, as if factors were their layer's own."""
    return name.replace(f".{FACTORS}.", ".")


def _take_over(layer: Any) -> None:
    """Have a layer of NxD's compute with its factors, where it has some.

    NxD's own gradients of a frozen ``weight_qkv`` fail, so that layers of shared kv heads never call it.
    """
    held = {name: child for name, child in layer.named_children() if isinstance(child, Factors)}
    if isinstance(layer, SharedKVProjection):
        parts = _of(held, ("q_proj", "k_proj", "v_proj"))
        layer.add_terms([None if part is None else part.add_to for part in parts])
    elif not held:
        return
    elif getattr(layer, "input_is_parallel", False):
        layer._forward_impl = _rows(held[FACTORS])
    else:
        if FACTORS in held:
            parts = [held[FACTORS]]
        elif isinstance(layer, CoalescedProjection):
            parts = _of(held, ("q_proj", "k_proj", "v_proj"))
        else:
            parts = _of(held, ("gate_proj", "up_proj"))
        layer._forward_impl = _columns(parts, sequence_parallel=layer.sequence_parallel_enabled)


def _of(held: dict[str, Factors], names: Sequence[str]) -> list[Factors | None]:
    return [held.get(name) for name in names]


def _columns(parts: Sequence[Factors | None], *, sequence_parallel: bool) -> Callable[..., Tensor]:
    """A layer of which this rank has some outputs: those of ``parts``, as many of each, in turn."""

    def forward_impl(*, input: Tensor, weight: Tensor, **_: object) -> Tensor:
        x = whole_input(input, sequence_parallel=sequence_parallel)
        plain = F.linear(x, weight).chunk(len(parts), dim=-1)
        weights = weight.chunk(len(parts))
        sums = [
            each if part is None else part.add_to(each, x, own)
            for part, each, own in zip(parts, plain, weights, strict=True)
        ]
        return sums[0] if len(sums) == 1 else torch.cat(sums, dim=-1)

    return forward_impl


def _rows(part: Factors) -> Callable[..., Tensor]:
    """A layer of which this rank has some inputs, before its outputs are reduced."""

    def forward_impl(*, input: Tensor, weight: Tensor, **_: object) -> Tensor:
        return part.add_to(F.linear(input, weight), input, weight)

    return forward_impl


# Dropout


def _drop(ranks: int, layer: Any, *, is_row: bool) -> Drop:
    """Dropout of a layer's whole or divided features, (B, S, I), or (S, B, I) under sequence parallel.

    Every rank draws the mask of whole rows, so that ranks, which are seeded alike, agree, and give what one
    process does. Which part is this rank's is a tensor: a number would make each rank's graph another.
    """
    tokens_first = bool(getattr(layer, "sequence_parallel_enabled", False))
    parts = ranks if is_row else 1

    def drop(x: Tensor, probability: float) -> Tensor:
        tokens, rows = x.shape[:2] if tokens_first else (x.shape[1], x.shape[0])
        whole = torch.ones(rows, tokens, parts, x.shape[-1], dtype=x.dtype, device=x.device)
        mask = F.dropout(whole, probability)
        if parts > 1:
            first = torch.zeros(1, dtype=torch.int32, device=x.device)
            rank: int = parallel_state.get_tensor_model_parallel_group().rank()
            mask = mask.index_select(2, first + on_device(rank, first))
        own = mask.squeeze(2)
        return x * (own.transpose(0, 1) if tokens_first else own)

    return drop
