"""Device memory of a model that transformers computes: what follows from the number of its weights.

What its layers keep for the backward pass only its own code knows.
"""

from __future__ import annotations

from nxdt_align.config.schema import Config
from nxdt_align.models.config import ModelShape, parameter_count
from nxdt_align.planning.workload import formats_of, reference_bytes

_GIB = 2**30


def states_report(config: Config, model: ModelShape, where: str, *, needs_reference: bool) -> str:
    """Weights, gradients, master weights and optimizer state per device, without activations."""
    strategy, formats = config.distributed_strategy, formats_of(config, where)
    count, copies = parameter_count(model), max(1, config.data_parallel_size)
    shard = -(-count // copies)
    is_fsdp = strategy.fsdp is not False and copies > 1
    optimized = shard if is_fsdp or strategy.zero1 else count
    reference = reference_bytes(config, formats) if needs_reference else 0
    held = shard if is_fsdp else count
    rows = {
        "weights": (0 if is_fsdp else count * formats.weight) + held * reference,
        "gradients": held * formats.gradient,
        "master weights": optimized * formats.master,
        "optimizer state": optimized * formats.state,
    }
    gathered = "; fsdp gathers a layer's weights besides, two layers at a time" if is_fsdp else ""
    return "\n".join(
        [
            f"memory of a device ({where}) for a {model.model_type} of {count:,} weights that transformers "
            f"computes, data parallel {copies}:",
            *(f"    {name:<18}{size / _GIB:6.2f} GiB" for name, size in rows.items()),
            f"    {'total':<18}{sum(rows.values()) / _GIB:6.2f} GiB and activations, which are not estimated "
            f"for such a model{gathered}",
        ]
    )
