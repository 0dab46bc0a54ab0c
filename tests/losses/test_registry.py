from __future__ import annotations

from typing import Any, get_args

import pytest

from nxdt_align.config.alignment import Objective
from nxdt_align.losses.preference import DPOLoss
from nxdt_align.losses.reference_free import CPOLoss, ORPOLoss, SimPOLoss
from nxdt_align.losses.registry import OBJECTIVES, build_loss
from nxdt_align.losses.supervised import SFTLoss
from nxdt_align.losses.types import Loss


@pytest.mark.parametrize(
    ("objective", "settings", "expected"),
    [
        ("dpo", {"kl_beta": 0.01, "loss_type": "sigmoid"}, DPOLoss(0.01)),
        ("dpo", {"kl_beta": 0.3, "label_smoothing": 0.1}, DPOLoss(0.3, 0.1)),
        ("dpo", {"kl_beta": 0.3, "label_smoothing": None}, DPOLoss(0.3)),
        ("dpo", {"kl_beta": 0.3, "loss_type": ["ipo", "aot"]}, DPOLoss(0.3, loss_types=("ipo", "aot"))),
        ("cpo", {}, CPOLoss(0.1, 1.0, 0.0)),
        ("simpo", {"gamma": 1.0}, SimPOLoss(2.0, 1.0, 0.0, 0.0)),
        ("orpo", {"beta": 0.1}, ORPOLoss(0.1)),
        ("sft", {}, SFTLoss()),
    ],
)
def test_losses_are_built_from_the_yaml_names(
    objective: str, settings: dict[str, Any], expected: Loss
) -> None:
    loss = build_loss(objective, settings)
    assert loss == expected
    assert isinstance(loss, Loss)


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        ("ppo", {}, r"objective must be one of dpo, orpo, cpo, simpo, kto, sft, but is 'ppo'"),
        (
            "dpo",
            {"kl_beta": 0.1, "loss_type": "sigmoyd"},
            r"loss_type must be one of sigmoid.*, but is 'sigmoyd'",
        ),
        ("dpo", {}, r"dpo needs kl_beta: set model_alignment_strategy\.dpo"),
        ("orpo", {"beta": None}, r"orpo needs beta"),
        ("orpo", {"kl_beta": 0.1}, r"orpo takes no kl_beta; its settings are beta, nll_scale"),
        ("sft", {"beta": 0.1}, r"sft takes no beta; its settings are none"),
        ("orpo", {"beta": -1.0}, r"ORPO's beta must be a finite number above 0, but is -1.0"),
    ],
)
def test_wrong_settings_are_named(objective: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_loss(objective, settings)


def test_objectives_are_those_of_the_schema() -> None:
    assert tuple(OBJECTIVES) == get_args(Objective)
