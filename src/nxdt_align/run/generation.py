"""Completions of any weights that ``locate`` finds: ``generate`` is public."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml

from nxdt_align.config.start import SETTINGS_FILE, follow, run_folder
from nxdt_align.data.reading import Source, load_records
from nxdt_align.data.tokenize import Tokenization, Truncation
from nxdt_align.data.tokenizer import load_tokenizer
from nxdt_align.errors import UserError
from nxdt_align.evaluation import vllm_model
from nxdt_align.evaluation.chat import HELP as CHAT_HELP
from nxdt_align.evaluation.chat import converse
from nxdt_align.evaluation.generate import Generator, Limits, Sampling, complete
from nxdt_align.evaluation.transformers_model import TransformersModel
from nxdt_align.evaluation.vllm_model import VLLMModel
from nxdt_align.files import atomic_write
from nxdt_align.messages import NOTICE
from nxdt_align.run.conversion import DTYPES, Dtype, convert
from nxdt_align.run.locate import is_checkpoint, locate
from nxdt_align.run.places import require_writable_file
from nxdt_align.weights.detect import layout_of
from nxdt_align.weights.hf_writer import CONFIG, holds_tokenizer
from nxdt_align.weights.peft import is_peft_folder

__all__ = ["CHAT_HELP", "chat", "generate"]

log = logging.getLogger(__name__)

Backend = Literal["auto", "vllm", "transformers"]
FORMAT_OPTION = "--format"
_VLLM_DTYPES: dict[str, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def generate(
    model: str | Path,
    prompts: str | Path,
    *,
    out: str | Path | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_tokens: int = 256,
    batch_size: int = 8,
    seed: int = 0,
    format: str | None = None,
    limit: int | None = None,
    backend: Backend = "auto",
    device: str | None = None,
    dtype: Dtype | None = None,
    tokenizer: str | Path | None = None,
    tensor_parallel: int = 1,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Let a model answer the prompts of a file.

    Args:
        model: a run's folder, a checkpoint, a Hugging Face folder, an adapter of PEFT's whose base is on this
            machine, NxD Training's shards.
        prompts: a file in any format that training reads, with responses, which are left out, or without;
            or a data set's name on the Hub.
        out: a .jsonl file to write, which must not exist.
        temperature: 0 takes the likeliest token.
        top_p: share of probability that tokens are drawn from.
        max_tokens: new tokens per prompt.
        batch_size: prompts at a time.
        seed: of the draws. The same prompts, settings, batch size and device give the same completions.
        format: of ``prompts``; None detects it from the keys.
        limit: take the first N prompts.
        backend: ``auto``: vLLM where it and an accelerator are there, else transformers.
        device: torch's name of one, for transformers; None: an accelerator if there is one, else the CPU.
        dtype: of weights and activations; None: the weights' own, on a CPU float32.
        tokenizer: a folder; None: that of the model.
        tensor_parallel: devices that share the model, for vLLM.
        chat_template_kwargs: variables of the chat template, as ``data.chat_template_kwargs``; None: those of
            the run that the model is of, if any.

    Returns a row per prompt: ``prompt``, ``completion``, ``finish_reason`` (``stop`` or ``length``),
    ``logprob`` (natural, of the whole completion at temperature 1), ``completion_tokens``,
    ``prompt_tokens``, ``source``. Raises UserError.
    """
    sampling = Sampling(temperature, top_p, max_tokens, batch_size, seed)
    require_backend(backend, device, dtype, tensor_parallel)
    if out is not None and Path(out).exists():
        raise UserError(f"{out} exists already: remove it, or choose another file")
    if out is not None:
        require_writable_file(Path(out))
    require_limit(limit)
    source = Source(str(prompts))
    records = load_records([source], "prompt", format=format, limit=limit, format_key=FORMAT_OPTION).records
    with hf_folder(Path(model)) as folder:
        tokenization = open_tokenization(folder, tokenizer, chat_template_kwargs, model)
        made = open_generator(folder, backend, device, dtype, tensor_parallel)
        rows = complete(records, tokenization, made, sampling)
    if out is not None:
        # default: messages may hold what JSON has no type for, such as Parquet's dates.
        lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        atomic_write(out, lines.encode())
        log.log(NOTICE, "%d completions: %s", len(rows), out)
    return rows


def require_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise UserError(f"limit: must be at least 1, but is {limit}; leave it out to take every record")


