"""A model's adapters while micro-batches go through it: on, off, and their dropout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch

from nxdt_align.batch import Batch, TokenStatistic, Topology
from nxdt_align.engines import xla
from nxdt_align.engines.steps import Runner, Share, TokenLogps
from nxdt_align.models.adapters import AdapterSpec, Switch

DROPOUT = "dropout_steps"
"""Key of a checkpoint's values: Dropout's ``steps``."""


class AdapterRunner:
    """A Runner of a model with its adapters on, or off: the reference, whose weights the model's are.

    Args:
        runner: through the model.
        switch: of its adapters.
    """

    def __init__(self, runner: Runner, switch: Switch, *, on: bool) -> None:
        self._runner, self._switch, self._on = runner, switch, on

    def forward(
        self, micro_batches: Sequence[Batch], *, wanted: Sequence[TokenStatistic]
    ) -> list[TokenLogps]:
        with self._switch.set(on=self._on):
            return self._runner.forward(micro_batches, wanted=wanted)

    def backward(
        self, micro_batches: Sequence[Batch], share: Share, *, wanted: Sequence[TokenStatistic]
    ) -> list[TokenLogps]:
        with self._switch.set(on=self._on, training=True):
            return self._runner.backward(micro_batches, share, wanted=wanted)


class Dropout:
    """The random numbers of a training step, from the run's seed and the number of steps before it.

    Tensor-parallel ranks draw alike, others apart. The rows of a step's micro-batches count, so that other
    layouts and data-parallel sizes draw other masks.
    """

    def __init__(self, spec: AdapterSpec, seed: int, topology: Topology, device: torch.device) -> None:
        self._probability, self._seed, self._device = spec.dropout, seed, device
        self._place = topology.data_parallel_rank, topology.pipeline_parallel_rank
        self.steps = 0

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Around a step. What others draw is as if there were no dropout."""
        if not self._probability:
            yield
            return
        text = f"{self._seed}:{self.steps}:{self._place}".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
        on_device = xla.seeded(seed) if self._device.type == "xla" else nullcontext()
        # torch.manual_seed below seeds the device's generator, too, where it has one.
        has_generator = self._device.type not in ("cpu", "xla")
        forked = torch.random.fork_rng(
            [self._device] if has_generator else [],
            device_type=self._device.type if has_generator else "cuda",
        )
        with on_device, forked:
            torch.manual_seed(seed)
            yield
        self.steps += 1
