"""The plain model with its modules replaced by NxD's parallel layers.

Between the layers the residual stream is (B, S, D), or, under sequence parallel, (S / tp, B, D): norms
and sums do not care, and attention's two projections turn what they get and give. The replaced modules
have NxD's names for their weights, so that a state dict is a shard of NxD's checkpoints.

Legend: ``B`` rows, ``S`` tokens, ``D`` hidden, ``F`` MLP width.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from neuronx_distributed.parallel_layers import (
    ColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    mappings,
    parallel_state,
)
from neuronx_distributed.parallel_layers.utils import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from nxdt_align.engines.nxd.qkv import (
    CoalescedProjection,
    SeparateProjection,
    SharedKVProjection,
    swap_first_two,
)
from nxdt_align.engines.nxd.settings import Parallel
from nxdt_align.engines.scoring import on_device
from nxdt_align.models.decoder import MLP, Attention, Decoder, RMSNorm
from nxdt_align.models.presets import DecoderConfig
from nxdt_align.models.sharding import Split


class RankFreeParallelEmbedding(ParallelEmbedding):  # type: ignore[misc]
    """NxD's, whose graph is the same on all ranks: which token ids are here is a tensor of it. NxD's
    pipeline knows its own layers by a part of their names."""

    def forward(self, input_: Tensor) -> Tensor:
        numbers: tuple[int, int] = (self.start_index, self.end_index)  # type: ignore[has-type]
        self.start_index, self.end_index = (on_device(number, input_) for number in numbers)
        try:
            hidden: Tensor = super().forward(input_)
        finally:
            # What outlives the call would be a result of the graph.
            self.start_index, self.end_index = numbers
        return hidden


class GateUp(ColumnParallelLinear):  # type: ignore[misc]
    """Gate and up in one matrix: each rank's rows are its gate's, then its up's (a stride of 2)."""

    def __init__(self, config: DecoderConfig, **settings: Any) -> None:
        size = 2 * config.intermediate_size
        super().__init__(config.hidden_size, size, stride=2, bias=config.mlp_bias, **settings)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = super().forward(x).chunk(2, dim=-1)
        return gate, up


class AttentionOutput(RowParallelLinear):  # type: ignore[misc]
    """(B, S, heads * head_dim) of this rank's heads -> the residual stream's layout."""

    def forward(self, x: Tensor) -> Tensor:
        summed: Tensor = super().forward(swap_first_two(x) if self.sequence_parallel_enabled else x)
        return summed


class GatheringNorm(RMSNorm):
    """The last norm, whose output is whole again: (S / tp, B, D) -> (B, S, D).

    What follows is the same on all tensor-parallel ranks, and so is its gradient: each takes its part.
    """

    def forward(self, x: Tensor) -> Tensor:
        return swap_first_two(_Gather.apply(super().forward(x)))  # type: ignore[no-untyped-call]


class _Gather(torch.autograd.Function):
    """NxD's gather_from_sequence_parallel_region with to_model_parallel=False, whose backward pass makes the
    rank a number of the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        whole: Tensor = mappings.gather_from_sequence_parallel_region(x, to_model_parallel=False)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        group = parallel_state.get_tensor_model_parallel_group()
        rows = grad.shape[0] // group.size()
        index = torch.arange(rows, dtype=torch.int32, device=grad.device)
        return grad.index_select(0, index + on_device(group.rank() * rows, index))


class ProjectionNorm(RMSNorm):
    """A norm over all heads of q or k, of which each rank has some.

    Args:
        size: entries of this rank's heads.
        entries: those of all ranks, copies counted.
    """

    def __init__(self, size: int, config: DecoderConfig, entries: int) -> None:
        super().__init__(size, config)
        self._entries = entries

    def mean_square(self, x: Tensor) -> Tensor:
        total = mappings.reduce_from_tensor_model_parallel_region(x.pow(2).sum(-1, keepdim=True))
        # Each rank's heads depend on it, so that its gradient is the sum of the ranks', too.
        whole: Tensor = mappings.copy_to_tensor_model_parallel_region(total)
        return whole / self._entries


def parallelize(decoder: Decoder, parallel: Parallel, dtype: torch.dtype, *, cpu_mode: bool) -> None:
    """Replace the modules of a decoder that is on the meta device, in place.

    NxD's groups must be there, of ``parallel``'s sizes.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`sequence_parallel_enabled` is set")
        _Swap(decoder.config, parallel, dtype, cpu_mode).apply(decoder)


