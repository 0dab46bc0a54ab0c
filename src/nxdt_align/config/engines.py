"""Which engine runs a configuration, what it cannot do yet, and which keys have no effect on it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, Literal

from nxdt_align.config.faults import Fault
from nxdt_align.config.megatron import megatron_key
from nxdt_align.config.rules import lookup
from nxdt_align.config.schema import Config

Engine = Literal["nxd", "native"]
NEURON_INDEX = "https://pip.repos.neuron.amazonaws.com"
"""AWS's own package index, as in requirements_dpo.txt."""


_CPU_MODE_PACKAGES = {"neuronx-distributed": "neuronx_distributed", "torch-xla": "torch_xla"}
_NEURON_PACKAGES = {
    "torch-neuronx": "torch_neuronx",
    "neuronx-cc": "neuronxcc",
    "libneuronxla": "libneuronxla",
    **_CPU_MODE_PACKAGES,
}
"""Package -> the module that it brings."""


def neuron_available() -> bool:
    """Whether the real Neuron packages are here. PyPI's placeholders of these names hold no module."""
    return all(_has_module(name) for name in ("torch_neuronx", "neuronx_distributed"))


def find_missing_neuron_packages(cpu_mode: bool = False) -> str | None:
    """What engine nxd lacks of its packages, and what to do; None where they are all here.

    Args:
        cpu_mode: as with NXD_CPU_MODE=1, where neither compiler nor runtime is needed.
    """
    wanted = _CPU_MODE_PACKAGES if cpu_mode else _NEURON_PACKAGES
    absent = [package for package, module in wanted.items() if not _has_module(module)]
    if not absent:
        return None
    hollow = [package for package in absent if _is_installed(package)]
    missing = [package for package in absent if package not in hollow]
    faults = []
    if missing:
        faults.append(f"not installed: {', '.join(missing)}")
    if hollow:
        faults.append(f"PyPI's empty placeholder is installed instead of the package: {', '.join(hollow)}")
    remove = f"pip uninstall -y {' '.join(hollow)}, then " if hollow else ""
    return (
        f"engine nxd needs packages of AWS Neuron. {'; '.join(faults)}. Install them from AWS's own index "
        f"({NEURON_INDEX}): {remove}pip install -r requirements_dpo.txt. "
        "distributed_strategy.engine=native runs without them"
    )


