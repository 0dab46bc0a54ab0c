"""User errors."""

from __future__ import annotations


class UserError(ValueError):
    """Invalid user input; the message says how to fix it."""
