"""What a run checks before it reads a record or a weight; ``nxdt-align config`` asks the same function."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nxdt_align.config.custom import named_parts
from nxdt_align.config.engines import Engine as EngineName
from nxdt_align.config.fields import is_dotted
from nxdt_align.config.schema import Config
from nxdt_align.config.start import hub_models
from nxdt_align.data.tokenize import Tokenization
from nxdt_align.engines.base import WeightSource
from nxdt_align.losses.objective import build_loss
from nxdt_align.models.presets import ModelShape
from nxdt_align.run import assemble, computing
from nxdt_align.run.contracts import RunEnv
from nxdt_align.run.mode import RunMode
from nxdt_align.run.places import Places
from nxdt_align.run.rows import with_possible_layout
from nxdt_align.training import optim
from nxdt_align.weights.hf import FreshWeights

NOT_CHECKED = (
    "the contents of data and weights, what follows from the number of records (steps per epoch, buckets)"
)
"""What only a run finds out."""


@dataclass(frozen=True)
class Ready:
    """What the checks have made, for the run."""

    model: ModelShape
    start: WeightSource
    tokenization: Tokenization


def require_ready(
    config: Config, engine: EngineName, env: RunEnv, mode: RunMode, *, fetches: bool = True
) -> Ready:
    """Raise UserError if this machine cannot run ``config``, as far as that shows without its data, its
    weights' values and the user's own parts: folders, loggers, optimizer, model, device, tokenizer, and what
    the folders of weights hold.

    Args:
        config: settled.
        fetches: the weights of models of the Hub; else no weights are looked into.
    """
    mode.check_places(Places(config))
    mode.check_experiment(config)
    model = assemble.model_config(config)
    assemble.check_router(config, model)
    with _quietly():  # the run itself says what they have to say
        config = with_possible_layout(config, model)
        computing.check_attention(config, model)
        if config.model_alignment_strategy.loss is None:
            build_loss(config.model_alignment_strategy)
        _check_optimizer(config)
        assemble.check_engine(config, engine, env, model, mode)
    start = assemble.start_weights(config, model) if fetches else FreshWeights(model, config.seed)
    reference = config.model_alignment_strategy.reference_model
    if reference is not None and fetches:
        assemble.weights_at(Path(reference), model, "model_alignment_strategy.reference_model")
    return Ready(model, start, assemble.tokenization(config, model))


def not_checked(config: Config) -> str:
    """What ``require_ready`` leaves to the run, in one line."""
    parts = named_parts(config)
    hub = f", the weights of {', '.join(map(str, named))}" if (named := hub_models(config)) else ""
    own = f", your own parts, which only what trains imports ({', '.join(map(str, parts))})" if parts else ""
    return f"not looked into: {NOT_CHECKED}{hub}{own}"


def _check_optimizer(config: Config) -> None:
    """Make optimizer and schedule for one number, as they judge their own settings."""
    settings = config.model.optim
    # On the CPU there is nothing to capture.
    values = {key: value for key, value in settings.settings().items() if key != "capturable"}
    one = [("weight", nn.Parameter(torch.zeros(1)))]
    if is_dotted(settings.name):
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            [parameter for _, parameter in one], lr=settings.lr
        )
    else:
        optimizer = optim.build_optimizer(one, settings.name, values)
    sched, steps = settings.sched, config.trainer.max_steps
    # Without max_steps the length follows from the number of records.
    if sched is not None and (steps > 0 or sched.settings().get("max_steps") not in (None, -1)):
        optim.build_scheduler(optimizer, sched.name, sched.settings(), steps)


@contextmanager
def _quietly() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
