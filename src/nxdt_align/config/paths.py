"""Rules on the files that a configuration names: they must exist, and config.json must fit the settings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nxdt_align.config.data import DataSource
from nxdt_align.config.faults import Fault, did_you_mean
from nxdt_align.config.pipeline import layers_of_stages
from nxdt_align.config.schema import Config
from nxdt_align.config.start import (
    VOCABULARIES,
    follow,
    holds_tokenizer,
    hub_model,
    model_config_path,
    model_is_missing,
    near,
    shape_in,
    tokenizer_of,
)

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_DATA_FILE = re.compile(r"\.(jsonl?|arrow|parquet|gz)$")
_TP = "distributed_strategy.tensor_model_parallel_size"
_LARGEST_TP = 128


def path_faults(config: Config) -> list[Fault]:
    """Every fault of the files and folders that the configuration names."""
    found = [*_data("data.train_dir", config.data.train_dir)]
    if config.validates:
        found += _data("data.val_dir", config.data.val_dir)
    found += _tokenizer(config)
    start = [*_weights("exp_manager.resume_from_checkpoint", config.exp_manager.resume_from_checkpoint)]
    found += start
    strategy = config.model_alignment_strategy
    # Only these ask for a reference; a custom loss may.
    if any(setting is not None for setting in (strategy.dpo, strategy.kto, strategy.loss)):
        path = "model_alignment_strategy.reference_model"
        found += _weights(path, config.model_alignment_strategy.reference_model)
    # Without a start, what its folder lacks is no news.
    return found if start and config.model.model_config is None else [*found, *_model(config)]


def _data(path: str, value: str | tuple[DataSource, ...] | None) -> Iterator[Fault]:
    if isinstance(value, str):
        if value and not Path(value).exists() and not _may_be_hub_data(value):
            yield Fault(
                path, "must be a file or folder that exists", value, _near(Path(value)), is_missing_path=True
            )
    else:
        for i, source in enumerate(value or ()):
            if not source.path:
                yield Fault(f"{path}.{i}.path", "is required")
            if source.weight <= 0:
                yield Fault(f"{path}.{i}.weight", "must be above 0", source.weight)
            yield from _data(f"{path}.{i}.path", source.path)


def _near(missing: Path) -> str:
    """Advice about a missing data file."""
    if not missing.parent.is_dir():
        hub = "a data set on the Hugging Face Hub is named as owner/name, or owner/name:split"
        return f"there is no folder {missing.parent} either" if missing.is_absolute() else hub
    there = sorted(f.name for f in missing.parent.iterdir() if _DATA_FILE.search(f.name))
    near = did_you_mean(missing.name, there)
    return near or (f"its folder holds {', '.join(there[:5])}" if there else "its folder holds no data file")


def _may_be_hub_data(value: str) -> bool:
    """``owner/name``, or ``owner/name:split``, where a split may be a part, ``train[:10%]``."""
    name = value.partition(":")[0]
    return "/" in name and _may_be_hub_name(name) and not _DATA_FILE.search(value)


def _may_be_hub_name(value: str) -> bool:
    """Whether it looks like ``owner/name`` or ``name``, and no local folder ``owner`` exists."""
    if not _HUB_NAME.fullmatch(value) or value.startswith("."):
        return False
    return "/" not in value or not Path(value).parent.is_dir()


def _tokenizer(config: Config) -> Iterator[Fault]:
    key, value = "data.tokenizer.type", tokenizer_of(config)
    folder = Path(value)
    start = config.exp_manager.resume_from_checkpoint
    if not value:
        if model_is_missing(config) or (start is not None and hub_model(start) is not None):
            return  # said already, or seen when it is there
        rule = "is required: the folder of a Hugging Face tokenizer"
        if start is not None:
            rule += f", as {start} has none"
        yield Fault(key, rule, is_missing_path=start is not None and not follow(Path(start)).exists())
    elif folder.is_dir():
        if not holds_tokenizer(folder) and not (folder / "tokenizer_config.json").is_file():
            rule = "must be a tokenizer's folder, with a tokenizer.json or tokenizer.model"
            yield Fault(key, rule, value)
    elif folder.exists():
        advice = f"did you mean {folder.parent}?" if folder.name in VOCABULARIES else ""
        yield Fault(key, "must be a folder, not a file", value, advice)
    elif not _may_be_hub_name(value):
        yield Fault(key, "must be a folder that exists", value, is_missing_path=True)


def tokenizer_notice(config: Config) -> Iterator[str]:
    """Which tokenizer is used where none is named."""
    found = tokenizer_of(config)
    if found and not config.data.tokenizer.type:
        yield f"data.tokenizer.type is not given: the tokenizer is that of {found}"


def _weights(path: str, value: str | None) -> Iterator[Fault]:
    if value is None:
        return
    folder = follow(Path(value))
    if hub_model(value) is not None:
        return  # what is there is seen when it is fetched
    if not folder.exists():
        rule = "must be a folder that exists"
        yield Fault(path, rule, value, near(Path(value)) or _hub_advice(value), is_missing_path=True)
    elif not folder.is_dir():
        yield Fault(path, "must be a folder, not a file", value)
    elif not any(folder.iterdir()):
        advice = "this one is empty; name a Hugging Face folder or a run, or a checkpoint of one"
        yield Fault(path, "must be a folder that holds weights", value, advice)


def _hub_advice(value: str) -> str:
    return "" if "/" in value else "a model on the Hugging Face Hub is named as owner/name"


# config.json


def positions_notice(config: Config) -> Iterator[str]:
    """Sequences beyond the positions that the model was trained on; it computes them all the same."""
    if "data.seq_length" in config.auto:
        return
    shape = _read_shape(config)
    found = None if isinstance(shape, Fault) else _size(shape or {}, "max_position_embeddings")
    limit = config.model.max_position_embeddings or found
    if limit is not None and config.data.seq_length > limit:
        yield (
            f"data.seq_length is {config.data.seq_length}, above the model's max_position_embeddings "
            f"({limit}): the model was not made for positions beyond it; set data.seq_length={limit}"
        )


def _model(config: Config) -> Iterator[Fault]:
    key, file = "model.model_config", model_config_path(config)
    if file is None:
        return
    if not file.is_file():
        if config.model.model_config is not None:
            received, rule = config.model.model_config, "must be a config.json that exists, or its folder"
            advice = (
                "null takes the start's own sizes, also those of a Hub id, as in model.model_config=null "
                "exp_manager.resume_from_checkpoint=meta-llama/Meta-Llama-3-8B"
            )
            yield Fault(key, rule, received, advice=advice, is_missing_path=True)
        elif file.parent.is_dir():
            advice = "model.model_config can name a config.json elsewhere"
            yield Fault(key, f"is required, since {file} does not exist", advice=advice, is_missing_path=True)
        return
    shape = _read_shape(config)
    if isinstance(shape, Fault):
        yield shape
    elif shape is not None:
        yield from _shape(config, shape)


def _read_shape(config: Config) -> dict[str, Any] | Fault | None:
    """What config.json holds, or why it cannot be read; None if there is none."""
    key, file = "model.model_config", model_config_path(config)
    if file is None or not file.is_file():
        return None
    try:
        shape = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        return Fault(key, f"must be JSON, but {file} cannot be read as such: {error}")
    shape = shape_in(file, shape)
    if not isinstance(shape, dict):
        return Fault(key, f"must be a JSON object, but {file} holds something else")
    return shape


def _shape(config: Config, shape: dict[str, Any]) -> Iterator[Fault]:
    """Heads and layers against the parallel sizes and against the YAML's overrides."""
    if config.model.hidden_size is not None:
        shape = shape | {"hidden_size": config.model.hidden_size}
    if config.model.num_layers is not None:
        shape = shape | {"num_hidden_layers": config.model.num_layers}
    heads, hidden = _size(shape, "num_attention_heads"), _size(shape, "hidden_size")
    if heads is None or hidden is None:
        return  # the model's reader fills in transformers' defaults, or reports the fault
    if "head_dim" not in shape and hidden % heads:
        path = "model.hidden_size" if config.model.hidden_size is not None else "model.model_config"
        yield Fault(path, f"must give a hidden_size that num_attention_heads ({heads}) divides", hidden)
    yield from _tensor_parallel(config.distributed_strategy.tensor_model_parallel_size, shape)
    layers = _size(shape, "num_hidden_layers")
    if layers is not None:
        yield from layers_of_stages(config, layers)


def _tensor_parallel(size: int, shape: dict[str, Any]) -> Iterator[Fault]:
    rules = _broken_rules(size, shape) if size >= 1 else []
    fitting = ", ".join(str(n) for n in range(1, _LARGEST_TP + 1) if rules and not _broken_rules(n, shape))
    for rule in rules:
        yield Fault(_TP, rule, size, f"possible are {fitting}")


def _broken_rules(size: int, shape: dict[str, Any]) -> list[str]:
    """Rules that ``size`` tensor-parallel ranks would break."""
    sizes = {key: _size(shape, key) for key in ("num_attention_heads", "intermediate_size", "vocab_size")}
    rules = [f"must divide {key} ({whole})" for key, whole in sizes.items() if whole and whole % size]
    kv_heads = _size(shape, "num_key_value_heads")
    # More ranks than kv heads is fine where whole heads can be replicated.
    if kv_heads and kv_heads % size and size % kv_heads:
        rules.append(f"must divide num_key_value_heads ({kv_heads}), or be a multiple of it")
    return rules


def _size(shape: dict[str, Any], key: str) -> int | None:
    value = shape.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
