"""Spreads a decoder over ranks from outside, by the one table ``models.sharding.SPLITS``.

Tensor and sequence parallel are DTensor's ``parallelize_module``; sharding over data-parallel ranks is
FSDP2. Between modules a hidden state is a plain tensor: (B, S, D), or this rank's (B, S / tp, D) under
sequence parallel. Layers are found by name, so a model may be one stage of a pipeline: without
embedding or head, and with some of the layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F

from nxdt_align.engines.base import EngineError
from nxdt_align.engines.native.mesh import Groups
from nxdt_align.engines.native.settings import Parallel, Precision
from nxdt_align.models.adapters import AdaptedLinear
from nxdt_align.models.decoder import CausalModel, Decoder, RMSNorm
from nxdt_align.models.nf4 import is_scale
from nxdt_align.models.partition import EMBEDDING
from nxdt_align.models.presets import DecoderConfig
from nxdt_align.models.sharding import (
    EACH_HEAD,
    KV_HEADS,
    LORA_A,
    LORA_B,
    MAGNITUDE,
    REPLICATED,
    START,
    TRAINED,
    VOCAB,
    split_of,
)

SEQUENCE_DIM = 1


def residual_placement(parallel: Parallel) -> Placement:
    """How the hidden states between modules, (B, S, D), lie on the tensor-parallel ranks."""
    return Shard(SEQUENCE_DIM) if parallel.sequence_parallel else Replicate()


def check_sizes(config: DecoderConfig, tensor: int) -> None:
    """Raises EngineError naming each size that ``tensor`` ranks cannot share evenly, and those they can."""
    faults = _misfits(config, tensor)
    if not faults:
        return
    largest = max(config.num_attention_heads, tensor)
    fitting = [str(n) for n in range(1, largest + 1) if not _misfits(config, n)]
    raise EngineError(
        f"distributed_strategy.tensor_model_parallel_size: {' and '.join(faults)}, but is {tensor}; "
        f"{', '.join(fitting)} would do"
    )


def _misfits(config: DecoderConfig, tensor: int) -> list[str]:
    sizes = {
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
    }
    faults = [f"must divide {name} ({size})" for name, size in sizes.items() if size % tensor]
    kv_heads = config.num_key_value_heads
    if kv_heads % tensor and tensor % kv_heads:
        faults.append(f"must divide num_key_value_heads ({kv_heads}) or be a multiple of it")
    return faults


# Tensor parallel


def split_over_tensor_ranks(decoder: Decoder, groups: Groups) -> None:
    """Make each parameter a DTensor on the tensor-parallel mesh and each module compute its share.

    Changes ``decoder`` in place; its values must not matter yet (they may be on the meta device).
    """
    mesh = groups.tensor_mesh
    if mesh is None:
        return
    residual = residual_placement(groups.parallel)
    styles: dict[str, ParallelStyle] = {}
    for name, _ in decoder.named_parameters():
        path, _, what = name.rpartition(".")
        if what != "weight":
            continue  # biases and adapters go with their module's weight
        styles[path] = style = _style(decoder.config, name, groups, residual)
        if isinstance(style, (ColwiseParallel, OwnKvHeads)) and split_of(name) != VOCAB:
            # Several projections read one input, so it is gathered once for all of them.
            parent = path.rpartition(".")[0]
            styles[parent] = PrepareModuleInput(input_layouts=residual, desired_input_layouts=Replicate())
    parallelize_module(decoder, mesh, styles, src_data_rank=None)


def _style(config: DecoderConfig, name: str, groups: Groups, residual: Placement) -> ParallelStyle:
    split = split_of(name)
    if split == REPLICATED:
        return ReplicatedWeight(residual)
    if split == EACH_HEAD:
        return HeadNorm()
    if name.endswith("_projection_norm.weight"):
        return ProjectionNorm(config, groups, of_keys=split == KV_HEADS)
    if split == KV_HEADS and groups.tensor.size > config.num_key_value_heads:
        return OwnKvHeads(config, groups)
    if name == EMBEDDING:
        return OwnVocabulary(groups, residual)
    if split.dim == 0:
        return Columns(groups)
    return Rows(groups, output_layouts=residual)


class Columns(ColwiseParallel):
    """A linear layer, or a head, of which each rank has some of the outputs; with the adapter's factors."""

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self._groups = groups

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        _divide(module, device_mesh, Shard(0), self._groups)


class Rows(RowwiseParallel):
    """A linear layer of which each rank has some of the inputs; with the adapter's factors."""

    def __init__(self, groups: Groups, *, output_layouts: Placement) -> None:
        super().__init__(output_layouts=output_layouts)
        self._groups = groups

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        _divide(module, device_mesh, Shard(1), self._groups)


