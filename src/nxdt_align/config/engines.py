"""Which engine runs a configuration, what it does not support yet, and which keys have no effect on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

from nxdt_align.config.faults import Fault
from nxdt_align.config.megatron import megatron_key
from nxdt_align.config.neuron_packages import neuron_available, neuron_stack
from nxdt_align.config.rules import lookup
from nxdt_align.config.schema import Config

Engine = Literal["nxd", "native"]


def resolve_engine(config: Config, neuron_available: bool) -> Engine:
    """The engine of distributed_strategy.engine; ``auto`` is nxd if the Neuron packages are installed and
    trainer.accelerator does not select another device."""
    chosen = config.distributed_strategy.engine
    if chosen != "auto":
        return chosen
    neuron_is_wanted = config.trainer.accelerator in ("auto", "neuron")
    return "nxd" if neuron_available and neuron_is_wanted else "native"


# What an engine does not support yet.

_SPREAD_OTHERWISE = "with 1, sequence_parallel over tensor_model_parallel_size=N ranks spreads long sequences"
_NXDS_VALIDATION_STOPS = (
    "leave it out: neuronx-distributed's schedule without gradients runs only each rank's first chunk of "
    "the layers, so neither validation nor a reference pass would work"
)
_NOT_YET = "engine {engine} does not support it yet"

LIMITS: dict[Engine, dict[str, tuple[Any, str]]] = {
    "native": {
        "distributed_strategy.context_parallel_size": (1, _SPREAD_OTHERWISE),
    },
    "nxd": {
        "distributed_strategy.virtual_pipeline_model_parallel_size": (1, _NXDS_VALIDATION_STOPS),
        "distributed_strategy.context_parallel_size": (1, "leave it out"),
        "distributed_strategy.fsdp": (False, "distributed_strategy.zero1=True shards the optimizer's state"),
        "model_alignment_strategy.peft.quantize_base": (None, "distributed_strategy.engine=native has it"),
    },
}
"""Engine -> path -> (the only supported value, what to do). Lift a limit by deleting its line."""


def find_engine_faults(config: Config, engine: Engine) -> list[Fault]:
    """What ``config`` asks for and ``engine`` does not support."""
    found = []
    not_yet = _NOT_YET.format(engine=engine)
    for path, (allowed, advice) in LIMITS[engine].items():
        value = lookup(config, path)
        if value != allowed:
            if allowed is None:
                found.append(Fault(path, f"must not be set: {not_yet}", advice=advice))
            else:
                found.append(Fault(path, f"must be {allowed} ({not_yet})", value, advice))
    found += [*_fp16_faults(config, engine), *_compile_faults(config, engine)]
    return [*found, *(_nxd_faults(config) if engine == "nxd" else ())]


MOST_BUCKETS = 32
"""Row lengths of compiled steps: each is a dozen graphs to compile."""


def buckets_fault(config: Config) -> Fault | None:
    """More row lengths than steps of ``distributed_strategy.compile`` are compiled for, where it compiles."""
    path, chosen = "distributed_strategy.compile", config.distributed_strategy.compile
    count = len(config.data.buckets or ())
    if count <= MOST_BUCKETS:
        return None
    rule = f"must be {MOST_BUCKETS} row lengths at most with {path} {chosen}, which compiles graphs of each"
    advice = f"leave it out to have few chosen, or set {path}=none"
    return Fault("data.buckets", f"{rule}, but is {count}", advice=advice, involves=(path,))


def _compile_faults(config: Config, engine: Engine) -> Iterator[Fault]:
    """``blocks`` where steps are graphs already, and what no graph of static shapes takes; where device and
    ``compile`` are both auto, the run itself looks for the latter."""
    path, data = "distributed_strategy.compile", config.data
    chosen = config.distributed_strategy.compile
    on_card = chosen == "auto" and engine == "native" and config.trainer.accelerator in ("cuda", "neuron")
    too_many = buckets_fault(config)
    if (chosen == "blocks" or on_card) and too_many is not None:
        yield too_many
    if chosen != "blocks":
        return
    if engine == "nxd":
        yield Fault(path, "must be auto or none on engine nxd, whose steps are graphs anyway", "blocks")
    elif config.trainer.accelerator == "xla":
        rule = "must be auto or none with trainer.accelerator xla, where steps are graphs anyway"
        yield Fault(path, rule, "blocks", involves=("trainer.accelerator",))
    if data.attention == "blocks":
        kinds = "auto, dense, causal, flex or nki"
        rule = f"must be {kinds} with distributed_strategy.compile blocks, which compiles static shapes"
        advice = "those of data.attention=blocks follow the data"
        yield Fault("data.attention", rule, "blocks", advice, (path,))


def _fp16_faults(config: Config, engine: Engine) -> Iterator[Fault]:
    """fp16 needs a dynamic loss scale, whose decision to skip a step cannot be in a compiled graph; and the
    Neuron stack has no setting for it."""
    if config.precision.type != "fp16":
        return
    # bf16 has float32's exponent range, so gradients neither overflow nor underflow.
    advice = "precision.type=mixed_precision computes in bf16, which needs no loss scale"
    if engine == "nxd":
        yield Fault("precision.type", "must not be fp16 on engine nxd", advice=advice)
    elif config.trainer.accelerator == "xla":
        rule = "must not be fp16 with trainer.accelerator xla"
        yield Fault("precision.type", rule, advice=advice, involves=("trainer.accelerator",))
    elif on_torch_neuron(config):
        rule = "must not be fp16 on TorchNeuron's device, of which AWS documents bf16 and fp32 training alone"
        yield Fault("precision.type", rule, advice=advice, involves=("trainer.accelerator",))


def _nxd_faults(config: Config) -> Iterator[Fault]:
    """Number formats of reductions and gradients that engine nxd does not support."""
    precision = config.precision
    is_float32 = precision.type == "fp32" or (
        precision.type == "manual" and "1" not in (precision.xla_use_bf16, precision.xla_downcast_bf16)
    )
    wanted, given = "fp32" if is_float32 else "bf16", precision.parallel_layers_reduce_dtype
    if given not in (None, wanted):
        rule = (
            f"must be {wanted} with precision.type {precision.type} on engine nxd, as neuronx-distributed "
            "loses gradients where its layers reduce in another dtype than they compute in"
        )
        path = "precision.parallel_layers_reduce_dtype"
        yield Fault(path, rule, given, "leave it out", ("precision.type",))
    if precision.type != "manual" or is_float32 or precision.master_weights:
        return
    for key in ("fp32_grad_acc", "fp32_grads_cc"):
        if getattr(precision, key):
            rule = (
                "must be False without precision.master_weights on engine nxd, as gradients then have the "
                "dtype of the bf16 weights that the optimizer updates"
            )
            advice = "precision.master_weights=True gives it fp32 weights and gradients"
            yield Fault(f"precision.{key}", rule, True, advice, ("precision.master_weights",))


# Keys that are read but have no effect.

_PEFT = "model_alignment_strategy.peft"
_MEGATRON_OR_LIGHTNING = (
    *("exp_manager.version", "exp_manager.use_datetime_version", "exp_manager.resume_past_end"),
    *("trainer.logger", "trainer.enable_checkpointing", "trainer.use_distributed_sampler"),
    *("trainer.limit_test_batches", "exp_manager.checkpoint_callback_params.model_parallel_size"),
    *("distributed_strategy.expert_model_parallel_size", "distributed_strategy.token_shuffle_group_size"),
    *(f"{_PEFT}.load_lora_from_ckpt", f"{_PEFT}.save_lora_base", f"{_PEFT}.save_lora_config_adapter"),
    f"{_PEFT}.merge_sharded_lora",
)
_NEURON = (
    *("compiler_flags", "compiler_cache_url", "aync_exec_max_inflight_requests", "bucket_size_collectives"),
    *("neuron_rt_exec_timeout", "neuron_experimental_compress_rg"),
    *("trainer.lnc", "trainer.sequential_move_factor"),
    "distributed_strategy.kv_replicator",
    *("model.qkv_linear", "model.fuse_qkv", "model.transpose_nki_inputs", "model.use_cpu_initialization"),
    *("model.fusions.softmax", "model.fusions.flash_attention", "model.fusions.ring_attention"),
    "model.fusions.flash_attention_packed",
    *("precision.neuron_rt_stochastic_rounding_en", "precision.parallel_layers_reduce_dtype"),
    *("exp_manager.save_xser", "exp_manager.load_xser", "exp_manager.ckpt_ptl_version"),
)
_NATIVE_NOT_YET = ("precision.master_weights", "precision.fp32_grad_acc", "precision.fp32_grads_cc")
_NXD_ON_TRN1 = ("trainer.lnc", "exp_manager.ckpt_ptl_version", "model.fusions.ring_attention")
# A native checkpoint holds the weights that the optimizer updates, float32 masters if any: without them a
# resumed run would differ from an uninterrupted one. (NxDT itself never reads save_bf16.)
_NATIVE_ALWAYS_EXACT = (
    "exp_manager.save_bf16",
    "exp_manager.checkpoint_callback_params.use_master_weights_in_ckpt",
)
NO_EFFECT: dict[Engine, tuple[str, ...]] = {
    "native": (*_MEGATRON_OR_LIGHTNING, *_NEURON, *_NATIVE_NOT_YET, *_NATIVE_ALWAYS_EXACT),
    "nxd": (*_MEGATRON_OR_LIGHTNING, *_NXD_ON_TRN1),
}
"""Engine -> keys that have no effect on it."""


_ON_TORCH_NEURON = ("trainer.lnc", "neuron_rt_exec_timeout", "precision.neuron_rt_stochastic_rounding_en")
"""Keys without effect on native but on TorchNeuron's device, whose runtime reads them."""


