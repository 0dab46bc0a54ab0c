"""The row plan and memory of a run without running it: tokenizes the data, builds no model."""

from __future__ import annotations

from pathlib import Path

from nxdt_align.batch import Topology
from nxdt_align.config.engines import Engine
from nxdt_align.config.schema import Config
from nxdt_align.data.module import ModelAlignmentDataModule
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.planning.device_memory import memory_report
from nxdt_align.planning.rows import row_reports
from nxdt_align.run import assemble


def plan_report(config: Config, engine: Engine) -> str:
    """The row plan of the data, as training logs it before its first step, and the device memory of the
    largest bucket.

    Uses and fills the token cache in ``data.cache_dir``. Raises UserError for data, tokenizer, buckets or a
    custom loss that training would refuse.
    """
    ranks, model = config.data_parallel_size, assemble.model_config(config)
    assemble.check_attention(config, model)
    objective = GlobalMeanObjective(assemble.loss(config, engine))
    cache = config.data.cache_dir
    data = ModelAlignmentDataModule(
        config,
        assemble.tokenization(config, model),
        Topology(data_parallel_size=ranks),
        cache_dir=None if cache is None else Path(cache) / "tokens",
        with_prompts=objective.needs_prompts,
        fixed_micro_batches=config.trainer.accelerator == "xla",
        **assemble.micro_batch_needs(config),
        window=model.sliding_window,
    )
    planner = data.splits["train"].planner
    memory = memory_report(
        config,
        model,
        config.layout,
        planner.responses_per_example,
        planner.buckets[-1],
        needs_reference=objective.needs_reference,
    )
    rows = row_reports(data.splits, config.data)
    data_of = [f"{split} data: {report}" for split, report in rows.items()]
    return "\n".join([*data_of, f"data-parallel ranks: {ranks}", memory])
