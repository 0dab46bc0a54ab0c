"""Reads a model's shape from Hugging Face's ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from nxdt_align.models.backend.config import BY_LONGEST_POSITION, TransformersConfig, is_recorded
from nxdt_align.models.config import (
    Activation,
    DecoderConfig,
    ModelConfigError,
    ModelShape,
    RopeScaling,
    broken_rules,
    config_error,
)
from nxdt_align.models.families import FAMILIES, Family
from nxdt_align.models.families.base import FULL, SLIDING
from nxdt_align.models.fields import Fields

Implementation = Literal["auto", "ours", "transformers"]


def read_config_json(path: str | Path) -> DecoderConfig:
    """The shape in a ``config.json``, or in that of a folder. Raises ModelConfigError."""
    file, values = load_config_json(path)
    return from_hf_dict(values, where=str(file))


def read_model_json(
    path: str | Path, implementation: Implementation = "auto", *, trust_remote_code: bool = False
) -> ModelShape:
    """As ``model_of``, of a file or a folder."""
    file, values = load_config_json(path)
    folder = str(file.parent) if trust_remote_code and "auto_map" in values else None
    return model_of(values, implementation, where=str(file), remote_folder=folder)


def model_of(
    values: Mapping[str, Any],
    implementation: Implementation = "auto",
    *,
    where: str = "config.json",
    remote_folder: str | None = None,
) -> ModelShape:
    """The model that a Hugging Face configuration, or a run's record of its model, describes.

    Args:
        implementation: who computes it; ``auto``: our decoder where it covers the family, else transformers.
        remote_folder: of a model with code of its own, which may be run.

    Raises ModelConfigError.
    """
    kind = values.get("model_type") or "llama"
    is_covered = kind in FAMILIES and not is_recorded(values)
    if implementation == "ours" or (implementation == "auto" and is_covered):
        return from_hf_dict(values, where=where)
    return TransformersConfig.of(values, where=where, remote_folder=remote_folder)


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


def from_hf_dict(values: Mapping[str, Any], *, where: str = "config.json") -> DecoderConfig:
    """The shape in a Hugging Face configuration; a missing key has transformers' default.

    Both spellings of the rotary settings are read: ``rope_theta`` with ``rope_scaling``
    (transformers 4), and ``rope_parameters`` (5). A Llama has no window, whatever its file says.

    Raises ModelConfigError naming every fault, and what the decoder does not do (other families and
    activations, other rotary scalings, quantised weights).
    """
    model_type = model_type_of(values, where=where)
    family = FAMILIES[model_type]
    fields = Fields({**family.defaults, **values})
    found = {"model_type": model_type, **_sizes(fields), **family.traits}
    found["rms_norm_eps"] = fields.number("rms_norm_eps", 1e-6)
    found["initializer_range"] = fields.number("initializer_range", 0.02)
    found["tie_word_embeddings"] = fields.boolean("tie_word_embeddings", False)
    for key, default in (("bos_token_id", 1), ("eos_token_id", 2), ("pad_token_id", None)):
        found[key] = fields.token_ids(key, default)
    found["activation"] = fields.choice(family.activation_key, get_args(Activation), "silu")
    found |= _rotary(fields, family, found["max_position_embeddings"])
    found |= family.read(fields, found)
    _refuse_unsupported(fields, family)
    faults = fields.faults + broken_rules(found)
    if faults:
        raise config_error(where, faults)
    return DecoderConfig(**found)


def model_type_of(values: Mapping[str, Any], *, where: str = "config.json") -> str:
    """The family that a configuration names; Llama where it names none.

    Raises ModelConfigError with what is known: of another model's file nothing else is worth naming.
    """
    model_type = values.get("model_type") or "llama"
    if isinstance(model_type, str) and model_type in FAMILIES:
        return model_type
    kind = ""
    if "vision_config" in values or "audio_config" in values:
        kind = ", a model of images or sounds; of those nothing is trained here"
        text = values.get("text_config")
        if isinstance(text, Mapping) and text.get("model_type") in FAMILIES:
            kind += (
                f". Its text model is {text['model_type']}: save that by itself, with transformers, and give "
                "its folder"
            )
    elif values.get("is_encoder_decoder") is True:
        kind = ", a model with an encoder; only models that continue a text are trained here"
    shown = model_type if isinstance(model_type, str) else json.dumps(model_type, default=str)
    raise config_error(where, [f"`model_type` must be one of {', '.join(FAMILIES)}, but is {shown}{kind}"])


def _sizes(fields: Fields) -> dict[str, Any]:
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    found: dict[str, Any] = {key: fields.integer(key) for key in required}
    hidden, heads = found["hidden_size"], found["num_attention_heads"]
    found["num_key_value_heads"] = fields.integer("num_key_value_heads", heads)
    found["head_dim"] = fields.integer("head_dim", None)
    if found["head_dim"] is None and hidden and heads:
        if hidden % heads:
            fields.fault("hidden_size", f"must be a multiple of `num_attention_heads` ({heads})", hidden)
        else:
            found["head_dim"] = hidden // heads
    found["max_position_embeddings"] = fields.integer("max_position_embeddings", 2048)
    return found


def _rotary(fields: Fields, family: Family, max_positions: int | None) -> dict[str, Any]:
    """Bases, scaling and the rotated part, out of whichever spellings are there; two that differ are a
    fault."""
    thetas = {"rope_theta": fields.number("rope_theta", None)}
    parts = {"partial_rotary_factor": fields.number("partial_rotary_factor", None)}
    local: dict[str, float | None] = {"rope_local_base_freq": None}
    if family.local_rope_theta is not None:
        local["rope_local_base_freq"] = fields.number("rope_local_base_freq", None)
    scalings = {}
    for key in ("rope_scaling", "rope_parameters"):
        part = fields.part(key)
        if part is not None and family.local_rope_theta is not None and {FULL, SLIDING} & set(part.values):
            local[f"{key}.{SLIDING}.rope_theta"] = _local_theta(part)
            part = part.part(FULL)
        if part is not None:
            thetas[f"{key}.rope_theta"] = part.number("rope_theta", None)
            parts[f"{key}.partial_rotary_factor"] = part.number("partial_rotary_factor", None)
            scalings[key] = _scaling(part, family, fields.values, max_positions)
    if len(set(scalings.values())) > 1:
        said = [fields.values[key] for key in scalings]
        fields.fault(" and ".join(scalings), "must say the same where both are given", said)
    rotated = _agreed(fields, parts, 1.0)
    if rotated != 1 and not family.partial_rotary:
        fields.fault("partial_rotary_factor", "must be 1 (no other is supported)", rotated)
    return {
        "rope_theta": _agreed(fields, thetas, family.rope_theta),
        "rope_scaling": next(iter(scalings.values()), None),
        "local_rope_theta": _agreed(fields, local, family.local_rope_theta),
        "partial_rotary_factor": rotated,
    }


def _local_theta(part: Fields) -> float | None:
    """The base of the layers with a window."""
    local = part.part(SLIDING)
    if local is None:
        return None
    local.choice("rope_type", ("default",), "default")
    return local.number("rope_theta", None)


def _agreed(fields: Fields, spellings: Mapping[str, float | None], absent: Any) -> Any:
    given = {key: value for key, value in spellings.items() if value is not None}
    if len(set(given.values())) > 1:
        fields.fault(" and ".join(given), "must be equal where several are given", list(given.values()))
    return next(iter(given.values()), absent)


def _scaling(
    part: Fields, family: Family, whole: Mapping[str, Any], max_positions: int | None
) -> RopeScaling | None:
    spelling = "type" if "type" in part.values and "rope_type" not in part.values else "rope_type"
    kind = part.values.get(spelling) or "default"
    if kind in BY_LONGEST_POSITION:
        part.fault(
            spelling,
            f"must be one of {', '.join(family.rope_types)} (that choose their frequencies once, where "
            f"{kind} does by the longest position of a batch, so that packing would change results)",
            kind,
        )
        return None
    kind = part.choice(spelling, family.rope_types, "default")
    if kind is None or kind == "default":
        return None
    numbers: dict[str, Any] = {"factor": part.number("factor")}
    if kind in ("llama3", "yarn"):
        # transformers' default; fixed here, so that an override of max_position_embeddings does not move it.
        name = "original_max_position_embeddings"
        numbers[name] = part.integer(name, whole.get(name, max_positions))
    if kind == "llama3":
        numbers["low_freq_factor"] = part.number("low_freq_factor")
        numbers["high_freq_factor"] = part.number("high_freq_factor")
        low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
        if low is not None and high is not None and high <= low:
            part.fault("high_freq_factor", f"must be above low_freq_factor ({low})", high)
    if None in numbers.values():
        return None
    if kind == "yarn":
        for key in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"):
            numbers[key] = part.number(key, None)
        numbers["truncate"] = part.boolean("truncate", True) if "truncate" in part.values else None
    return RopeScaling(rope_type=kind, **numbers)


def _refuse_unsupported(fields: Fields, family: Family) -> None:
    for key, only in (("attention_dropout", 0), *family.only.items()):
        value = fields.values.get(key)
        if value is not None and value != only:
            fields.fault(key, f"must be {json.dumps(only)} (no other is supported)", value)
    quantization = fields.values.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        by = f", which {method} has quantised" if isinstance(method, str) else ""
        fields.fault("quantization_config", f"must be absent (give unquantised weights){by}", quantization)
