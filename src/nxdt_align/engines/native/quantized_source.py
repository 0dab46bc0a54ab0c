"""The source that fills a decoder whose base is quantised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nxdt_align.engines.base import WeightSource
from nxdt_align.models import nf4
from nxdt_align.models.adapters import AdapterSpec, quantized_layers, row_norms
from nxdt_align.models.presets import DecoderConfig
from nxdt_align.models.sharding import MAGNITUDE


class QuantizedWeights(WeightSource):
    """What a decoder with a quantised base is filled from: another source, its weights quantised from
    ``dtype``, the one that is computed in, on ``device``."""

    def __init__(
        self,
        source: WeightSource,
        config: DecoderConfig,
        spec: AdapterSpec,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._source, self._spec, self._dtype, self._device = source, spec, dtype, device
        self._paths = frozenset(quantized_layers(config, spec))
        self._shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for path in self._paths:
            rows, columns = source.shape(f"{path}.weight")
            parts = nf4.quantized_shapes(rows, columns)
            self._shapes |= {f"{path}.{part}": found for part, found in parts.items()}
        self._last: tuple[str, dict[str, Tensor]] = ("", {})
        """The layer that was read last, as its tensors are read one after the other."""
        self._magnitudes: dict[str, Tensor] = {}
        """DoRA's, of each layer that was quantised: they are read when all weights have been."""
        self.path = source.path

    def __str__(self) -> str:
        return str(self._source)

    def names(self) -> list[str]:
        return [*(name for name in self._source.names() if name not in self._shapes), *self._shapes]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name][0] if name in self._shapes else self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._shapes[name][1] if name in self._shapes else self._source.dtype(name)

    def read(self, name: str) -> Tensor:
        path, _, part = name.rpartition(".")
        if name in self._shapes:
            return self._quantized(path)[part]
        if part == MAGNITUDE and path in self._paths and not self._spec.from_adapter:
            if path not in self._magnitudes:
                self._quantized(path)
            return self._magnitudes[path]
        return self._source.read(name)

    def read_slice(self, name: str, region: Sequence[slice]) -> Tensor:
        # Scales hang together over a whole weight, so that no part of it can be quantised by itself.
        if name in self._shapes or name.endswith(f".{MAGNITUDE}"):
            return self.read(name)[tuple(region)]
        return self._source.read_slice(name, region)

    def _quantized(self, path: str) -> dict[str, Tensor]:
        if self._last[0] != path:
            weight = self._source.read(f"{path}.weight").to(self._device, self._dtype)
            self._last = path, nf4.quantized(weight)
            if self._spec.dora and path in self._spec.targets:
                # Of the rows that there are: what adds an adapter must not change the base.
                whole = nf4.weight_of(self._last[1]).dequantized(self._dtype)
                self._magnitudes[path] = row_norms(whole)
        return self._last[1]
