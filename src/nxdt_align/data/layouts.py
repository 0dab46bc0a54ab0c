"""The layout of rows where ``data.packing`` is auto: of those that are possible, the one that costs least."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from nxdt_align.config.data import PACKING
from nxdt_align.data.packing import Bucket, Layout, RowCost, RowPlanner
from nxdt_align.errors import UserError

Unit = Literal["positions", "seconds"]


@dataclass(frozen=True)
class RowOption:
    """A layout that rows may have, and what they need there."""

    layout: Layout
    row_multiple: int = 1
    """See RowPlanner."""
    row_cost: RowCost | None = None
    """See RowPlanner; in seconds."""
    memory_fault: Callable[[Bucket], str | None] | None = None
    """Why a device's memory does not hold rows of this shape; None where it does."""


@dataclass(frozen=True)
class LayoutOptions:
    """The layouts that a run may take, one where the configuration names it."""

    options: Sequence[RowOption]
    refused: Mapping[Layout, str] = field(default_factory=dict)
    """Layouts that are not among them -> why."""
    priced_for: str = ""
    """The device that ``row_cost`` is of."""
    unchosen: Sequence[RowOption] = ()
    """What rows might have with ``setting``: named where it costs less, never taken."""
    setting: str = ""

    def choose(self, plan: Callable[[RowOption], RowPlanner]) -> tuple[RowPlanner, LayoutChoice | None]:
        """The rows of the option that costs least, planned by ``plan``, and what the others cost; None where
        there is one option. Of equal ones the first; one that memory does not hold only where none is held.

        Raises UserError where ``plan`` refuses every option, with the first one's words.
        """
        if len(self.options) == 1 and not self.refused:
            return plan(self.options[0]), None
        planned: dict[Layout, tuple[RowOption, RowPlanner]] = {}
        refused, faults = dict(self.refused), []
        for option in self.options:
            try:
                planned[option.layout] = option, plan(option)
            except UserError as error:
                faults.append(error)
                refused[option.layout] = str(error)
        if not planned:
            raise faults[0]
        too_large = {
            layout: fault
            for layout, (option, planner) in planned.items()
            if option.memory_fault is not None
            and (fault := option.memory_fault(planner.buckets[-1])) is not None
        }
        prices = {layout: planner.cost_per_step() for layout, (_, planner) in planned.items()}
        chosen = min(prices, key=lambda layout: (layout in too_large, prices[layout]))
        unit: Unit = "positions" if planned[chosen][0].row_cost is None else "seconds"
        hint = self._hint(plan, prices[chosen])
        choice = LayoutChoice(chosen, prices, refused, too_large, unit, self.priced_for, hint)
        return planned[chosen][1], choice

    def _hint(self, plan: Callable[[RowOption], RowPlanner], price: float) -> Hint | None:
        """The cheapest of ``unchosen`` that memory holds; None where none costs less than ``price``."""
        hints = []
        for option in self.unchosen:
            try:
                planner = plan(option)
            except UserError:
                continue  # no rows of these examples, as with buckets that its kernel does not take
            cost = planner.cost_per_step()
            is_held = option.memory_fault is None or option.memory_fault(planner.buckets[-1]) is None
            if cost < price and is_held:
                hints.append(Hint(self.setting, option.layout, cost, price / cost))
        return min(hints, key=lambda hint: hint.price, default=None)


@dataclass(frozen=True)
class Hint:
    """A setting that the run does not have, and what it would win."""

    setting: str
    layout: Layout
    price: float
    gain: float
    """The chosen layout's price over this one's."""


@dataclass(frozen=True)
class LayoutChoice:
    """The layout that was chosen, and why."""

    layout: Layout
    prices: Mapping[Layout, float]
    """Layout -> what a rank's rows of a step cost."""
    refused: Mapping[Layout, str]
    """Layout -> why it is not possible."""
    too_large: Mapping[Layout, str]
    """Layout -> why memory does not hold it."""
    unit: Unit
    priced_for: str
    hint: Hint | None = None

    def _price(self, layout: Layout) -> str:
        return self._told(self.prices[layout])

    def _told(self, price: float) -> str:
        return f"{price:,.0f} tokens" if self.unit == "positions" else f"{price:.3g} s"

    @property
    def _of_hint(self) -> str:
        hint = self.hint
        if hint is None:
            return ""
        return f"with {hint.setting} {hint.layout} {self._told(hint.price)}, {hint.gain:.3g} times as fast"

    @property
    def _measure(self) -> str:
        on = f" on paper ({self.priced_for})" if self.unit == "seconds" else ", padding included"
        return f"per step and rank{on}"

    @property
    def summary(self) -> str:
        """In one line."""
        others = [layout for layout in self.prices if layout != self.layout]
        prices = ", ".join(f"{layout} {self._price(layout)}" for layout in others)
        told = f"{PACKING}: auto is {self.layout}, {self._price(self.layout)} {self._measure}"
        told += f"; {prices}" if prices else ""
        faults = [f"{layout} does not fit memory" for layout in self.too_large]
        faults += [f"not {layout}: {why}" for layout, why in self.refused.items()]
        return "; ".join(filter(None, [told, self._of_hint, *faults]))

    def __str__(self) -> str:
        lines = [f"{PACKING}: auto is {self.layout}, the cheapest {self._measure}"]
        for layout in sorted(self.prices, key=lambda layout: self.prices[layout]):
            more = self.prices[layout] / self.prices[self.layout]
            fault = f"; {self.too_large[layout]}" if layout in self.too_large else ""
            lines.append(f"  {layout:<14}{self._price(layout)}, {more:.2f} times{fault}")
        lines += [f"  {layout:<14}{why}" for layout, why in self.refused.items()]
        return "\n".join([*lines, *([f"  {self._of_hint}"] if self.hint is not None else [])])
