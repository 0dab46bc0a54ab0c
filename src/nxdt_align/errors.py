"""User errors."""

from __future__ import annotations


class UserError(ValueError):
    """Invalid user input; the message says how to fix it."""


class SharedError(UserError):
    """One that every process of the run raises in the same words, so that one of each node reports it."""