def on_torch_neuron(config: Config) -> bool:
    """Whether engine native runs ``config`` on TorchNeuron's device, as far as packages tell."""
    chosen = config.trainer.accelerator
    return chosen == "neuron" or (chosen == "auto" and neuron_stack() == "native")


def with_torch_neuron(config: Config) -> Config:
    """``config`` with engine native and device neuron where TorchNeuron is installed and a run here would
    take both; elsewhere the same object, whose ``auto`` a plan may mean for another machine."""
    strategy = config.distributed_strategy
    if strategy.engine == "nxd" or neuron_stack() != "native" or not on_torch_neuron(config):
        return config
    return replace(
        config,
        distributed_strategy=replace(strategy, engine="native"),
        trainer=replace(config.trainer, accelerator="neuron"),
    )


def _runs_on_neuron(config: Config) -> bool:
    return resolve_engine(config, neuron_available()) == "nxd"


def may_compile(config: Config) -> bool:
    """Whether ``distributed_strategy.compile`` may make graphs of native's steps; a CPU has to be told."""
    chosen = config.distributed_strategy.compile
    return chosen == "blocks" or (chosen == "auto" and config.trainer.accelerator != "cpu")


_OF_ADAPTERS = {
    f"{_PEFT}.load_lora_from_ckpt": "an adapter in exp_manager.resume_from_checkpoint is recognised",
    f"{_PEFT}.save_lora_base": "checkpoints hold adapters alone; the base is where it was",
    f"{_PEFT}.save_lora_config_adapter": "an exported adapter always has its settings",
    f"{_PEFT}.merge_sharded_lora": "an exported adapter always is one file",
}
REASONS: dict[Engine, dict[str, str]] = {
    "native": _OF_ADAPTERS,
    "nxd": {
        **_OF_ADAPTERS,
        "trainer.lnc": "a logical NeuronCore of trn1 is a physical one",
        "exp_manager.ckpt_ptl_version": "checkpoints of this package record their version",
        "model.fusions.ring_attention": "it is for context parallelism",
        "model.transpose_nki_inputs": "it is for the kernel of model.fusions.flash_attention",
        "model.fusions.flash_attention_packed": "it is for the kernel of model.fusions.flash_attention",
        "model.use_cpu_initialization": (
            "weights are always initialised on the CPU, so that every layout starts from the same ones"
        ),
        "trainer.sequential_move_factor": "without a pipeline all ranks load their weights at once",
    },
}
"""Engine -> key -> why it has no effect, for the notice."""


