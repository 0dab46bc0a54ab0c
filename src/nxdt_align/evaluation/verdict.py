"""Did it work? Rules over a run's curves: each says in words what it found, on what evidence, and the key to
change. docs/report.md lists them with their sources.

A rule answers None where the run does not show its fault, or has not logged what it would need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from nxdt_align.evaluation.curves import Curve, Curves

Settings = Mapping[str, Any]
"""Dotted key -> value, see ``settings.py``."""
Weight = Literal["fault", "warning"]

CHOSEN, REJECTED = "rewards/chosen", "rewards/rejected"
MARGIN, ACCURACY = "rewards/margins", "rewards/accuracies"
CHOSEN_PER_TOKEN, REJECTED_PER_TOKEN = "logps/chosen_per_token", "logps/rejected_per_token"
CHOSEN_LONGER, REJECTED_LONGER = f"{ACCURACY}_chosen_longer", f"{ACCURACY}_rejected_longer"
LOSS, VAL_LOSS, GRADIENT = "reduced_train_loss", "val_loss", "gradient_norm"
_LEAST_STEPS = 4
"""Points of a curve below which its course says nothing."""


@dataclass(frozen=True)
class Finding:
    """A fault that a run shows."""

    rule: str
    weight: Weight
    says: str
    evidence: str
    """The numbers."""
    change: str
    """The key, and what to do with it."""
    source: str


@dataclass(frozen=True)
class Verdict:
    summary: str
    """One sentence that answers "did it work?"."""
    learnt: bool | None
    """None: the run has logged too little to say."""
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(curves: Curves, settings: Settings) -> Verdict:
    """The verdict on one run, finished or not."""
    objective = objective_of(settings)
    # Few steps show nothing but where they began.
    rules = (reference_apart,) if _is_early(curves) else RULES
    found = [finding for rule in rules if (finding := rule(curves, settings)) is not None]
    names = {finding.rule for finding in found}
    # One cause, one finding: what follows from another fault is not told apart from it.
    follows = {
        "learning rate too high": {"likelihood displacement", "data noise", "nothing learnt"},
        "nothing learnt": {"data noise"},
    }
    hidden = {name for cause, effects in follows.items() if cause in names for name in effects}
    findings = tuple(finding for finding in found if finding.rule not in hidden)
    return Verdict(*_summary(curves, objective, findings), findings)


def objective_of(settings: Settings) -> str:
    """``dpo``, ``orpo``, ...; empty where the settings do not say."""
    prefix = "model_alignment_strategy."
    # A section that is null has no keys below it.
    below = [key.removeprefix(prefix) for key in settings if key.startswith(prefix)]
    sections = {key.partition(".")[0] for key in below if "." in key}
    return next((name for name in ("dpo", "orpo", "cpo", "simpo", "kto", "sft") if name in sections), "")


def _summary(curves: Curves, objective: str, findings: tuple[Finding, ...]) -> tuple[str, bool | None]:
    if curves.last_step == 0:
        return "Nothing has been logged yet.", None
    accuracy = curves[f"val_{ACCURACY}"] or curves[ACCURACY]
    what = "held-out" if curves[f"val_{ACCURACY}"] else "training"
    loss = curves[VAL_LOSS] or curves[LOSS]
    ill = [finding for finding in findings if finding.weight == "fault"]
    if _is_early(curves):
        return f"Too early to say: {curves.last_step} step(s) so far.", None
    if accuracy:
        margin = curves[f"val_{MARGIN}"] or curves[MARGIN]
        said = f"reward accuracy on {what} pairs is {_end(accuracy):.0%}"
        said += f", the margin {_end(margin):+.2f}" if margin else ""
    elif loss:
        said = f"loss went from {loss.values[0]:.3f} to {_end(loss):.3f}"
    else:
        return "Neither a loss nor rewards have been logged.", None
    if any(finding.rule == "nothing learnt" for finding in findings):
        return f"It has learnt nothing: {said}.", False
    if ill:
        return f"It trained, but not as wanted ({', '.join(f.rule for f in ill)}): {said}.", False
    if findings:
        return f"It learnt, with a caveat ({', '.join(f.rule for f in findings)}): {said}.", True
    return f"It learnt: {said}; no rule found a fault.", True


def _is_early(curves: Curves) -> bool:
    return len(curves[LOSS].steps) < _LEAST_STEPS and len(curves[f"val_{ACCURACY}"].steps) < 2


def _end(curve: Curve) -> float:
    """What a curve ends with: a training step's values are of few examples, so the mean of its last tenth."""
    return curve.mean(0.9, 1)


