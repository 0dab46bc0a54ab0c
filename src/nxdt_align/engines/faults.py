"""What goes wrong with a checkpoint or with a model's weights, said the same way on every engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from nxdt_align.engines.base import EngineError, WeightSource
from nxdt_align.engines.summary import CheckpointError
from nxdt_align.files import explain
from nxdt_align.named_tensors import Spec, require_fit

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


def require_same_tensors(directory: Path, saved: Mapping[str, Spec], model: Mapping[str, Spec]) -> None:
    """Raises CheckpointError naming every tensor of another shape or dtype, missing or surplus."""
    require_fit(
        f"checkpoint {directory}",
        saved,
        model,
        error=CheckpointError,
        hint="The model and precision.type must be those of the run that wrote it",
    )


def require_same_shapes(source: WeightSource, model: Mapping[str, Shape]) -> None:
    """Raises EngineError naming every weight that is missing, surplus or of another shape. Any dtype fits:
    a source's values are cast to the parameters'."""
    require_fit(
        source,
        {name: (tuple(source.shape(name)), None) for name in source.names()},
        {name: (shape, None) for name, shape in model.items()},
        error=EngineError,
        hint="model.model_config, model.num_layers and model.hidden_size must be those of the weights",
    )
