"""Reads a Llama's shape from Hugging Face's ``config.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nxdt_align.models.config import (
    LlamaConfig,
    ModelConfigError,
    RopeScaling,
    TokenIds,
    broken_rules,
    config_error,
)


def read_config_json(path: str | Path) -> LlamaConfig:
    """The shape in a ``config.json``, or in that of a folder. Raises ModelConfigError."""
    file, values = load_config_json(path)
    return from_hf_dict(values, where=str(file))


def load_config_json(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file found at ``path``, a file or a folder, and its content. Raises ModelConfigError."""
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    if not file.is_file():
        raise ModelConfigError(
            f"no model configuration at {file}: give a Hugging Face config.json, or a folder that has one"
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelConfigError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelConfigError(f"{file} must hold a JSON object, but holds a {type(values).__name__}")
    return file, values


def from_hf_dict(values: Mapping[str, Any], *, where: str = "config.json") -> LlamaConfig:
    """The shape in a Hugging Face configuration; a missing key has transformers' default.

    Both spellings of the rotary settings are read: ``rope_theta`` with ``rope_scaling``
    (transformers 4), and ``rope_parameters`` (5). A Llama has no window, whatever its file says.

    Raises ModelConfigError naming every fault, and what this Llama does not do (biases, other
    activations, other rotary scalings, quantised weights).
    """
    fields = _Fields(values)
    found = _sizes(fields)
    found["rms_norm_eps"] = fields.number("rms_norm_eps", 1e-6)
    found["initializer_range"] = fields.number("initializer_range", 0.02)
    found["tie_word_embeddings"] = fields.boolean("tie_word_embeddings", False)
    for key, default in (("bos_token_id", 1), ("eos_token_id", 2), ("pad_token_id", None)):
        found[key] = fields.token_ids(key, default)
    found["rope_theta"], found["rope_scaling"] = _rotary(fields, found["max_position_embeddings"])
    if found["model_type"] == "mistral":
        has_none = "sliding_window" in values and values["sliding_window"] is None
        found["sliding_window"] = None if has_none else fields.integer("sliding_window", 4096)
    _refuse_unsupported(fields)
    faults = fields.faults + broken_rules(found)
    if faults:
        raise config_error(where, faults)
    return LlamaConfig(**found)


def _sizes(fields: _Fields) -> dict[str, Any]:
    model_type = fields.choice("model_type", ("llama", "mistral"), "llama")
    is_mistral = model_type == "mistral"
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    found: dict[str, Any] = {"model_type": model_type} | {key: fields.integer(key) for key in required}
    hidden, heads = found["hidden_size"], found["num_attention_heads"]
    absent_kv_heads = 8 if is_mistral and "num_key_value_heads" not in fields.values else heads
    found["num_key_value_heads"] = fields.integer("num_key_value_heads", absent_kv_heads)
    found["head_dim"] = fields.integer("head_dim", None)
    if found["head_dim"] is None and hidden and heads:
        if hidden % heads:
            fields.fault("hidden_size", f"must be a multiple of `num_attention_heads` ({heads})", hidden)
        else:
            found["head_dim"] = hidden // heads
    found["max_position_embeddings"] = fields.integer(
        "max_position_embeddings", 131072 if is_mistral else 2048
    )
    return found


def _rotary(fields: _Fields, max_positions: int | None) -> tuple[float | None, RopeScaling | None]:
    """Theta and scaling, out of whichever spellings are there; two that differ are a fault."""
    thetas = {"rope_theta": fields.number("rope_theta", None)}
    scalings = {}
    for key in ("rope_scaling", "rope_parameters"):
        part = fields.part(key)
        if part is not None:
            thetas[f"{key}.rope_theta"] = part.number("rope_theta", None)
            scalings[key] = _scaling(part, fields.values, max_positions)
    given = {key: theta for key, theta in thetas.items() if theta is not None}
    if len(set(given.values())) > 1:
        fields.fault(" and ".join(given), "must be equal where several are given", list(given.values()))
    if len(set(scalings.values())) > 1:
        said = [fields.values[key] for key in scalings]
        fields.fault(" and ".join(scalings), "must say the same where both are given", said)
    return next(iter(given.values()), 10000.0), next(iter(scalings.values()), None)


def _scaling(part: _Fields, whole: Mapping[str, Any], max_positions: int | None) -> RopeScaling | None:
    if part.values.get("partial_rotary_factor") not in (None, 1):
        part.fault("partial_rotary_factor", "must be 1", part.values["partial_rotary_factor"])
    spelling = "type" if "type" in part.values and "rope_type" not in part.values else "rope_type"
    kind = part.choice(spelling, ("default", "linear", "llama3"), "default")
    if kind is None or kind == "default":
        return None
    numbers: dict[str, Any] = {"factor": part.number("factor")}
    if kind == "llama3":
        numbers["low_freq_factor"] = part.number("low_freq_factor")
        numbers["high_freq_factor"] = part.number("high_freq_factor")
        # transformers' default; fixed here, so that an override of max_position_embeddings does not move it.
        name = "original_max_position_embeddings"
        numbers[name] = part.integer(name, whole.get(name, max_positions))
        low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
        if low is not None and high is not None and high <= low:
            part.fault("high_freq_factor", f"must be above low_freq_factor ({low})", high)
    if None in numbers.values():
        return None
    return RopeScaling(rope_type=kind, **numbers)


def _refuse_unsupported(fields: _Fields) -> None:
    required: tuple[tuple[str, Any], ...] = (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("attention_dropout", 0),
        ("partial_rotary_factor", 1),
    )
    for key, only in required:
        value = fields.values.get(key)
        if value is not None and value != only:
            fields.fault(key, f"must be {json.dumps(only)} (no other is supported)", value)
    quantization = fields.values.get("quantization_config")
    if quantization is not None:
        fields.fault("quantization_config", "must be absent (give unquantised weights)", quantization)


_REQUIRED: Any = object()


class _Fields:
    """Reads typed values out of JSON and gathers the faults; a value at fault is None.

    A null counts as absent, except for token ids.
    """

    def __init__(self, values: Mapping[str, Any], faults: list[str] | None = None, prefix: str = "") -> None:
        self.values = values
        self.faults: list[str] = [] if faults is None else faults
        self._prefix = prefix

    def fault(self, key: str, rule: str, value: object) -> None:
        shown = value if isinstance(value, str) else json.dumps(value, default=str)
        self.faults.append(f"`{self._prefix}{key}` {rule}, but is {shown}")

    def part(self, key: str) -> _Fields | None:
        value = self.values.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, Mapping):
            self.fault(key, "must be an object or null", value)
            return None
        return _Fields(value, self.faults, f"{self._prefix}{key}.")

    def integer(self, key: str, default: int | None = _REQUIRED) -> int | None:
        value = self._take(key, default)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        self.fault(key, "must be an integer", value)
        return None

    def number(self, key: str, default: float | None = _REQUIRED) -> float | None:
        value = self._take(key, default)
        if value is None:
            return None
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        self.fault(key, "must be a finite number", value)
        return None

    def boolean(self, key: str, default: bool) -> bool | None:
        value = self._take(key, default)
        if isinstance(value, bool):
            return value
        self.fault(key, "must be true or false", value)
        return None

    def choice(self, key: str, choices: Sequence[str], default: str) -> Any:
        value = self._take(key, default)
        if value in choices:
            return value
        self.fault(key, f"must be one of {', '.join(choices)}", value)
        return None

    def token_ids(self, key: str, default: int | None) -> TokenIds:
        value = self.values.get(key, default)
        items = value if isinstance(value, list) else [0 if value is None else value]
        if not items or any(isinstance(item, bool) or not isinstance(item, int) for item in items):
            self.fault(key, "must be an integer, a list of integers or null", value)
            return None
        return tuple(value) if isinstance(value, list) else value

    def _take(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            self.faults.append(f"`{self._prefix}{key}` is missing")
            return None
        return default