def chat(
    model: str | Path,
    *,
    ask: Callable[[], str | None],
    show: Callable[[str], None],
    system: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_tokens: int = 1024,
    seed: int = 0,
    device: str | None = None,
    dtype: Dtype | None = None,
    tokenizer: str | Path | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """A conversation: ``evaluation.chat.converse`` explains ``ask`` and ``show``, ``generate`` the rest."""
    sampling = Sampling(temperature, top_p, max_tokens, 1, seed)
    require_backend("transformers", device, dtype, 1)
    with hf_folder(Path(model)) as folder:
        tokenization = open_tokenization(folder, tokenizer, chat_template_kwargs, model)
        made = TransformersModel(folder, device_of(device), None if dtype is None else DTYPES[dtype])
        torch.manual_seed(seed)
        converse(made, tokenization, sampling, system=system, ask=ask, show=show)


@contextmanager
def hf_folder(model: Path) -> Iterator[Path]:
    """The weights that ``model`` leads to as a folder for transformers, adapters added in: themselves, or an
    export that is removed afterwards. Raises UserError."""
    place = locate(model)
    needs_export = is_checkpoint(place) or is_peft_folder(place) or not (place / CONFIG).is_file()
    if not needs_export and layout_of(place) == "hf":
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="nxdt-align-") as temporary:
        folder = Path(temporary) / "model"
        # Not ``export``, which writes adapters apart from their model.
        convert(place, folder, to="hf", verify=False, quiet=True)
        yield folder


def open_tokenization(
    folder: Path,
    tokenizer: str | Path | None,
    chat_template_kwargs: Mapping[str, Any] | None,
    model: str | Path,
) -> Tokenization:
    """Of ``model``, whose weights ``folder`` holds; None takes the model's tokenizer, and the chat template's
    variables of the run that the model is of. Raises UserError."""
    if tokenizer is None and not holds_tokenizer(folder):
        raise UserError("the model's folder has no tokenizer: give a folder that has it with --tokenizer DIR")
    made = load_tokenizer(str(folder if tokenizer is None else tokenizer))
    variables = chat_template_kwargs
    if variables is None:
        variables = variables_of_run(Path(model))
        if variables:
            said = "chat template: with the run's data.chat_template_kwargs, %s"
            log.log(NOTICE, said, json.dumps(variables))
    # Prompts to be answered are cut by the model's positions, see ``complete``.
    return Tokenization(made, Truncation(Limits.of(folder).positions or 2**20), variables)


def variables_of_run(model: Path) -> dict[str, Any] | None:
    """``data.chat_template_kwargs`` of the run that ``model`` is or is in; None where there is none."""
    variables = settings_of_run(model).get("data", {}).get("chat_template_kwargs")
    return dict(variables) if variables else None


def settings_of_run(model: Path) -> dict[str, Any]:
    """The YAML of the run that ``model`` is or is in; empty where there is none. Raises UserError where it
    cannot be read."""
    run = run_folder(follow(model.expanduser()))
    if run is None or not (run / SETTINGS_FILE).is_file():
        return {}
    try:
        return dict(yaml.safe_load((run / SETTINGS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(
            f"{run / SETTINGS_FILE} cannot be read: {' '.join(str(error).split())}; restore it, or remove it "
            "and give what it says of chats with --chat-template-kwargs"
        ) from error


def open_generator(
    folder: Path, backend: Backend, device: str | None, dtype: Dtype | None, tensor_parallel: int
) -> Generator:
    """What ``generate`` lets answer; its arguments are explained there. Raises UserError."""
    if require_backend(backend, device, dtype, tensor_parallel) == "vllm":
        name = None if dtype is None else _VLLM_DTYPES[dtype]
        return VLLMModel(folder, tensor_parallel=tensor_parallel, dtype=name)
    return TransformersModel(folder, device_of(device), None if dtype is None else DTYPES[dtype])


def require_backend(
    backend: Backend, device: str | None, dtype: Dtype | None, tensor_parallel: int
) -> Literal["vllm", "transformers"]:
    """The one that answers. Raises UserError; to be asked before weights are exported or read."""
    if backend not in get_args(Backend):
        raise UserError(f"backend: must be one of {', '.join(get_args(Backend))}, but is {backend!r}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype: must be one of {', '.join(DTYPES)}, but is {dtype!r}")
    where = device_of(device)
    if backend == "vllm":
        vllm_model.require_installed()
    if backend == "vllm" or (backend == "auto" and where.type != "cpu" and vllm_model.is_installed()):
        return "vllm"
    if tensor_parallel != 1:
        raise UserError(
            "tp: is for vLLM alone, but transformers computes here; leave it out, or --backend vllm"
        )
    return "transformers"


def device_of(name: str | None) -> torch.device:
    """The device of this name; None: an accelerator if there is one. Raises UserError."""
    present = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return present or torch.device("cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: {name!r} is none that torch knows; cpu or cuda, such as cuda:0") from error
    if chosen.type != "cpu" and (present is None or present.type != chosen.type):
        found = "no accelerator" if present is None else f"{present.type} alone"
        raise UserError(f"device: is {name}, but torch finds {found}; --device cpu runs here")
    return chosen
