"""One optimizer step as a device sees it, in sizes: what ``models.memory`` computes with.

Legend: ``B`` rows and ``S`` tokens of a micro-batch, ``T`` response positions a row, ``D`` hidden, ``N``
query heads, ``K`` key-value heads, ``H`` head size, ``F`` MLP width, ``V`` vocabulary; heads, widths and
vocabulary are a tensor-parallel rank's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nxdt_align.models.config import LlamaConfig

FLOAT = 4
"""Bytes of a float32."""
AttentionKind = Literal["flash", "masked", "scores"]
"""flash: causal, nothing between pairs of tokens; masked: a fused kernel that takes a mask of all pairs;
scores: softmax over all pairs, in float32."""


@dataclass(frozen=True)
class Formats:
    """Bytes a number."""

    weight: int
    """Of the weights that are computed with."""
    gradient: int
    master: int
    """Of master weights, or of an optimizer's own copy of its shard; 0 for none."""
    state: int
    """Of the optimizer's states of one weight together."""
    activation: int
    autocast: bool = False
    """torch.autocast: the residual is float32, weights and inputs of each product are cast to
    ``activation`` and kept."""
    float32_copy: int = 0
    """Of copies of all gradients that the optimizer's step begins with, where they were added up in a lower
    precision."""
    shard_gradient: int = 0
    """Of the gradients of an optimizer's shard where they are apart from those of the whole weights."""

    @property
    def residual(self) -> int:
        return FLOAT if self.autocast else self.activation


@dataclass(frozen=True)
class Workload:
    """One optimizer step as a device sees it."""

    model: LlamaConfig
    formats: Formats
    rows: int
    """B."""
    tokens: int
    """S."""
    responses: int
    """T."""
    attention: AttentionKind
    recompute: tuple[str, ...] = ()
    """``("full",)``, or names as in ``models.llama.RECOMPUTABLE``."""
    tensor_parallel: int = 1
    kv_heads: int | None = None
    """Key-value heads that a rank's weights have, copies included; None: its share, at least one."""
    sequence_parallel: bool = False
    keeps_gathered: bool = False
    """Whether sequence parallel keeps a projection's input gathered (DTensor) or gathers it again in the
    backward pass (neuronx-distributed)."""
    context_parallel: int = 1
    stages: tuple[int, ...] | None = None
    """Layers of each pipeline stage; None: one stage."""
    micro_batches: int = 1
    """Of one optimizer step and rank; a stage holds as many as the 1F1B schedule has in flight."""
    data_parallel: int = 1
    zero1: bool = False
    """Optimizer states and master weights are sharded over the data-parallel ranks."""
    fsdp: bool = False
    """Gradients too, and weights are gathered a layer at a time from the masters."""
    tile: int = 0
    """Bytes of the float32 logits that exist at a time (ops.logprobs)."""
    kept: int = 0
    """Most bytes of probabilities that ops.logprobs keeps for the backward pass."""
    reference: int = 0
    """Bytes a weight of a frozen reference that lies beside the policy; 0 for none."""

    @property
    def layers_of_stages(self) -> tuple[int, ...]:
        return self.stages or (self.model.num_hidden_layers,)

    @property
    def positions(self) -> int:
        """Tokens of a micro-batch on this rank: B x S."""
        return self.rows * self.tokens // self.context_parallel

    @property
    def residual_positions(self) -> int:
        return self.positions // (self.tensor_parallel if self.sequence_parallel else 1)

    @property
    def heads(self) -> int:
        return self.model.num_attention_heads // self.tensor_parallel

    @property
    def own_kv_heads(self) -> int:
        """Key-value heads that a rank computes."""
        return max(1, self.model.num_key_value_heads // self.tensor_parallel)

    @property
    def width(self) -> int:
        """F of this rank."""
        return self.model.intermediate_size // self.tensor_parallel
