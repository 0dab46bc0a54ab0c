"""Two models on the same records: what each answers, how right it is, and how far the second has moved
towards the chosen responses. A page that needs no network, and the same as JSON.

The models are not here: their completions and log-probabilities are handed in.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from nxdt_align import __version__
from nxdt_align.data.records import Prompt
from nxdt_align.evaluation.page import page_environment
from nxdt_align.evaluation.plots import histogram
from nxdt_align.files import atomic_write

_TEMPLATE = "compare.html.jinja"
MOST = 20
"""Gains and losses that the page shows."""
_MOST_RECORDS = 200
"""Records that the page shows beside those; the JSON has all."""
_DRAWS, _CONFIDENCE = 10_000, 0.95


@dataclass(frozen=True)
class Answer:
    """A model's on one record."""

    text: str
    tokens: int
    """Of its completion, the end included."""
    finish_reason: str
    logps: tuple[float, ...]
    """Log-probabilities of the record's responses, nats: (chosen, rejected), (response,) or none."""
    score: float | None


@dataclass(frozen=True)
class Compared:
    """One record through both models."""

    source: str
    prompt: Prompt
    responses: tuple[str, ...]
    before: Answer
    after: Answer
    beta: float
    label: bool | None = None
    """Of a labelled completion: whether it is desirable."""

    @property
    def rewards(self) -> tuple[float, ...]:
        """Of each response: beta * (log-probability after - before), Rafailov et al. 2023, equation 5 up to a
        constant per prompt."""
        pairs = zip(self.after.logps, self.before.logps, strict=True)
        return tuple(self.beta * (after - before) for after, before in pairs)

    @property
    def margin(self) -> float | None:
        """Reward of the chosen response over that of the rejected one; None where it is no pair."""
        return self.rewards[0] - self.rewards[1] if len(self.rewards) == 2 else None

    @property
    def gain(self) -> tuple[float, float]:
        """By how much the second model is better: by score, and where that is equal by margin, or by the
        reward of the one response, which is a loss where that is undesirable."""
        before, after = self.before.score, self.after.score
        by_score = 0.0 if before is None or after is None else after - before
        sign = -1.0 if self.label is False else 1.0
        return by_score, self.margin if self.margin is not None else sign * sum(self.rewards)

    @property
    def is_changed(self) -> bool:
        return self.before.text != self.after.text

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "prompt": self.prompt,
            "responses": list(self.responses),
            **({} if self.label is None else {"label": self.label}),
            "before": asdict(self.before),
            "after": asdict(self.after),
            "changed": self.is_changed,
            "rewards": list(self.rewards),
            "margin": self.margin,
            "accurate": None if self.margin is None else self.margin > 0,
        }


@dataclass(frozen=True)
class Share:
    """A mean of values from 0 to 1 over records, and its 95% interval by the bootstrap."""

    value: float
    low: float
    high: float
    records: int

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%}, {self.records} records)"


def share(values: Sequence[float]) -> Share | None:
    """Their mean, and the percentiles of the means of 10,000 resamples (Efron 1979); None of nothing.

    The values are few different ones, such as 0, 0.5 and 1, so that a resample is a draw of their counts.
    """
    if not values:
        return None
    different, counts = np.unique(np.asarray(values, dtype=float), return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(values), counts / len(values), size=_DRAWS)
    tails = 100 * (1 - _CONFIDENCE) / 2
    low, high = np.percentile(drawn @ different / len(values), [tails, 100 - tails])
    return Share(float(np.mean(values)), float(low), float(high), len(values))