def _divide(module: nn.Module, mesh: DeviceMesh, of_weight: Shard, groups: Groups) -> None:
    """Each tensor of a linear layer over the ranks, as ``sharding.split_of`` has it of a weight that is split
    so: a factor that lies across the split is split with it, the other is whole everywhere."""
    shared = {0: (LORA_A,), 1: ("bias", LORA_B, MAGNITUDE)}[of_weight.dim]
    for key, parameter in list(module.named_parameters(recurse=False)):
        kind = key.removeprefix(START).removeprefix(TRAINED)
        placement = Replicate() if kind in shared else of_weight
        part = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
        module.register_parameter(key, nn.Parameter(part, requires_grad=parameter.requires_grad))
    if isinstance(module, AdaptedLinear):
        own = (groups.tensor.rank, groups.tensor.size) if of_weight.dim == 1 else (0, 1)
        module.drop = partial(_drop, *own)


def _drop(rank: int, ranks: int, x: DTensor, probability: float) -> Tensor:
    """Dropout of whole or divided features. Every rank draws the whole mask, so that ranks, which are seeded
    alike, agree, and give what one process does."""
    local = x.to_local()
    whole = torch.ones(*local.shape[:-1], local.shape[-1] * ranks, dtype=local.dtype, device=local.device)
    mask = F.dropout(whole, probability).chunk(ranks, dim=-1)[rank]
    return x * DTensor.from_local(mask, x.device_mesh, x.placements, run_check=False)


class ReplicatedWeight(ParallelStyle):
    """A module of the residual stream whose weight every rank holds: a norm.

    The weight is a DTensor all the same, so that all parameters meet on one mesh in norms and optimizer.
    """

    def __init__(self, residual: Placement) -> None:
        self._residual = residual

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        # What these return replaces the module's input and output; torch's own annotations say None.
        def from_local(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
            return DTensor.from_local(inputs[0], mesh, [self._residual], run_check=False)

        def to_local(module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
            return output.to_local()

        return distribute_module(module, device_mesh, _replicate, from_local, to_local)


class OwnKvHeads(ParallelStyle):
    """A key or value projection with fewer heads than ranks: all hold the whole weight, and each computes
    the one head that its query heads attend to. Gradients are summed over the ranks."""

    def __init__(self, config: DecoderConfig, groups: Groups) -> None:
        self._rows = _rows_of_own_head(config, groups)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Linear)
        distribute_module(module, device_mesh, _replicate)
        kind = _AdaptedLinearOfRows if isinstance(module, AdaptedLinear) else _LinearOfRows
        return _become(module, kind, rows=self._rows)


def _rows_of_own_head(config: DecoderConfig, groups: Groups) -> slice:
    """Of a key or value projection with fewer heads than ranks."""
    head = groups.tensor.rank * config.num_key_value_heads // groups.tensor.size
    return slice(head * config.head_dim, (head + 1) * config.head_dim)


class HeadNorm(ParallelStyle):
    """A norm of each head of q or k: all ranks hold its weight, and each norms its own heads, plain tensors.
    Gradients are summed over the ranks."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, RMSNorm)
        distribute_module(module, device_mesh, _replicate)
        return _become(module, _NormOfOwn, rows=slice(None), gradient=Partial())


class ProjectionNorm(ParallelStyle):
    """A norm over all heads of q or k, of which each rank has its own: the mean square is that of all
    ranks. The weight lies as the projection's rows do."""

    def __init__(self, config: DecoderConfig, groups: Groups, *, of_keys: bool) -> None:
        self._copies, self._rows, kv_heads = 1, slice(None), config.num_key_value_heads
        if of_keys and groups.tensor.size > kv_heads:
            self._copies = groups.tensor.size // kv_heads
            self._rows = _rows_of_own_head(config, groups)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, RMSNorm)
        entries = len(module.weight) * self._copies
        is_whole = self._copies > 1
        distribute_module(module, device_mesh, _replicate if is_whole else _divide_rows)
        placement = Partial() if is_whole else Shard(0)
        return _become(
            module, _NormOverRanks, rows=self._rows, gradient=placement, mesh=device_mesh, entries=entries
        )


def _become(module: nn.Module, kind: type[nn.Module], **fields: Any) -> nn.Module:
    """``module`` as a ``kind``, a class of its own class, with these fields. A function put into the module
    instead, with the module bound to it, would make every layer a compiled graph of its own."""
    assert issubclass(kind, type(module))
    module.__class__ = kind
    vars(module).update(fields)
    return module


