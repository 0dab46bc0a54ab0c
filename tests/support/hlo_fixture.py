"""Graphs as XLA prints them."""

from __future__ import annotations

from dataclasses import dataclass

HEAD = "HloModule IrToHlo.9, entry_computation_layout={(f32[4,4]{1,0})->(f32[4,4]{1,0})}\n\n"
ADD = """%AddComputation.5 (x.6: f32[], y.7: f32[]) -> f32[] {
  %x.6 = f32[] parameter(0)
  %y.7 = f32[] parameter(1)
  ROOT %add.8 = f32[] add(f32[] %x.6, f32[] %y.7)
}

"""


@dataclass(frozen=True)
class Traced:
    hlo: str
    key: str = "1"
    name: str = "training step"
    shapes: tuple[tuple[int, ...], ...] = ((1, 64, 16, 2),)


def module(*lines: str) -> str:
    return HEAD + ADD + "ENTRY %IrToHlo.9 (p0.1: f32[4,4]) -> (f32[4,4]) {\n  " + "\n  ".join(lines) + "\n}\n"
