"""Values as YAML users write them, and those that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nxdt_align.config.convert import Walk, build_section
from nxdt_align.config.faults import ConfigError
from nxdt_align.config.rules import lookup
from nxdt_align.config.schema import Config

Load = Callable[..., Config]


def value_of(path: str, value: Any) -> Any:
    """The key at ``path`` of a configuration that has only this."""
    nested = value
    for name in reversed(path.split(".")):
        nested = {name: nested}
    walk = Walk()
    config = build_section(Config, nested, "", walk)
    if walk.faults:
        raise ConfigError(walk.faults)
    return lookup(config, path)


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        ("model.optim.lr", "3e-4", 3e-4),
        ("model.optim.lr", 1, 1.0),
        ("seed", "12", 12),
        ("trainer.max_steps", 5e3, 5000),
        ("trainer.limit_val_batches", 1, 1),
        ("trainer.limit_val_batches", 1.0, 1.0),
        ("trainer.limit_val_batches", "0.5", 0.5),
        ("precision.xla_use_bf16", "0", "0"),
        ("precision.xla_use_bf16", 1, "1"),
        ("exp_manager.ckpt_ptl_version", 1.8, "1.8"),
        ("exp_manager.save_xser", "False", False),
        ("distributed_strategy.zero1", 1, True),
        ("data.packing", True, "packed"),
        ("data.packing", False, "none"),
        ("data.packing", "shared_prompt", "shared_prompt"),
        ("data.packing", None, None),
        ("data.buckets", [64, 128], (64, 128)),
        ("trainer.check_val_every_n_epoch", None, None),
        ("distributed_strategy.virtual_pipeline_model_parallel_size", None, 1),
        ("model_alignment_strategy.sft", None, None),
        ("exp_manager.checkpoint_callback_params.train_time_interval", {"minutes": 5}, {"minutes": 5}),
    ],
)
def test_a_value_is_taken_as_it_is_meant(path: str, value: Any, wanted: Any) -> None:
    got = value_of(path, value)
    assert got == wanted
    assert type(got) is type(wanted)


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("seed", True, "must be an integer, but is True"),
        ("seed", 1.5, "must be an integer, but is 1.5"),
        ("seed", [1], r"must be an integer, but is \[1\]"),
        ("model.optim.lr", "fast", "must be a number, but is 'fast'"),
        ("model.optim.lr", False, "must be a number"),
        ("distributed_strategy.zero1", 2, "must be True or False, but is 2"),
        ("name", True, "must be text, but is True"),
        (
            "data.packing",
            "pack",
            "must be one of none, packed, shared_prompt, but is 'pack'; did you mean packed",
        ),
        ("data.buckets", 64, "must be a list of integer, but is 64"),
        ("data.buckets", ["a"], "must be a list of integer"),
        ("data.columns", ["prompt"], "must be a mapping"),
        ("data.train_dir", [{"pth": "a"}], r"data.train_dir.0.pth: is not a known key"),
        ("data.train_dir", 1.5, None),
        ("trainer", 5, "trainer: must be a section of keys, but is 5"),
        ("trainer.precision", 16, "here it is precision.type"),
    ],
)
def test_a_value_of_another_type_is_refused(path: str, value: Any, rule: str | None) -> None:
    if rule is None:
        assert value_of(path, value) == str(value)  # a number is taken for a text
        return
    with pytest.raises(ConfigError, match=rule):
        value_of(path, value)


def test_a_key_that_is_no_text_is_named(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.True: is not a known key"):
        load("trainer: {on: 1}")


def test_an_empty_section_has_its_defaults(load: Load) -> None:
    config = load("trainer:\nmodel: {fusions: }\nmodel_alignment_strategy: {dpo: {}}")
    assert config.trainer == Config().trainer
    assert config.model.fusions == Config().model.fusions
    assert config.model_alignment_strategy.objective == "dpo"


def test_settings_of_optimizer_and_schedule_are_kept(load: Load) -> None:
    text = "model: {optim: {name: adamw, lr: 1.0, betas: [0.9, 0.95], sched: {name: StepLR, step_size: 3}}}"
    optim = load(text).model.optim
    assert optim.settings() == {"lr": 1.0, "betas": [0.9, 0.95]}
    assert optim.sched is not None and optim.sched.params == {"step_size": 3}
