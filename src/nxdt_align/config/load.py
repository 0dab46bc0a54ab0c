"""Read a YAML with Hydra and OmegaConf, apply overrides, resolve it, and convert it to a Config."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from nxdt_align.config.alignment import MAX_PROMPT_LENGTH, OBJECTIVES
from nxdt_align.config.bounds import (
    MAX_DEPTH,
    MAX_VALUES,
    check_interpolations,
    check_override,
    check_quoted_override,
)
from nxdt_align.config.convert import ALIASES, Walk, build_section
from nxdt_align.config.faults import ConfigError, Fault, did_you_mean, nearest, shorten, show
from nxdt_align.config.keys import accepts_text, all_keys, key_fields
from nxdt_align.config.schema import Config
from nxdt_align.config.yaml_files import check_yaml_files, first_line
from nxdt_align.errors import UserError
from nxdt_align.files import atomic_write
from nxdt_align.redaction import hide, looks_secret

_LONGEST_REASON = 1000
HYDRA_VERSION_BASE = "1.2"
"""The version whose rules NxDT uses to compose its YAMLs."""


def load_config(
    config_name_or_path: str, overrides: Sequence[str] = (), config_dir: Path | None = None
) -> Config:
    """The configuration of a YAML and its overrides.

    Args:
        config_name_or_path: name in ``config_dir``, with or without .yaml, or a path to a file.
        overrides: ``key=value`` for any known key, ``+key=value``, ``++key=value`` or ``~key``.
        config_dir: folder of names; None: conf in the current folder, then the package's.

    Raises UserError for a YAML or an override that cannot be read, and ConfigError (one of them)
    with every unknown key and every value of a wrong type.
    """
    config, faults = read_config(config_name_or_path, overrides, config_dir)
    if faults:
        raise ConfigError(faults, config.source)
    return config


def read_config(
    config_name_or_path: str, overrides: Sequence[str] = (), config_dir: Path | None = None
) -> tuple[Config, list[Fault]]:
    """As ``load_config``, but returns the faults; a faulty key has its default."""
    walk = Walk()
    _register_resolvers(walk)
    path = find_config(config_name_or_path, config_dir)
    for text in overrides:
        check_override(text)
    rewritten = [rewrite_override(text) for text in overrides]
    for text in rewritten:
        check_quoted_override(text)
    try:
        values = _resolved(_compose(path, rewritten), "", walk, depth=1)
        config = build_section(Config, values, "", walk)
    except RecursionError as error:
        raise UserError(f"{path}, or an override: is nested too deeply; no key here is") from error
    given, auto = frozenset(walk.given), frozenset(walk.auto)
    named = tuple(text.partition("=")[0].lstrip("+") for text in overrides if not text.startswith("~"))
    config = dataclasses.replace(
        _derive(config, given, auto), given=given, overridden=named, source=str(path), secrets=walk.secrets
    )
    return config, walk.faults


def default_config_dirs() -> list[Path]:
    """Where a name is looked up: conf in the current folder, then the package's own."""
    own = Path(__file__).resolve().parents[1] / "conf"
    return list(dict.fromkeys([(Path.cwd() / "conf").resolve(), own]))


def find_config(name: str, config_dir: Path | None = None) -> Path:
    """The file that ``name`` refers to. Raises UserError, with the known names, if there is none."""
    file = name if name.endswith(".yaml") else f"{name}.yaml"
    folders = [config_dir] if config_dir is not None else default_config_dirs()
    candidates = [folder / file for folder in folders]
    candidates += [Path(file).expanduser()] if config_dir is None or Path(file).name != file else []
    for candidate in candidates:
        if _is_file(candidate):
            return candidate.resolve()
    known = sorted({found.stem for folder in folders if folder.is_dir() for found in folder.glob("*.yaml")})
    looked = ", ".join(shorten(str(candidate)) for candidate in candidates)
    there = f"there are: {', '.join(known)}" if known else "there are no configs in that folder"
    near = did_you_mean(Path(file).stem, known)
    raise UserError(f"no config {show(name)}: looked for {looked}; {near + ' ' if near else ''}{there}")