@dataclass(frozen=True)
class Comparison:
    """Of two models on a file."""

    before: str
    after: str
    data: str
    beta: float
    scorer: str
    """``none`` where completions were not judged."""
    records: tuple[Compared, ...]

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What the page says of all records; None for what the data do not have."""
        both = [(each.before, each.after) for each in self.records]
        scores = [(b.score, a.score) for b, a in both if b.score is not None and a.score is not None]
        margins = [each.margin for each in self.records if each.margin is not None]
        return {
            "records": len(self.records),
            "changed": sum(each.is_changed for each in self.records) / len(self.records),
            "tokens": _means([(float(b.tokens), float(a.tokens)) for b, a in both]),
            "stopped": _means(
                [(float(b.finish_reason == "stop"), float(a.finish_reason == "stop")) for b, a in both]
            ),
            "score": _means(scores) if scores else None,
            "win_rate": share([_wins(*each) for each in scores]),
            "accuracy": share([_wins(0.0, margin) for margin in margins]),
            "margin": float(np.mean(margins)) if margins else None,
            "rewards": self._mean_rewards(),
        }

    def _mean_rewards(self) -> list[float | None]:
        """Of chosen and rejected responses, of desirable and undesirable completions (None where there are
        none), or of the only responses; empty for prompts."""
        if not self.is_labelled:
            return [float(np.mean(c)) for c in zip(*(each.rewards for each in self.records), strict=True)]
        by_label = [[c.rewards[0] for c in self.records if c.label is good] for good in (True, False)]
        return [float(np.mean(values)) if values else None for values in by_label]

    @property
    def is_labelled(self) -> bool:
        return any(each.label is not None for each in self.records)

    @property
    def gains(self) -> list[Compared]:
        """The largest first."""
        better = [each for each in self.records if each.gain > (0.0, 0.0)]
        return sorted(better, key=lambda each: each.gain, reverse=True)[:MOST]

    @property
    def losses(self) -> list[Compared]:
        """The largest first."""
        worse = [each for each in self.records if each.gain < (0.0, 0.0)]
        return sorted(worse, key=lambda each: each.gain)[:MOST]

    @property
    def verdict(self) -> str:
        """One sentence."""
        found = self.summary
        said = f"{found['changed']:.0%} of {found['records']} answers changed"
        if found["win_rate"] is not None:
            said += f"; by {self.scorer}, the win rate is {found['win_rate']}"
        if found["accuracy"] is not None:
            said += f"; reward accuracy {found['accuracy']}"
        return said

    def to_dict(self) -> dict[str, Any]:
        named = {name: getattr(self, name) for name in ("before", "after", "data", "beta", "scorer")}
        summary = {k: asdict(v) if isinstance(v, Share) else v for k, v in self.summary.items()}
        return {
            **named,
            "verdict": self.verdict,
            "summary": summary,
            "records": [each.to_dict() for each in self.records],
        }


def write_comparison(found: Comparison, out: Path) -> None:
    """The page to ``out``, and the same as JSON beside it (.json). Raises OSError."""
    atomic_write(out, render(found).encode())
    text = json.dumps(found.to_dict(), indent=2, ensure_ascii=False, default=str)
    atomic_write(out.with_suffix(".json"), text.encode())


def render(found: Comparison) -> str:
    margins = [each.margin for each in found.records if each.margin is not None]
    lengths = {
        name: [float(getattr(each, name).tokens) for each in found.records] for name in ("before", "after")
    }
    plots = [
        histogram("Tokens per completion", lengths, "lengths"),
        histogram("Reward margin per record", {"": margins}, "margins") if margins else "",
    ]
    shown = {id(each) for each in (*found.gains, *found.losses)}
    others = [each for each in found.records if id(each) not in shown]
    return (
        page_environment()
        .get_template(_TEMPLATE)
        .render(
            found=found,
            summary=found.summary,
            plots=[Markup(svg) for svg in plots if svg],
            others=others[:_MOST_RECORDS],
            left_out=len(others) - len(others[:_MOST_RECORDS]),
            version=__version__,
        )
    )


def _wins(before: float, after: float) -> float:
    """A tie is half a win."""
    return 0.5 if before == after else float(after > before)


def _means(pairs: Sequence[tuple[float, float]]) -> dict[Literal["before", "after"], float]:
    table: npt.NDArray[Any] = np.asarray(pairs, dtype=float)
    before, after = table.mean(0)
    return {"before": float(before), "after": float(after)}
