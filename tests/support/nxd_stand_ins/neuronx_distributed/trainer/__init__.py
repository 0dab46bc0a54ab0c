"""Only the names that the engine imports: recording graphs writes and reads no checkpoint."""

from __future__ import annotations

from . import checkpoint

__all__ = ["checkpoint"]
