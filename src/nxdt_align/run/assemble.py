"""Configuration -> single objects: processes, device, model shape, weights, tokenizer, precision, loss."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from lightning.pytorch import Callback

from nxdt_align.config.engines import Engine as EngineName
from nxdt_align.config.pipeline import cut_layers
from nxdt_align.config.schema import Config
from nxdt_align.config.start import model_config_path, tokenizer_of
from nxdt_align.data.tokenize import Tokenization, Truncation
from nxdt_align.data.tokenizer import load_tokenizer
from nxdt_align.engines.base import WeightSource
from nxdt_align.engines.native.checkpoint import is_checkpoint
from nxdt_align.engines.native.settings import Parallel
from nxdt_align.engines.nxd.checkpoint import is_checkpoint as is_nxd_checkpoint
from nxdt_align.errors import UserError
from nxdt_align.losses.custom import CustomLoss, given_loss, load_loss
from nxdt_align.losses.objective import build_loss
from nxdt_align.losses.types import Loss, LossOutput, ResponseLogps
from nxdt_align.messages import NOTICE
from nxdt_align.models.decoder import no_router
from nxdt_align.models.families import FAMILIES
from nxdt_align.models.presets import DecoderConfig, ModelShape
from nxdt_align.own_parts import OwnPartError, find_class, make
from nxdt_align.run.adapters import adapter_record, open_checkpoint
from nxdt_align.run.contracts import EngineParts, RunEnv
from nxdt_align.run.locate import locate, read_shape
from nxdt_align.run.mode import RunMode
from nxdt_align.weights.detect import (
    base_folder,
    check_weights,
    fresh_weights,
    holds_weights,
    layout_of,
    open_folder,
)
from nxdt_align.weights.nxdt import NxDTFolder
from nxdt_align.weights.peft import MergedWeights, PeftFolder, is_peft_folder

log = logging.getLogger(__name__)


def parallel(config: Config) -> Parallel:
    """The layout of the model over the processes."""
    strategy = config.distributed_strategy
    return Parallel(
        tensor=strategy.tensor_model_parallel_size,
        pipeline=strategy.pipeline_model_parallel_size,
        virtual_pipeline=strategy.virtual_pipeline_model_parallel_size,
        pipeline_cuts=cut_layers(config),
        sequence_parallel=strategy.sequence_parallel and strategy.tensor_model_parallel_size > 1,
        zero1=strategy.zero1,
        fsdp=strategy.fsdp is not False,
    )


def join(config: Config, engine: EngineName, env: RunEnv, model: ModelShape, mode: RunMode) -> EngineParts:
    """Join the run's processes for ``engine``; imports only that engine."""
    if engine == "nxd":
        from nxdt_align.run.nxd import NxDParts

        return NxDParts(config, env, decoder_for_nxd(model), mode)
    from nxdt_align.run.native import NativeParts

    return NativeParts(config, env, model, mode)


def check_engine(config: Config, engine: EngineName, env: RunEnv, model: ModelShape, mode: RunMode) -> None:
    """Raise UserError for what ``join`` would refuse before it joins any process."""
    if engine == "nxd":
        from nxdt_align.run.nxd import check as check_nxd

        check_nxd(config, decoder_for_nxd(model))
    else:
        from nxdt_align.run.native import check

        check(config, env, model, mode)


def decoder_for_nxd(model: ModelShape) -> DecoderConfig:
    """The same model. Raises UserError for one that engine nxd does not run."""
    if isinstance(model, DecoderConfig):
        return model
    raise UserError(
        "distributed_strategy.engine: is nxd, which runs the families of this package's own decoder "
        f"({', '.join(FAMILIES)}), but a {model.model_type} is computed by transformers: set "
        "distributed_strategy.engine=native and trainer.accelerator to cpu or cuda"
    )


class MicroBatchNeeds(TypedDict):
    """The pipeline schedule's requirements on micro-batches per step, as arguments of the data module."""

    min_micro_batches: int
    round_size: int


