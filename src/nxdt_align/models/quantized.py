"""A decoder's frozen linear layers in 4 bits, with or without adapters."""

from __future__ import annotations

from torch import nn

from nxdt_align.models import nf4
from nxdt_align.models.adapters import AdaptedLinear, AdapterSpec, quantized_layers
from nxdt_align.models.config import DecoderConfig
from nxdt_align.models.nf4 import NF4Linear, NF4Weight


class _NF4AdaptedLinear(AdaptedLinear):
    def frozen(self) -> NF4Weight:
        return nf4.weight_of(self._parameters)


def quantize_base(decoder: nn.Module, config: DecoderConfig, spec: AdapterSpec) -> None:
    """Have the linear layers of ``decoder``'s layers hold their weights in 4 bits, but those trained whole.

    After ``add_adapters``, and after a change of dtype, which scales must not see. Values are not looked at.
    """
    modules = dict(decoder.named_modules())
    for path in quantized_layers(config, spec):
        module = modules[path]
        assert isinstance(module, nn.Linear)
        nf4.hold_quantized(module)
        # The class alone, so that whatever else has been put into the module stays.
        module.__class__ = _NF4AdaptedLinear if isinstance(module, AdaptedLinear) else NF4Linear