def _key(settings: Settings, name: str) -> str:
    """The objective's own key."""
    return f"model_alignment_strategy.{objective_of(settings) or 'dpo'}.{name}"


def _advice(settings: Settings, *advice: tuple[str, str]) -> str:
    """Of (key, what to do) those that the run's settings have; a key without dots is the objective's."""
    given = [(name if "." in name else _key(settings, name), what) for name, what in advice]
    return "; ".join(f"{key}: {what}" for key, what in given if not settings or key in settings)


# Rules

_FALL, _COLLAPSE = 0.15, 1.0
"""Nats per token that the chosen responses' log-probability has lost: a displacement; the policy in ruins."""


def likelihood_displacement(curves: Curves, settings: Settings) -> Finding | None:
    """The chosen responses became less likely, while the margin grew."""
    per_token = curves[f"val_{CHOSEN_PER_TOKEN}"]
    per_token = per_token if len(per_token.steps) >= 2 else curves[CHOSEN_PER_TOKEN]
    margin = curves[MARGIN]
    if len(per_token.steps) < 2 or len(margin.steps) < _LEAST_STEPS:
        return None
    fall = _start(per_token) - _end(per_token)
    if fall < _FALL or _end(margin) <= _start(margin):
        return None
    return Finding(
        "likelihood displacement",
        "warning",
        "The chosen responses became less likely, too: the margin grew because the rejected ones fell "
        "further. Probability moves to responses that nobody chose.",
        f"log-probability of chosen responses, nats per token: {_change(per_token)}",
        _advice(
            settings,
            ("nll_scale", "raise it; 1 keeps the chosen responses' likelihood up"),
            ("model.optim.lr", "lower it"),
            ("data.train_dir", "look at pairs whose responses are nearly alike"),
        ),
        "Razin et al. 2024, https://arxiv.org/abs/2410.08847; Pal et al. 2024, https://arxiv.org/abs/2402.13228",
    )


_LENGTH_GAP = 0.25


def length_exploitation(curves: Curves, settings: Settings) -> Finding | None:
    """Accuracy is much higher where the chosen response is the longer one, or where it is the shorter one,
    and low for the others: length tells what is chosen."""
    # A training step's value is of few pairs.
    for prefix, least in (("val_", 2), ("", 2 * _LEAST_STEPS)):
        longer, shorter = curves[prefix + CHOSEN_LONGER], curves[prefix + REJECTED_LONGER]
        if min(len(longer.steps), len(shorter.steps)) >= least:
            break
    else:
        return None
    ends = (longer.mean(0.5, 1), shorter.mean(0.5, 1))
    if abs(ends[0] - ends[1]) < _LENGTH_GAP or min(ends) > 0.6:
        return None
    which = "longer" if ends[0] > ends[1] else "shorter"
    return Finding(
        "length exploitation",
        "fault",
        f"The policy prefers the {which} response whichever was chosen: it has learnt length.",
        f"accuracy {ends[0]:.0%} where the chosen response is longer, {ends[1]:.0%} where it is shorter",
        _advice(
            settings,
            ("ld_alpha", "0 to 0.5 counts tokens beyond the shorter response less"),
            ("length_normalization", "True compares log-probabilities per token"),
            ("data.train_dir", "balance the lengths of chosen and rejected responses"),
        ),
        "Park et al. 2024, https://arxiv.org/abs/2403.19159; Liu et al. 2024 (LD-DPO), "
        "https://arxiv.org/abs/2409.06411",
    )


def overfitting(curves: Curves, settings: Settings) -> Finding | None:
    """The training pairs are learnt by heart and the validation loss rises."""
    accuracy, loss, training = curves[ACCURACY], curves[VAL_LOSS], curves[LOSS]
    if len(loss.steps) < 3:
        return None
    best = min(loss.values)
    at = loss.values.index(best)
    rise = loss.last - best
    learnt = accuracy.mean(0.75, 1) >= 0.95 if accuracy else training.mean(0.75, 1) < 0.8 * best
    if not learnt or at == len(loss.values) - 1 or rise < max(0.1 * abs(best), 0.02):
        return None
    known = f"training accuracy {accuracy.mean(0.75, 1):.0%}" if accuracy else "training loss still falling"
    return Finding(
        "overfitting",
        "fault",
        "The training data are known by heart, and validation gets worse.",
        f"{known}; validation loss {best:.3f} at step {loss.steps[at]}, {loss.last:.3f} at step "
        f"{loss.steps[-1]}",
        _advice(
            settings,
            ("trainer.max_steps", f"{loss.steps[at]}, where validation was best"),
            ("exp_manager.checkpoint_callback_params.monitor", "val_loss with mode min keeps the best step"),
            (_beta_key(settings), "raise it"),
            ("data.train_dir", "more pairs"),
        ),
        "Azar et al. 2023, https://arxiv.org/abs/2310.12036; Tunstall et al. 2023, "
        "https://arxiv.org/abs/2310.16944",
    )


