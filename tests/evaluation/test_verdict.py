"""Each rule of the verdict on curves that show its fault and that do not, and the keys that it names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nxdt_align.config.keys import all_keys
from nxdt_align.evaluation.curves import Curve, Curves
from nxdt_align.evaluation.settings import flat
from nxdt_align.evaluation.verdict import RULES, judge

DPO = flat(
    {
        "model_alignment_strategy": {
            "dpo": {
                "kl_beta": 0.1,
                "nll_scale": 0.0,
                "ld_alpha": None,
                "label_smoothing": None,
                "loss_type": "sigmoid",
                "length_normalization": None,
                "reference_free": False,
            },
            "orpo": None,
            "reference_model": None,
        },
        "model": {"optim": {"lr": 5e-6, "sched": {"warmup_steps": 2}}},
        "trainer": {"max_steps": 40},
        "data": {"train_dir": "pairs.jsonl"},
        "exp_manager": {
            "resume_from_checkpoint": "m",
            "checkpoint_callback_params": {"monitor": "step"},
        },
    }
)
STEPS = range(1, 41)


def line(begin: float, end: float, steps: Sequence[int] = STEPS) -> Curve:
    count = len(steps)
    return Curve(tuple(steps), tuple(begin + (end - begin) * i / (count - 1) for i in range(count)))


VAL = (10, 20, 30, 40)


def healthy(**others: Curve) -> Curves:
    """A good run; ``others`` replaces curves, with __ for /."""
    curves = {
        "reduced_train_loss": line(math.log(2), 0.3),
        "rewards/accuracies": line(0.5, 0.9),
        "rewards/margins": line(0.0, 1.5),
        "rewards/chosen": line(0.0, 0.5),
        "rewards/rejected": line(0.0, -1.0),
        "logps/chosen_per_token": line(-2.0, -1.95),
        "logps/rejected_per_token": line(-2.0, -2.2),
        "rewards/accuracies_chosen_longer": line(0.5, 0.92),
        "rewards/accuracies_rejected_longer": line(0.5, 0.86),
        "gradient_norm": line(3.0, 2.0),
        "val_loss": line(0.65, 0.35, VAL),
        "val_rewards/accuracies": line(0.6, 0.88, VAL),
        "val_rewards/margins": line(0.2, 1.3, VAL),
    }
    curves |= {name.replace("__", "/"): curve for name, curve in others.items()}
    return Curves({name: curve for name, curve in curves.items() if curve})


NO_VALIDATION = {name: Curve() for name in ("val_loss", "val_rewards__accuracies", "val_rewards__margins")}
STILL = {
    "reduced_train_loss": line(0.6931, 0.6925),
    "rewards__accuracies": line(0.5, 0.55),
    "rewards__margins": line(0.0, 0.002),
    "rewards__chosen": line(0.0, 0.001),
    "rewards__rejected": line(0.0, -0.001),
    "val_loss": line(0.693, 0.6928, VAL),
    "val_rewards__accuracies": line(0.5, 0.53, VAL),
}
SHOW: list[tuple[str, dict[str, Curve]]] = [
    ("likelihood displacement", {"logps__chosen_per_token": line(-2.0, -2.4)}),
    ("likelihood displacement", {"logps__chosen_per_token": line(-2.0, -2.4), **NO_VALIDATION}),
    (
        "length exploitation",
        {
            "rewards__accuracies_chosen_longer": line(0.5, 0.98),
            "rewards__accuracies_rejected_longer": line(0.5, 0.3),
        },
    ),
    (
        "length exploitation",
        {
            "val_rewards__accuracies_chosen_longer": line(0.5, 0.2, VAL),
            "val_rewards__accuracies_rejected_longer": line(0.5, 0.95, VAL),
        },
    ),
    (
        "overfitting",
        {
            "rewards__accuracies": line(0.9, 1.0),
            "val_loss": Curve(VAL, (0.60, 0.52, 0.61, 0.80)),
            "val_rewards__accuracies": Curve(VAL, (0.7, 0.74, 0.72, 0.70)),
        },
    ),
    ("reference is not the start", {"rewards__chosen": line(-0.8, 0.5), "rewards__rejected": line(-0.7, -1)}),
    ("learning rate too high", {"reduced_train_loss": line(0.69, 2.1)}),
    ("learning rate too high", {"logps__chosen_per_token": line(-2.0, -6.0)}),
    # Seen of a model of 135M parameters at 1e-5, whose answers got short and wrong.
    ("learning rate too high", {"logps__rejected_per_token": line(-0.4, -5.0)}),
    ("learning rate too high", {"gradient_norm": Curve(tuple(STEPS), (2.0,) * 25 + (90.0,) * 15)}),
    ("nothing learnt", STILL),
    # Seen at a learning rate of 1e-9: margins of 1e-5 nats have a sign, too.
    (
        "nothing learnt",
        {**STILL, "rewards__accuracies": line(0.5, 0.97), "rewards__margins": line(1e-7, 3e-5)},
    ),
    (
        "data noise",
        {
            "rewards__accuracies": line(0.5, 0.6),
            "rewards__rejected": line(0.0, 0.4),
            "val_rewards__accuracies": line(0.5, 0.52, VAL),
            "val_loss": line(0.69, 0.68, VAL),
        },
    ),
    # Seen where half of the labels were flipped: rewards part either way, and their means stay.
    (
        "data noise",
        {
            "reduced_train_loss": line(0.693, 0.66),
            "rewards__accuracies": line(0.5, 0.6),
            "rewards__chosen": line(0.0, 0.05),
            "rewards__rejected": line(0.0, -0.05),
            "rewards__margins": line(0.0, 0.1),
            "val_rewards__accuracies": line(0.5, 0.47, VAL),
            "val_loss": line(0.70, 0.74, VAL),
        },
    ),
]
SHOW_NOT: list[tuple[str, dict[str, Curve]]] = [
    ("a good run", {}),
    ("without validation", NO_VALIDATION),
    ("chosen falls a little", {"logps__chosen_per_token": line(-2.0, -2.1)}),
    ("rejected falls", {"logps__rejected_per_token": line(-0.4, -2.9)}),
    ("one length is harder", {"rewards__accuracies_rejected_longer": line(0.5, 0.7)}),
    (
        "validation wavers",
        {"rewards__accuracies": line(0.9, 1.0), "val_loss": Curve(VAL, (0.5, 0.4, 0.42, 0.41))},
    ),
    ("validation rises before all is known", {"val_loss": Curve(VAL, (0.6, 0.5, 0.55, 0.6))}),
    ("first logged later", {"rewards__chosen": line(0.4, 0.9, range(10, 41, 10))}),
    ("one spike", {"gradient_norm": Curve(tuple(STEPS), (2.0,) * 20 + (90.0,) + (2.0,) * 19)}),
]


@pytest.mark.parametrize(("rule", "curves"), SHOW)
def test_a_run_that_shows_it(rule: str, curves: dict[str, Curve]) -> None:
    verdict = judge(healthy(**curves), DPO)
    assert [finding.rule for finding in verdict.findings] == [rule]
    (finding,) = verdict.findings
    assert rule in verdict.summary or rule == "nothing learnt"
    assert re.search(r"\d", finding.evidence) and finding.source
    named = set(re.findall(r"[a-z_]+(?:\.[a-z_]+)+(?=:)", finding.change))
    assert named and named <= set(all_keys()) | {"model.optim.sched.warmup_steps"}
    assert verdict.learnt == (finding.weight == "warning")


@pytest.mark.parametrize(("what", "curves"), SHOW_NOT)
def test_a_run_that_does_not(what: str, curves: dict[str, Curve]) -> None:
    verdict = judge(healthy(**curves), DPO)
    assert verdict.findings == () and verdict.learnt
    assert verdict.summary.startswith("It learnt: reward accuracy on ")


def test_every_rule_is_shown() -> None:
    assert len({rule for rule, _ in SHOW}) == len(RULES)


@pytest.mark.parametrize("rule", RULES)
def test_a_run_that_has_hardly_begun_is_not_judged(rule: Callable[[Curves, Any], Any]) -> None:
    """With no settings, too: those of an earlier version say little."""
    begun = {name.replace("/", "__"): line(1, 2, (2, 3)) for name in healthy().by_name}
    for curves in (Curves({}), healthy(**begun)):
        assert rule(curves, {}) is None and rule(curves, DPO) is None


def test_what_is_said_before_there_is_enough() -> None:
    assert judge(Curves({}), DPO).summary == "Nothing has been logged yet."
    early = judge(Curves({"reduced_train_loss": line(0.69, 0.68, (1, 2))}), DPO)
    two = {
        name: Curve(curve.steps[:2], curve.values[:2])
        for name, curve in healthy(**SHOW[2][1]).by_name.items()
    }
    assert judge(Curves({k: v for k, v in two.items() if not k.startswith("val_")}), DPO).findings == ()
    assert early.learnt is None and early.summary == "Too early to say: 2 step(s) so far."


def test_sft_is_judged_by_its_loss() -> None:
    sft = flat({"model_alignment_strategy": {"sft": {"packing": None}}, "model": {"optim": {"lr": 1e-5}}})
    good = judge(Curves({"reduced_train_loss": line(3.0, 1.0)}), sft)
    assert good.summary == "It learnt: loss went from 3.000 to 1.077; no rule found a fault."
    assert [f.rule for f in judge(Curves({"reduced_train_loss": line(3.0, 5.0)}), sft).findings] == [
        "learning rate too high"
    ]


def test_rewards_are_taken_by_ktos_own_beta() -> None:
    """A reward of 0.5 at step 1 is 0.5 nats at beta 1, and 5 at 0.1, which no run has that starts at its
    reference."""
    curves = healthy(rewards__chosen=line(0.5, 0.9))
    found = []
    for beta in (1.0, 0.1):
        kto = {key: value for key, value in DPO.items() if ".dpo." not in key}
        kto |= {"model_alignment_strategy.kto.beta": beta}
        found.append([finding.rule for finding in judge(curves, kto).findings])
    assert found == [[], ["reference is not the start"]]


def test_rules_are_documented(repo: Path) -> None:
    text = (repo / "docs" / "report.md").read_text()
    for rule, curves in SHOW:
        (finding,) = judge(healthy(**curves), DPO).findings
        assert f"| {rule} |" in text
        for link in re.findall(r"https://[^\s;,]+", finding.source):
            assert link.rstrip(".:") in text
