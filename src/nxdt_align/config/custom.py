"""The parts of the user's own that a configuration names by dotted path, and who may import them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from nxdt_align.config.fields import is_dotted
from nxdt_align.config.schema import Config
from nxdt_align.errors import UserError

IMPORTS_HERE = "--import-own-parts imports it here"


@dataclass(frozen=True)
class NamedPart:
    """A dotted path in a configuration."""

    key: str
    path: str
    is_users_word: bool
    """Whether an override named it, and not the YAML, which may be another's."""

    def __str__(self) -> str:
        return f"{self.key} ({self.path})"


def named_parts(config: Config) -> list[NamedPart]:
    """Every part of the user's own that ``config`` names."""
    found = [
        ("model_alignment_strategy.loss", config.model_alignment_strategy.loss),
        ("data.format", config.data.format),
        ("model.optim.name", config.model.optim.name),
        *(("trainer.callbacks", part.path) for part in config.trainer.callbacks or ()),
    ]
    return [
        NamedPart(key, path, _was_overridden(config, key))
        for key, path in found
        if path is not None and is_dotted(path)
    ]


def _was_overridden(config: Config, key: str) -> bool:
    return any(key == other or key.startswith(f"{other}.") for other in config.overridden)


def parts_not_imported(config: Config) -> list[NamedPart]:
    """Those that only what trains may import, unless the user allows it."""
    return [part for part in named_parts(config) if not part.is_users_word]


def refuse_own_parts(config: Config, keys: Collection[str]) -> None:
    """Raise UserError for a part among ``keys`` that what does not train needs but may not import."""
    for part in parts_not_imported(config):
        if part.key in keys:
            raise UserError(
                f"{part.key}: {part.path} is a part of your own, which a YAML has only training import; "
                f"{IMPORTS_HERE}, as does the override {part.key}={part.path}"
            )
