"""The ranks that share a kv head, which NxD chooses by a rule of its own."""

from __future__ import annotations

from collections.abc import Sequence

from nxdt_align.engines.base import EngineError


def check_kv_groups(
    kv_groups: Sequence[Sequence[int]], tensor_groups: Sequence[Sequence[int]], multiplier: int
) -> None:
    """Raise EngineError unless ranks that share kv heads are of one tensor-parallel group, tp / multiplier
    apart: NxD makes the two kinds of groups by rules of their own, and sums gradients over either."""
    wanted = {
        tuple(group[first :: len(group) // multiplier])
        for group in tensor_groups
        for first in range(len(group) // multiplier)
    }
    if {tuple(group) for group in kv_groups} != wanted:
        raise EngineError(
            f"neuronx-distributed puts the ranks {list(map(list, kv_groups))} together for shared kv heads, "
            f"but its tensor-parallel groups are {list(map(list, tensor_groups))}: gradients of other heads "
            "would be summed. Choose another distributed_strategy.tensor_model_parallel_size, or "
            "kv_replicator=1"
        )
