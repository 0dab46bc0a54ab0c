"""Rules that the values of a configuration must keep, and what is worth a notice. No files here.

Each rule yields its faults; ``RULES`` and ``NOTICES`` list them all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from nxdt_align.config.aliases import foreign_advice
from nxdt_align.config.alignment import OBJECTIVES
from nxdt_align.config.custom import named_parts
from nxdt_align.config.data import FORMATS, PACKING, TEMPLATE_ARGUMENTS
from nxdt_align.config.faults import Fault, did_you_mean
from nxdt_align.config.fields import is_dotted, section_faults
from nxdt_align.config.objectives import NOTICES as OBJECTIVE_NOTICES
from nxdt_align.config.optim import (
    BETAS,
    DEFAULT_MIN_LR,
    FIXED_SETTINGS,
    OPTIMIZERS,
    OTHER_SCHEDULER_KEYS,
    REFUSED_SCHEDULERS,
    REQUIRED_SCHEDULER_SETTINGS,
    SCHEDULERS,
)
from nxdt_align.config.pipeline import pipeline
from nxdt_align.config.schema import Config
from nxdt_align.config.start import model_is_missing
from nxdt_align.own_parts import OwnPartError, require_no_standard_module

Rule = Callable[[Config], Iterator[Fault]]

_DURATION = re.compile(r"\d{1,8}:\d\d:\d\d:\d\d", re.ASCII)
_STRATEGY = "distributed_strategy"
_ALIGN = "model_alignment_strategy"

_CALLBACK = "exp_manager.checkpoint_callback_params"
_BY_EXAMPLES = "trainer.val_check_interval_examples"
_NO_ARCHIVE = "no .nemo archive is written here; exp_manager.export_hf writes a Hugging Face folder"
_NO_EXPERTS = "experts are not divided over ranks"

FIXED: dict[str, tuple[Any, str]] = {
    "trainer.accumulate_grad_batches": (1, "data.global_batch_size sets how much is accumulated"),
    f"{_STRATEGY}.expert_model_parallel_size": (1, _NO_EXPERTS),
    f"{_STRATEGY}.token_shuffle_group_size": (1, _NO_EXPERTS),
    f"{_CALLBACK}.save_best_model": (False, _NO_ARCHIVE),
    f"{_CALLBACK}.always_save_nemo": (False, _NO_ARCHIVE),
    f"{_CALLBACK}.save_nemo_on_train_end": (False, _NO_ARCHIVE),
    f"{_CALLBACK}.async_save": (False, "NeMo's own; exp_manager.async_checkpointing=True does the same"),
}
"""Path -> (the only value, why), of keys that other programs' YAMLs have."""


def lookup(config: Config, path: str) -> Any:
    """The value at ``path``; None where a section on the way is not set."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def values(config: Config) -> Iterator[Fault]:
    """Every section's bounds, and the rules that it states of itself."""
    yield from section_faults(config, "")
    lnc = config.trainer.lnc
    if lnc not in (None, 1, 2):
        yield Fault("trainer.lnc", "must be 1 or 2", lnc)


def fixed(config: Config) -> Iterator[Fault]:
    for path, (wanted, why) in FIXED.items():
        value = lookup(config, path)
        if value != wanted:
            yield Fault(path, f"must be {'null' if wanted is None else wanted} ({why})", value)


def required(config: Config) -> Iterator[Fault]:
    if not config.data.train_dir:
        yield Fault("data.train_dir", "is required: training data as .jsonl, .json, .arrow or .parquet")
    if model_is_missing(config):
        rule = "is required: a model's folder, or its name on the Hugging Face Hub, owner/name"
        advice = "model.model_config alone, a Hugging Face config.json, starts from random weights"
        yield Fault("exp_manager.resume_from_checkpoint", rule, advice=advice)


def objective(config: Config) -> Iterator[Fault]:
    chosen = [name for name in OBJECTIVES if lookup(config, f"{_ALIGN}.{name}")]
    if len(chosen) != 1:
        found = f"has {' and '.join(chosen)}" if chosen else "has none"
        advice = _drop_one(config, chosen) if chosen else f"e.g. {_ALIGN}.dpo: {{}} for DPO with its defaults"
        *others, last = OBJECTIVES
        names = f"{', '.join(others)} and {last}"
        yield Fault(_ALIGN, f"must have exactly one of {names}, but {found}", advice=advice)