def micro_batch_needs(config: Config) -> MicroBatchNeeds:
    """At least one micro-batch per stage in 1F1B, whole rounds in the interleaved schedule."""
    strategy = config.distributed_strategy
    ranks = strategy.pipeline_model_parallel_size
    if strategy.virtual_pipeline_model_parallel_size > 1:
        return {"min_micro_batches": 1, "round_size": ranks}
    # With fewer micro-batches than stages, torch's 1F1B schedule raises.
    return {"min_micro_batches": ranks, "round_size": 1}


def model_config(config: Config) -> ModelShape:
    """config.json with the YAML's overrides applied, as in NxDT; see ``overridden``."""
    model = config.model
    source = model_config_path(config)
    if source is None:
        raise UserError("model.model_config: must name a Hugging Face config.json or a folder that holds one")
    return overridden(
        config, read_shape(source, model.implementation, trust_remote_code=model.trust_remote_code)
    )


def overridden(config: Config, shape: ModelShape) -> ModelShape:
    """``shape`` with the YAML's overrides applied. Raises UserError where transformers computes the model."""
    model = config.model
    overrides: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "rope_theta": model.rope_theta,
        "max_position_embeddings": model.max_position_embeddings,
    }
    if isinstance(shape, DecoderConfig):
        return shape.with_overrides(**overrides)
    given = [f"model.{key}" for key, value in overrides.items() if value is not None]
    if given:
        raise UserError(
            f"{', '.join(given)}: cannot override the config.json of a {shape.model_type} that transformers "
            "computes; leave it out, and change config.json"
        )
    return shape


def refusal_of_layouts(model: ModelShape) -> str | None:
    """Why rows of several texts do not work with the model; None where they do."""
    if isinstance(model, DecoderConfig):
        return None
    from nxdt_align.models.backend.config import TransformersConfig

    assert isinstance(model, TransformersConfig)
    return model.findings.refusal


def check_router(config: Config, model: ModelShape) -> None:
    """Raise UserError where ``model.router_aux_loss_coef`` asks for what the model does not have."""
    weight = config.model.router_aux_loss_coef
    if not weight:
        return
    if isinstance(model, DecoderConfig):
        raise UserError(no_router(model, weight))
    from nxdt_align.models.backend.config import TransformersConfig
    from nxdt_align.models.backend.model import StockAttention, TransformersModel

    assert isinstance(model, TransformersConfig)
    TransformersModel(model, StockAttention()).balance_router(weight)


def say_implementation(config: Config, model: ModelShape) -> None:
    """Log who computes the model."""
    if isinstance(model, DecoderConfig):
        log.info("model.implementation: ours, the decoder of this package, as a %s", model.model_type)
        return
    from nxdt_align.models.backend.config import TransformersConfig, type_name

    assert isinstance(model, TransformersConfig)
    log.log(NOTICE, "model.implementation: transformers' %s computes the model", type_name(model))
    if model.remote_folder is not None:
        log.warning(
            "model.trust_remote_code: the Python code in %s is run with the rights of this process",
            model.remote_folder,
        )


def start_weights(config: Config, model: ModelShape) -> WeightSource:
    """The policy's start weights: ``resume_from_checkpoint``, or random ones."""
    given = config.exp_manager.resume_from_checkpoint
    if given is None:
        log.warning("exp_manager.resume_from_checkpoint is null: the model starts from random weights")
        return fresh_weights(model, config.seed)
    return weights_at(Path(given), model, "exp_manager.resume_from_checkpoint")


def weights_at(folder: Path, model: ModelShape, key: str) -> WeightSource:
    """A reader for any kind of weights that ``folder``, the value of ``key``, leads to."""
    weights: WeightSource
    try:
        folder = locate(folder)
        if not folder.is_dir():
            raise UserError(f"must be a folder of weights, but {folder} is a file")
        if is_checkpoint(folder) or (is_nxd_checkpoint(folder) and adapter_record(folder) is not None):
            return open_checkpoint(folder, model, lambda base: weights_at(base, model, "the adapters' base"))
        weights = _foreign_weights(folder, model)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    return weights


