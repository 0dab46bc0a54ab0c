"""Arguments of convert, export and inspect, under this package's names and NxD Training's."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from nxdt_align.errors import UserError

_DTYPES = ("bf16", "fp16", "fp32")
_DIRECTIONS = (
    "convert_from_full_state",
    "convert_to_full_state",
    "convert_from_xser",
    "convert_to_xser",
)
_UNSUPPORTED = ("virtual_pp_size", "ep_size")
_CUT = re.compile(r"(?:(?:model\.)?layers\.)?(\d+)")


def add_conversion_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the three verbs to the command line's parser."""
    convert = _add(verbs, "convert", "convert weights between Hugging Face, NxD Training, Meta and our own")
    convert.add_argument(
        "--to", choices=("hf", "nxdt", "native"), help="layout to write (default: by the source)"
    )
    _add_sizes(convert)
    _add_nxdt(convert)
    export = _add(verbs, "export", "write any checkpoint as a folder that transformers loads")
    export.add_argument(
        "--merge",
        action="store_true",
        help="adapters: write the whole model with them added in (default: the adapter, as PEFT loads it)",
    )
    for verb in (convert, export):
        _add_common(verb)
    inspect = verbs.add_parser("inspect", help="describe a checkpoint", allow_abbrev=False)
    inspect.add_argument("path", type=Path, metavar="PATH")
    inspect.add_argument("--config", type=Path, metavar="FILE", help="config.json of the model")
    inspect.add_argument("--json", action="store_true", help="as JSON")


def conversion_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``convert`` or ``export`` in run/conversion.py, and the two paths as ``source``
    and ``destination``. Raises UserError."""
    values = dict(vars(arguments))
    source = values.pop("source") or values.pop("input_dir", None)
    destination = values.pop("destination") or values.pop("output_dir", None)
    if source is None or destination is None:
        raise UserError(
            f"{arguments.verb} needs a source and a destination: nxdt-align {arguments.verb} SRC DST"
        )
    directions = [name for name in _DIRECTIONS if values.pop(name, False)]
    if len(directions) > 1:
        raise UserError(f"give one direction, not {' and '.join('--' + name for name in directions)}")
    for direction in directions:
        values |= _direction(direction) | {"direction": direction}
    for name in _UNSUPPORTED:
        if values.pop(name, 1) != 1:
            raise UserError(f"--{name}: must be 1, no other is supported")
    if values.pop("hw_backend", "trn1") != "trn1":
        raise UserError("--hw_backend: must be trn1; the order of heads for trn2 is not supported")
    # Accepted for NxD Training's command lines; their only valid values mean nothing here.
    for name in ("verb", "command", "help_keys", "model_style", "input_dir", "output_dir"):
        values.pop(name, None)
    size = values.pop("max_shard_size")
    return values | {"source": source, "destination": destination, "max_shard_bytes": int(size * 1e9)}


def _direction(name: str) -> dict[str, Any]:
    """The target that a --convert_* flag of NxD's converter selects."""
    if name == "convert_from_xser":
        return {"to": "nxdt", "xser": False}
    if name == "convert_to_xser":
        return {"to": "nxdt", "xser": True}
    return {"to": "nxdt" if name == "convert_from_full_state" else "hf"}


def _add(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
    verb.add_argument(
        "source", type=Path, nargs="?", metavar="SOURCE", help="folder, or one file, of weights"
    )
    verb.add_argument("destination", type=Path, nargs="?", metavar="DESTINATION", help="folder to make")
    return verb


def _add_sizes(verb: argparse.ArgumentParser) -> None:
    add = verb.add_argument
    add(
        "--tp",
        "--tp_size",
        dest="tp",
        type=_size,
        metavar="N",
        help="tensor-parallel size (default: that of the shards read, or 1)",
    )
    add(
        "--pp",
        "--pp_size",
        dest="pp",
        type=_size,
        metavar="N",
        help="pipeline-parallel size (default: the same)",
    )
    add(
        "--pipeline-cuts",
        dest="pipeline_cuts",
        type=_layers,
        metavar="LAYERS",
        help="layers after which a stage ends, as model.pipeline_cuts: 10,20 (default: even stages)",
    )
    add(
        *("--kv-replicator", "--kv_size_multiplier"),
        dest="kv_multiplier",
        type=_size,
        metavar="N",
        help="copies of each kv head (default: as few as fit)",
    )
    add("--vocab-size", dest="vocab", type=_size, metavar="N", help="rows to pad the vocabulary to")
    add("--qkv_linear", **_switch("GQAQKVColumnParallelLinear (default: where tp = kv heads x copies)"))
    add("--fuse_qkv", **_switch("q, k and v as one tensor"))
    add("--coalesce_qkv", **_switch("one column-parallel qkv layer, without qkv_linear"))
    add("--save_xser", dest="xser", **_switch("one file per tensor, as save_xser writes", default=False))


def _add_nxdt(verb: argparse.ArgumentParser) -> None:
    """Further options of NxD Training's converter (checkpoint_converter.py)."""
    add = verb.add_argument
    add("--input_dir", type=Path, metavar="PATH", help="SOURCE under NxD Training's name")
    add("--output_dir", type=Path, metavar="PATH", help="DESTINATION under NxD Training's name")
    add("--model_style", choices=("hf",), default="hf", help="hf; megatron is not supported")
    add("--hw_backend", default="trn1", help="trn1")
    add("--n_layers", type=int, metavar="N", help="checked against the model's")
    add("--load_xser", **_switch("checked against the source"))
    for name in _UNSUPPORTED:
        add(f"--{name}", type=int, default=1, help=argparse.SUPPRESS)
    for name in _DIRECTIONS:
        add(f"--{name}", action="store_true", help="direction; detected if left out")


def _add_common(verb: argparse.ArgumentParser) -> None:
    add = verb.add_argument
    add("--config", type=Path, metavar="FILE", help="config.json of the model, where the source has none")
    add("--dtype", choices=_DTYPES, help="cast the weights (default: keep each as it is)")
    add("--tokenizer", type=Path, metavar="DIR", help="tokenizer to copy into a Hugging Face folder")
    add("--max-shard-size", type=float, default=5.0, metavar="GB", help="of a safetensors file (default: 5)")
    add("--resume", action="store_true", help="resume an interrupted conversion")
    add("--no-verify", dest="verify", action="store_false", help="do not read back what was written")
    add(
        "--first-replica",
        action="store_true",
        help="take the first rank's copy of heads and norms where ranks differ",
    )
    add("--workers", type=_size, metavar="N", help="threads (default: 4)")
    add("--quiet", action="store_true", help="no progress bar")


def _switch(text: str, default: bool | None = None) -> dict[str, Any]:
    """``--flag``, ``--flag True`` and ``--flag False``."""
    return {
        # Not type=bool, with which NxD's converter takes "--flag False" for True.
        "type": _boolean,
        "nargs": "?",
        "const": True,
        "default": default,
        "metavar": "BOOL",
        "help": text,
    }


def _boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"must be True or False, but is {text!r}")
    return values[text.lower()]


def _layers(text: str) -> tuple[int, ...]:
    """Layer numbers or names, with or without YAML's brackets and quotes."""
    matches = [_CUT.fullmatch(part.strip(" \"'")) for part in text.strip("[] ").split(",")]
    if None in matches:
        raise argparse.ArgumentTypeError(
            "must be layers with commas between them, as 10,20 or model.layers.10,model.layers.20, but is "
            f"{text!r}"
        )
    return tuple(int(match[1]) for match in matches if match)


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, but is {text!r}")
    return int(text)