class _NormOfOwn(RMSNorm):
    """A norm of this rank's heads, by its ``rows`` of what it holds of the weight."""

    rows: slice
    gradient: Placement

    def compute(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        return self.scaled(x, weight.to_local(grad_placements=[self.gradient])[self.rows])


class _NormOverRanks(_NormOfOwn):
    """Its mean square is of ``entries`` that the ranks hold together. Each rank's heads depend on it, so that
    its gradient is the sum of the ranks', too."""

    mesh: DeviceMesh
    entries: int

    def mean_square(self, x: Tensor) -> Tensor:
        own = x.pow(2).sum(-1, keepdim=True)
        summand: Any = DTensor.from_local(own, self.mesh, [Partial()], run_check=False)
        total: Tensor = summand.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        return total / self.entries


class OwnVocabulary(ParallelStyle):
    """An embedding of which each rank holds the vectors of its share of the vocabulary, and adds those of
    other tokens as zeros. DTensor's own embedding has each rank compute the whole matrix's gradient."""

    def __init__(self, groups: Groups, residual: Placement) -> None:
        self._rank = groups.tensor.rank
        self._residual = residual

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Embedding)
        first = self._rank * (module.num_embeddings // device_mesh.size())
        distribute_module(module, device_mesh, _divide_rows)
        return _become(module, _OwnEmbedding, first=first, residual=self._residual)


class _OwnEmbedding(nn.Embedding):
    first: int
    residual: Placement

    def forward(self, ids: Tensor) -> Tensor:
        weight: Any = self.weight
        own = weight.to_local(grad_placements=[Shard(0)])
        rows = ids - self.first
        is_foreign = (rows < 0) | (rows >= own.shape[0])
        vectors = F.embedding(rows.masked_fill(is_foreign, 0), own).masked_fill(is_foreign[..., None], 0.0)
        summand: Any = DTensor.from_local(vectors, weight.device_mesh, [Partial()], run_check=False)
        whole: Tensor = summand.redistribute(placements=[self.residual]).to_local()
        return whole


class _LinearOfRows(nn.Linear):
    rows: slice

    def forward(self, x: Any) -> Tensor:
        return F.linear(x.to_local(grad_placements=[Partial()]), *_own_rows(self, self.rows))


class _AdaptedLinearOfRows(AdaptedLinear):
    rows: slice

    def forward(self, x: Any) -> Tensor:
        own_x, rows, factors = x.to_local(grad_placements=[Partial()]), self.rows, self.factors()
        if factors is None:
            return F.linear(own_x, *_own_rows(self, rows))
        a, b, *magnitude = (
            f.to_local(grad_placements=[Partial()]) for f in factors if isinstance(f, DTensor)
        )
        return self.adapted(
            own_x, *_own_rows(self, rows), a, b[rows], magnitude[0][rows] if magnitude else None
        )


def _own_rows(module: nn.Linear, rows: slice) -> tuple[Tensor, Tensor | None]:
    """Of weight and bias, which all ranks hold; gradients are summed over the ranks."""
    weight: Any = module.weight
    bias: Any = module.bias
    own = weight.to_local(grad_placements=[Partial()])[rows]
    return own, None if bias is None else bias.to_local(grad_placements=[Partial()])[rows]


def _divide_rows(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    for key, parameter in module.named_parameters(recurse=False):
        rows = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
        module.register_parameter(key, nn.Parameter(rows, requires_grad=parameter.requires_grad))


def _replicate(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    for key, parameter in module.named_parameters(recurse=False):
        whole = DTensor.from_local(parameter.detach(), mesh, [Replicate()], run_check=False)
        module.register_parameter(key, nn.Parameter(whole, requires_grad=parameter.requires_grad))


# Data parallel


def shard_over_data_ranks(
    root: nn.Module, decoder: CausalModel, groups: Groups, precision: Precision
) -> None:
    """FSDP2: each layer by itself, and what is left of ``root``, the module that is called, as one.

    Parameters stay float32 and are gathered in the compute dtype; gradients are added up and reduced in
    float32, and summed rather than averaged, since losses are shares of a sum. Frozen weights have the
    compute dtype already, or 4 bits, whose scales stay whole. With ``zero1``, which shards what the optimizer
    has, they all stay whole on each rank.
    """
    mesh = groups.data_mesh
    assert mesh is not None
    # Rotary tables come to each layer in float32 and must stay it, so inputs are not cast.
    policy = MixedPrecisionPolicy(
        param_dtype=precision.compute if precision.has_masters else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    reshard = groups.parallel.fsdp
    trains = any(p.requires_grad for p in decoder.parameters())
    frozen_stay = trains and not reshard
    whole = {
        parameter
        for name, parameter in decoder.named_parameters()
        if is_scale(name) or (frozen_stay and not parameter.requires_grad)
    }
    for layer in decoder.layers():
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, ignored_params=whole)
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=whole)
    for module in fsdp_modules(root):
        module.set_gradient_divide_factor(1.0)
        # The other way to divide by 1 is NCCL's alone.
        module.set_force_sum_reduction_for_comms(True)


def fsdp_modules(root: nn.Module) -> list[FSDPModule]:
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def reduce_gradients(module: nn.Module, now: bool) -> None:
    """Whether the next backward pass of an FSDP module reduces what has been added up, or only adds."""
    assert isinstance(module, FSDPModule)
    module.set_requires_gradient_sync(now)
    module.set_reshard_after_backward(now)
    module.set_is_last_backward(now)


def drop_gathered(root: nn.Module) -> None:
    """Forget gathered weights: their shards have changed."""
    for module in fsdp_modules(root):
        module.reshard()


def whole_rows(hidden: Tensor, groups: Groups) -> Tensor:
    """(B, S / tp, D) of each rank -> (B, S, D) on every rank.

    The gradient that comes back must be whole and the same on every rank; each takes its part.
    """
    mesh = groups.tensor_mesh
    if mesh is None or not groups.parallel.sequence_parallel:
        return hidden
    sharded: Any = DTensor.from_local(hidden, mesh, [Shard(SEQUENCE_DIM)], run_check=False)
    whole: Tensor = sharded.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])
    return whole