def _is_file(path: Path) -> bool:
    """False too for what cannot be a file's name: too long, a zero byte, half a character."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def presets(config_dir: Path | None = None) -> list[tuple[str, str]]:
    """The configs and the purpose of each, the first line of its comment.

    Raises UserError if there are none.
    """
    files = _preset_files(config_dir)
    return [(name, _purpose(files[name])) for name in sorted(files)]


def copy_preset(name: str, destination: Path, config_dir: Path | None = None) -> Path:
    """Copy a config, comments included, to a new file, or into a folder; returns the file.

    Raises UserError where there is no config of this name, or a file in its place.
    """
    files = _preset_files(config_dir)
    stem = name.removesuffix(".yaml")
    if stem not in files:
        near = nearest(stem, sorted(files))
        raise UserError(f"no config {name!r}: {f'did you mean {near}?' if near else 'presets lists them'}")
    file = destination / f"{stem}.yaml" if destination.is_dir() else destination
    if file.suffix != ".yaml":
        raise UserError(f"{file} must end in .yaml, as --config-name takes it")
    if file.exists():
        raise UserError(f"{file} exists already: choose another name, or remove it")
    atomic_write(file, files[stem].read_bytes())
    return file


def _preset_files(config_dir: Path | None) -> dict[str, Path]:
    folders = [config_dir] if config_dir is not None else default_config_dirs()
    files: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.yaml")):
            files.setdefault(path.stem, path)
    if not files:
        raise UserError(f"there are no configs in {', '.join(map(str, folders))}")
    return files


def _purpose(path: Path) -> str:
    first = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def to_yaml(config: Config) -> str:
    """The configuration as a YAML of every key, which loads as the same configuration.

    Values from environment variables whose names look secret are written as the YAML had them,
    ``${oc.env:NAME}``.
    """
    written = {**config.secrets, **dict.fromkeys(config.auto, "auto")}
    return OmegaConf.to_yaml(OmegaConf.create(_as_written(_plain(config), "", written)))


def _as_written(value: Any, path: str, texts: Mapping[str, str]) -> Any:
    """``value`` with ``texts`` at their paths."""
    if path in texts:
        return texts[path]
    prefix = f"{path}." if path else ""
    if isinstance(value, Mapping):
        return {key: _as_written(item, f"{prefix}{key}", texts) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_written(item, f"{prefix}{number}", texts) for number, item in enumerate(value)]
    return value


# Overrides


def rewrite_override(text: str) -> str:
    """``key=value`` in Hydra's grammar, for any key, whether or not the YAML has it.

    Text values are quoted, so that the user need not quote paths.
    """
    key, equals, value = text.partition("=")
    if not equals or key.startswith("~"):
        return text
    name = key.lstrip("+")
    # Hydra's plain key=value requires that the YAML has the key; "++" adds or overrides.
    plus = key[: len(key) - len(name)] or "++"
    name = ALIASES.get(name, name)
    known = all_keys().get(name)
    if known is not None and known.is_section and not value.startswith("{") and value != "null":
        return text
    if known is not None and not known.is_section and accepts_text(known.hint):
        value = quoted(value)
    return f"{plus}{name}={value}"


def quoted(value: str) -> str:
    """A text quoted for Hydra's grammar; a quoted text, a list, a mapping or null stays as it is."""
    if value[:1] in ("'", '"', "[", "{") or value.lower() in ("", "null"):
        return value
    escaped = ""
    backslashes = 0
    # Hydra's grammar (OverrideLexer.g4): backslashes are literal, except before a quote.
    for character in value + "\0":
        if character in ("'", "\0"):
            escaped += "\\" * backslashes
        escaped += "\\'" if character == "'" else character
        backslashes = backslashes + 1 if character == "\\" else 0
    return f"'{escaped[:-1]}'"


# Reading


def _register_resolvers(walk: Walk) -> None:
    def env(name: str, default: Any = _REQUIRED) -> Any:
        """OmegaConf's ``oc.env``, which tells ``walk`` of secrets."""
        value = oc.env(name, None)
        if value is None:
            return oc.env(name) if default is _REQUIRED else oc.env(name, default)
        if looks_secret(name):
            walk.secrets_read += 1
            hide(value, f"${{oc.env:{name}}}")
        return value

    OmegaConf.register_new_resolver("oc.env", env, replace=True)
    OmegaConf.register_new_resolver("multiply", _multiply, replace=True)


_REQUIRED = object()


def _multiply(*factors: Any) -> int | float:
    """``${multiply:a, b}`` of NxDT's YAMLs: integers give an integer."""
    if not factors or any(factor is None or isinstance(factor, bool) for factor in factors):
        raise ValueError(f"multiply takes numbers, as ${{multiply:8, 4}}, but got {list(factors)}")
    product = math.prod([float(factor) for factor in factors], start=1.0)
    return int(product) if product.is_integer() else product


def _compose(path: Path, overrides: list[str]) -> DictConfig:
    check_yaml_files(path, overrides)
    with initialize_config_dir(str(path.parent), version_base=HYDRA_VERSION_BASE):
        try:
            config = compose(path.stem, overrides=overrides)
        except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
            # Hydra raises a bare ValueError for a number in place of a config group, e.g. trainer=3, and the
            # system's OSError for a key that it looks up as a file's name.
            raise UserError(_compose_message(error, path, overrides)) from error
    config = _with_aliases(config)
    check_interpolations(OmegaConf.to_container(config, resolve=False), path)  # type: ignore[arg-type]
    return config


