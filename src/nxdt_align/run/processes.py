"""This process: its device, and how it joins the others of the run."""

from __future__ import annotations

import gc
import logging
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch.distributed.constants import default_pg_timeout

from nxdt_align.batch import Topology
from nxdt_align.config.engines import on_torch_neuron
from nxdt_align.config.neuron_packages import mixed_products_fault, torch_neuron_fault
from nxdt_align.config.schema import Config
from nxdt_align.engines import ranks, xla
from nxdt_align.engines.native.mesh import TIMED_DEVICES
from nxdt_align.errors import SharedError, UserError
from nxdt_align.messages import NOTICE
from nxdt_align.planning.devices import DEFAULT_LNC
from nxdt_align.run.contracts import RunEnv
from nxdt_align.run.mode import RunMode

log = logging.getLogger(__name__)

PINNED_BY_GROUP = ("neuron",)
"""Types of devices whose process group gives a process its core (it must be joined before the device is
touched), and has no side for the CPU: groups for values on the host are opened apart."""

NO_CORE = (
    "its packages fit, so that the Neuron driver or runtime is missing or sees no NeuronCore (neuron-ls "
    "lists them), or TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from loading it"
)
"""Why there is no device ``neuron`` where packages do not tell."""


def device(config: Config, env: RunEnv, mode: RunMode) -> torch.device:
    """The device of this process; the mode's fallback if there is no accelerator.

    Raises UserError if the chosen accelerator is missing, or TorchNeuron's where auto is that.
    """
    chosen = config.trainer.accelerator
    if chosen == "xla":
        return _xla_device(env)
    # Variables, prices and rows follow from the packages: a broken installation must not train on the CPU.
    wanted = "neuron" if on_torch_neuron(config) else chosen
    # The accelerator that torch was built for: CUDA, or one that registers itself, such as TorchNeuron's.
    present = torch.accelerator.current_accelerator(check_available=True)
    if present is None and env.compile_only and env.compiles_without_device:
        known = torch.accelerator.current_accelerator()
        present = known if known is not None and known.type == "neuron" else None
    if wanted in ("cuda", "neuron") and (present is None or present.type != wanted):
        found = "no accelerator" if present is None else f"{present.type} alone"
        why = f": {torch_neuron_fault(torch.__version__) or NO_CORE}" if wanted == "neuron" else ""
        meant = chosen if chosen == wanted else f"{chosen}, which is {wanted} where TorchNeuron is installed"
        raise UserError(
            f"trainer.accelerator: is {meant}, but torch finds {found}{why}; trainer.accelerator=cpu runs "
            "here"
        )
    if chosen != "cpu" and present is not None:
        fault = mixed_products_fault() if present.type == "neuron" else None
        if fault is not None:
            raise UserError(f"trainer.accelerator: neuron does not run here, as {fault}")
        if not (env.compile_only and env.compiles_without_device):
            _require_devices(config, env, present.type)
        if present.type not in PINNED_BY_GROUP:
            torch.accelerator.set_device_index(env.local_rank)
        return torch.device(present.type, env.local_rank)
    return mode.fallback_device(config, env)


def _require_devices(config: Config, env: RunEnv, kind: str) -> None:
    """Raise UserError where there is no device for each process of this node: torch would end in an error of
    the driver's."""
    count = torch.accelerator.device_count()
    wanted = max(config.trainer.devices, env.local_rank + 1)
    if wanted <= count:
        return
    what = f"{kind} devices"
    if kind == "neuron":
        lnc = config.trainer.lnc or DEFAULT_LNC
        what = f"logical NeuronCores (trainer.lnc {lnc})"
        what += f", or {2 * count} with trainer.lnc=1, each of half the memory" if lnc == 2 else ""
    # A launcher may start more processes than the YAML says; not all of them see that.
    error = SharedError if config.trainer.devices > count else UserError
    raise error(f"trainer.devices: must be {count} at most here: torch finds {count} {what}; but is {wanted}")


def _xla_device(env: RunEnv) -> torch.device:
    if not xla.is_available():
        raise UserError(
            "trainer.accelerator: is xla, but the package torch_xla is not installed; install torch==2.9.0 "
            "and torch_xla==2.9.0 (make test-xla does, in .venv-xla), or choose trainer.accelerator=cpu"
        )
    if env.world_size > 1:
        raise UserError(
            f"trainer.accelerator: xla runs in one process here, but there are {env.world_size} "
            "(WORLD_SIZE), and torch_xla's CPU device has no collectives between processes; set "
            "trainer.devices=1"
        )
    return xla.device()


def start_processes(config: Config, env: RunEnv, where: torch.device) -> Topology:
    """Join a process group with ``where``'s default backend, plus gloo for values on the host."""
    if env.world_size > 1:
        own = dist.get_default_backend_for_device(where)
        has_host = where.type == "cpu" or where.type in PINNED_BY_GROUP
        try:
            # Without device_id: DeviceMesh would then split the group, which TorchNeuron's cannot.
            dist.init_process_group(
                own if has_host else f"cpu:gloo,{where.type}:{own}", timeout=timeout(config)
            )
            if where.type in PINNED_BY_GROUP:
                ranks.open_host_group(timeout(config))
        except ValueError as error:
            raise UserError(
                f"the {env.world_size} processes (WORLD_SIZE) cannot connect to each other: {error}; start "
                "with train.sh or torchrun"
            ) from error
        if env.rank == 0 and where.type not in TIMED_DEVICES and timeout(config) != default_pg_timeout:
            log.log(
                NOTICE,
                "distributed_strategy.timeout_minutes: counts for all processes together; torch cannot set "
                "it for groups of some of them (tensor, data, pipeline) on %s, which keep the backend's own",
                where.type,
            )
    if where.type in PINNED_BY_GROUP:
        torch.accelerator.set_device_index(env.local_rank)
    parallel = config.distributed_strategy
    return Topology.of_rank(
        env.rank,
        env.world_size,
        tensor_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_parallel_size=parallel.pipeline_model_parallel_size,
    )


def timeout(config: Config) -> timedelta:
    """How long a process waits for the others."""
    return timedelta(minutes=config.distributed_strategy.timeout_minutes)


def end_processes() -> None:
    """Destroy the process group, if there is one, when all its processes are done.

    This ends gloo's threads. One that still releases a tensor while the interpreter shuts down cannot get the
    GIL and aborts the process ("terminate called without an active exception").
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    if dist.get_backend() != "xla":  # it has no gloo backend for CPU tensors
        # A barrier: a rank that leaves early closes connections that others still use.
        dist.all_reduce(torch.zeros(()), group=ranks.host_group())
    gc.collect()  # a group's threads end with the last reference to it
    ranks.close_host_group()
    dist.destroy_process_group()


def cluster(env: RunEnv) -> ClusterEnvironment:
    """Ranks for Lightning, from torchrun or of a single process."""
    return TorchElasticEnvironment() if env.world_size > 1 else LightningEnvironment()
