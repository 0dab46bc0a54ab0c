"""What goes wrong with a checkpoint or with a model's weights, said the same way on every engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from nxdt_align.engines.base import EngineError, WeightSource
from nxdt_align.engines.summary import CheckpointError
from nxdt_align.files import explain

Shape = tuple[int, ...]


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """What can go wrong when the checkpoint ``directory`` is written, as a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write checkpoint {directory}: {explain(error)}. Earlier checkpoints are whole, and "
            "the run can go on from the newest"
        ) from error
    except (TypeError, RuntimeError) as error:
        # A value that is not plain; a rank that is gone.
        said = str(error).partition("\n")[0]
        raise CheckpointError(f"cannot write checkpoint {directory}: {said}") from error


def require_same_tensors(
    directory: Path,
    saved: Mapping[str, tuple[Shape, torch.dtype]],
    model: Mapping[str, tuple[Shape, torch.dtype]],
) -> None:
    """Raises CheckpointError naming every weight of another shape or dtype, missing or surplus."""
    faults = []
    for name in sorted(set(saved) & set(model)):
        (have, stored), (want, dtype) = saved[name], model[name]
        if have != want:
            faults.append(f"{name} has shape {list(have)}, but the model has {list(want)}")
        elif stored != dtype:
            faults.append(f"{name} is {stored}, but the model keeps {dtype}")
    faults += _other_names(set(saved), set(model))
    if faults:
        raise CheckpointError(
            f"checkpoint {directory} does not fit the model ({len(faults)} tensors):\n  "
            + "\n  ".join(faults)
            + "\nThe model and precision.type must be those of the run that wrote it"
        )


def require_same_shapes(source: WeightSource, model: Mapping[str, Shape]) -> None:
    """Raises EngineError naming every weight that is missing, surplus or of another shape. Any dtype fits:
    a source's values are brought to the parameters'."""
    there = set(source.names())
    faults = _other_names(there, set(model))
    for name in sorted(there & set(model)):
        have, want = tuple(source.shape(name)), model[name]
        if have != want:
            faults.append(f"{name} has shape {list(have)}, but the model has {list(want)}")
    if faults:
        shown = "\n  ".join(faults)
        raise EngineError(
            f"{source} does not fit the model ({len(faults)} tensors):\n  {shown}\n"
            "model.model_config, model.num_layers and model.hidden_size must be those of the weights"
        )


def _other_names(there: set[str], wanted: set[str]) -> list[str]:
    faults = [f"missing: {name}" for name in sorted(wanted - there)]
    return faults + [f"not in the model: {name}" for name in sorted(there - wanted)]
