"""User-supplied components named by a dotted path: losses, callbacks, optimizers, data formats.

They are imported only where they are used, so that ``nxdt-align config`` runs no code that a YAML names.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nxdt_align.errors import UserError


class OwnPartError(UserError):
    """A user-supplied component that cannot be found or used; the message says what was found."""


def find(path: str) -> Callable[..., Any]:
    """The class or function at ``path``, module.name; the current folder comes first, as in ``python -m``.

    Raises OwnPartError if the module does not import or has no such name, or if the object is not callable.
    """
    module_name, _, name = path.rpartition(".")
    try:
        module = _import(module_name)
    except (Exception, SystemExit) as error:
        # User code may raise anything at import, and a script without an `if __name__` guard exits: the user
        # has to see it beside the key that named the module.
        reason = f"{type(error).__name__}: {error}"
        raise OwnPartError(
            f"{path}: cannot import the module {module_name} ({reason}); it is looked up in "
            f"PYTHONPATH and in {Path.cwd()}"
        ) from error
    found = getattr(module, name, None)
    if found is None:
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise OwnPartError(
            f"{path}: {module_name} has no {name}; it has {', '.join(names) or 'nothing to call'}"
        )
    if not callable(found):
        raise OwnPartError(f"{path} must be a class or a function, but is {describe(found)}")
    part: Callable[..., Any] = found
    return part


def find_class(path: str, base: type) -> Callable[..., Any]:
    """The class at ``path``, which must be a subclass of ``base``. Raises OwnPartError."""
    found = find(path)
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise OwnPartError(
            f"{path} must be a subclass of {base.__module__.partition('._')[0]}.{base.__qualname__}, but is "
            f"{describe(found)}"
        )
    return found


def require_call(found: Callable[..., Any], path: str, *arguments: str) -> None:
    """Raise OwnPartError if ``found`` cannot be called with the positional ``arguments``."""
    wanted = f"{path}: it must be called as ({', '.join(arguments)})"
    try:
        signature = inspect.signature(found)
    except ValueError as error:
        raise OwnPartError(
            f"{wanted}, but it is {describe(found)}, whose signature cannot be inspected; wrap it in "
            "a function"
        ) from error
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise OwnPartError(f"{wanted}, but its signature is {signature} ({error})") from error


def make(found: Callable[..., Any], path: str, settings: Mapping[str, Any], key: str) -> Any:
    """``found`` called with ``settings``, the value of the YAML's ``key``. Raises OwnPartError."""
    try:
        return found(**settings)
    except Exception as error:
        # User code may raise anything; the message quotes it.
        is_plain = isinstance(error, TypeError | ValueError)
        reason = str(error) if is_plain else f"{type(error).__name__}: {error}"
        raise OwnPartError(
            f"{path} cannot be created with {key} {dict(settings)}: {reason}; it takes {signature_of(found)}"
        ) from error


def signature_of(called: Callable[..., Any]) -> str:
    """Its arguments as text, for a message."""
    try:
        return str(inspect.signature(called))
    except ValueError:
        return "an unknown signature"


def describe(value: object) -> str:
    """A value for a message: its type and its text, truncated."""
    if isinstance(value, tuple):
        return f"a tuple of {', '.join(type(item).__name__ for item in value) or 'nothing'}"
    return f"{type(value).__name__} {value!r}"[:120]


def _import(name: str) -> Any:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    finally:
        # Not left there: a user's folder must not shadow what libraries import later.
        sys.path.remove(here)
