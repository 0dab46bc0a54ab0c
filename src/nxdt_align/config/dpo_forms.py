"""The forms of DPO's loss: one row per value of ``dpo.loss_type``.

A new form is a row here and a function of the same name in ``losses/forms.py``. Imports no torch: the
configuration is checked against this table.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """Which settings a form reads and what it can be combined with."""

    reads: tuple[str, ...] = ()
    """Settings of ``dpo`` that only some forms read."""
    of_difference: bool = True
    """Whether it depends only on the difference of the two scores; only then do other f-divergences and
    ``reference_free`` make sense."""
    normalised: bool = False
    """Whether scores are divided by the response's tokens if ``length_normalization`` is null."""
    sorts: bool = False
    """Whether it depends on how a pair's scores rank within the global batch."""
    smoothing: float = 0.0
    """Default of label_smoothing; a form with a default above 0 is undefined without smoothing."""
    function: str = ""
    """Function in ``losses/forms.py``; empty: the form's name."""


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
