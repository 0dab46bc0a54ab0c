"""The order of the data: shuffled by seed and epoch, the same for any number of workers and ranks.

The unit is a step: the indices of one global batch. Ranks share each step between them (see
packing.py), so none of them sees an example twice and the order does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler


class StepSampler(Sampler[tuple[int, ...]]):
    """Yields the examples of each step of an epoch.

    It keeps no position of its own: ``steps_done`` is asked when an iteration starts, so that a
    resumed run goes on in the middle of its epoch, and what a loader has fetched ahead is not
    mistaken for what was trained on. The last step of an epoch is smaller where the batch size does
    not divide the number of examples; the loss is divided by its true size.

    Args:
        examples: N, the size of the data set.
        examples_per_step: the global batch size.
        seed: with the epoch, decides the order.
        shuffle: False for validation.
        steps_done: steps trained so far, counted over epochs.
    """

    def __init__(
        self,
        examples: int,
        examples_per_step: int,
        seed: int,
        *,
        shuffle: bool = True,
        steps_done: Callable[[], int] = lambda: 0,
    ) -> None:
        self.examples = examples
        self.examples_per_step = examples_per_step
        self._seed = seed
        self._shuffle = shuffle
        self._steps_done = steps_done

    def order(self, epoch: int) -> npt.NDArray[Any]:
        """(N,) indices in the order of this epoch."""
        if not self._shuffle:
            return np.arange(self.examples)
        return np.random.default_rng([self._seed, epoch]).permutation(self.examples)

    def consumed(self, steps: int) -> int:
        """Examples seen in the first ``steps`` steps, over epochs."""
        epochs, rest = divmod(steps, len(self))
        return epochs * self.examples + min(rest * self.examples_per_step, self.examples)

    def __len__(self) -> int:
        """Steps of a whole epoch, wherever an iteration starts: Lightning counts on from there."""
        return -(-self.examples // self.examples_per_step)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        epoch, first = divmod(self._steps_done(), len(self))
        yield from self.steps(epoch, first)

    def steps(self, epoch: int, first: int = 0) -> Iterator[tuple[int, ...]]:
        """The steps of an epoch from its ``first`` one."""
        order = self.order(epoch)
        for step in range(first, len(self)):
            start = step * self.examples_per_step
            yield tuple(int(i) for i in order[start : start + self.examples_per_step])