def _has_module(name: str) -> bool:
    """Whether ``name`` can be imported; a folder of that name without code does not count."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def resolve_engine(config: Config, neuron_available: bool) -> Engine:
    """The engine that distributed_strategy.engine asks for; of ``auto``, nxd where the Neuron packages
    are and trainer.accelerator does not ask for another device."""
    chosen = config.distributed_strategy.engine
    if chosen != "auto":
        return chosen
    neuron_is_wanted = config.trainer.accelerator in ("auto", "neuron")
    return "nxd" if neuron_available and neuron_is_wanted else "native"


# What an engine does not support yet: path -> (values that it can, why not the others, what to do).

_SPREAD_OTHERWISE = "with 1, sequence_parallel over tensor_model_parallel_size=N ranks spreads long sequences"
_NXDS_VALIDATION_STOPS = (
    "leave it out: neuronx-distributed's schedule without gradients goes through each rank's first share of "
    "the layers alone, so that there would be no validation and no reference pass"
)
_NOT_YET = "engine {engine} does not support it yet"

LIMITS: dict[Engine, dict[str, tuple[Any, str]]] = {
    "native": {
        "distributed_strategy.context_parallel_size": (1, _SPREAD_OTHERWISE),
        "model_alignment_strategy.peft": (None, "~model_alignment_strategy.peft trains every weight"),
    },
    "nxd": {
        "distributed_strategy.virtual_pipeline_model_parallel_size": (1, _NXDS_VALIDATION_STOPS),
        "distributed_strategy.context_parallel_size": (1, "leave it out"),
        "distributed_strategy.fsdp": (False, "distributed_strategy.zero1=True shards the optimizer's state"),
        "model_alignment_strategy.peft": (None, "~model_alignment_strategy.peft trains every weight"),
    },
}
"""Engine -> path -> (the only value that it takes, what to do). Lift a limit by deleting its line."""


def find_engine_faults(config: Config, engine: Engine) -> list[Fault]:
    """What ``engine`` cannot do of ``config``."""
    found = []
    not_yet = _NOT_YET.format(engine=engine)
    for path, (allowed, advice) in LIMITS[engine].items():
        value = lookup(config, path)
        if value != allowed:
            if allowed is None:
                found.append(Fault(path, f"must not be set: {not_yet}", advice=advice))
            else:
                found.append(Fault(path, f"must be {allowed} ({not_yet})", value, advice))
    return [*found, *_fp16_faults(config, engine), *(_nxd_faults(config) if engine == "nxd" else ())]


def _fp16_faults(config: Config, engine: Engine) -> Iterator[Fault]:
    """Whether a step is skipped is decided on the host, outside of any compiled graph."""
    if config.precision.type != "fp16":
        return
    advice = "precision.type=mixed_precision computes in bf16, which needs no loss scale"
    if engine == "nxd":
        yield Fault("precision.type", "must not be fp16 on engine nxd", advice=advice)
    elif config.trainer.accelerator == "xla":
        rule = "must not be fp16 with trainer.accelerator xla"
        yield Fault("precision.type", rule, advice=advice, involves=("trainer.accelerator",))


def _nxd_faults(config: Config) -> Iterator[Fault]:
    """Number formats of reductions and of gradients that engine nxd has not."""
    precision = config.precision
    is_float32 = precision.type == "fp32" or (
        precision.type == "manual" and "1" not in (precision.xla_use_bf16, precision.xla_downcast_bf16)
    )
    wanted, given = "fp32" if is_float32 else "bf16", precision.parallel_layers_reduce_dtype
    if given not in (None, wanted):
        rule = (
            f"must be {wanted} with precision.type {precision.type} on engine nxd, as neuronx-distributed "
            "loses gradients where its layers reduce in another format than they compute in"
        )
        path = "precision.parallel_layers_reduce_dtype"
        yield Fault(path, rule, given, "leave it out", ("precision.type",))
    if precision.type != "manual" or is_float32 or precision.master_weights:
        return
    for key in ("fp32_grad_acc", "fp32_grads_cc"):
        if getattr(precision, key):
            rule = (
                "must be False without precision.master_weights on engine nxd, as gradients then have the "
                "format of the bf16 weights that the optimizer moves"
            )
            advice = "precision.master_weights=True gives it fp32 weights and gradients"
            yield Fault(f"precision.{key}", rule, True, advice, ("precision.master_weights",))


# Keys that are read but change nothing.

_MEGATRON_OR_LIGHTNING = (
    *("exp_manager.version", "exp_manager.use_datetime_version", "exp_manager.resume_past_end"),
    *("trainer.logger", "trainer.enable_checkpointing", "trainer.use_distributed_sampler"),
    *("trainer.limit_test_batches", "exp_manager.checkpoint_callback_params.model_parallel_size"),
    *("distributed_strategy.expert_model_parallel_size", "distributed_strategy.token_shuffle_group_size"),
)
_NEURON = (
    *("compiler_flags", "compiler_cache_url", "aync_exec_max_inflight_requests", "bucket_size_collectives"),
    *("neuron_rt_exec_timeout", "neuron_experimental_compress_rg"),
    *("trainer.lnc", "trainer.sequential_move_factor"),
    "distributed_strategy.kv_replicator",
    *("model.qkv_linear", "model.fuse_qkv", "model.transpose_nki_inputs", "model.use_cpu_initialization"),
    *("model.fusions.softmax", "model.fusions.flash_attention", "model.fusions.ring_attention"),
    *("precision.neuron_rt_stochastic_rounding_en", "precision.parallel_layers_reduce_dtype"),
    *("exp_manager.save_xser", "exp_manager.load_xser", "exp_manager.ckpt_ptl_version"),
)
_NATIVE_NOT_YET = ("precision.master_weights", "precision.fp32_grad_acc", "precision.fp32_grads_cc")
_NXD_ON_TRN1 = ("trainer.lnc", "exp_manager.ckpt_ptl_version", "model.fusions.ring_attention")
# A native checkpoint keeps the weights that the optimizer moves, float32 masters where there are such:
# without them a run would not go on as if it had not been interrupted. (NxDT itself reads save_bf16 nowhere.)
_NATIVE_ALWAYS_EXACT = (
    "exp_manager.save_bf16",
    "exp_manager.checkpoint_callback_params.use_master_weights_in_ckpt",
)
NO_EFFECT: dict[Engine, tuple[str, ...]] = {
    "native": (*_MEGATRON_OR_LIGHTNING, *_NEURON, *_NATIVE_NOT_YET, *_NATIVE_ALWAYS_EXACT),
    "nxd": (*_MEGATRON_OR_LIGHTNING, *_NXD_ON_TRN1),
}
"""Engine -> keys that change nothing on it."""


def _runs_on_neuron(config: Config) -> bool:
    return resolve_engine(config, neuron_available()) == "nxd"


REASONS: dict[Engine, dict[str, str]] = {
    "native": {},
    "nxd": {
        "trainer.lnc": "a logical NeuronCore of trn1 is a physical one",
        "exp_manager.ckpt_ptl_version": "checkpoints of this package say their version themselves",
        "model.fusions.ring_attention": "it is for context parallelism",
        "model.transpose_nki_inputs": "it is for the kernel of model.fusions.flash_attention",
        "model.use_cpu_initialization": (
            "weights are always made on the CPU, so that ranks of any sizes start from the same ones"
        ),
        "trainer.sequential_move_factor": "without a pipeline all ranks load their weights at once",
    },
}
"""Engine -> why a key of those that say so in the notice changes nothing."""


_ONLY_WITH: dict[str, Callable[[Config], bool]] = {
    **{
        f"precision.{key}": lambda c: c.precision.type == "manual"
        for key in ("master_weights", "fp32_grad_acc", "fp32_grads_cc", "xla_use_bf16", "xla_downcast_bf16")
    },
    "precision.neuron_rt_stochastic_rounding_en": lambda c: c.precision.type == "manual",
    "exp_manager.fail_on_recompile": lambda c: c.trainer.accelerator == "xla" or _runs_on_neuron(c),
    "model.activations_checkpoint_recompute": lambda c: (
        c.model.activations_checkpoint_granularity == "selective"
    ),
    "model.transpose_nki_inputs": lambda c: c.model.fusions.flash_attention,
    "model.use_cpu_initialization": lambda c: c.model.use_cpu_initialization,
    "trainer.sequential_move_factor": lambda c: c.distributed_strategy.pipeline_model_parallel_size > 1,
}
"""Keys that count only where they or another have some value."""


def keys_without_effect(config: Config, engine: Engine) -> list[str]:
    """Keys that the YAML or an override sets to something and that change nothing on ``engine``."""

    def is_idle(path: str) -> bool:
        if path in NO_EFFECT[engine]:
            return lookup(config, path) is not None
        condition = _ONLY_WITH.get(path)
        return condition is not None and not condition(config) and lookup(config, path) is not None

    return sorted(path for path in config.given if megatron_key(path) or is_idle(path))


def notices(config: Config, engine: Engine) -> list[str]:
    """One notice that names every such key; none where there is no such key."""
    reasons = REASONS[engine]
    keys = [f"{k} ({reasons[k]})" if k in reasons else k for k in keys_without_effect(config, engine)]
    return [f"keys without effect on engine {engine}: {', '.join(keys)}"] if keys else []
