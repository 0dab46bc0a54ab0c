"""Whether this machine has the memory that recording a rank's graphs takes.

The numbers lie above what was measured on a CPU (docs/graphs.md), which grows with the layers and their width
though weights are given no memory, and hardly with the lengths of rows or the ranks.
"""

from __future__ import annotations

import re
from math import ceil
from pathlib import Path

from nxdt_align.config.engines import Engine
from nxdt_align.config.schema import Config
from nxdt_align.errors import UserError
from nxdt_align.models.presets import DecoderConfig
from nxdt_align.planning.graph_report import size_in_words

MEMINFO = Path("/proc/meminfo")
_NATIVE = 2**30
"""Bytes on engine native, whose layers share one graph: 0.6 GiB were measured with 2 layers and with 32."""
_NXD = 5 * 2**28
"""Bytes on engine nxd without any layer, most of them torch_xla's."""
_LAYER, _LAYER_WIDTH = 6 * 2**20, 7 * 2**10
"""Bytes of a layer, and for each entry of its hidden states."""


def require_memory(config: Config, model: DecoderConfig, engine: Engine) -> None:
    """Raise UserError where less is available than it takes, at most, to record a rank's graphs. What reading
    the data takes is not counted. A machine that does not say what it has is taken to have enough."""
    needed, available = tracing_bytes(config, model, engine), available_bytes()
    if available is None or needed <= available:
        return
    fewer = (
        ""
        if engine == "native"
        else "set model.num_layers lower, as further layers repeat the same instructions, or "
    )
    raise UserError(
        f"graphs: recording {model.num_hidden_layers} layers takes up to {size_in_words(needed)} of memory "
        f"(an estimate), but {size_in_words(available)} are available on this machine (MemAvailable of "
        f"{MEMINFO}); {fewer}record on a machine that has more"
    )


def tracing_bytes(config: Config, model: DecoderConfig, engine: Engine) -> int:
    """An estimate from above for one rank's process."""
    if engine == "native":
        return _NATIVE
    layers = ceil(model.num_hidden_layers / config.distributed_strategy.pipeline_model_parallel_size)
    return _NXD + layers * (_LAYER + _LAYER_WIDTH * model.hidden_size)


def available_bytes() -> int | None:
    """What this machine can give without swapping; None where it does not say."""
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024