def _drop_one(config: Config, chosen: list[str]) -> str:
    """Of several objectives, the one that an override asked for last is meant."""
    asked = [path.split(".")[1] for path in config.overridden if path.startswith(f"{_ALIGN}.")]
    wanted = next((name for name in reversed(asked) if name in chosen), None)
    if wanted is None:
        return f"drop one, e.g. with the override ~{_ALIGN}.{chosen[1]}"
    others = [name for name in chosen if name != wanted]
    overrides = " ".join(f"~{_ALIGN}.{name}" for name in others)
    return f"for {wanted}, drop {' and '.join(others)} with {overrides}"


def model_source(config: Config) -> Iterator[Fault]:
    if config.model_source != "hf":
        advice = "set model_source to hf, and model.model_config to a Hugging Face config.json"
        yield Fault("model_source", "must be hf: Megatron models are not supported", "megatron", advice)
    if any(path == "model.moe" or path.startswith("model.moe.") for path in config.given):
        fault = "Megatron's settings of experts are not read; a mixture of experts has its own in config.json"
        yield Fault("model.moe", fault, advice="leave them out, and see docs/models.md")


def parallel_sizes(config: Config) -> Iterator[Fault]:
    parallel, world, each = config.distributed_strategy, config.world_size, config.model_parallel_size
    if world < 1 or each < 1:
        return
    if world % each:
        sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        product = " x ".join(f"{key} ({getattr(parallel, key)})" for key in sizes)
        yield Fault(
            "trainer.devices",
            f"times trainer.num_nodes must be a multiple of {product} = {each}, but is {world}",
            involves=("trainer.num_nodes", *(f"{_STRATEGY}.{key}" for key in sizes)),
        )
    else:
        yield from _batch_sizes(config)
    if parallel.context_parallel_size > 1 and not config.model.fusions.ring_attention:
        yield Fault("model.fusions.ring_attention", "must be True with context_parallel_size above 1", False)


def _batch_sizes(config: Config) -> Iterator[Fault]:
    """Rows of the packed layouts are padded with empty ones, so only layout ``none``, and NxDT's
    YAMLs, which mean it by saying nothing, are held to NxDT's rule."""
    data, copies = config.data, config.data_parallel_size
    unit = data.micro_batch_size * copies
    if data.packing in ("packed", "shared_prompt") or unit < 1 or data.global_batch_size < 1:
        return
    if PACKING in config.auto:  # which leaves layout none out then
        return
    if data.global_batch_size % unit:
        yield Fault(
            "data.global_batch_size",
            f"must be a multiple of data.micro_batch_size ({data.micro_batch_size}) x data-parallel size "
            f"({copies}) = {unit}",
            data.global_batch_size,
            f"the next is {(data.global_batch_size // unit + 1) * unit}; with data.packing=shared_prompt "
            "or packed any size will do",
            ("data.micro_batch_size", "trainer.devices", "trainer.num_nodes", "data.packing"),
        )


def lengths(config: Config) -> Iterator[Fault]:
    seq_length, model_length = config.data.seq_length, config.model.encoder_seq_length
    if model_length is not None and seq_length > model_length:
        yield Fault(
            "data.seq_length",
            f"must not be above model.encoder_seq_length ({model_length})",
            seq_length,
            involves=("model.encoder_seq_length",),
        )
    for name in OBJECTIVES:
        settings = getattr(config.model_alignment_strategy, name)
        if settings is not None and settings.max_prompt_length >= seq_length:
            path = f"{_ALIGN}.{name}.max_prompt_length"
            rule = f"must be below data.seq_length ({seq_length}), which the response needs a share of"
            yield Fault(path, rule, settings.max_prompt_length, involves=("data.seq_length",))
    buckets = config.data.buckets
    if buckets is not None and (not buckets or buckets[0] < 1 or list(buckets) != sorted(set(buckets))):
        fitting = sorted({bucket for bucket in buckets if bucket > 0})
        advice = f"{fitting} would be" if fitting else "leave it out to have them chosen from the data"
        yield Fault("data.buckets", "must be positive row lengths in ascending order", buckets, advice)