def _foreign_weights(folder: Path, model: ModelShape) -> WeightSource:
    """Weights from other tools: NxD's shards, a Hugging Face folder, or an adapter of PEFT's on one."""
    if is_peft_folder(folder) and not holds_weights(folder):
        base = _foreign_weights(base_folder(folder), model)
        return MergedWeights(base, PeftFolder(folder, model))
    layout = layout_of(folder)
    if layout == "meta":
        raise UserError(
            f"{folder} is Meta's original download; nxdt-align convert {folder} DESTINATION --to hf makes a "
            "folder that training can start from"
        )
    if layout == "nxdt":
        if not isinstance(model, DecoderConfig):
            raise UserError(
                f"{folder} holds NxD's shards, which are of this package's own families, but a "
                f"{model.model_type} is computed by transformers: give a Hugging Face folder"
            )
        return NxDTFolder(folder, model)  # checks its shards against the model
    weights = open_folder(folder, model)
    check_weights(weights, model)
    return weights


def tokenization(config: Config, model: ModelShape) -> Tokenization:
    """Tokenizer and truncation. Raises UserError if the tokenizer exceeds the model's vocabulary."""
    tokenizer = load_tokenizer(tokenizer_of(config))
    if len(tokenizer) > model.vocab_size:
        raise UserError(
            f"data.tokenizer.type: the tokenizer has {len(tokenizer)} tokens, but the model's vocab_size is "
            f"{model.vocab_size}; they do not belong together"
        )
    strategy = config.model_alignment_strategy
    return Tokenization(
        tokenizer,
        Truncation(config.data.seq_length, strategy.max_prompt_length, strategy.truncation_mode),
        config.data.chat_template_kwargs,
    )


def loss(config: Config, engine: EngineName, given: Loss | Callable[..., Any] | None = None) -> Loss:
    """The loss of ``model_alignment_strategy``, or ``given`` instead.

    Raises UserError for an invalid custom loss.
    """
    strategy = config.model_alignment_strategy
    if given is None and strategy.loss is None:
        return build_loss(strategy)
    try:
        if given is not None:
            own = given_loss(given, strategy.examples)
        else:
            own = load_loss(str(strategy.loss), strategy.loss_settings, strategy.examples)
    except OwnPartError as error:
        raise UserError(f"model_alignment_strategy.loss: {error}") from error
    if own.needs_logits:
        _require_whole_logits(config, engine, own)
    return own


def unread_loss(config: Config) -> Loss:
    """Stands for a custom loss that must not be imported: with the needs of one that declares none."""
    strategy = config.model_alignment_strategy

    def unread(policy: ResponseLogps, reference: ResponseLogps | None) -> LossOutput:
        raise NotImplementedError

    return CustomLoss(unread, str(strategy.loss), strategy.examples)


def _require_whole_logits(config: Config, engine: EngineName, own: Loss) -> None:
    strategy = config.distributed_strategy
    faults = {
        "distributed_strategy.engine is nxd": engine == "nxd",
        "trainer.accelerator is xla": config.trainer.accelerator == "xla",
        "tensor_model_parallel_size is above 1": strategy.tensor_model_parallel_size > 1,
        "pipeline_model_parallel_size is above 1": strategy.pipeline_model_parallel_size > 1,
    }
    found = [fault for fault, is_there in faults.items() if is_there]
    if found:
        raise UserError(
            f"model_alignment_strategy.loss: {own} declares needs_logits, "
            f"but {' and '.join(found)}, so that no process has whole logits in shapes that follow the data. "
            "Run it with engine native on cpu or cuda, and tensor and pipeline parallel sizes of 1 (data "
            "parallel, zero1 and fsdp are fine), or write it over log-probabilities"
        )


def own_callbacks(config: Config) -> list[Callback]:
    """The callbacks of ``trainer.callbacks``. Raises UserError for an invalid one."""
    made: list[Callback] = []
    for part in config.trainer.callbacks or ():
        try:
            found = find_class(part.path, Callback)
            made.append(make(found, part.path, part.settings or {}, "settings"))
        except OwnPartError as error:
            raise UserError(f"trainer.callbacks: {error}") from error
    return made
