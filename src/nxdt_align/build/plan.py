"""The row plan and the memory of a run, without the run: tokens are made, a model is not."""

from __future__ import annotations

from pathlib import Path

from nxdt_align.batch import Topology
from nxdt_align.build import parts
from nxdt_align.build.memory import memory_report
from nxdt_align.config.schema import Config
from nxdt_align.data.module import ModelAlignmentDataModule


def plan_report(config: Config) -> str:
    """What the planner chooses for the data, as training says it before its first step, and the device
    memory that the largest bucket takes.

    Tokens are taken from ``data.cache_dir`` where it has them, and kept there. Raises UserError for
    data, tokenizer, buckets or a loss of one's own that training would refuse.
    """
    ranks = config.data_parallel_size
    cache = config.data.cache_dir
    data = ModelAlignmentDataModule(
        config,
        parts.tokenization(config, parts.model_config(config)),
        Topology(data_parallel_size=ranks),
        cache_dir=None if cache is None else Path(cache) / "tokens",
        with_prompts=parts.loss(config).needs_prompts,
        fixed_micro_batches=config.trainer.accelerator == "xla",
        **parts.micro_batch_needs(config),
    )
    planner = data.splits["train"].planner
    memory = memory_report(config, data.layout, planner.responses_per_example, planner.buckets[-1])
    return "\n".join([*data.reports.values(), f"data-parallel ranks: {ranks}", memory])
