"""Our own stand-ins of what engine nxd records graphs with, for machines without neuronx-distributed.

What is called computes what NxD's (2.29) does on a trn1: weights divided the same way, the same products in
the same dtypes, the same collectives of the same ranks; ``tests/run/test_graph_stand_ins.py`` holds graphs to
those of NxD's source. Signatures have the settings that the engine gives, and no other: an unknown one is a
TypeError. Missing are pipelines, checkpoints, kernels, and NxD's CPU mode.
"""

from __future__ import annotations

from typing import Any

from . import modules, optimizer, parallel_layers, pipeline, trainer

__all__ = ["modules", "neuronx_distributed_config", "optimizer", "parallel_layers", "pipeline", "trainer"]


def neuronx_distributed_config(
    *,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    sequence_parallel: bool,
    optimizer_config: dict[str, Any],
) -> dict[str, Any]:
    """What was given; makes the groups of ranks. Raises NotImplementedError for a pipeline."""
    if pipeline_parallel_size != 1:
        raise NotImplementedError(pipeline.MISSING)
    parallel_layers.parallel_state.initialize_model_parallel(tensor_parallel_size)
    return {
        "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size,
        "sequence_parallel": sequence_parallel,
        "optimizer_config": optimizer_config,
    }


def __getattr__(name: str) -> Any:
    raise AttributeError(f"the tests' stand-ins of neuronx_distributed have no {name}; its source does")
