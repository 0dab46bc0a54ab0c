"""Parts of a run that the user brings, named by a dotted path: losses, callbacks, optimizers, data formats.

They are imported where they are used and never before, so that ``nxdt-align config`` runs no code that a
YAML names.
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
    """A part of the user's own that cannot be found or used; the message says what was found."""


def find(path: str) -> Callable[..., Any]:
    """The class or function at ``path``, module.name; the current folder comes first, as in ``python -m``.

    Raises OwnPartError where the module does not import, has no such name, or that cannot be called.
    """
    module_name, _, name = path.rpartition(".")
    try:
        module = _import(module_name)
    except (Exception, SystemExit) as error:
        # Whatever a module raises while it is imported is the user's to see, with the key that named it; a
        # script without a guard ends by SystemExit.
        reason = f"{type(error).__name__}: {error}"
        raise OwnPartError(
            f"{path}: the module {module_name} does not import ({reason}); it is looked up in "
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
    """Raise OwnPartError where ``found`` cannot be called with ``arguments``, in their order."""
    wanted = f"{path}: it must be called as ({', '.join(arguments)})"
    try:
        signature = inspect.signature(found)
    except ValueError as error:
        raise OwnPartError(
            f"{wanted}, but it is {describe(found)}, whose arguments cannot be told; wrap it in a "
            "function of your own"
        ) from error
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise OwnPartError(f"{wanted}, but its signature is {signature} ({error})") from error


def make(found: Callable[..., Any], path: str, settings: Mapping[str, Any], key: str) -> Any:
    """``found`` called with the keyword settings that ``key`` of the YAML holds. Raises OwnPartError."""
    try:
        return found(**settings)
    except Exception as error:
        # A part of the user's may raise anything; what it was is in the message.
        is_plain = isinstance(error, TypeError | ValueError)
        reason = str(error) if is_plain else f"{type(error).__name__}: {error}"
        raise OwnPartError(
            f"{path} cannot be made with {key} {dict(settings)}: {reason}; it takes {signature_of(found)}"
        ) from error


def signature_of(called: Callable[..., Any]) -> str:
    """Its arguments as text, for a message."""
    try:
        return str(inspect.signature(called))
    except ValueError:
        return "arguments that cannot be told"


def describe(value: object) -> str:
    """A value for a message: what type it is of, and its text, cut."""
    if isinstance(value, tuple):
        return f"a tuple of {', '.join(type(item).__name__ for item in value) or 'nothing'}"
    return f"{type(value).__name__} {value!r}"[:120]


def _import(name: str) -> Any:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(here)
