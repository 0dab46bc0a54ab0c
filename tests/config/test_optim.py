"""The tables of optimizers and schedules agree with the classes of torch and NeMo."""

from __future__ import annotations

import inspect

import pytest

from nxdt_align.config import optim, rules
from nxdt_align.config.load import load_config


@pytest.fixture(scope="module")
def classes() -> tuple[dict[str, type], dict[str, type]]:
    from nxdt_align.training.optim import available_optimizers, available_schedulers

    return dict(available_optimizers()), dict(available_schedulers())


def settings_of(cls: type, without: set[str]) -> tuple[set[str], set[str]]:
    """(all, required) keywords of the constructor and of the bases that it passes keywords on to."""
    taken: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        taken = {p.name: p for p in named} | taken
        if len(named) == len(parameters):
            break
    kept = {name: p for name, p in taken.items() if name not in without}
    return set(kept), {name for name, p in kept.items() if p.default is p.empty}


def test_optimizers(classes: tuple[dict[str, type], dict[str, type]]) -> None:
    found = classes[0]
    assert set(optim.OPTIMIZERS) == set(found)
    for name, settings in optim.OPTIMIZERS.items():
        taken, _ = settings_of(found[name], {"params", "lr"})
        # torch 2.9 lacks no setting of the table; a later torch may have more.
        assert set(settings) - taken == set(), name


def test_schedulers(classes: tuple[dict[str, type], dict[str, type]]) -> None:
    found = classes[1]
    assert {*optim.SCHEDULERS, *optim.REFUSED_SCHEDULERS} == set(found)
    for name, settings in optim.SCHEDULERS.items():
        taken, required = settings_of(found[name], {"optimizer", "last_epoch", "scale_fn"})
        assert set(settings) == taken, name
        assert set(optim.REQUIRED_SCHEDULER_SETTINGS.get(name, ())) == required - {"max_steps"}, name
        min_lr = inspect.signature(found[name]).parameters.get("min_lr")
        assert optim.DEFAULT_MIN_LR.get(name, 0.0) == (min_lr.default if min_lr else 0.0), name


def test_tutorials_names_are_known() -> None:
    optimizers = "adamw adamw_fp32OptState sgd adam adadelta adamax adagrad rmsprop rprop novograd adafactor"
    schedules = (
        "LinearAnnealingWithWarmUp CosineAnnealing WarmupPolicy WarmupHoldPolicy SquareAnnealing "
        "NoamAnnealing WarmupAnnealing StepLR ExponentialLR"
    )
    assert set(optimizers.split()) <= set(optim.OPTIMIZERS)
    assert set(schedules.split()) <= set(optim.SCHEDULERS)


def test_an_unknown_name_keeps_its_settings_for_the_error() -> None:
    assert optim.accepted_settings(optim.OPTIMIZERS, "nope", {"lr": 1, "a": 2}) == {"lr": 1, "a": 2}


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (
            ["model.optim.name=adan", "++model.optim.betas=[0.9, 0.99]"],
            "model.optim.betas: must have 3 values for adan, but is [0.9, 0.99]; leave it out",
        ),
        (["++model.optim.betas=[0.9, 0.9, 0.9]"], "model.optim.betas: must have 2 values for adamw"),
        (["model.optim.name=adan", "~model.optim.betas"], None),
        (["model.optim.name=adan", "++model.optim.betas=[0.98, 0.92, 0.99]"], None),
        (["model.optim.name=sgd", "++model.optim.betas=[0.9]"], None),
        (
            ["model.optim.name=adafactor", "~model.optim.betas", "++model.optim.scale_parameter=True"],
            "model.optim.scale_parameter: must be False for adafactor, or left out, but is True; it would",
        ),
        (
            ["model.optim.name=adafactor", "++model.optim.relative_step=True"],
            "model.optim.relative_step: must be False for adafactor, or left out, but is True; it would",
        ),
        (["model.optim.name=adafactor", "++model.optim.relative_step=False"], None),
        (["model.optim.name=my_module.Mine", "++model.optim.anything=1"], None),
        (
            ["model.optim.sched.name=ReduceLROnPlateau"],
            "model.optim.sched.name: must be another schedule, but is 'ReduceLROnPlateau'; it waits",
        ),
        (
            ["model.optim.sched={name: CosineAnnealing, min_lr: low}"],
            "model.optim.sched.min_lr: must be a number, but is 'low'",
        ),
        (
            # It would raise DPO's rate twentyfold.
            ["model.optim.lr=5e-7", "model.optim.sched={name: SquareAnnealing}"],
            "model.optim.sched.min_lr: must not be above model.optim.lr (5e-07), but is 1e-05; that is "
            "SquareAnnealing's default: set a lower one",
        ),
        (
            ["trainer.callbacks=[NoModule]"],
            "trainer.callbacks: must be dotted paths, module.name, but is 'NoModule'",
        ),
        (["trainer.callbacks=[my.Watch, {path: my.Other, settings: {every: 3}}]"], None),
    ],
)
def test_rules(overrides: list[str], fault: str | None) -> None:
    """Nothing of the user's own is imported: ``my_module`` does not exist."""
    config = load_config("hf_llama3_8B_DPO_config", overrides)
    found = [
        str(found) for rule in (rules.optimizer, rules.scheduler, rules.own_parts) for found in rule(config)
    ]
    assert (found == []) if fault is None else found[0].startswith(fault), found
