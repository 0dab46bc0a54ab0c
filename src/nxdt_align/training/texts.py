"""Settings, texts and tables in the loggers that show any: TensorBoard, W&B, MLflow."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

from nxdt_align.training.curves import Curves

log = logging.getLogger(__name__)
_MLFLOW_LENGTH = 250
"""Characters of a setting that Lightning hands to MLflow."""


def write_settings(
    loggers: Sequence[Logger], settings: Mapping[str, Any], given: Mapping[str, Any], yaml: str
) -> None:
    """Log a run's settings before its first step. Of rank 0 alone.

    Args:
        settings: all of them, dotted key -> value.
        given: those that are not at their defaults, which TensorBoard gets: its table has a column for each.
        yaml: the resolved YAML, as text for those that show any.
    """
    for logger in loggers:
        if isinstance(logger, Curves):
            logger.write_settings(given)
            logger.write_layout()
        elif isinstance(logger, MLFlowLogger):
            logger.log_hyperparams(_that_mlflow_lacks(logger, settings))
        else:
            logger.log_hyperparams(dict(settings))
    write_text(loggers, "config", f"```yaml\n{yaml}```", 0)


def _that_mlflow_lacks(logger: MLFlowLogger, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run that ``run_id`` names, MLflow refuses another value for a setting that it has."""
    there: Mapping[str, str] = logger.experiment.get_run(logger.run_id).data.params
    of_both = {key: str(value)[:_MLFLOW_LENGTH] for key, value in settings.items() if key in there}
    changed = [f"{key} ({there[key]})" for key, value in of_both.items() if value != there[key]]
    if changed:
        log.warning(
            "MLflow's run %s keeps the values that it began with of settings that have changed: %s; "
            "its config_0.md has this run's",
            logger.run_id,
            ", ".join(changed),
        )
    return {key: value for key, value in settings.items() if key not in there}


def write_text(loggers: Sequence[Logger], name: str, markdown: str, step: int) -> None:
    """Log ``markdown`` under ``name``, as of ``step`` optimizer steps. Of rank 0 alone."""
    for logger in loggers:
        if isinstance(logger, Curves):
            logger.write_text(name, markdown, step)
        elif isinstance(logger, MLFlowLogger) and logger.run_id is not None:
            logger.experiment.log_text(logger.run_id, markdown, f"{name}_{step}.md")


def write_table(
    loggers: Sequence[Logger], name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int
) -> None:
    """Log a table under ``name``: W&B's own, elsewhere as text. Of rank 0 alone."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(key=name, columns=list(columns), data=[list(row) for row in rows], step=step)
    lines = [columns, ["---"] * len(columns), *rows]
    write_text(loggers, name, "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines), step)


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\r", "").replace("\n", "<br>")
