"""What other libraries call the settings of an objective, so that a message can say what they are here.

From TRL 1.16 (and names that it had before), fairseq2, torchtune and the papers; docs/objectives.md has the
table.
"""

from __future__ import annotations

_ALIGN = "model_alignment_strategy"
_DPO = f"{_ALIGN}.dpo"

OTHER_NAMES = {
    "beta": "kl_beta",
    "kl_beta": "beta",
    "tau": "kl_beta",
    "rpo_alpha": "nll_scale",
    "cpo_alpha": "nll_scale",
    "simpo_gamma": "gamma",
    "orpo_lambda": "beta",
    "average_log_prob": "length_normalization",
}
"""Key of an objective elsewhere -> the key here, where the section has it."""

_LOSS_TYPES = {
    "sft": f"{_DPO}.nll_scale adds that term to any loss_type",
    "rso": f"loss_type hinge is it, with {_DPO}.gamma",
    "slic": "loss_type hinge is it",
    "cdpo": f"loss_type sigmoid is it, with {_DPO}.label_smoothing",
    "dpo": "loss_type sigmoid is it",
    "kto_pair": f"{_ALIGN}.kto takes labelled completions",
    **{name: f"{_ALIGN}.{name} instead of dpo is it" for name in ("orpo", "cpo", "simpo", "kto")},
}


def loss_type_advice(path: str, value: object) -> str:
    """What a loss type of elsewhere is here; nothing for another key, or one that is not known."""
    return _LOSS_TYPES.get(str(value).lower(), "") if path == f"{_DPO}.loss_type" else ""
