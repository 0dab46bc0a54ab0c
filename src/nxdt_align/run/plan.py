"""The row plan and memory of a run without running it: tokenizes the data, builds no model."""

from __future__ import annotations

from pathlib import Path

from nxdt_align.batch import Topology
from nxdt_align.config.custom import parts_not_imported
from nxdt_align.config.engines import Engine
from nxdt_align.config.schema import Config
from nxdt_align.data.module import ModelAlignmentDataModule
from nxdt_align.errors import UserError
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.planning.device_memory import memory_report
from nxdt_align.planning.host_memory import host_memory
from nxdt_align.planning.rows import row_reports
from nxdt_align.planning.workload import device_kind
from nxdt_align.run import assemble, nxd
from nxdt_align.run.settle import settle

_FLAG = "--import-own-parts imports it here"


def plan_report(config: Config, engine: Engine, *, import_own_parts: bool = False) -> str:
    """The row plan of the data, as training logs it before its first step, and the device memory of the
    largest bucket.

    Uses and fills the token cache in ``data.cache_dir``. What is not trained imports none of the user's own
    parts that the YAML names, unless ``import_own_parts``: a custom loss then counts as one that declares
    nothing. Raises UserError for a custom data format that must not be imported, and for data, tokenizer,
    buckets or a custom loss that training would refuse.
    """
    settled = settle(config, engine, device=device_kind(config), weights=False)
    config = settled.config
    closed = {} if import_own_parts else {part.key: part for part in parts_not_imported(config)}
    if "data.format" in closed:
        path = closed["data.format"].path
        raise UserError(
            f"data.format: {path} is a function of your own, which a YAML has only training import; "
            f"{_FLAG}, as does the override data.format={path}"
        )
    ranks, model = config.data_parallel_size, assemble.model_config(config)
    if engine == "nxd":
        model = assemble.decoder_for_nxd(model)
    config = assemble.with_possible_layout(config, model)
    assemble.check_attention(config, model)
    unread = closed.get("model_alignment_strategy.loss")
    loss = assemble.loss(config, engine) if unread is None else assemble.unread_loss(config)
    objective = GlobalMeanObjective(loss)
    cache = config.data.cache_dir
    on_chip = engine == "nxd" and config.trainer.accelerator in ("auto", "neuron")
    data = ModelAlignmentDataModule(
        config,
        assemble.tokenization(config, model),
        Topology(data_parallel_size=ranks),
        cache_dir=None if cache is None else Path(cache) / "tokens",
        with_prompts=objective.needs_prompts,
        fixed_micro_batches=config.trainer.accelerator == "xla",
        **assemble.micro_batch_needs(config),
        **assemble.row_needs(config, model),
        row_multiple=nxd.row_multiple(config, assemble.decoder_for_nxd(model)) if on_chip else 1,
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
    precomputes = config.model_alignment_strategy.precompute_ref_log_probs
    host = host_memory(
        data.splits,
        config.trainer.devices,
        keeps_reference=objective.needs_reference and precomputes,
    )
    notes = (
        [] if unread is None else [f"{unread}: not imported, counted as one that declares nothing; {_FLAG}"]
    )
    return "\n".join([*settled.notes, *data_of, f"data-parallel ranks: {ranks}", memory, host, *notes])
