"""The row plan and memory of a run without running it: tokenizes the data, builds no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nxdt_align.batch import Topology
from nxdt_align.config.custom import IMPORTS_HERE, parts_not_imported, refuse_own_parts
from nxdt_align.config.engines import Engine
from nxdt_align.config.schema import Config
from nxdt_align.data.layouts import LayoutChoice
from nxdt_align.data.module import ModelAlignmentDataModule
from nxdt_align.data.steps import Split, StepDataset
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.models.presets import ModelShape
from nxdt_align.planning.device_memory import memory_report
from nxdt_align.planning.host_memory import host_memory
from nxdt_align.planning.rows import row_reports
from nxdt_align.planning.workload import device_kind
from nxdt_align.run import assemble, computing
from nxdt_align.run.rows import row_needs, with_possible_layout
from nxdt_align.run.settle import settle_sizes
from nxdt_align.run.standing import require_lengths, standing_for_data


def plan_report(
    config: Config,
    engine: Engine,
    *,
    lengths: Sequence[int] | None = None,
    import_own_parts: bool = False,
) -> str:
    """The row plan of the data, as training logs it before its first step, and the device memory of the
    largest bucket.

    With ``lengths``, tokens of a prompt and of its responses, examples of these stand for the data: neither
    data nor tokenizer are read, and of a model of the Hub whose sizes are known nothing is fetched.

    Uses and fills the token cache in ``data.cache_dir``. What is not trained imports none of the user's own
    parts that the YAML names, unless ``import_own_parts``: a custom loss then counts as one that declares
    nothing. Raises UserError for a custom data format that must not be imported, and for data, tokenizer,
    buckets or a custom loss that training would refuse.
    """
    reads_data = lengths is None
    settled, model = settle_sizes(config, engine, device=device_kind(config), reads_data=reads_data)
    config = settled.config
    closed = {} if import_own_parts else {part.key: part for part in parts_not_imported(config)}
    if closed and reads_data:
        refuse_own_parts(config, ("data.format",))
    ranks = config.data_parallel_size
    if engine == "nxd":
        model = assemble.decoder_for_nxd(model)
    config = with_possible_layout(config, model)
    computing.check_attention(config, model, device_kind(config) if engine == "native" else None)
    unread = closed.get("model_alignment_strategy.loss")
    loss = assemble.loss(config, engine) if unread is None else assemble.unread_loss(config)
    objective = GlobalMeanObjective(loss)
    splits, choice = _splits(config, engine, model, lengths, objective)
    config = config if choice is None else config.with_layout(choice.layout)
    planner = splits["train"].planner
    memory = memory_report(
        config,
        model,
        config.layout,
        planner.responses_per_example,
        planner.buckets[-1],
        needs_reference=objective.needs_reference,
    )
    rows = row_reports(splits, config.data)
    of = "data" if lengths is None else "data, as --lengths has them"
    data_of = [f"{split} {of}: {report}" for split, report in rows.items()]
    precomputes = objective.needs_reference and config.model_alignment_strategy.precompute_ref_log_probs
    host = [] if lengths else [host_memory(splits, config.trainer.devices, keeps_reference=precomputes)]
    told = f"{unread}: not imported, counted as one that declares nothing; {IMPORTS_HERE}"
    notes = [] if unread is None else [told]
    chosen = [] if choice is None else [str(choice)]
    return "\n".join(
        [*settled.notes, *chosen, *data_of, f"data-parallel ranks: {ranks}", memory, *host, *notes]
    )


def _splits(
    config: Config,
    engine: Engine,
    model: ModelShape,
    lengths: Sequence[int] | None,
    objective: GlobalMeanObjective,
) -> tuple[Mapping[Split, StepDataset], LayoutChoice | None]:
    """The data in rows, and the choice of their layout, where that is auto."""
    topology = Topology(data_parallel_size=config.data_parallel_size)
    fixed, needs = config.trainer.accelerator == "xla", assemble.micro_batch_needs(config)
    rows = row_needs(
        *(config, engine, model, _device_type(config, engine)), needs_reference=objective.needs_reference
    )
    if lengths is not None:
        require_lengths(config, lengths)
        standing, choice = standing_for_data(
            *(config, topology, lengths),
            with_prompts=objective.needs_prompts,
            fixed_micro_batches=fixed,
            **rows,
            **needs,
        )
        return {"train": standing}, choice
    cache = config.data.cache_dir
    module = ModelAlignmentDataModule(
        config,
        assemble.tokenization(config, model),
        topology,
        cache_dir=None if cache is None else Path(cache) / "tokens",
        with_prompts=objective.needs_prompts,
        fixed_micro_batches=fixed,
        **rows,
        **needs,
    )
    return module.splits, module.choice


def _device_type(config: Config, engine: Engine) -> str:
    """Of the device that rows are planned for."""
    chosen = config.trainer.accelerator
    if chosen == "auto":
        return "neuron" if engine == "nxd" else "cpu"  # CUDA's rows are the same
    return chosen
