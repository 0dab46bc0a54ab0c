"""The Lightning strategy: delegates ranks, devices and checkpoints to the engine."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from nxdt_align.engines.base import Engine, EngineError
from nxdt_align.files import DOOMED_PREFIX, explain
from nxdt_align.training.finite import FiniteCheck

log = logging.getLogger(__name__)
OPTIMIZER_IN_FOLDER = "in the checkpoint folder"
"""Placeholder for the optimizer's state in Lightning's checkpoint; the engine writes the state itself."""


def checkpoint_folder(path: str | Path) -> Path:
    """The folder of a checkpoint's path: the path without the '.ckpt' that Lightning and NeMo append, as NeMo
    itself names checkpoint folders."""
    return Path(str(path).removesuffix(".ckpt"))


class EngineStrategy(ParallelStrategy):
    """Everything that touches the model goes to ``engine``.

    Args:
        engine: the engine.
        cluster_environment: ranks, as the launcher gives them.
        extra: plain values stored in each checkpoint beside Lightning's.
        background: write checkpoints while training continues. An old checkpoint is removed only once the
            new one is complete.
        finite: stops a save, or a resume, of values that are not finite; None checks nothing.
    """

    def __init__(
        self,
        engine: Engine,
        cluster_environment: ClusterEnvironment,
        extra: Mapping[str, Any],
        *,
        background: bool = False,
        finite: FiniteCheck | None = None,
    ) -> None:
        super().__init__(
            cluster_environment=cluster_environment,
            checkpoint_io=_FolderIO(),
            parallel_devices=[engine.device],
        )
        self.engine = engine
        self._extra = dict(extra)
        self._background = background
        self._finite = finite
        self._resumed: Path | None = None

    # Ranks and devices

    @property
    def root_device(self) -> torch.device:
        """The device of Lightning's own tensors. The CPU on a lazy device, where each read of them would
        compile a graph; the module moves batches to such a device itself."""
        return torch.device("cpu") if self.engine.lazy else self.engine.device

    @property
    def is_global_zero(self) -> bool:
        return self.engine.topology.rank == 0

    @property
    def global_rank(self) -> int:
        return self.engine.topology.rank

    @property
    def world_size(self) -> int:
        return self.engine.topology.world_size

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        topology = self.engine.topology
        return {"num_replicas": topology.data_parallel_size, "rank": topology.data_parallel_rank}

    def model_to_device(self) -> None:
        """The engine has placed its model already."""

    def optimizer_step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Does nothing if the engine skips the step."""
        return None if self.engine.skips_step else super().optimizer_step(optimizer, *args, **kwargs)

    def setup(self, trainer: Trainer) -> None:
        """Create the optimizer, then load weights and optimizer state together, in one read of the
        checkpoint.

        Lightning loads weights before ``setup``, when there is no optimizer yet, and optimizer state after
        ``on_fit_start``, whose hooks already need the weights. Only here do both exist in time.
        """
        super().setup(trainer)
        if self._resumed is not None:
            optimizer = self.optimizers[0] if self.optimizers else None
            self.engine.load(self._resumed, optimizer)
            if self._finite is not None:
                self._finite.check_loaded(self._resumed, optimizer)

    # Communication

    def barrier(self, name: str | None = None) -> None:
        self.engine.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        assert src == 0
        return self.engine.broadcast_object(obj)

    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        return self.engine.all_gather(tensor)

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Logged values are already global means, so there is nothing to reduce."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all ranks, or any, vote True. Includes every pipeline stage and tensor-parallel rank, as a
        deadline or signal reaches processes at different times."""
        votes = self.engine.gather_objects(bool(decision))
        return False not in votes if all else True in votes

    # Checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Empty: the engine writes the weights."""
        return {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {"state": OPTIMIZER_IN_FOLDER}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        extra = {**checkpoint, **self._extra}
        folder = checkpoint_folder(filepath)
        finite, step = self._finite, int(checkpoint.get("global_step", 0))
        if finite is not None:
            finite.check_weights(f"checkpoint {folder}", step, self.optimizers[0])
        self.engine.save(folder, self.optimizers[0], extra, background=self._background)
        if finite is not None:
            self.engine.once_saved(lambda: finite.note_checkpoint(folder))

    def load_checkpoint(self, checkpoint_path: str | Path) -> dict[str, Any]:
        """The trainer's state only; ``setup`` loads the rest."""
        self._resumed = checkpoint_folder(checkpoint_path)
        return self.engine.read_extra(self._resumed)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """``setup`` fills the model."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """``setup`` has filled the optimizer."""

    def remove_checkpoint(self, filepath: str | Path) -> None:
        if self.is_global_zero:
            self.engine.once_saved(lambda: self.checkpoint_io.remove_checkpoint(filepath))

    def on_exception(self, exception: BaseException) -> None:
        """Finish a background checkpoint: an interrupted run will need it."""
        try:
            self.engine.finish_saving()
        except EngineError as error:
            log.error("%s", error)


class _FolderIO(CheckpointIO):
    """The strategy saves and loads through the engine; only removal is left to do here."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        raise RuntimeError("checkpoints are written by the engine")

    def load_checkpoint(self, path: Any, map_location: Any | None = None) -> dict[str, Any]:
        raise RuntimeError("checkpoints are read by the engine")

    def remove_checkpoint(self, path: Any) -> None:
        folder = checkpoint_folder(path)
        if folder.is_dir():
            # Rename first, so that a crash half-way leaves nothing that looks like a checkpoint.
            doomed = folder.with_name(f"{DOOMED_PREFIX}{folder.name}")
            try:
                folder.replace(doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                log.warning("the earlier checkpoint %s could not be removed: %s", folder, explain(error))


class EngineAccelerator(Accelerator):
    """For devices that Lightning does not know: leaves everything about them to the engine, which has set its
    device up; ``trainer.devices`` counts processes."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """Not asked: the strategy brings the engine's device."""
        raise NotImplementedError

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True
