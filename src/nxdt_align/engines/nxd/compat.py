"""Where neuronx-distributed (NxD) runs, and what differs between the backends.

Call ``start`` before any other module of this folder is imported: NxD reads the environment while it
is being imported. Beside the command line, this file alone touches ``os.environ``.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from nxdt_align.engines import xla
from nxdt_align.engines.base import EngineError

log = logging.getLogger(__name__)

Backend = Literal["neuron", "xla", "cpu"]
"""neuron: NeuronCores; xla: torch_xla's CPU device, one process; cpu: NxD's CPU mode, gloo between
processes, plain CPU tensors."""

INSTALL = (
    "install the real packages with pip install -r requirements_dpo.txt, whose index is "
    "https://pip.repos.neuron.amazonaws.com (PyPI's packages of these names are empty placeholders); "
    "distributed_strategy.engine=native runs without them"
)
_HOST_WORLD_SIZE = "HOST_WORLD_SIZE"
_FORCE_SAFE_LOAD = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@dataclass(frozen=True)
class Platform:
    """The backend of this process."""

    backend: Backend
    device: torch.device
    alone: bool = False
    """Whether the other ranks' processes are not there, as only graphs are recorded."""

    def mark_step(self) -> None:
        """End the graph that is being recorded, and run it. Nothing where nothing is recorded."""
        if self.backend != "cpu":
            xla.sync()

    def recompute(self) -> Callable[..., Any]:
        """How activations are computed again in the backward pass.

        XLA would find the second computation equal to the first, and keep the first one's results.
        """
        if self.backend == "cpu":
            from torch.utils.checkpoint import checkpoint

            return partial(checkpoint, use_reentrant=False)
        from torch_xla.utils.checkpoint import checkpoint as barred_checkpoint

        return partial(barred_checkpoint, use_reentrant=True)


def backend_of(accelerator: str) -> Backend:
    """The backend that ``trainer.accelerator`` means with this engine. ``auto`` is Neuron, unless the user
    has chosen NxD's CPU mode (NXD_CPU_MODE=1). Raises EngineError for cuda."""
    if accelerator == "cuda":
        raise EngineError(
            "trainer.accelerator: engine nxd runs on Neuron devices, or on a CPU, but not on cuda; "
            "distributed_strategy.engine=native does"
        )
    if accelerator in ("cpu", "xla"):
        return "cpu" if accelerator == "cpu" else "xla"
    is_cpu = accelerator == "auto" and os.environ.get("NXD_CPU_MODE", "0") not in ("", "0")
    return "cpu" if is_cpu else "neuron"


def start(backend: Backend, rank: int = 0, world_size: int = 1) -> Platform:
    """Set the environment that ``backend`` wants, import NxD, and join the process group.

    With several processes the launcher has set MASTER_ADDR and MASTER_PORT. What the user has set
    stays, except NXD_CPU_MODE, which must agree with ``backend``.

    Raises EngineError where NxD cannot be imported, or a backend takes no more than one process.
    """
    if backend == "xla" and world_size > 1:
        raise EngineError(
            f"trainer.accelerator: xla on a CPU runs in one process, but there are {world_size}; "
            "trainer.accelerator=cpu runs several"
        )
    _set_environment(backend)
    import_nxd()
    if backend != "neuron":
        _supply_world_size()
    _join(backend, rank, world_size)
    if backend == "cpu":
        return Platform(backend, torch.device("cpu"))
    import torch_xla

    return Platform(backend, torch_xla.device())


def start_tracing(rank: int, world_size: int) -> Platform:
    """One rank of ``world_size`` NeuronCores in a process of its own, whose graphs are recorded and never run
    (``xla.start_tracing``). Needs torch_xla and NxD; no Neuron device.

    Raises EngineError where NxD cannot be imported.
    """
    _set_environment("neuron")
    for name, value in _TRACED.items():
        os.environ.setdefault(name, value)
    xla.start_tracing()
    runtime: Any = importlib.import_module("torch_xla.runtime")
    model: Any = importlib.import_module("torch_xla.core.xla_model")
    # torch_xla knows of this process alone, which ZeRO-1 asks for its rank.
    runtime.global_ordinal, runtime.global_device_count = lambda: rank, lambda: world_size
    model.rendezvous = lambda *_, **__: []
    import_nxd()
    _supply_world_size()
    importlib.import_module("torch_xla.distributed.xla_backend")
    dist.init_process_group("xla", store=HashStore(), rank=rank, world_size=world_size)
    return Platform("neuron", xla.device(), alone=True)


