"""Rules and notices on model_alignment_strategy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from config_checks import check

from nxdt_align.config.schema import Config

Load = Callable[..., Config]
Reject = Callable[..., str]
ALIGN = "model_alignment_strategy"
DPO = f"{ALIGN}.dpo"


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["reference_free=True", "loss_type=nca_pair"], "must be False with loss_type nca_pair"),
        (["reference_free=True", "f_divergence_type=forward_kl"], "a divergence from a reference"),
        (
            ["f_divergence_type=js_divergence", "loss_type=apo_zero"],
            "must be reverse_kl with loss_type apo",
        ),
        (["use_weighting=True", "loss_type=[sigmoid,aot]"], "must be False with loss_type aot, which sorts"),
        (["loss_type=exo_pair", "label_smoothing=0"], "must be above 0 with loss_type exo_pair"),
        (
            ["loss_type=sigmoid_norm", "length_normalization=False"],
            "must not be False with loss_type",
        ),
        (
            ["loss_type=[sigmoid,ipo]", "loss_weights=[1.0]"],
            f"{DPO}.loss_weights: must have one weight for each loss_type (2: sigmoid, ipo), but is [1.0]",
        ),
        (["loss_weights=[-1.0]"], "loss_weights: must be at least 0, and not all 0, but is [-1.0]"),
        (["loss_type=[]"], "loss_type: must name at least one loss, but is []"),
        (["label_smoothing=0.5"], "label_smoothing: must be below 0.5, but is 0.5"),
        (["label_smoothing=-0.1"], "label_smoothing: must be at least 0, but is -0.1"),
        (["kl_beta=0"], "kl_beta: must be above 0, but is 0.0"),
        (["gamma=0"], "gamma: must be above 0"),
        (["ld_alpha=1.5"], "ld_alpha: must be at most 1, but is 1.5"),
        (["nll_scale=-1"], "nll_scale: must be at least 0, but is -1.0"),
        (["loss_type=[sigmoid,ippo]"], "loss_type: must be one of sigmoid, robust"),
        (["loss_type=[sigmoid,ippo]"], "but is ['sigmoid', 'ippo']; did you mean ipo?"),
        (["loss_type=[sigmoid,bco_pair,sft]"], f"'sft']; {DPO}.nll_scale adds that term to any loss_type"),
        (["loss_type=rso"], f"but is 'rso'; use loss_type hinge with {DPO}.gamma"),
        (["loss_type=simpo"], f"but is 'simpo'; use {ALIGN}.simpo instead of dpo"),
        (["beta=0.1"], f"{DPO}.beta: is not a known key; did you mean {DPO}.kl_beta?"),
        (["rpo_alpha=1"], f"did you mean {DPO}.nll_scale?"),
        (["kl_beta=inf"], f"{DPO}.kl_beta: must be a finite number, but is inf"),
        (["loss_weights=[nan]"], f"{DPO}.loss_weights: must be a finite number, but is [nan]"),
        (["f_alpha_divergence_coef=nan"], "f_alpha_divergence_coef: must be a finite number, but is nan"),
    ],
)
def test_settings_of_dpo_that_break_a_rule(reject: Reject, overrides: list[str], rule: str) -> None:
    assert rule in reject(*(f"{DPO}.{override}" for override in overrides))


@pytest.mark.parametrize(
    ("objective", "override", "rule"),
    [
        ("cpo", "beta=0", "cpo.beta: must be above 0, but is 0.0"),
        ("simpo", "beta=-1", "simpo.beta: must be above 0, but is -1.0"),
        ("simpo", "gamma=-1", "simpo.gamma: must be at least 0, but is -1.0"),
        ("simpo", "label_smoothing=0.7", "simpo.label_smoothing: must be below 0.5, but is 0.7"),
        ("orpo", "nll_scale=-1", "orpo.nll_scale: must be at least 0, but is -1.0"),
        ("kto", "beta=0", "kto.beta: must be above 0, but is 0.0"),
        ("simpo", "simpo_gamma=1", f"did you mean {ALIGN}.simpo.gamma?"),
        ("cpo", "cpo_alpha=1", f"did you mean {ALIGN}.cpo.nll_scale?"),
        ("kto", "kl_beta=1", f"did you mean {ALIGN}.kto.beta?"),
        ("kto", "undesirable_weight=-1", "kto.undesirable_weight: must be at least 0, but is -1.0"),
        ("cpo", "max_prompt_length=4096", "must be below data.seq_length (4096)"),
    ],
)
def test_settings_of_others_that_break_a_rule(
    reject: Reject, objective: str, override: str, rule: str
) -> None:
    assert rule in reject(f"~{DPO}", f"{ALIGN}.{objective}.{override}")


def test_kto_with_no_weight_at_all(reject: Reject) -> None:
    weights = (f"{ALIGN}.kto.desirable_weight=0", f"{ALIGN}.kto.undesirable_weight=0")
    assert "nothing would be trained" in reject(f"~{DPO}", *weights)


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["loss=myloss"], "loss: must be a dotted path, module.name, but is 'myloss'"),
        (["loss=my module.Loss"], "must be a dotted path"),
        (["loss_settings={beta: 1.0}"], f"must not be set without {ALIGN}.loss"),
    ],
)
def test_a_path_that_is_none(reject: Reject, overrides: list[str], rule: str) -> None:
    assert rule in reject(*(f"{ALIGN}.{override}" for override in overrides))


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([f"{DPO}.gamma=0.5"], f"{DPO}.gamma: no effect with loss_type sigmoid"),
        (
            [f"{DPO}.label_smoothing=0.1", f"{DPO}.loss_type=ipo"],
            "smoothing: no effect with loss_type ipo",
        ),
        (
            [f"{DPO}.f_alpha_divergence_coef=0.3"],
            "loss_type sigmoid and f_divergence_type reverse_kl",
        ),
        ([f"{ALIGN}.loss=a.b", f"{DPO}.kl_beta=0.3"], f"{DPO}.kl_beta: no effect, since {ALIGN}.loss (a.b)"),
    ],
)
def test_settings_without_effect_are_noticed(
    load: Load, good: str, overrides: list[str], wanted: str
) -> None:
    (notice,) = check(load(good, *overrides), world_size=1)
    assert wanted in notice


def test_a_reference_model_that_is_left_out_is_noticed(load: Load, good: str, tmp_path: object) -> None:
    weights = f"{tmp_path}/files/weights"
    overrides = (f"{ALIGN}.reference_model={weights}", f"{DPO}.reference_free=True")
    (notice,) = check(load(good, *overrides), world_size=1)
    assert "reference_model has no effect: dpo.reference_free leaves the reference out" in notice


def test_one_loss_type_and_a_list_are_read(load: Load, good: str) -> None:
    one = load(good, f"{DPO}.loss_type=hinge").model_alignment_strategy.dpo
    several = load(good, f"{DPO}.loss_type=[sigmoid,bco_pair]", f"{DPO}.loss_weights=[0.8,0.2]")
    assert one is not None and one.loss_types == ("hinge",)
    dpo = several.model_alignment_strategy.dpo
    assert dpo is not None and dpo.loss_types == ("sigmoid", "bco_pair") and dpo.loss_weights == (0.8, 0.2)
