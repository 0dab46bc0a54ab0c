"""Environment variables of the Neuron stack that follow from the YAML, as NxDT sets them.

torch_xla, the runtime and the compiler read them once, at their start: they must be set before the first
import of torch_xla. Values that the user has set are kept.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nxdt_align.config.faults import ConfigError, Fault
from nxdt_align.config.schema import Config, PrecisionConfig
from nxdt_align.errors import UserError
from nxdt_align.files import CHOOSE_ANOTHER, unwritable

FLAGS = "NEURON_CC_FLAGS"
CACHE = "NEURON_COMPILE_CACHE_URL"
DEFAULT_CACHE = "/var/tmp/neuron-compile-cache"
"""The Neuron compiler's default cache."""

LOGICAL_CORES = "NEURON_LOGICAL_NC_CONFIG"
"""Physical NeuronCores that are one device: 1 or 2, on trn2 and trn3."""

COMPILE_ONLY = "TORCH_NEURONX_COMPILE_ONLY"
"""1: TorchNeuron compiles and runs nothing, also where there is no device; seen in AWS's own sources, and not
run by us. NEURON_PLATFORM_TARGET_OVERRIDE then says for which chip."""

INSPECT, INSPECT_DIR = "NEURON_RT_INSPECT_ENABLE", "NEURON_RT_INSPECT_OUTPUT_DIR"
"""Neuron's own profile, of a whole process, and its folder: as AWS documents Neuron Explorer, not run by us.
Not on TorchNeuron, where they conflict with torch.profiler."""

DOWNCASTS = ("XLA_USE_BF16", "XLA_DOWNCAST_BF16")
"""Always 0, whatever the user has set. With either, torch_xla silently stores float32 tensors as bf16:
log-probabilities, master weights, gradient sums, and AdamW's step count, which then stops at 256. With the
first also float64 tensors, so that nothing can be exempted."""

Origin = Literal["YAML", "already set", "already set, then YAML"]

KEYS: dict[str, str] = {
    "NEURON_FUSE_SOFTMAX": "model.fusions.softmax",
    "NEURON_EXPERIMENTAL_COMPRESS_RG": "neuron_experimental_compress_rg",
    "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS": "aync_exec_max_inflight_requests",
    "BUCKET_CAP_MB": "bucket_size_collectives",
    CACHE: "compiler_cache_url",
    FLAGS: "compiler_flags, precision.type",
    "NEURON_RT_EXEC_TIMEOUT": "neuron_rt_exec_timeout",
    LOGICAL_CORES: "trainer.lnc",
    "XLA_USE_BF16": "engine nxd",
    "XLA_DOWNCAST_BF16": "engine nxd",
    "NEURON_RT_STOCHASTIC_ROUNDING_EN": "precision.type",
    INSPECT: "trainer.profiler",
    INSPECT_DIR: "trainer.profiler",
}
"""Variable -> the keys that determine it."""

RELATED = ("NEURON_", "NEURONCORE_", "XLA_", "PJRT_", "NXD_", "FI_", "CCOM_", "MALLOC_ARENA_MAX")
"""Prefixes of other variables that affect the stack."""

_ACCUMULATE = "--enable-mixed-precision-accumulation"
_NO_CAST = "--auto-cast none"


@dataclass(frozen=True)
class _Format:
    """One value of ``precision.type`` in the stack's terms; None leaves a variable unset."""

    stochastic_rounding: str | None
    flags: tuple[str, ...]


_FORMATS: dict[str, _Format] = {
    "bf16SR":            _Format("1", (_ACCUMULATE,)),
    "mixed_precision":   _Format("0", (_ACCUMULATE,)),
    "mixed_precisionSR": _Format("1", (_ACCUMULATE,)),
    "fp32":              _Format(None, (_NO_CAST,)),
    "autocast":          _Format("0", (_ACCUMULATE, _NO_CAST)),
}  # fmt: skip


def _format(precision: PrecisionConfig) -> _Format:
    if precision.type == "manual":
        rounding = precision.neuron_rt_stochastic_rounding_en
        return _Format(rounding, ())
    return _FORMATS[precision.type.replace("precision_SR", "precisionSR")]


def neuron_environment(config: Config) -> dict[str, str]:
    """Variable -> value, as NxDT's training_orchestrator.py sets them on an empty environment.

    A flag in compiler_flags overrides the same flag implied by precision.type. Raises UserError for flags
    that a shell could not parse.
    """
    chosen = _format(config.precision)
    values: dict[str, str | None] = {
        "NEURON_FUSE_SOFTMAX": "1" if config.model.fusions.softmax else None,
        "NEURON_EXPERIMENTAL_COMPRESS_RG": "1" if config.neuron_experimental_compress_rg else "0",
        "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS": str(config.aync_exec_max_inflight_requests),
        "BUCKET_CAP_MB": str(config.bucket_size_collectives),
        CACHE: config.compiler_cache_url,
        FLAGS: add_flags(config.compiler_flags, " ".join(chosen.flags)),
        "NEURON_RT_EXEC_TIMEOUT": str(config.neuron_rt_exec_timeout),
        # The only difference from NxDT: engine nxd chooses the bf16 tensors itself.
        **dict.fromkeys(DOWNCASTS, "0"),
        "NEURON_RT_STOCHASTIC_ROUNDING_EN": chosen.stochastic_rounding,
    }
    if config.trainer.profiler is not None:
        # NxDT has no such key.
        values |= {INSPECT: "1", INSPECT_DIR: str(_profile_folder(config))}
    return {name: value for name, value in values.items() if value}