_TRACED = {
    "PJRT_DEVICE": "CPU",
    _HOST_WORLD_SIZE: "1",
    # Else torch_xla leaves out the all-reduces of what it takes for a run of one process.
    "XLA_ALWAYS_ALLREDUCE": "1",
}


def _set_environment(backend: Backend) -> None:
    os.environ["NXD_CPU_MODE"] = "1" if backend == "cpu" else "0"
    for name in ("XLA_USE_BF16", "XLA_DOWNCAST_BF16"):
        if os.environ.get(name, "0") not in ("", "0"):
            # XLA would store float32 tensors as bf16: log-probabilities, master weights, sums of gradients.
            log.warning("%s: taken for 0, as engine nxd computes in bf16 where precision.type says so", name)
            os.environ[name] = "0"
    # Means the same as 0; but at exactly 0 NxD's flash kernel keeps its log-sum-exp in bf16, which the
    # backward pass computes every probability from: up to 3% off.
    os.environ.pop("XLA_DOWNCAST_BF16", None)
    if backend == "neuron":
        return
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    os.environ.setdefault(_HOST_WORLD_SIZE, "1")


def _supply_world_size() -> None:
    """Off Neuron NxD asks for a variable by a name that torch_xla no longer has, when it saves. A process
    on the CPU is all that torch_xla knows of."""
    names = importlib.import_module("torch_xla.core.xla_env_vars")
    if not hasattr(names, _HOST_WORLD_SIZE):
        setattr(names, _HOST_WORLD_SIZE, _HOST_WORLD_SIZE)


def import_nxd() -> ModuleType:
    """neuronx_distributed. Raises EngineError where it, or what it imports, is missing or a placeholder."""
    _supply_tracer()
    try:
        nxd = importlib.import_module("neuronx_distributed")
    except ImportError as error:
        raise EngineError(f"engine nxd cannot import neuronx_distributed: {error}; {INSTALL}") from error
    if not hasattr(nxd, "neuronx_distributed_config"):
        where = getattr(nxd, "__file__", None) or "an empty folder"
        raise EngineError(
            f"engine nxd found a neuronx_distributed without content ({where}), a placeholder; {INSTALL}"
        )
    return nxd


@contextmanager
def only_plain_values() -> Iterator[None]:
    """Inside, ``torch.load`` takes tensors and plain values only, even where NxD asks it not to check:
    nothing in a checkpoint is executed."""
    from torch_xla.utils.serialization import TensorReference

    before = os.environ.get(_FORCE_SAFE_LOAD)
    os.environ[_FORCE_SAFE_LOAD] = "1"
    try:
        with torch.serialization.safe_globals([TensorReference]):
            yield
    finally:
        if before is None:
            del os.environ[_FORCE_SAFE_LOAD]
        else:
            os.environ[_FORCE_SAFE_LOAD] = before


def _supply_tracer() -> None:
    """NxD's pipeline module imports a tracer that transformers 5 no longer has, and that is used for
    transformers' own models alone. torch's stands there, so that NxD can be imported at all."""
    if "transformers.utils.fx" in sys.modules:
        return
    try:
        if importlib.util.find_spec("transformers.utils.fx") is not None:
            return
    except ImportError:
        return  # no transformers: NxD does without
    module = ModuleType("transformers.utils.fx")
    module.HFTracer = torch.fx.Tracer  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module


def _join(backend: Backend, rank: int, world_size: int) -> None:
    if dist.is_initialized():
        return
    if backend == "cpu" and world_size == 1:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    elif backend == "cpu":
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
    elif backend == "xla":
        importlib.import_module("torch_xla.distributed.xla_backend")
        dist.init_process_group("xla", store=HashStore(), rank=0, world_size=1)
    else:
        importlib.import_module("torch_xla.distributed.xla_backend")
        dist.init_process_group("xla")