def _beta_key(settings: Settings) -> str:
    return _key(settings, "kl_beta" if objective_of(settings) in ("dpo", "") else "beta")


def _beta(settings: Settings) -> float:
    value = settings.get(_beta_key(settings))
    return float(value) if isinstance(value, int | float) and value > 0 else 0.1


_NATS_APART = 1.0


def reference_apart(curves: Curves, settings: Settings) -> Finding | None:
    """Rewards are not 0 before the first update: the policy does not start at its reference."""
    if objective_of(settings) not in ("dpo", "kto", "") or _is_reference_free(settings):
        return None
    rewards = [curve for name in (CHOSEN, REJECTED) if (curve := curves[name]) and curve.steps[0] == 1]
    # Logged at step 1, a reward is of the policy before its first update.
    worst = max((abs(curve.values[0]) for curve in rewards), default=0.0) / _beta(settings)
    if worst <= _NATS_APART:
        return None
    return Finding(
        "reference is not the start",
        "warning",
        "Policy and reference differ before the first update, so rewards measure that, too.",
        f"rewards of step 1 correspond to {worst:.1f} nats per response; they would be 0",
        _advice(
            settings,
            ("model_alignment_strategy.reference_model", "null takes the start weights"),
            ("exp_manager.resume_from_checkpoint", "start from the reference's weights"),
        ),
        "Rafailov et al. 2023, https://arxiv.org/abs/2305.18290: the reference is the model that is trained",
    )


def _is_reference_free(settings: Settings) -> bool:
    return bool(settings.get("model_alignment_strategy.dpo.reference_free"))


_NORM_GROWTH = 10.0
_REJECTED_COLLAPSE = 3.0
"""Nats per token that the rejected responses' log-probability has lost: 20 times less likely at each token,
far more than a preference needs."""


def learning_rate_too_high(curves: Curves, settings: Settings) -> Finding | None:
    """The loss ends above its start, the policy is in ruins, or margin or gradient norm have exploded."""
    loss, norm = curves[LOSS], curves[GRADIENT]
    chosen, rejected = curves[CHOSEN_PER_TOKEN], curves[REJECTED_PER_TOKEN]
    evidence = []
    if len(loss.steps) >= _LEAST_STEPS and loss.mean(0.75, 1) > 1.1 * _start(loss) + 0.02:
        evidence.append(f"training loss {_start(loss):.3f} -> {loss.mean(0.75, 1):.3f}")
    falls = (
        ("chosen", chosen, _COLLAPSE),
        ("rejected", rejected, _REJECTED_COLLAPSE if chosen else _COLLAPSE),
    )
    for name, curve, most in falls:
        if len(curve.steps) >= _LEAST_STEPS and _start(curve) - _end(curve) > most:
            evidence.append(f"{name} responses, nats per token: {_change(curve)}")
    if len(norm.steps) >= 2 * _LEAST_STEPS:
        before, after = norm.mean(0, 0.25), norm.mean(0.75, 1)
        if after > _NORM_GROWTH * max(before, 1e-6) and after > 1:
            evidence.append(f"gradient norm {before:.2g} -> {after:.2g}")
    if not evidence:
        return None
    rate = settings.get("model.optim.lr")
    lower = f", {rate / 5:.1g}" if isinstance(rate, float) and rate > 0 else ""
    return Finding(
        "learning rate too high",
        "fault",
        "Updates are too large: the policy has lost what it knew.",
        "; ".join(evidence),
        _advice(
            settings,
            ("model.optim.lr", f"a fifth of it{lower}"),
            ("nll_scale", "1 keeps the chosen responses' likelihood up"),
            ("model.optim.sched.warmup_steps", "5 to 10% of the steps"),
        ),
        "Tunstall et al. 2023 (5e-7 for 7B), https://arxiv.org/abs/2310.16944",
    )


