"""User errors."""

from __future__ import annotations


class UserError(ValueError):
    """A fault in what the user gave; the message says what to do."""
