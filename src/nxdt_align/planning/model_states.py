"""Device memory of a model that transformers computes: what follows from the number of its weights.

What its layers keep for the backward pass only its own code knows.
"""

from __future__ import annotations

from math import prod

from nxdt_align.config.schema import Config
from nxdt_align.models.adapters import adapter_shapes
from nxdt_align.models.config import ModelShape, parameter_count
from nxdt_align.planning.workload import adapters_of, formats_of, reference_bytes

_GIB = 2**30


def states_report(config: Config, model: ModelShape, where: str, *, needs_reference: bool) -> str:
    """Weights, gradients, master weights and optimizer state per device, without activations."""
    strategy, formats = config.distributed_strategy, formats_of(config)
    count, copies = parameter_count(model), max(1, config.data_parallel_size)
    is_fsdp = strategy.fsdp is not False and copies > 1
    spec = adapters_of(config, model)
    if spec is None:
        trained, frozen, what = count, 0, f"{count:,} weights"
    else:
        added = adapter_shapes(model, spec).items()
        trained, frozen = sum(prod(shape) for name, shape in added if spec.trains(name)), count
        what = f"{count:,} frozen weights and {trained:,} of adapters"

    def held(size: int, *, shards: bool = is_fsdp) -> int:
        return -(-size // copies) if shards else size

    reference = reference_bytes(config, formats) if needs_reference else 0
    optimized = held(trained, shards=is_fsdp or strategy.zero1)
    # FSDP's shards of what is trained are its masters.
    weights = held(frozen) * formats.weight + (0 if is_fsdp else trained * formats.weight)
    rows = {
        "weights": weights + held(count) * reference,
        "gradients": held(trained) * formats.gradient,
        "master weights": optimized * formats.master,
        "optimizer state": optimized * formats.state,
    }
    gathered = "; fsdp gathers a layer's weights besides, two layers at a time" if is_fsdp else ""
    return "\n".join(
        [
            f"memory of a device ({where}) for a {model.model_type} of {what} that transformers "
            f"computes, data parallel {copies}:",
            *(f"    {name:<18}{size / _GIB:6.2f} GiB" for name, size in rows.items()),
            f"    {'total':<18}{sum(rows.values()) / _GIB:6.2f} GiB and activations, which are not estimated "
            f"for such a model{gathered}",
        ]
    )