def _profile_folder(config: Config) -> Path:
    """In the run's folder where that is known before the runtime starts: a dated one is not."""
    explicit = config.exp_manager.explicit_log_dir
    if explicit is not None:
        return Path(explicit).absolute() / "profile" / "neuron"
    return config.experiments / "neuron_profile" / (config.exp_manager.name or config.name)


def torch_neuron_environment(config: Config) -> dict[str, str]:
    """Variable -> value for engine native on TorchNeuron's device: what its runtime has in common with
    that of NxDT's stack, and the cores of a device. Compiler flags and caches have other names there."""
    values = {
        LOGICAL_CORES: None if config.trainer.lnc is None else str(config.trainer.lnc),
        "NEURON_RT_EXEC_TIMEOUT": str(config.neuron_rt_exec_timeout),
        "NEURON_RT_STOCHASTIC_ROUNDING_EN": _format(config.precision).stochastic_rounding,
    }
    return {name: value for name, value in values.items() if value}


def missing_from(present: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, str]:
    """The variables of ``wanted`` to set: ``present`` ones are kept, except that compiler flags are appended
    and DOWNCASTS are always as wanted. Idempotent.
    """
    absent = {name: value for name, value in wanted.items() if name not in present}
    absent |= {name: wanted[name] for name in replaced(present, wanted)}
    if FLAGS in wanted and FLAGS in present:
        merged = add_flags(present[FLAGS], wanted[FLAGS])
        if merged != present[FLAGS].strip():
            absent[FLAGS] = merged
    return absent


def replaced(present: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Those of DOWNCASTS that are ``present`` with another value than ``wanted``."""
    return [n for n in DOWNCASTS if n in wanted and (present.get(n) or wanted[n]) != wanted[n]]


def missing_variables(config: Config, present: Mapping[str, str]) -> dict[str, str]:
    """The variables that a run of ``config`` on engine nxd must set.

    Raises ConfigError for a compile cache that cannot be written to.
    """
    wanted = neuron_environment(config)
    fault = cache_fault(present, wanted)
    if fault is not None:
        raise ConfigError([fault], config.source)
    return missing_from(present, wanted)


def describe(present: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """A line of shell for each variable with its value and origin, related ones that are set included."""
    changed, others = missing_from(present, wanted), replaced(present, wanted)
    related = sorted(n for n in present if n.startswith(RELATED) and n not in wanted)
    lines = []
    for name in (*wanted, *related):
        origin: Origin = "already set"
        if name in changed:
            origin = "already set, then YAML" if name in present else "YAML"
        about = origin if origin == "already set" else f"{origin} ({KEYS[name]})"
        if name in others:
            about = f"always, though it was set to {present[name]}"
        lines.append(f"export {name}={shlex.quote({**present, **changed}[name])}  # {about}")
    return lines


# The compile cache


def local_cache(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """The compiler's cache and the variable that names it, empty for the default; None for an s3://
    address."""
    for tokens in _options(environment.get(FLAGS, "")):
        name, _, value = tokens[0].partition("=")
        if name == "--cache_dir":
            return _local(value or "".join(tokens[1:]), FLAGS)
    if environment.get(CACHE):
        return _local(environment[CACHE], CACHE)
    return DEFAULT_CACHE, ""


def cache_fault(present: Mapping[str, str], wanted: Mapping[str, str]) -> Fault | None:
    """The fault of the compiler's cache, if it is a local folder."""
    place = local_cache({**present, **missing_from(present, wanted)})
    problem = unwritable(Path(place[0])) if place else None
    if place is None or problem is None:
        return None
    folder, variable = place
    rule = "must be a folder that can be written to, or an s3:// address"
    if variable in present:
        rule += f" (so must the variable {variable}, which takes precedence)"
    elif not variable:
        rule += " (null means the compiler's own default)"
    return Fault("compiler_cache_url", f"{rule}, but is {folder}{problem}", advice=CHOOSE_ANOTHER)


def _local(address: str, origin: str) -> tuple[str, str] | None:
    path = address.removeprefix("file://")
    return None if "://" in path else (path, origin)


# Compiler flags


def add_flags(first: str, more: str) -> str:
    """``first``, then the options of ``more`` that it lacks. Raises UserError for an open quote."""
    known = {_name(tokens) for tokens in _options(first)}
    added = [shlex.join(tokens) for tokens in _options(more) if _name(tokens) not in known]
    return " ".join(filter(None, [first.strip(), *added]))


def _options(text: str) -> list[list[str]]:
    """Options with their values: ``--a b -O1`` is [[--a, b], [-O1]]."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(
            f"compiler_flags, or the variable {FLAGS}: must be options as in a shell, but is {text!r} "
            f"({error}); close the quote"
        ) from error
    found: list[list[str]] = []
    for word in words:
        if word.startswith("-") or not found:
            found.append([word])
        else:
            found[-1].append(word)
    return found


def _name(tokens: Sequence[str]) -> str:
    name = tokens[0].partition("=")[0]
    # neuronx-cc's -O1 is short for --optlevel=1; both in one command would conflict.
    return "--optlevel" if name in ("-O", "-O1", "-O2", "-O3") else name