_ONLY_WITH: dict[str, Callable[[Config], bool]] = {
    **{
        f"precision.{key}": lambda c: c.precision.type == "manual"
        for key in ("master_weights", "fp32_grad_acc", "fp32_grads_cc", "xla_use_bf16", "xla_downcast_bf16")
    },
    "precision.neuron_rt_stochastic_rounding_en": lambda c: c.precision.type == "manual",
    "exp_manager.fail_on_recompile": lambda c: (
        c.trainer.accelerator == "xla" or _runs_on_neuron(c) or may_compile(c)
    ),
    "model.activations_checkpoint_recompute": lambda c: (
        c.model.activations_checkpoint_granularity == "selective"
    ),
    "model.transpose_nki_inputs": lambda c: c.model.fusions.flash_attention,
    "model.fusions.flash_attention_packed": lambda c: c.model.fusions.flash_attention,
    "model.use_cpu_initialization": lambda c: c.model.use_cpu_initialization,
    "trainer.sequential_move_factor": lambda c: c.distributed_strategy.pipeline_model_parallel_size > 1,
}
"""Keys that have an effect only if the condition holds."""


def keys_without_effect(config: Config, engine: Engine) -> list[str]:
    """Keys that the YAML or an override sets and that have no effect on ``engine``."""

    runtimes = _ON_TORCH_NEURON if engine == "native" else ()

    def is_idle(path: str) -> bool:
        if path in NO_EFFECT[engine] and not (path in runtimes and on_torch_neuron(config)):
            return lookup(config, path) is not None
        condition = _ONLY_WITH.get(path)
        return condition is not None and not condition(config) and lookup(config, path) is not None

    return sorted(path for path in config.given if megatron_key(path) or is_idle(path))


def notices(config: Config, engine: Engine) -> list[str]:
    """One notice that names every such key; empty if there is none."""
    reasons = REASONS[engine]
    keys = [f"{k} ({reasons[k]})" if k in reasons else k for k in keys_without_effect(config, engine)]
    return [f"keys without effect on engine {engine}: {', '.join(keys)}"] if keys else []
