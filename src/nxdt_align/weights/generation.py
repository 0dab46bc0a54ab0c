"""generation_config.json: the special tokens and sampling settings that a model's folder brings along.

A copy of a model keeps those of the folder it comes from; a trained one also stops at the tokens that its
training data ended with.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nxdt_align.models.presets import ModelShape
from nxdt_align.weights.digests import require_unchanged
from nxdt_align.weights.extents import WeightsError

log = logging.getLogger(__name__)

GENERATION = "generation_config.json"
_EOS = "eos_token_id"
_DERIVED = "_from_model_config"
"""transformers replaces the ids of a file with this key by those of config.json."""
_ONLY_SAMPLING: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "typical_p": 1.0,
    "min_p": None,
    "top_h": None,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""Settings without effect unless ``do_sample`` is true, and their values when not set."""


def read_generation(folder: Path) -> dict[str, Any] | None:
    """What the file in ``folder`` says; None if there is none.

    Raises WeightsError if it is not a JSON object, or its ``eos_token_id`` is not of whole numbers.
    """
    file = folder / GENERATION
    if not file.is_file():
        return None
    require_unchanged(file)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise WeightsError(
            f"{file} cannot be read as JSON ({error}): copy or download it again, or remove it"
        ) from error
    if not isinstance(values, dict):
        raise WeightsError(f"{file} must hold a JSON object, but holds a {type(values).__name__}")
    try:
        _ids(values.get(_EOS))
    except TypeError as error:
        raise WeightsError(
            f"{file}: `{_EOS}` must be a whole number, a list of them or null, but is "
            f"{json.dumps(values[_EOS])}; correct or remove it"
        ) from error
    return values


def generation_json(
    config: ModelShape, start: Mapping[str, Any] | None = None, ends: Iterable[int] = ()
) -> dict[str, Any]:
    """The content of generation_config.json.

    Args:
        start: what the folder of the start weights says, kept as it is; None takes the special tokens of
            ``config``.
        ends: tokens that generation must stop at, too.
    """
    shape = config.to_hf_dict()
    derived = {key: shape[key] for key in ("bos_token_id", _EOS, "pad_token_id") if shape[key] is not None}
    values = {_DERIVED: True, **derived} if start is None else dict(start)
    known = _ids(values.get(_EOS)) or _ids(shape[_EOS])
    more = [token for token in dict.fromkeys(ends) if token not in known]
    if more:
        values.pop(_DERIVED, None)
        every = [*known, *more]
        values[_EOS] = every if len(every) > 1 else every[0]
    return values


def note_unused_sampling(values: Mapping[str, Any], place: Path) -> None:
    """Log settings that transformers ignores, and for which its later versions refuse to save a model."""
    if values.get("do_sample") is True:
        return
    unused = [key for key, unset in _ONLY_SAMPLING.items() if values.get(key) not in (None, unset)]
    if unused:
        log.warning(
            "%s: %s %s kept, but do_sample is not true, so transformers ignores them and may refuse to save "
            "the model once it is changed: set do_sample to true there, or remove them",
            *(place / GENERATION, ", ".join(unused), "are" if len(unused) > 1 else "is"),
        )


def _ids(value: object) -> list[int]:
    """Raises TypeError for what are no token ids."""
    items = value if isinstance(value, list) else [] if value is None else [value]
    ids = [item for item in items if isinstance(item, int) and not isinstance(item, bool)]
    if len(ids) < len(items):
        raise TypeError(f"{value!r} is no token id")
    return ids
