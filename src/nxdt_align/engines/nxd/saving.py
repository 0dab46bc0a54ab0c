"""Writing and reading checkpoints through nxd.save_checkpoint and nxd.load_checkpoint."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import neuronx_distributed as nxd
import torch
from torch import Tensor, nn

from nxdt_align.engines.nxd import checkpoint
from nxdt_align.engines.nxd.checkpoint import MODEL, OPTIMIZER, CheckpointError
from nxdt_align.engines.nxd.compat import only_plain_values
from nxdt_align.engines.nxd.mesh import Mesh
from nxdt_align.engines.nxd.settings import SaveOptions
from nxdt_align.engines.plain import to_plain
from nxdt_align.files import atomic_folder, explain

log = logging.getLogger(__name__)
MASTERS = "master_weights"
"""Key of the optimizer's file: the weights that the optimizer works on, where the model's file has them
in a lower precision."""
NamedParameters = Sequence[tuple[str, nn.Parameter]]


class Checkpoints:
    """Writes and reads one rank's part of a checkpoint. All ranks make the same calls."""

    def __init__(self, mesh: Mesh, options: SaveOptions, stage_ends: Sequence[int]) -> None:
        self._parallel, self._groups, self._platform = mesh.parallel, mesh.groups, mesh.platform
        self._options, self._stage_ends = options, list(stage_ends)
        self._xser = options.xser and mesh.platform.place != "cpu"
        if options.xser and not self._xser:
            log.info(
                "exp_manager.save_xser: not in CPU mode, where xser files cannot be read back: plain files"
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
    ) -> None:
        """Write a checkpoint at ``directory``; whatever was there stays until the new one is whole.

        Raises CheckpointError on every rank where any cannot write.
        """
        is_writer = torch.distributed.get_rank() == 0
        with ExitStack() as stack:

            def begin() -> tuple[Path, Any]:
                folder = stack.enter_context(atomic_folder(directory)) if is_writer else directory
                for part in (MODEL, *([OPTIMIZER] if optimizer is not None else [])):
                    # Before any rank writes: in CPU mode NxD's ranks do not wait for each other.
                    (folder / part).mkdir() if is_writer else None
                return folder, to_plain(extra)

            folder, plain = self._together(directory, begin)
            folder = Path(self._groups.broadcast_object(str(folder)))
            self._together(directory, lambda: self._write(folder, parameters, optimizer, plain))

            def end() -> None:
                if is_writer:
                    step = int(extra.get("global_step", 0))
                    checkpoint.write_summary(folder, step, self._sizes, optimizer is not None)
                    stack.close()

            self._together(directory, end)

    def _write(
        self,
        folder: Path,
        parameters: NamedParameters,
        optimizer: torch.optim.Optimizer | None,
        extra: dict[str, Any],
    ) -> None:
        model: dict[str, Tensor] = {name: p.detach() for name, p in parameters}
        state = None
        if optimizer is not None:
            state = optimizer.state_dict()
            low = self._options.low_precision
            if low is not None and any(t.dtype != low for t in model.values()):
                state = {**state, MASTERS: model}
                model = {name: tensor.to(low) for name, tensor in model.items()}
        nxd.save_checkpoint(
            str(folder),
            tag=".",
            model=model,
            optimizer=state,
            zero1_optimizer=self._parallel.zero1,
            user_content=extra,
            use_xser=self._xser,
        )

    def load(
        self, directory: Path, parameters: NamedParameters, optimizer: torch.optim.Optimizer | None
    ) -> dict[str, Any]:
        """Fill the parameters, and the optimizer where one is given, bit for bit; returns ``extra``.

        Raises CheckpointError: not a checkpoint, incomplete, damaged, of ranks of other sizes, or of
        another model.
        """
        model, state, extra = self._together(
            directory, lambda: self._read(directory, parameters, wants_optimizer=optimizer is not None)
        )
        for name, parameter in parameters:
            parameter.detach().copy_(model[name])
        if optimizer is not None:
            optimizer.load_state_dict(state)
        return dict(extra)

    def _read(
        self, directory: Path, parameters: NamedParameters, *, wants_optimizer: bool
    ) -> tuple[dict[str, Tensor], dict[str, Any] | None, dict[str, Any]]:
        """What the parameters are filled with, the optimizer's state, and ``extra``."""
        summary = checkpoint.require_whole(directory)
        checkpoint.require_sizes(directory, summary, self._sizes)
        self._check_form(directory)
        if wants_optimizer and not summary["has_optimizer"]:
            raise CheckpointError(
                f"checkpoint {directory} holds no optimizer state; set model.weight_init_only: True to "
                "start a new run from its weights"
            )
        model: dict[str, Tensor] = {}
        state: dict[str, Any] | None = {} if summary["has_optimizer"] else None
        try:
            with only_plain_values():
                extra = nxd.load_checkpoint(
                    str(directory), tag=".", model=model, optimizer=state, strict=False
                )
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            raise checkpoint.damaged(directory, reason or type(error).__name__) from error
        masters = None if state is None else state.pop(MASTERS, None)
        filling = masters if masters is not None else model
        _check_fit(directory, parameters, filling)
        return filling, state, extra

    def _check_form(self, directory: Path) -> None:
        is_xser = any((directory / MODEL).glob("*.tensors"))
        if is_xser and self._platform.place == "cpu" and self._groups.data.size > 1:
            raise CheckpointError(
                f"checkpoint {directory} has a file for each tensor (save_xser), which neuronx-distributed "
                "reads wrongly in CPU mode with data parallel ranks; read it on Neuron devices, in one "
                "data-parallel rank, or convert it with nxdt-align convert"
            )

    def _together(self, directory: Path, act: Callable[[], Any]) -> Any:
        """Do a part of a save or a load; if any rank fails, all raise."""
        result, fault = None, None
        try:
            result = act()
        except OSError as error:
            fault = (
                f"cannot write checkpoint {directory}: {explain(error)}. Earlier checkpoints are whole, and "
                "the run can go on from the newest"
            )
        except TypeError as error:
            fault = f"cannot write checkpoint {directory}: {error}"
        except CheckpointError as error:
            fault = str(error)
        faults = [found for found in self._groups.gather_objects(fault) if found is not None]
        if faults:
            raise CheckpointError(faults[0])
        return result


def _check_fit(directory: Path, parameters: NamedParameters, tensors: Mapping[str, Tensor]) -> None:
    """Report all weights of another shape, dtype or name at once."""
    wanted, faults = dict(parameters), []
    for name in sorted(set(tensors) & set(wanted)):
        have, want = tensors[name], wanted[name]
        if have.shape != want.shape:
            faults.append(f"{name} has shape {list(have.shape)}, but the model has {list(want.shape)}")
        elif have.dtype != want.dtype:
            faults.append(f"{name} is {have.dtype}, but the model keeps {want.dtype}")
    faults += [f"missing: {name}" for name in sorted(set(wanted) - set(tensors))]
    faults += [f"not in the model: {name}" for name in sorted(set(tensors) - set(wanted))]
    if faults:
        raise CheckpointError(
            f"checkpoint {directory} does not fit the model ({len(faults)} tensors):\n  "
            + "\n  ".join(faults)
            + "\nThe model and precision.type must be those of the run that wrote it"
        )
