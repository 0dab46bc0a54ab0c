"""An objective's loss is made with its section of the schema, which states each setting once."""

from __future__ import annotations

import dataclasses
from typing import get_type_hints

import pytest

from nxdt_align.config.alignment import OBJECTIVES, ModelAlignmentStrategyConfig
from nxdt_align.config.keys import section_type
from nxdt_align.losses import CPOLoss, DPOLoss, KTOLoss, ORPOLoss, SFTLoss, SimPOLoss, build_loss
from nxdt_align.losses.types import Loss

SECTIONS = {
    name: section_type(hint)
    for name, hint in get_type_hints(ModelAlignmentStrategyConfig).items()
    if name in OBJECTIVES
}
LOSSES = {
    "dpo": DPOLoss,
    "orpo": ORPOLoss,
    "cpo": CPOLoss,
    "simpo": SimPOLoss,
    "kto": KTOLoss,
    "sft": SFTLoss,
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_is_made_with_its_section(name: str) -> None:
    section = SECTIONS[name]
    assert section is not None
    settings = section()
    loss = build_loss(ModelAlignmentStrategyConfig(**{name: settings}))
    assert type(loss) is LOSSES[name] and isinstance(loss, Loss)
    assert loss.config is settings  # type: ignore[attr-defined]
    assert loss == LOSSES[name]()


def test_every_objective_has_a_loss() -> None:
    assert OBJECTIVES.keys() == LOSSES.keys()


def test_a_section_that_means_nothing_is_named_with_all_its_faults() -> None:
    strategy = ModelAlignmentStrategyConfig(orpo=SECTIONS["orpo"]())  # type: ignore[misc]
    broken = dataclasses.replace(strategy.active, beta=-1.0, nll_tokens="all")
    with pytest.raises(
        ValueError, match=r"2 faults:\n.*orpo.nll_tokens: must be one of response, .*\n.*orpo.beta"
    ):
        build_loss(dataclasses.replace(strategy, orpo=broken))
