"""Rules of the pipeline: the number of stages, and the layers after which the model is cut."""

from __future__ import annotations

import re
from collections.abc import Iterator

from nxdt_align.config.faults import Fault
from nxdt_align.config.schema import Config

_PIPELINE = "distributed_strategy.pipeline_model_parallel_size"
_VIRTUAL = "distributed_strategy.virtual_pipeline_model_parallel_size"
_CUTS = "model.pipeline_cuts"
_CUT = re.compile(r"(?:model\.)?layers\.(\d+)")


def stages(config: Config) -> int:
    """Number of model chunks: pipeline ranks x chunks per rank."""
    parallel = config.distributed_strategy
    return parallel.pipeline_model_parallel_size * parallel.virtual_pipeline_model_parallel_size


def cut_layers(config: Config) -> tuple[int, ...] | None:
    """Numbers of the layers that ``model.pipeline_cuts`` names; None for even shares."""
    if config.model.pipeline_cuts is None:
        return None
    matches = [_CUT.fullmatch(name) for name in config.model.pipeline_cuts]
    return tuple(int(match[1]) for match in matches if match)


def pipeline(config: Config) -> Iterator[Fault]:
    """Rules that do not depend on the model."""
    parallel, names = config.distributed_strategy, config.model.pipeline_cuts
    if parallel.virtual_pipeline_model_parallel_size > 1 and parallel.pipeline_model_parallel_size == 1:
        yield Fault(
            _VIRTUAL,
            "must be 1 where pipeline_model_parallel_size is 1, as a single rank has nothing to interleave",
            parallel.virtual_pipeline_model_parallel_size,
            involves=(_PIPELINE,),
        )
    if names is None:
        return
    product, wanted = "pipeline_model_parallel_size", stages(config) - 1
    if parallel.virtual_pipeline_model_parallel_size > 1:
        product += " x virtual_pipeline_model_parallel_size"
    cuts = cut_layers(config) or ()
    if len(names) != wanted:
        rule = f"must have {product} - 1 ({wanted}) entries"
        yield Fault(_CUTS, rule, names, involves=(_PIPELINE, _VIRTUAL))
    elif len(cuts) != len(names) or list(cuts) != sorted(set(cuts)):
        yield Fault(
            _CUTS, "must name layers in ascending order, as [model.layers.10, model.layers.20]", names
        )


def layers_of_stages(config: Config, layers: int) -> Iterator[Fault]:
    """Rules that depend on the model's number of layers."""
    parallel = config.distributed_strategy
    ranks, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if ranks > layers:
        yield Fault(_PIPELINE, f"must not be above the number of layers ({layers})", ranks)
    elif ranks * chunks > layers:
        rule = f"x pipeline_model_parallel_size ({ranks}) must not be above the number of layers ({layers})"
        yield Fault(_VIRTUAL, rule, chunks, f"it can be 1 to {layers // ranks}", (_PIPELINE,))
    cuts = cut_layers(config)
    if cuts and max(cuts) >= layers - 1:
        rule = f"must name layers below the last (model.layers.{layers - 1}), which ends the last stage"
        yield Fault(_CUTS, rule, config.model.pipeline_cuts)
