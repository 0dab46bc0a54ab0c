"""Other libraries' names for the settings of an objective, for messages that point to ours.

From TRL 1.16 and earlier, fairseq2, torchtune and the papers; docs/objectives.md has the table.
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
"""Another library's key of an objective -> our key, if the section has it."""

_LOSS_TYPES = {
    "sft": f"{_DPO}.nll_scale adds that term to any loss_type",
    "rso": f"use loss_type hinge with {_DPO}.gamma",
    "slic": "use loss_type hinge",
    "cdpo": f"use loss_type sigmoid with {_DPO}.label_smoothing",
    "dpo": "use loss_type sigmoid",
    "kto_pair": f"{_ALIGN}.kto takes labelled completions",
    **{name: f"use {_ALIGN}.{name} instead of dpo" for name in ("orpo", "cpo", "simpo", "kto")},
}


def loss_type_advice(path: str, value: object) -> str:
    """Our equivalent of another library's loss type; empty for other keys and unknown types."""
    return _LOSS_TYPES.get(str(value).lower(), "") if path == f"{_DPO}.loss_type" else ""
