"""What each objective is trained with on the demo's data: settings at the scale of a 0.7M-parameter Llama.

All start from one warm-up and take as many steps over as many responses as the demo. Where a setting is
not the demo's, ``why`` says what it is instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Reward = Literal["log-ratio", "log p", "log p a token"]
"""What an objective implies that a response is worth, before its scale: log policy - log reference, or the
policy's log-probability, summed over tokens or a mean."""

DEMO_LR = 2.0e-5
LIKELIHOOD_LR = 3.0e-4
"""That of the demo's ORPO."""


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    name: str
    objective: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keys of ``model_alignment_strategy.<objective>``."""
    reward: Reward = "log-ratio"
    lr: float = DEMO_LR
    why: str = ""

    @property
    def scale(self) -> float:
        """Of the reward: hinge's gamma, or beta; 1 for sft, which has none."""
        return float(
            next((self.settings[k] for k in ("gamma", "kl_beta", "beta") if k in self.settings), 1.0)
        )


def _dpo(
    name: str, loss_type: str | list[str], *, why: str = "", lr: float = DEMO_LR, **settings: Any
) -> Entry:
    return Entry(name, "dpo", {"loss_type": loss_type, "kl_beta": 0.5, **settings}, lr=lr, why=why)


ENTRIES = (
    Entry(
        "sft",
        "sft",
        {"packing": True},
        lr=LIKELIHOOD_LR,
        why="the baseline: chosen responses alone",
    ),
    _dpo("dpo", "sigmoid"),
    _dpo("conservative dpo", "sigmoid", label_smoothing=0.1),
    _dpo("robust", "robust", label_smoothing=0.1),
    _dpo("ipo", "ipo"),
    _dpo("hinge", "hinge"),
    _dpo("rso", "hinge", gamma=0.05),
    _dpo("exo_pair", "exo_pair"),
    _dpo("nca_pair", "nca_pair"),
    _dpo("bco_pair", "bco_pair"),
    _dpo("bco_pair, no shift", "bco_pair", bco_reward_shift="none"),
    _dpo("sppo_hard", "sppo_hard"),
    _dpo("aot", "aot"),
    _dpo("aot_unpaired", "aot_unpaired"),
    _dpo("apo_zero", "apo_zero"),
    _dpo("apo_down", "apo_down", why="lowers both, where chosen ones are worse than the model's own"),
    _dpo(
        "discopop",
        "discopop",
        discopop_tau=0.25,
        why="at its tau of 0.05 the gradient at a margin of 0 lowers the margin: 0.003",
    ),
    _dpo("sigmoid_norm", "sigmoid_norm"),
    _dpo("forward KL", "sigmoid", f_divergence_type="forward_kl"),
    _dpo("Jensen-Shannon", "sigmoid", f_divergence_type="js_divergence"),
    _dpo("alpha divergence", "sigmoid", f_divergence_type="alpha_divergence"),
    _dpo("ipo on sums", "ipo", length_normalization=False),
    _dpo("LD-DPO", "sigmoid", ld_alpha=0.5),
    _dpo("WPO", "sigmoid", use_weighting=True),
    _dpo("dpo + nll", "sigmoid", nll_scale=1.0),
    _dpo("MPO", ["sigmoid", "bco_pair"], loss_weights=[0.8, 0.2], nll_scale=1.0),
    Entry("dpo without reference", "dpo", {"kl_beta": 0.5, "reference_free": True}, reward="log p"),
    Entry("orpo", "orpo", {"beta": 0.1}, reward="log p a token", lr=LIKELIHOOD_LR, why="the demo's"),
    Entry("cpo", "cpo", {"beta": 0.1}, reward="log p", lr=LIKELIHOOD_LR, why="a likelihood term, as orpo"),
    Entry(
        "orpo, prompt too",
        "orpo",
        {"beta": 0.1, "nll_tokens": "prompt_and_response"},
        reward="log p a token",
        lr=LIKELIHOOD_LR,
        why="as orpo",
    ),
    Entry("simpo", "simpo", {"beta": 2.0, "gamma": 1.0}, reward="log p a token"),
    Entry("simpo + nll", "simpo", {"beta": 2.0, "gamma": 1.0, "nll_scale": 1.0}, reward="log p a token"),
    Entry("kto", "kto", {"beta": 0.5}),
    Entry("kto, weighted", "kto", {"beta": 0.5, "desirable_weight": 1.33}),
)
