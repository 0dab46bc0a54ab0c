"""User-supplied components named by a dotted path: losses, callbacks, optimizers, data formats.

A YAML may come from anywhere, and a dotted path can name anything that is installed. So a part is imported
only by what trains, is never one of the standard library, and must be what its key's documentation says
before it is called: a subclass of the right base, or a callable that names its arguments. A callable of an
installed package must give them the documented names, since what merely takes as many may do anything:
``hydra.utils.instantiate(config, *args, **kwargs)`` runs what a record of the data says.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from nxdt_align.errors import UserError
from nxdt_align.messages import NOTICE

log = logging.getLogger(__name__)

Place = Literal["own", "installed", "standard"]
_SITE = ("site-packages", "dist-packages")
_BEGINNINGS = {"record": ("record", "example", "row")}
"""Documented argument -> how an installed package's may begin, if not with that name."""


class OwnPartError(UserError):
    """A user-supplied component that cannot be found or used; the message says what was found."""


def find(path: str) -> Callable[..., Any]:
    """The class or function at ``path``, module.name; the current folder comes first, as in ``python -m``.

    Raises OwnPartError if the module does not import or has no such name, if the object is not callable, or
    if either is of the standard library.
    """
    module_name, _, name = path.rpartition(".")
    require_no_standard_module(path)
    try:
        module = _import(module_name, path)
    except OwnPartError:
        raise
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
    home = _home(found)
    if _place(home) == "standard":
        raise _of_standard_library(path, home)
    log.log(NOTICE, "own part: %s, of %s", path, getattr(module, "__file__", None) or module_name)
    part: Callable[..., Any] = found
    return part


def find_class(path: str, base: type) -> type[Any]:
    """The class at ``path``, which must be a subclass of ``base``. Raises OwnPartError."""
    found = find(path)
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise OwnPartError(
            f"{path} must be a subclass of {base.__module__.partition('._')[0]}.{base.__qualname__}, but is "
            f"{describe(found)}"
        )
    return found


def require_call(
    found: Callable[..., Any],
    path: str,
    *arguments: str,
    settings: Mapping[str, Any] | None = None,
    is_users_own: bool = False,
) -> None:
    """Raise OwnPartError if ``found`` cannot be called with the positional ``arguments`` and the keyword
    ``settings``, or does not name them.

    Of an installed package's, the names must begin with those of ``arguments``, and no ``*`` or ``**`` may
    take whatever else there is. ``is_users_own``: a script's own object, which no YAML chose; it need only
    take the arguments.
    """
    wanted = f"{path}: it must be called as ({', '.join(arguments)})"
    if settings:
        wanted += f" with loss_settings {dict(settings)}"
    if inspect.isclass(found):
        raise OwnPartError(f"{wanted}, but it is a class; name a function")
    try:
        signature = inspect.signature(found)
    except (ValueError, TypeError) as error:
        raise OwnPartError(
            f"{wanted}, but it is {describe(found)}, whose signature cannot be inspected; wrap it in "
            "a function"
        ) from error
    try:
        bound = signature.bind(*arguments, **(settings or {}))
    except TypeError as error:
        raise OwnPartError(f"{wanted}, but its signature is {signature} ({error})") from error
    if is_users_own:
        return
    parameters = list(signature.parameters.values())
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(named) < len(arguments):
        raise OwnPartError(f"{wanted}, but its signature is {signature}, which must name these arguments")
    if "installed" not in (_place(path.rpartition(".")[0]), _place(_home(found))):
        return
    pairs = zip(named, arguments, strict=False)
    fits = all(name.startswith(_BEGINNINGS.get(argument, argument)) for name, argument in pairs)
    loose = [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not fits or any(p.name in bound.arguments for p in loose):
        raise OwnPartError(
            f"{wanted}, but its signature is {signature}; a callable of an installed package must name its "
            "arguments so: wrap this one in a function of your own"
        )


def require_no_standard_module(path: str) -> None:
    """Raise OwnPartError if ``path`` names something of the standard library, or a package's start as a
    program. Imports nothing."""
    module_name = path.rpartition(".")[0]
    top, *inner = module_name.split(".")
    if "__main__" in inner:
        raise OwnPartError(f"{path}: importing {module_name} would run that package as a program")
    if top in sys.stdlib_module_names:
        raise _of_standard_library(path, top)


def _of_standard_library(path: str, module_name: str) -> OwnPartError:
    return OwnPartError(
        f"{path} is of Python's standard library (module {module_name}), which a configuration must not run; "
        "name a class or a function of your own, in a module of another name"
    )


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


def _import(name: str, path: str) -> Any:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        top = name.partition(".")[0]
        spec = None if top in sys.modules else importlib.util.find_spec(top)
        # Parts of the standard library that sys.stdlib_module_names leaves out, as its tests.
        if spec is not None and spec.origin is not None and _place_of_file(spec.origin) == "standard":
            raise _of_standard_library(path, top)
        return importlib.import_module(name)
    finally:
        # Not left there: a user's folder must not shadow what libraries import later.
        sys.path.remove(here)


# Where a part comes from


def _home(found: Callable[..., Any]) -> str:
    """The module that defines ``found``, whatever module it was imported into; of an object, its class's."""
    while isinstance(found, functools.partial):
        found = found.func
    name = getattr(getattr(found, "__func__", found), "__module__", None)
    return name if isinstance(name, str) else type(found).__module__


def _place(module_name: str) -> Place:
    """Whether a module that has been imported is the user's, of an installed package or the language's."""
    top = module_name.partition(".")[0]
    if top in sys.stdlib_module_names:
        return "standard"
    if top == "nxdt_align":
        return "installed"
    if module_name == "__main__":
        return "own"
    module = sys.modules.get(module_name) or sys.modules.get(top)
    file = getattr(module, "__file__", None)
    # Without a file it is made by a package as that is imported, as torch.ops, or says a name that is none.
    return "installed" if file is None else _place_of_file(file)


def _place_of_file(file: str) -> Place:
    places = [Path(file).absolute(), Path(file).resolve()]
    if any(part in _SITE for place in places for part in place.parts) or any(
        _is_below(place, ("purelib", "platlib")) for place in places
    ):
        return "installed"
    return "standard" if any(_is_below(place, ("stdlib", "platstdlib")) for place in places) else "own"


def _is_below(place: Path, kinds: tuple[str, ...]) -> bool:
    return any(place.is_relative_to(folder) for folder in _folders(kinds))


@functools.cache
def _folders(kinds: tuple[str, ...]) -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    return tuple(each for kind in kinds for each in (Path(paths[kind]), Path(paths[kind]).resolve()))
