"""What every test has: one thread, no network, and the repository's folder."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

# Before torch or a Hugging Face library is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # the losses that ours are compared with live there

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real preference pairs beside the checkout; the test skips where it is missing."""
    folder = REPO.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real preference pairs are not here ({folder})")
    return folder


@pytest.fixture(autouse=True)
def heard_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier test's command or benchmark left of logging keeps no message from ``caplog``."""
    logger = logging.getLogger("nxdt_align")
    logger.setLevel(logging.NOTSET)
    monkeypatch.setattr(logger, "propagate", True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA card"))
