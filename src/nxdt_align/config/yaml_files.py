"""The YAML files that Hydra will read, checked before it does: the one that is named, and what its list of
defaults and overrides bring in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nxdt_align.config.bounds import check_yaml_text
from nxdt_align.config.faults import show
from nxdt_align.errors import UserError

_MOST_FILES = 200
_ROOT = "/"


def check_yaml_files(path: Path, overrides: Sequence[str] = ()) -> None:
    """Raise UserError, with file and line, for a YAML that is no mapping within bounds, at ``path`` or among
    the files that Hydra adds to it, and for a search path of packages, which Hydra would import."""
    content = _checked_content(path)
    plain: Any = OmegaConf.to_container(content, resolve=False)
    _check_search_path(plain.get("hydra"), path)
    roots = [path.parent, *_search_folders(plain.get("hydra"))]
    seen = {path}
    waiting = [*_named_files(plain.get("defaults"), path.parent, roots), *_overridden_files(overrides, roots)]
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        if len(seen) > _MOST_FILES:
            raise UserError(f"{path}: its lists of defaults name more than {_MOST_FILES} files; name fewer")
        inner: Any = OmegaConf.to_container(_checked_content(file), resolve=False)
        waiting += _named_files(inner.get("defaults"), file.parent, roots)


def _named_files(defaults: Any, folder: Path, roots: Sequence[Path]) -> Iterator[Path]:
    """Files that a list of defaults may mean, below ``folder`` or a root: more than Hydra would read, never
    less. ``- group: name``, ``- group/name``, with ``optional``, ``override`` and ``@package``."""
    for entry in defaults if isinstance(defaults, list) else ():
        pairs = entry.items() if isinstance(entry, Mapping) else [("", entry)]
        for key, value in pairs:
            group = str(key).rpartition(" ")[2].partition("@")[0]
            for name in value if isinstance(value, list) else [value]:
                if isinstance(name, str) and name != "_self_":
                    name = name.removeprefix("optional ").partition("@")[0]
                    yield from _files_of(f"{group}{_ROOT if group else ''}{name}", [folder, *roots])


def _overridden_files(overrides: Sequence[str], roots: Sequence[Path]) -> Iterator[Path]:
    for text in overrides:
        key, _, value = text.lstrip("+").partition("=")
        yield from _files_of(f"{key.partition('@')[0]}/{value.strip(chr(39) + chr(34))}", roots)


def _files_of(name: str, folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        place = folder / name.lstrip(_ROOT)
        try:
            # What an interpolation will be is not known yet, so any file of its group.
            found = (
                place.parent.glob("*.yaml")
                if "${" in name
                else [place.with_name(f"{place.name}.yaml"), place]
            )
            yield from (file.resolve() for file in found if file.suffix == ".yaml" and file.is_file())
        except (OSError, ValueError):
            continue  # no name that a file can have


def _search_folders(hydra: Any) -> list[Path]:
    places = hydra.get("searchpath") if isinstance(hydra, Mapping) else None
    return [Path(place.removeprefix("file://")) for place in places or () if isinstance(place, str)]


def _checked_content(path: Path) -> DictConfig:
    """A YAML file, unresolved. Raises UserError with file and line unless it is a mapping within bounds."""
    try:
        check_yaml_text(path.read_text(encoding="utf-8"), path)
        content = OmegaConf.load(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read as a YAML of sections and keys: {error}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {first_line(error)}") from error
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, (ValueError, TypeError, AttributeError, LookupError, RecursionError)):
            # A value that does not have the type of its tag, as !!int x.
            raise UserError(f"{path}: not valid YAML: a value cannot be read: {first_line(error)}") from error
        # PyYAML's errors, told by module name as this package does not import it; most carry the position.
        if type(error).__module__.partition(".")[0] != "yaml":
            raise
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{where}: not valid YAML: {reason}") from error
    if not isinstance(content, DictConfig):
        raise UserError(f"{path} must hold sections and keys, but holds a list")
    return content


def _check_search_path(hydra: Any, path: Path) -> None:
    """Hydra imports the packages that ``pkg://`` names, and a YAML must not have anything imported."""
    places = hydra.get("searchpath") if isinstance(hydra, Mapping) else hydra
    for place in places if isinstance(places, list) else [places]:
        if place is not None and not (
            isinstance(place, str) and place.startswith("file://") and "${" not in place
        ):
            raise UserError(
                f"{path}: hydra.searchpath: must be folders, as file:///folder, but is {show(place)}; Hydra "
                "would import a package that is named here, which a YAML must not ask for"
            )


def first_line(error: Exception) -> str:
    """Of its message."""
    return str(error).partition("\n")[0]
