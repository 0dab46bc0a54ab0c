"""Writing and reading checkpoints through nxd.save_checkpoint and nxd.load_checkpoint."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import neuronx_distributed as nxd
import torch
from torch import Tensor, nn

from nxdt_align.engines import xla
from nxdt_align.engines.async_save import AsyncSaver
from nxdt_align.engines.checkpoint_folder import (
    CheckpointError,
    StagedFolder,
    damaged,
    require_same_tensors,
    to_plain,
)
from nxdt_align.engines.nxd import checkpoint
from nxdt_align.engines.nxd.checkpoint import DONE, MODEL, OPTIMIZER, SUMMARY
from nxdt_align.engines.nxd.checkpoint_files import Files, apart_from_training, is_xser, read_xser
from nxdt_align.engines.nxd.compat import only_plain_values
from nxdt_align.engines.nxd.mesh import Mesh
from nxdt_align.engines.nxd.settings import SaveOptions
from nxdt_align.messages import NOTICE

log = logging.getLogger(__name__)
MASTERS = "master_weights"
"""Key of the optimizer's file: the weights that the optimizer works on, where the model's file has them
in a lower precision."""
NamedParameters = Sequence[tuple[str, nn.Parameter]]


class Checkpoints(AsyncSaver):
    """Writes and reads one rank's part of NxD's checkpoints. All ranks make the same calls."""

    def __init__(self, mesh: Mesh, options: SaveOptions, stage_ends: Sequence[int]) -> None:
        super().__init__()
        self._parallel, self._groups, self._platform = mesh.parallel, mesh.groups, mesh.platform
        self._options, self._stage_ends = options, list(stage_ends)
        self._xser = options.xser and mesh.platform.backend != "cpu"
        if options.xser and not self._xser:
            log.log(
                NOTICE,
                "exp_manager.save_xser: not in CPU mode, where neuronx-distributed itself reads such files "
                "wrongly: plain files",
            )

    @property
    def _sizes(self) -> dict[str, Any]:
        sizes = {**asdict(self._parallel), "data": self._groups.data.size, "pipeline_cuts": self._stage_ends}
        return {key: sizes[key] for key in checkpoint.SIZES}

    def save(
        self,
        directory: Path,
        parameters: NamedParameters,
        optimizer: torch.optim.Optimizer | None,
        extra: Mapping[str, Any],
        *,
        background: bool = False,
    ) -> None:
        """Write a checkpoint at ``directory``, once the one before is done; whatever was there stays until
        the new one is whole.

        Args:
            background: return as soon as the values are in this rank's memory on the host. What fails
                after that is raised by the next ``save`` or ``finish``.

        Raises CheckpointError on every rank where any cannot write.
        """
        self.finish()
        files, ranks = Files(deferred=background), self.ranks()
        with ExitStack() as stack:
            subfolders = [MODEL] if optimizer is None else [MODEL, OPTIMIZER]
            folder = stack.enter_context(StagedFolder(directory, ranks, subfolders))
            with folder.step():
                plain = to_plain(extra)
                self._collect(files, folder.path, parameters, optimizer, plain)
            placing = stack.pop_all()

        def finish(path: Path) -> dict[str, Any]:
            (path / DONE).write_text("1")
            return checkpoint.description(plain, self._sizes, optimizer is not None)

        def write() -> None:
            with placing:
                with folder.step():
                    files.write()
                folder.place(SUMMARY, finish, files.written(folder.path))

        self._write(write, background=background)

    def _collect(
        self,
        files: Files,
        folder: Path,
        parameters: NamedParameters,
        optimizer: torch.optim.Optimizer | None,
        extra: dict[str, Any],
    ) -> None:
        """Have NxD write this rank's files, or hand them to ``files`` to be written later."""
        model, state = self._values(parameters, optimizer)
        if files.deferred:
            model, state = apart_from_training(model), apart_from_training(state)
        with files.taken_from_nxd():
            nxd.save_checkpoint(
                str(folder),
                tag=".",
                model=model,
                optimizer=state,
                zero1_optimizer=self._parallel.zero1,
                user_content=extra,
                use_xser=self._xser,
            )

    def _values(
        self, parameters: NamedParameters, optimizer: torch.optim.Optimizer | None
    ) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """What the model's file holds, and the optimizer's."""
        model: dict[str, Tensor] = {name: p.detach() for name, p in parameters}
        if optimizer is None:
            return model, None
        state = optimizer.state_dict()
        low = self._options.low_precision
        if low is not None and any(t.dtype != low for t in model.values()):
            state = {**state, MASTERS: model}
            # On the host: on a lazy device a cast is a graph.
            model = {name: tensor.cpu().to(low) for name, tensor in model.items()}
        return model, state

    def read_extra(self, directory: Path) -> dict[str, Any]:
        """What ``save`` was given as ``extra``. Raises CheckpointError, on every rank."""
        self.finish()
        with self.ranks().together(CheckpointError):
            return checkpoint.read_extra(directory)

    def load(
        self, directory: Path, parameters: NamedParameters, optimizer: torch.optim.Optimizer | None
    ) -> dict[str, Any]:
        """Fill the parameters, and the optimizer where one is given, bit for bit; returns ``extra``.

        Raises CheckpointError: not a checkpoint, incomplete, damaged, of ranks of other sizes, or of
        another model.
        """
        self.finish()
        with self.ranks().together(CheckpointError):
            model, state, extra = self._read(directory, parameters, wants_optimizer=optimizer is not None)
        for name, parameter in parameters:
            with torch.no_grad(), xla.filling({name: parameter}) as filled:
                filled[name].copy_(model[name])
        if optimizer is not None:
            assert state is not None
            optimizer.load_state_dict(state)
        return dict(extra)

    def _read(
        self, directory: Path, parameters: NamedParameters, *, wants_optimizer: bool
    ) -> tuple[dict[str, Tensor], dict[str, Any] | None, dict[str, Any]]:
        """What the parameters are filled with, the optimizer's state, and ``extra``."""
        summary = SUMMARY.require_whole(directory)
        checkpoint.require_sizes(directory, summary, self._sizes)
        if wants_optimizer and not summary["has_optimizer"]:
            raise CheckpointError(
                f"checkpoint {directory} holds no optimizer state; set model.weight_init_only: True to "
                "start a new run from its weights"
            )
        try:
            with only_plain_values():
                model, state, extra = self._read_files(directory, summary["has_optimizer"])
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            raise damaged(directory, reason or type(error).__name__) from error
        masters = None if state is None else state.pop(MASTERS, None)
        filling = masters if masters is not None else model
        require_same_tensors(directory, _shapes(filling.items()), _shapes(parameters))
        return filling, state, extra

    def _read_files(
        self, directory: Path, has_optimizer: bool
    ) -> tuple[dict[str, Tensor], dict[str, Any] | None, dict[str, Any]]:
        model: dict[str, Tensor] = {}
        state: dict[str, Any] | None = {} if has_optimizer else None
        if not is_xser(directory / MODEL):
            extra = nxd.load_checkpoint(str(directory), tag=".", model=model, optimizer=state, strict=False)
            return model, state, extra
        model = read_xser(directory / MODEL / self._shard(0))
        if has_optimizer:
            copy = self._groups.data.rank if self._parallel.zero1 else 0
            state = read_xser(directory / OPTIMIZER / self._shard(copy))
        return model, state, checkpoint.read_extra(directory)

    def _shard(self, copy: int) -> str:
        """The name that NxD gives this rank's files. ``copy``: the data-parallel rank."""
        tensor, stage = self._groups.tensor.rank, self._groups.pipeline.rank
        return f"dp_rank_{copy:02d}_tp_rank_{tensor:02d}_pp_rank_{stage:02d}.pt"


def _shapes(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors}
