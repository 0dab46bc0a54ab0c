"""Fonts for the scripts that draw."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which matplotlib has its list of fonts. Where it makes the list and is slow at it,
    or has no place to keep it, it says so on stderr."""
    environment = os.environ | {"MPLCONFIGDIR": str(tmp_path_factory.mktemp("matplotlib"))}
    make = "import matplotlib.font_manager"
    subprocess.run([sys.executable, "-c", make], env=environment, capture_output=True, check=True)
    return environment