def _compose_message(error: Exception, path: Path, overrides: list[str]) -> str:
    culprit = next((text for text in overrides if text in str(error)), None)
    cause = f": {error.__cause__}" if error.__cause__ is not None else ""
    reason = " ".join((str(error) + cause).split())
    if culprit is None and len(overrides) == 1:
        culprit = overrides[0]
    if not overrides:
        return f"{path}: {reason}"
    if "multirun" in reason and culprit:
        key, _, value = culprit.lstrip("+").partition("=")
        return (
            f"{key}: must be one value, but is {show(value)}; start one run for each value. A list is "
            f"written {key}=[a,b], and a text with a comma in quotes, {key}=\"'a,b'\""
        )
    names = ", ".join(map(shorten, overrides))
    about = f"the override {show(culprit)}" if culprit else f"one of the overrides {names}"
    reason = shorten(reason, _LONGEST_REASON)
    return f"{about} cannot be read or applied: {reason}. Overrides are key=value, +key=value or ~key"


def _with_aliases(config: DictConfig) -> DictConfig:
    """Copy each key with an alternative spelling to its canonical name, before interpolations refer to it."""
    for alias, key in ALIASES.items():
        section, _, name = key.rpartition(".")
        node: Any = OmegaConf.select(config, section) if section else config
        spelled = alias.rpartition(".")[2]
        if isinstance(node, DictConfig) and spelled in node and name not in node:
            with open_dict(node):
                node[name] = OmegaConf.to_container(node, resolve=False)[spelled]  # type: ignore[index, call-overload]
    return config


def _resolved(node: DictConfig | ListConfig, prefix: str, walk: Walk, depth: int) -> Any:
    """``node`` with every interpolation resolved; one that fails becomes a fault and is left out."""
    keys: Any = range(len(node)) if isinstance(node, ListConfig) else list(node)
    pairs = [(key, _resolved_item(node, key, f"{prefix}{key!s}", walk, depth)) for key in keys]
    kept = {key: value for key, value in pairs if value is not _FAULTY}
    return list(kept.values()) if isinstance(node, ListConfig) else kept


_FAULTY = object()


def _resolved_item(node: DictConfig | ListConfig, key: Any, path: str, walk: Walk, depth: int) -> Any:
    walk.values += 1
    if walk.values > MAX_VALUES:
        raise UserError(f"{path}: interpolations give more than {MAX_VALUES:,} values; write fewer")
    before = walk.secrets_read
    try:
        value = node[key]
    except (OmegaConfBaseException, ValueError, TypeError, OverflowError) as error:
        walk.faults.append(Fault(path, f"cannot be resolved: {first_line(error)}"))
        return _FAULTY
    if walk.secrets_read > before:
        raw: Any = node._get_node(key)
        walk.secrets[path] = str(raw._value())
    if not isinstance(value, (DictConfig, ListConfig)):
        return value
    if depth > MAX_DEPTH:
        walk.faults.append(
            Fault(path, "must not lie inside what it stands for", advice="write the values out")
        )
        return _FAULTY
    return _resolved(value, f"{path}.", walk, depth + 1)


# Defaults that follow from other keys

_LENGTH = "data.seq_length"


def prompt_limit(seq_length: int, *, is_auto: bool) -> int:
    """The default of max_prompt_length, for sequences of a length that is the user's or, ``is_auto``, the
    run's."""
    return max(1, seq_length * 3 // 4) if is_auto else min(MAX_PROMPT_LENGTH, seq_length // 2)


def _derive(config: Config, given: frozenset[str], auto: frozenset[str]) -> Config:
    """``config`` with the lengths that follow from others, and ``auto`` where they follow from what is auto.

    Args:
        given: keys that the YAML has.
        auto: those of them that are auto.
    """
    data = config.data
    if _LENGTH not in given - auto and config.model.encoder_seq_length is not None:
        data = dataclasses.replace(data, seq_length=config.model.encoder_seq_length)
    strategy = config.model_alignment_strategy
    limit = prompt_limit(data.seq_length, is_auto=_LENGTH in auto)
    for name in OBJECTIVES:
        objective, key = getattr(strategy, name), f"model_alignment_strategy.{name}.max_prompt_length"
        if objective is None or key in given - auto:
            continue
        shorter = dataclasses.replace(objective, max_prompt_length=limit)
        strategy = dataclasses.replace(strategy, **{name: shorter})
        auto = auto | {key} if _LENGTH in auto else auto
    return dataclasses.replace(config, data=data, model_alignment_strategy=strategy, auto=auto)


# Writing


def _plain(value: Any) -> Any:
    """Dataclasses to plain YAML values; an open mapping's keys go into its section."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain: dict[str, Any] = {}
        for field in key_fields(type(value)):
            item = _plain(getattr(value, field.name))
            plain.update(item if field.metadata.get("open") else {field.name: item})
        return plain
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value
