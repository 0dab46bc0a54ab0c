"""The forms of DPO's loss: one row per value of ``dpo.loss_type``, which says all that a form needs.

A new form is a row here and a function of its name in ``losses/forms.py``. No torch: the configuration is
checked against this table.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """What a form reads and what may be combined with it."""

    reads: tuple[str, ...] = ()
    """Settings of ``dpo`` that count for this form and not for all."""
    of_difference: bool = True
    """Whether it depends on the difference of the two scores alone: then another f-divergence, and doing
    without a reference, make sense."""
    normalised: bool = False
    """Whether scores are divided by the response's tokens unless ``length_normalization`` says otherwise."""
    sorts: bool = False
    """Whether it depends on the ranks of a pair's scores among all others' of the global batch."""
    smoothing: float = 0.0
    """label_smoothing where it is null; a form with one above 0 cannot do without."""
    function: str = ""
    """Name in ``losses/forms.py``; that of the form where empty."""


SMOOTHING = ("label_smoothing",)

FORMS: dict[str, Form] = {
    "sigmoid": Form(reads=SMOOTHING),
    "robust": Form(reads=SMOOTHING),
    "ipo": Form(normalised=True),
    "hinge": Form(reads=("gamma",)),
    "exo_pair": Form(reads=SMOOTHING, smoothing=1e-3),  # the epsilon that the EXO paper recommends
    "nca_pair": Form(of_difference=False),
    "bco_pair": Form(reads=("bco_reward_shift",), of_difference=False),
    "sppo_hard": Form(of_difference=False),
    "aot": Form(reads=SMOOTHING, of_difference=False, sorts=True),
    "aot_unpaired": Form(reads=SMOOTHING, of_difference=False, sorts=True),
    "apo_zero": Form(of_difference=False),
    "apo_down": Form(of_difference=False),
    "discopop": Form(reads=("discopop_tau",)),
    "sigmoid_norm": Form(reads=SMOOTHING, normalised=True, function="sigmoid"),
}
"""``dpo.loss_type`` -> form."""
