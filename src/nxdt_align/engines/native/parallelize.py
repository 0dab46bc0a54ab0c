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
from nxdt_align.models.decoder import CausalModel, Decoder, RMSNorm
from nxdt_align.models.partition import EMBEDDING
from nxdt_align.models.presets import DecoderConfig
from nxdt_align.models.sharding import EACH_HEAD, KV_HEADS, REPLICATED, VOCAB, split_of

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
        if what == "bias":
            continue  # it goes with its module's weight
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
    return ColwiseParallel() if split.dim == 0 else RowwiseParallel(output_layouts=residual)


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
        module.forward = partial(_linear_rows, module, self._rows)  # type: ignore[method-assign]
        return module


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
        module.compute = partial(_norm_of_own, module, slice(None), Partial())  # type: ignore[method-assign]
        return module


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
        module.compute = partial(_norm_of_own, module, self._rows, placement)  # type: ignore[method-assign]
        module.mean_square = partial(_mean_over_ranks, device_mesh, entries)  # type: ignore[method-assign]
        return module


def _norm_of_own(module: RMSNorm, rows: slice, gradient: Placement, x: Tensor) -> Tensor:
    """A norm of this rank's heads, by its ``rows`` of what it holds of the weight."""
    weight = module.weight
    assert isinstance(weight, DTensor)
    return module.scaled(x, weight.to_local(grad_placements=[gradient])[rows])


def _mean_over_ranks(mesh: DeviceMesh, entries: int, x: Tensor) -> Tensor:
    """The mean square of ``entries`` that the ranks hold together. Each rank's heads depend on it, so that
    its gradient is the sum of the ranks', too."""
    own = x.pow(2).sum(-1, keepdim=True)
    summand: Any = DTensor.from_local(own, mesh, [Partial()], run_check=False)
    total: Tensor = summand.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    return total / entries


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
        module.forward = partial(_own_embeddings, module, first, self._residual)  # type: ignore[method-assign]
        return module


def _own_embeddings(module: nn.Embedding, first: int, residual: Placement, ids: Tensor) -> Tensor:
    weight = module.weight
    assert isinstance(weight, DTensor)
    own = weight.to_local(grad_placements=[Shard(0)])
    rows = ids - first
    is_foreign = (rows < 0) | (rows >= own.shape[0])
    vectors = F.embedding(rows.masked_fill(is_foreign, 0), own).masked_fill(is_foreign[..., None], 0.0)
    summand: Any = DTensor.from_local(vectors, weight.device_mesh, [Partial()], run_check=False)
    whole: Tensor = summand.redistribute(placements=[residual]).to_local()
    return whole


def _linear_rows(module: nn.Linear, rows: slice, x: DTensor) -> Tensor:
    weight = module.weight
    assert isinstance(weight, DTensor)
    own = weight.to_local(grad_placements=[Partial()])[rows]
    bias = module.bias
    own_bias = bias.to_local(grad_placements=[Partial()])[rows] if isinstance(bias, DTensor) else None
    return F.linear(x.to_local(grad_placements=[Partial()]), own, own_bias)


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
    float32, and summed rather than averaged, since losses are shares of a sum.
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
    for layer in decoder.layers():
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
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