def trainer(config: Config) -> Iterator[Fault]:
    settings = config.trainer
    if settings.max_steps == -1 and settings.max_epochs == -1 and settings.max_time is None:
        yield Fault(
            "trainer.max_steps",
            "training would never end: trainer.max_steps, max_epochs or max_time must be set",
            involves=("trainer.max_epochs", "trainer.max_time"),
        )
    for path in ("trainer.max_time", "exp_manager.max_time_per_run"):
        duration = lookup(config, path)
        if duration is not None and not _DURATION.fullmatch(duration):
            yield Fault(path, "must be days:hours:minutes:seconds, as 00:11:30:00", duration)
    logs = config.exp_manager
    if logs.log_local_rank_0_only and logs.log_global_rank_0_only:
        rule = "must not both be True"
        yield Fault("exp_manager.log_local_rank_0_only", f"and log_global_rank_0_only {rule}")
    interval, epochs = settings.val_check_interval, settings.check_val_every_n_epoch
    if settings.val_check_interval_examples is not None:
        yield from _validation_by_examples(config)
    elif epochs is None and isinstance(interval, float):
        rule = "must be a number of steps (an integer) where check_val_every_n_epoch is null"
        yield Fault("trainer.val_check_interval", rule, interval)
    for path in ("trainer.limit_val_batches", "trainer.limit_train_batches", "trainer.val_check_interval"):
        value = lookup(config, path)
        if isinstance(value, float) and value > 1:
            yield Fault(path, "must be a share from 0.0 to 1.0, or a whole number", value)
    if config.exp_manager.ema.get("enable"):
        yield Fault("exp_manager.ema.enable", "must be False: averaged weights are not supported", True)


def _validation_by_examples(config: Config) -> Iterator[Fault]:
    examples, batch = config.trainer.val_check_interval_examples, config.data.global_batch_size
    if examples is not None and 0 < examples < batch:
        rule = f"must be at least data.global_batch_size ({batch}), the examples of a step"
        yield Fault(_BY_EXAMPLES, rule, examples, involves=("data.global_batch_size",))


def checkpoint_choice(config: Config) -> Iterator[Fault]:
    monitor = config.exp_manager.checkpoint_callback_params.monitor
    if (
        str(monitor).startswith("val_")
        and config.exp_manager.create_checkpoint_callback
        and not config.validates
    ):
        off = "data.val_dir" if config.data.val_dir is None else "trainer.limit_val_batches"
        yield Fault(
            f"{_CALLBACK}.monitor",
            f"needs validation, but {off} is {lookup(config, off)}",
            monitor,
            "set it, or rank by step, or by a metric of training as reduced_train_loss",
            (off,),
        )


def optimizer(config: Config) -> Iterator[Fault]:
    optim, path = config.model.optim, "model.optim.name"
    if is_dotted(optim.name):
        return  # the user's own class, which is imported at training, says what it takes
    if optim.name not in OPTIMIZERS:
        advice = f"{_choices(optim.name, OPTIMIZERS)}, or a class of your own, module.name"
        yield Fault(path, "must be a known optimizer", optim.name, advice)
    yield from _unknown_settings("model.optim", optim.params, set().union(*OPTIMIZERS.values()))
    settings = optim.settings()
    betas, wanted = settings.get("betas"), BETAS.get(optim.name, 2)
    if optim.name in OPTIMIZERS and isinstance(betas, list | tuple) and len(betas) != wanted:
        rule = f"must have {wanted} values for {optim.name}"
        advice = "leave it out for the optimizer's own, with the override ~model.optim.betas"
        yield Fault("model.optim.betas", rule, betas, advice, (path,))
    for key, value in FIXED_SETTINGS.get(optim.name, {}).items():
        if settings.get(key) not in (None, value):
            rule = f"must be {value} for {optim.name}, or left out"
            advice = "it would set its own step size, against model.optim.lr and its schedule"
            yield Fault(f"model.optim.{key}", rule, settings[key], advice, (path,))


def scheduler(config: Config) -> Iterator[Fault]:
    optim, sched, path = config.model.optim, config.model.optim.sched, "model.optim.sched.name"
    if sched is None:
        return
    if sched.name in OPTIMIZERS:
        advice = f"set model.optim.name: {sched.name}, and here one of {', '.join(SCHEDULERS)}"
        yield Fault(path, "must be a schedule; this is an optimizer", sched.name, advice)
    elif sched.name in REFUSED_SCHEDULERS:
        advice = f"{REFUSED_SCHEDULERS[sched.name]}. There are: {', '.join(SCHEDULERS)}"
        yield Fault(path, "must be another schedule", sched.name, advice)
    elif sched.name not in SCHEDULERS:
        yield Fault(path, "must be a known schedule", sched.name, _choices(sched.name, SCHEDULERS))
    known = {*OTHER_SCHEDULER_KEYS}.union(*SCHEDULERS.values())
    yield from _unknown_settings("model.optim.sched", sched.params, known)
    settings = sched.settings()
    for key in REQUIRED_SCHEDULER_SETTINGS.get(sched.name, ()):
        if settings.get(key) is None:
            yield Fault(f"model.optim.sched.{key}", f"is required by {sched.name}", involves=(path,))
    given, default = settings.get("min_lr"), DEFAULT_MIN_LR.get(sched.name)
    min_lr = default if given is None else given
    if isinstance(min_lr, bool) or not isinstance(min_lr, int | float | None):
        yield Fault("model.optim.sched.min_lr", "must be a number", min_lr)
    elif min_lr is not None and min_lr > optim.lr:
        rule = f"must not be above model.optim.lr ({optim.lr})"
        advice = f"that is {sched.name}'s default: set a lower one" if given is None else ""
        yield Fault("model.optim.sched.min_lr", rule, min_lr, advice, ("model.optim.lr", path))