class _Swap:
    def __init__(self, config: DecoderConfig, parallel: Parallel, dtype: torch.dtype, cpu_mode: bool) -> None:
        self._config, self._parallel, self._dtype, self._cpu_mode = config, parallel, dtype, cpu_mode
        self._common = {
            "dtype": dtype,
            # With its default, float32, NxD loses the input's gradient of a bf16 layer: it reduces a
            # copy and returns the original.
            "reduce_dtype": dtype,
            "sequence_parallel_enabled": parallel.sequence_parallel,
            "sequence_dimension": 0 if parallel.sequence_parallel else None,
        }
        self._column = {**self._common, "gather_output": False}
        self._row = {**self._common, "input_is_parallel": True}

    def apply(self, decoder: Decoder) -> None:
        config, body = self._config, decoder.model
        body.embed_tokens = RankFreeParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            dtype=self._dtype,
            sequence_parallel_enabled=self._parallel.sequence_parallel,
        )
        for module in body.layers.modules():
            if isinstance(module, Attention):
                module.qkv_proj = self._qkv()
                queries = config.num_attention_heads * config.head_dim
                module.o_proj = AttentionOutput(
                    queries, config.hidden_size, bias=config.output_bias, **self._row
                )
                if config.qk_norm == "projection":
                    copies = self._parallel.kv_multiplier
                    keys = config.num_key_value_heads * config.head_dim * copies
                    module.q_projection_norm = self._projection_norm(queries)
                    module.k_projection_norm = self._projection_norm(keys)
            elif isinstance(module, MLP):
                module.gate_up_proj = GateUp(config, **self._column)
                module.down_proj = RowParallelLinear(
                    config.intermediate_size, config.hidden_size, bias=config.mlp_bias, **self._row
                )
        if self._parallel.sequence_parallel:
            body.norm = GatheringNorm(config.hidden_size, config).to(dtype=self._dtype)
        if decoder.lm_head is not None:
            # Asked for its rows of the head alone, which is why it gathers nothing.
            decoder.lm_head = ColumnParallelLinear(
                config.hidden_size, config.vocab_size, bias=False, gather_output=False, dtype=self._dtype
            )

    def _projection_norm(self, entries: int) -> ProjectionNorm:
        norm = ProjectionNorm(entries // self._parallel.tensor, self._config, entries)
        return norm.to(dtype=self._dtype)

    def _qkv(self) -> Any:
        kind = self._parallel.qkv
        if kind == "separate":
            return SeparateProjection(self._config, **self._column)
        if kind == "coalesced":
            return CoalescedProjection(self._config, **self._column)
        return SharedKVProjection(
            self._config,
            dtype=self._dtype,
            sequence_parallel=self._parallel.sequence_parallel,
            kv_multiplier=self._parallel.kv_multiplier,
            fused=kind == "fused",
            cpu_mode=self._cpu_mode,
        )


def mark(name: str, parameter: nn.Parameter, split: Split, parallel: Parallel) -> None:
    """Tell NxD how a parameter is split. Its layers do so themselves, but what they say is lost where the
    parameter is made anew on the device, and never said of weight_qkv.

    Args:
        name: NxD's.
        split: that of the plain weight, or the plain weights, which the parameter holds.
    """
    if split.dim is None:
        parameter.sequence_parallel_enabled = parallel.sequence_parallel  # type: ignore[attr-defined]
        return
    for attribute in ("tensor_model_parallel", "partition_dim", "partition_stride", "num_partitions"):
        if hasattr(parameter, attribute):
            delattr(parameter, attribute)
    stride = {
        **dict.fromkeys(("gate_up_proj.weight", "gate_up_proj.bias"), 2),
        **dict.fromkeys(("qkv_proj.weight", "qkv_proj.bias"), 3),
    }
    set_tensor_model_parallel_attributes(
        parameter,
        is_parallel=True,
        dim=split.dim,
        stride=next((s for end, s in stride.items() if name.endswith(end)), 1),
        num_partitions=parallel.tensor,
    )
