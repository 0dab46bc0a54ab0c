"""The program that stands for neuron-monitor, for every test of this folder."""

from __future__ import annotations

from neuron_monitor_fixture import install

__all__ = ["install"]