def _choices(name: str, known: Collection[str]) -> str:
    return f"{did_you_mean(name, known)} There are: {', '.join(known)}".strip()


def _unknown_settings(section: str, params: Mapping[str, Any], known: Collection[str]) -> Iterator[Fault]:
    for key, value in params.items():
        if key not in known:
            rule = "is not a setting of any optimizer or schedule here"
            advice = foreign_advice(f"{section}.{key}") or did_you_mean(key, known)
            yield Fault(f"{section}.{key}", rule, value, advice)


def own_parts(config: Config) -> Iterator[Fault]:
    """Whether they can be imported, and are what they must be, is seen at training."""
    for part in config.trainer.callbacks or ():
        if not is_dotted(part.path):
            yield Fault("trainer.callbacks", "must be dotted paths, module.name", part.path)
    for named in named_parts(config):
        try:
            require_no_standard_module(named.path)
        except OwnPartError as error:
            yield Fault(named.key, f"must be a part of your own, but {error}")
    data = config.data
    if data.format is not None and not is_dotted(data.format):
        yield from _named_format(config, data.format)
    if data.columns and data.format is not None and is_dotted(data.format):
        rule = f"must be null, since data.format is a function ({data.format}) that reads the file's own keys"
        yield Fault("data.columns", rule, dict(data.columns), involves=("data.format",))


def template_variables(config: Config) -> Iterator[Fault]:
    for name, value in config.data.chat_template_kwargs.items():
        if name in TEMPLATE_ARGUMENTS:
            rule = "is no variable of a chat template: the data and the tokenizer give it"
            yield Fault(f"data.chat_template_kwargs.{name}", rule, value, "remove it")


def _named_format(config: Config, name: str) -> Iterator[Fault]:
    kinds = {row["examples"] for key, row in OBJECTIVES.items() if lookup(config, f"{_ALIGN}.{key}")}
    known = dict.fromkeys(each for kind in FORMATS if kind in kinds or not kinds for each in FORMATS[kind])
    if name not in known:
        advice = f"{_choices(name, known)}, or a function of your own, module.function"
        yield Fault("data.format", "must be a format of the objective's examples", name, advice, (_ALIGN,))


def adapters(config: Config) -> Iterator[Fault]:
    peft, export = config.model_alignment_strategy.peft, config.exp_manager.export_hf
    if peft is None:
        if isinstance(export, str):
            advice = f"{_ALIGN}.peft trains adapters"
            yield Fault("exp_manager.export_hf", "must be True or False without adapters", export, advice)
        return
    if config.model_alignment_strategy.reference_dtype is not None and (
        config.model_alignment_strategy.reference_model is None
    ):
        rule = f"must be null with {_ALIGN}.peft, whose reference is the policy with its adapters off"
        given = config.model_alignment_strategy.reference_dtype
        yield Fault(f"{_ALIGN}.reference_dtype", rule, given, involves=(f"{_ALIGN}.peft",))
    if peft.quantize_base is not None:
        yield from _quantized_base(config, peft.quantize_base)
    if peft.merge_lora and export in ("adapter", False):
        rule = f"must be merged with {_ALIGN}.peft.merge_lora"
        yield Fault("exp_manager.export_hf", rule, export, involves=(f"{_ALIGN}.peft.merge_lora",))


def _quantized_base(config: Config, kind: str) -> Iterator[Fault]:
    path, strategy = f"{_ALIGN}.peft.quantize_base", config.distributed_strategy
    for name in ("tensor", "pipeline"):
        key = f"{name}_model_parallel_size"
        if (size := getattr(strategy, key)) > 1:
            rule = f"must be 1 with {path}: {kind}, whose weights are not split over {name}-parallel ranks"
            advice = "distributed_strategy.fsdp=full spreads the base over all ranks"
            yield Fault(f"distributed_strategy.{key}", rule, size, advice, (path,))
    merged = {"exp_manager.export_hf": ("merged", "adapter"), f"{_ALIGN}.peft.merge_lora": (True, "False")}
    for key, (refused, instead) in merged.items():
        if (value := lookup(config, key)) == refused:
            rule = f"must be {instead} with {path}: {kind}, as a merged weight would have to be rounded anew"
            advice = (
                "nxdt-align export --merge RUN FOLDER adds a run's adapter to the weights that were quantised"
            )
            yield Fault(key, rule, value, advice, (path,))


