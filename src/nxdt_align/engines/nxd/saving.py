"""Writing and reading checkpoints through nxd.save_checkpoint and nxd.load_checkpoint."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import neuronx_distributed as nxd
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nxdt_align.engines import xla
from nxdt_align.engines.async_save import AsyncSave, AsyncSaver
from nxdt_align.engines.checkpoint_folder import (
    CheckpointError,
    damaged,
    require_same_tensors,
    to_plain,
    writing,
)
from nxdt_align.engines.nxd import checkpoint
from nxdt_align.engines.nxd.checkpoint import DONE, MODEL, OPTIMIZER, SUMMARY
from nxdt_align.engines.nxd.checkpoint_files import Files, apart_from_training, is_xser, read_xser
from nxdt_align.engines.nxd.compat import only_plain_values
from nxdt_align.engines.nxd.mesh import Groups, Mesh
from nxdt_align.engines.nxd.settings import SaveOptions
from nxdt_align.files import atomic_folder

log = logging.getLogger(__name__)
MASTERS = "master_weights"
"""Key of the optimizer's file: the weights that the optimizer works on, where the model's file has them
in a lower precision."""
NamedParameters = Sequence[tuple[str, nn.Parameter]]
T = TypeVar("T")


class Checkpoints(AsyncSaver):
    """Writes and reads one rank's part of a checkpoint, at most one at a time. All ranks make the same
    calls."""

    def __init__(self, mesh: Mesh, options: SaveOptions, stage_ends: Sequence[int]) -> None:
        super().__init__()
        self._parallel, self._groups, self._platform = mesh.parallel, mesh.groups, mesh.platform
        self._options, self._stage_ends = options, list(stage_ends)
        self._xser = options.xser and mesh.platform.place != "cpu"
        self._of_threads: Groups | None = None
        if options.xser and not self._xser:
            log.info(
                "exp_manager.save_xser: not in CPU mode, where neuronx-distributed itself reads such files "
                "wrongly: plain files"
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
        groups = self._groups_of_threads() if background else self._groups
        is_writer = dist.get_rank() == 0
        with ExitStack() as stack:

            def begin() -> tuple[Path, Any]:
                folder = stack.enter_context(atomic_folder(directory)) if is_writer else directory
                for part in (MODEL, *([OPTIMIZER] if optimizer is not None else [])):
                    # Before any rank writes: in CPU mode NxD's ranks do not wait for each other.
                    (folder / part).mkdir() if is_writer else None
                return folder, to_plain(extra)

            own, plain = _write_together(self._groups, directory, begin)
            folder = Path(self._groups.broadcast_object(str(own)))
            files = Files(deferred=background)
            collect = partial(self._collect, files, folder, parameters, optimizer, plain)
            _write_together(self._groups, directory, collect)

            def end() -> None:
                if is_writer:
                    (folder / DONE).write_text("1")
                    said = checkpoint.description(plain, self._sizes, optimizer is not None)
                    SUMMARY.write(folder, said)
                    placing.close()

            placing = stack.pop_all()
            complete = partial(_complete, groups, directory, placing, files.write, end)
            if background:
                self._running = AsyncSave(complete)
            else:
                complete()

    def _groups_of_threads(self) -> Groups:
        """The ranks' groups for a thread that talks while training does; the first call is a collective."""
        if self._of_threads is None:
            host = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
            self._of_threads = replace(self._groups, host=host)
        return self._of_threads

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
        return _together(self._groups, partial(checkpoint.read_extra, directory))

    def load(
        self, directory: Path, parameters: NamedParameters, optimizer: torch.optim.Optimizer | None
    ) -> dict[str, Any]:
        """Fill the parameters, and the optimizer where one is given, bit for bit; returns ``extra``.

        Raises CheckpointError: not a checkpoint, incomplete, damaged, of ranks of other sizes, or of
        another model.
        """
        self.finish()
        read = partial(self._read, directory, parameters, wants_optimizer=optimizer is not None)
        model, state, extra = _together(self._groups, read)
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


def _complete(
    groups: Groups,
    directory: Path,
    placing: ExitStack,
    write: Callable[[], None],
    end: Callable[[], None],
) -> None:
    """Write, and put the folder in its place when all ranks have; else it goes away."""
    with placing:
        _write_together(groups, directory, write)
        _write_together(groups, directory, end)


def _together(groups: Groups, act: Callable[[], T]) -> T:
    """Do a part of a save or a load; if any rank fails, all raise the same."""
    try:
        result = act()
    except CheckpointError as error:
        told = groups.gather_objects(str(error))
        raise CheckpointError(next(found for found in told if found is not None)) from error
    except Exception as error:  # the others are told before it is raised
        groups.gather_objects(str(error) or type(error).__name__)
        raise
    fault = next((found for found in groups.gather_objects(None) if found is not None), None)
    if fault is not None:
        raise CheckpointError(fault)
    return result


def _write_together(groups: Groups, directory: Path, act: Callable[[], T]) -> T:
    def explained() -> T:
        with writing(directory):
            return act()

    with writing(directory):  # a rank that is gone
        return _together(groups, explained)


def _shapes(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors}
