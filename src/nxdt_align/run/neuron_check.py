"""What ``nxdt-align doctor --neuron`` asks of the package itself."""

from __future__ import annotations

from pathlib import Path

from nxdt_align.config.schema import Config
from nxdt_align.errors import UserError
from nxdt_align.run.places import Places


def flash_lines() -> list[str]:
    """The flash kernel with a bias beside a dense mask on this machine's NeuronCore, a line per comparison.

    Raises UserError where there is none, and for a wrong one, with all lines.
    """
    from nxdt_align.engines.nxd import compat
    from nxdt_align.engines.nxd.flash import nki_kernels
    from nxdt_align.engines.nxd.flash_check import differences

    kernels = nki_kernels(transposes=True)
    found = differences(kernels, compat.start("neuron", 0, 1).device)
    lines = [str(each) for each in found]
    if not all(each.is_right for each in found):
        raise UserError("\n".join(["the flash kernel with a bias differs from a dense mask:", *lines]))
    return lines


def manifest_of(config: Config) -> Path:
    """Where the run keeps the manifest of its graphs."""
    return Places(config).manifest