def samples(config: Config) -> Iterator[Fault]:
    """Tokens are drawn from whole logits, which a rank has only by itself."""
    settings, parallel = config.exp_manager.sample_during_eval, config.distributed_strategy
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if settings.prompts and settings.temperature > 0 and ranks > 1:
        key = "exp_manager.sample_during_eval.temperature"
        involves = tuple(
            f"{_STRATEGY}.{name}_model_parallel_size"
            for name in ("tensor", "pipeline")
            if lookup(config, f"{_STRATEGY}.{name}_model_parallel_size") > 1
        )
        rule = f"must be 0 with {' and '.join(involves)} above 1, as no rank has all logits"
        yield Fault(key, rule, settings.temperature, involves=involves)


RULES: tuple[Rule, ...] = (
    *(values, fixed, required, objective, model_source, parallel_sizes, pipeline),
    *(lengths, trainer, checkpoint_choice, optimizer, scheduler, own_parts, template_variables, adapters),
    samples,
)


# Notices


def validation_is_off(config: Config) -> Iterator[str]:
    if config.data.val_dir is not None and not config.validates:
        yield (
            f"trainer.limit_val_batches is {config.trainer.limit_val_batches}: validation is off, "
            "data.val_dir is not read, and no reference log-probabilities are computed for it"
        )


def samples_without_validation(config: Config) -> Iterator[str]:
    if config.exp_manager.sample_during_eval.prompts and not config.validates:
        key = "exp_manager.sample_during_eval"
        yield f"{key}: no samples, as the run does not validate; set data.val_dir"


def traces_no_step(config: Config) -> Iterator[str]:
    profiler, steps = config.trainer.profiler, config.trainer.max_steps
    if profiler is not None and 0 < steps <= profiler.wait + profiler.warmup:
        yield (
            f"trainer.profiler: no trace, as trainer.max_steps ({steps}) is within wait + warmup "
            f"({profiler.wait} + {profiler.warmup} steps)"
        )


def validation_before_checkpoints(config: Config) -> Iterator[str]:
    params, (every, _) = config.exp_manager.checkpoint_callback_params, config.validation_interval
    by_examples = config.trainer.val_check_interval_examples is not None
    key = _BY_EXAMPLES if by_examples else "trainer.val_check_interval"
    steps = params.every_n_train_steps
    if str(params.monitor).startswith("val_") and steps and isinstance(every, int) and steps % every:
        yield (
            f"{_CALLBACK}.monitor: {params.monitor} ranks a checkpoint by its own step, so that validation "
            f"runs before each, every {steps} steps, besides {key}, every {every}"
        )


def validation_by_examples(config: Config) -> Iterator[str]:
    trainer, batch = config.trainer, config.data.global_batch_size
    examples = trainer.val_check_interval_examples
    if examples is None:
        return
    steps = examples // batch
    if examples % batch:
        yield (
            f"{_BY_EXAMPLES}: {examples} is no multiple of data.global_batch_size ({batch}), so that "
            f"validation runs every {steps * batch} examples, {steps} steps"
        )
    # A run's resolved settings, which may be given again, have every key.
    usual = {"val_check_interval": 1.0, "check_val_every_n_epoch": 1}
    idle = [f"trainer.{key}" for key, value in usual.items() if getattr(trainer, key) not in (value, None)]
    if idle:
        yield f"{', '.join(idle)}: no effect, since {_BY_EXAMPLES} is set"


def settings_without_effect(config: Config) -> Iterator[str]:
    """Settings that another optimizer or schedule takes, as when only the name was overridden."""
    optim = config.model.optim
    for path, section in (("model.optim", optim), ("model.optim.sched", optim.sched)):
        if section is None:
            continue
        taken = section.settings()
        left_out = [f"{path}.{key}" for key in section.params if key not in taken]
        if left_out:
            yield f"{section.name} takes no {', '.join(left_out)}: no effect"


NOTICES: tuple[Callable[[Config], Iterator[str]], ...] = (
    *(
        validation_is_off,
        samples_without_validation,
        traces_no_step,
        validation_before_checkpoints,
        validation_by_examples,
        *OBJECTIVE_NOTICES,
        settings_without_effect,
    ),
)