def nothing_learnt(curves: Curves, settings: Settings) -> Finding | None:
    """The loss has not fallen, and rewards have hardly moved."""
    loss, accuracy = curves[LOSS], curves[ACCURACY]
    if len(loss.steps) < 2 * _LEAST_STEPS:
        return None
    fall = (loss.mean(0, 0.25) - loss.mean(0.75, 1)) / max(abs(loss.mean(0, 0.25)), 1e-9)
    moved = accuracy and accuracy.mean(0.75, 1) >= 0.65 and _margin_moved(curves, settings)
    if abs(fall) >= 0.02 or moved or _policy_moved(curves, settings):
        return None
    reached = f", reward accuracy {accuracy.mean(0.75, 1):.0%}" if accuracy else ""
    return Finding(
        "nothing learnt",
        "fault",
        "The policy is still what it was.",
        f"training loss {loss.mean(0, 0.25):.4f} in the first quarter, {loss.mean(0.75, 1):.4f} in the last"
        + reached,
        _advice(
            settings,
            ("model.optim.lr", "5 to 10 times as much"),
            ("trainer.max_steps", "more of them"),
            ("model.optim.sched.warmup_steps", "fewer, if the run is short"),
        ),
        "by definition: loss and rewards at their starting values",
    )


_MARGIN_NATS = 0.1


def _margin_moved(curves: Curves, settings: Settings) -> bool:
    """Whether accuracy counts: at the smallest learning rate it is high at once, as margins of 1e-5 have a
    sign, too."""
    margin = curves[MARGIN]
    return not margin or abs(margin.mean(0.75, 1) - _start(margin)) / _beta(settings) > _MARGIN_NATS


def _policy_moved(curves: Curves, settings: Settings) -> bool:
    """Whether rewards are off their start by more than a nat per response."""
    moved = [
        abs(curve.mean(0.75, 1) - _start(curve)) for name in (CHOSEN, REJECTED) if (curve := curves[name])
    ]
    return bool(moved) and max(moved) / _beta(settings) > _NATS_APART


def _loss_moved(curves: Curves) -> bool:
    """Whether the loss, validation's if there is one, is off its start by 2%: where labels are noise, rewards
    part the one way as often as the other, and their means stay."""
    loss = curves[LOSS]
    if not loss:
        return False
    late = (curves[VAL_LOSS] or loss).mean(0.5, 1)
    return abs(late - _start(loss)) > 0.02 * abs(_start(loss))


def data_noise(curves: Curves, settings: Settings) -> Finding | None:
    """Much has moved, but held-out pairs are told apart hardly better than by chance."""
    held_out, training = curves[f"val_{ACCURACY}"], curves[ACCURACY]
    accuracy, what = (held_out, "held-out") if len(held_out.steps) >= 2 else (training, "training")
    if (
        len(accuracy.steps) < 2
        or len(training.steps) < 2 * _LEAST_STEPS
        or not (_policy_moved(curves, settings) or _loss_moved(curves))
    ):
        return None
    late = accuracy.mean(0.5, 1)
    if late >= 0.65:
        return None
    return Finding(
        "data noise",
        "warning",
        "The policy moves, but does not come to tell chosen from rejected responses: labels look like noise, "
        "or what decides them is not in the text.",
        f"accuracy on {what} pairs {late:.0%} in the second half of the run, training accuracy "
        f"{training.mean(0.75, 1):.0%}",
        _advice(
            settings,
            ("label_smoothing", "the fraction of labels that may be flipped, 0.1 to 0.3"),
            ("loss_type", "robust corrects for flipped labels"),
            ("data.train_dir", "look at pairs whose rewards part the wrong way"),
        ),
        "Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409; Mitchell 2023 (cDPO), "
        "https://ericmitchell.ai/cdpo.pdf",
    )


def _change(curve: Curve) -> str:
    return f"{_start(curve):.2f} -> {_end(curve):.2f}"


def _start(curve: Curve) -> float:
    """What a curve begins with; of many points the mean of the first twentieth."""
    return curve.mean(0, 0.05)


Rule = Callable[[Curves, Settings], Finding | None]
RULES: tuple[Rule, ...] = (
    learning_rate_too_high,
    nothing_learnt,
    overfitting,
    length_exploitation,
    likelihood_displacement,
    data_noise,
    reference_apart,
)
