"""The graphs of a run's compiled steps on engine native, recorded without device, weights or other ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from nxdt_align.batch import Topology
from nxdt_align.config.check import ConfigError, find_faults
from nxdt_align.config.schema import Config
from nxdt_align.data.module import ModelAlignmentDataModule
from nxdt_align.data.packing import Bucket
from nxdt_align.data.steps import step_of_each_bucket
from nxdt_align.engines.base import shapes_of
from nxdt_align.engines.native import traced
from nxdt_align.engines.native.compiled import checkpointing_fault, require_own_decoder
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.engines.native.mesh import Groups
from nxdt_align.engines.native.model import check_parallel
from nxdt_align.errors import UserError
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.models.decoder import CausalModel
from nxdt_align.models.presets import DecoderConfig, ModelShape
from nxdt_align.ops.attention import Attention, DenseAttention
from nxdt_align.planning.aten_report import report, step_on_paper
from nxdt_align.planning.devices import Device
from nxdt_align.planning.graph_cost import StepCost
from nxdt_align.planning.graph_report import GraphReport
from nxdt_align.planning.kernels import FLASH_MULTIPLE, attention_kind
from nxdt_align.planning.workload import workload
from nxdt_align.run import assemble, computing
from nxdt_align.run.adapters import spec_of
from nxdt_align.run.rows import row_needs, with_possible_layout
from nxdt_align.run.settle import settle_sizes
from nxdt_align.run.standing import require_lengths, standing_for_data
from nxdt_align.run.tracing_memory import require_memory

STEP, REFERENCE = "training step", "log-probabilities without gradients"


def settled(config: Config, lengths: Sequence[int] | None) -> tuple[Config, ModelShape]:
    """The run and its model as on a NeuronCore of trn2 or trn3, the one device of engine native that compiles
    for Trainium. Raises ConfigError for what training there would refuse, though it may be right for the
    device of ``config``."""
    strategy = replace(config.distributed_strategy, engine="native")
    config = replace(
        config, distributed_strategy=strategy, trainer=replace(config.trainer, accelerator="neuron")
    )
    faults = [fault for fault in find_faults(config, engine="native") if not fault.is_missing_path]
    if faults:
        raise ConfigError(faults, config.source)
    found, model = settle_sizes(config, "native", device="neuron", reads_data=lengths is None)
    return found.config, model


def reports(
    config: Config, rank: int, lengths: Sequence[int] | None, device: Device
) -> tuple[list[GraphReport], list[StepCost]]:
    """What is in each graph of the compiled parts on ``rank``, and what a step in each bucket takes on
    ``device``, on paper. A pipeline's stages compute the same parts, which are recorded once; the step is
    that of the slowest stage.

    Raises UserError for what training would refuse, and where memory is missing.
    """
    config, model = settled(config, lengths)
    if lengths is not None:
        require_lengths(config, lengths)
    require_own_decoder(model)
    assert isinstance(model, DecoderConfig)
    config = with_possible_layout(config, model)
    _require(config, model)
    require_memory(config, model, "native")
    objective = GlobalMeanObjective(
        assemble.loss(config, "native"), token_statistics=config.exp_manager.log_token_statistics
    )
    tensor = config.distributed_strategy.tensor_model_parallel_size
    # Ranks of a data-parallel group or of a pipeline have the same parts.
    traced.start_tracing(rank % tensor, tensor)
    needs = row_needs(config, "native", model, "neuron", needs_reference=objective.needs_reference)
    topology = Topology(data_parallel_size=config.data_parallel_size)
    if lengths is None:
        module = ModelAlignmentDataModule(
            config,
            assemble.tokenization(config, model),
            topology,
            cache_dir=None,
            with_prompts=objective.needs_prompts,
            **assemble.micro_batch_needs(config),
            **needs,
        )
        dataset, choice = module.splits["train"], module.choice
    else:
        dataset, choice = standing_for_data(
            *(config, topology, lengths),
            with_prompts=objective.needs_prompts,
            fixed_micro_batches=False,
            **assemble.micro_batch_needs(config),
            **needs,
        )
    config = config if choice is None else config.with_layout(choice.layout)
    examples = range(min(config.data.global_batch_size, len(dataset.examples)))
    visited = step_of_each_bucket(dataset.planner, examples)
    laid = {bucket: dataset.lay_out(step.examples, bucket) for bucket, step in visited.items()}
    asks = objective.needs_reference and not config.model_alignment_strategy.precompute_ref_log_probs

    compiling = traced.RecordedCompiling()
    recorder = compiling.tracer
    engine = _engine(
        config,
        model,
        compiling,
        Topology.of_rank(rank % tensor, tensor, tensor_parallel_size=tensor, pipeline_parallel_size=1),
    )
    if objective.needs_reference:
        engine.load_reference(None)
    for micro_batches in laid.values():
        with recorder.fake:
            batch = micro_batches[0].map(recorder.fake.from_tensor).to(engine.device)
            if objective.needs_reference:
                batch = batch.with_reference(engine.response_logps(batch, reference=True))
            engine.step([batch], objective)
            if config.validates:
                engine.evaluate([batch], objective)
    low = computing.precision(config).compute == torch.bfloat16
    made: dict[str, GraphReport] = {}
    for graph in recorder.traced:
        if graph.key not in made:
            made[graph.key] = report(graph, device, low_precision=low)

    def of_bucket(bucket: Bucket) -> StepCost:
        work = workload(
            *(config, model, config.layout, dataset.planner.responses_per_example),
            bucket,
            needs_reference=objective.needs_reference,
        )
        return step_on_paper(
            *(recorder.traced, made, work, device),
            steps=(STEP, REFERENCE) if asks else (STEP,),
            shapes=shapes_of(laid[bucket][:1]),
            micro_batches=len(laid[bucket]),
            examples=len(visited[bucket].examples),
            clips=config.trainer.gradient_clip_val is not None,
            chunks=config.distributed_strategy.virtual_pipeline_model_parallel_size,
        )

    return list(made.values()), list(map(of_bucket, laid))


def _require(config: Config, model: DecoderConfig) -> None:
    check_parallel(model, assemble.parallel(config))
    computing.check_attention(config, model, "neuron")
    _check_attention(config, model)
    if config.distributed_strategy.compile == "none":
        raise UserError(
            "graphs: distributed_strategy.compile must be auto or blocks, as steps that run op by op have no "
            "graphs, but is none"
        )
    fault = checkpointing_fault(
        config.distributed_strategy.tensor_model_parallel_size, computing.recomputed_alone(config)
    )
    if fault is not None:
        raise UserError(f"graphs: distributed_strategy.compile: {fault}")


def _engine(
    config: Config, model: DecoderConfig, compiling: traced.RecordedCompiling, topology: Topology
) -> NativeEngine:
    # What shards weights over data-parallel ranks stays outside of the graphs (planning/around_graphs.py).
    parallel = replace(
        assemble.parallel(config), pipeline=1, virtual_pipeline=1, pipeline_cuts=None, zero1=False, fsdp=False
    )
    settings = config.model

    def configure(decoder: CausalModel) -> None:
        decoder.set_checkpointing(
            settings.activations_checkpoint_granularity, settings.activations_checkpoint_recompute or ()
        )

    engine = NativeEngine(
        model,
        _attention(config, model),
        precision=computing.precision(config),
        reference_precision=computing.reference_precision(config),
        topology=topology,
        parallel=parallel,
        device=traced.DEVICE,
        configure_model=configure,
        adapters=spec_of(config, model),
        seed=config.seed,
        compiling=compiling,
        groups=Groups.join(parallel, topology, traced.DEVICE, tied_head=model.tie_word_embeddings),
    )
    engine.compiler = compiling.tracer
    return engine


def _check_attention(config: Config, model: DecoderConfig) -> None:
    kind = attention_kind(config, "neuron", model)
    if kind not in ("causal", "nki", "dense"):
        raise UserError(
            "data.attention: must be auto, dense, causal or nki on a NeuronCore by engine native, but is "
            f"{kind}"
        )


def _attention(config: Config, model: DecoderConfig) -> Attention:
    kind = attention_kind(config, "neuron", model)
    if kind == "causal":
        return traced.TracedFlash(FLASH_MULTIPLE["neuron"])
    if kind == "nki":
        return traced.traced_intervals()
    return DenseAttention()
