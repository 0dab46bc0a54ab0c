"""Models of the Hugging Face Hub: what a run needs of one, fetched into the hub library's cache."""

from __future__ import annotations

import logging
from pathlib import Path

from nxdt_align.config.start import HubModel, near
from nxdt_align.errors import UserError
from nxdt_align.messages import NOTICE
from nxdt_align.weights.detect import holds_weights

log = logging.getLogger(__name__)

# By patterns, not all files: many repositories hold their weights a second time, as consolidated.safetensors
# or in the folder original.
_SMALL = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.*", "additional_chat_templates/*.jinja"),
)
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
"""In the order in which they are looked for: pickled ones only where there are no others."""
_LOG_IN = "log in with `hf auth login` or a token in HF_TOKEN"


def fetch_model(model: HubModel, *, weights: bool) -> Path:
    """The folder of ``model``'s config.json, tokenizer and, unless only these are wanted, ``weights``.

    Safe in several processes at once. Raises UserError where the Hub has no such model or none that this user
    may read, where it cannot be reached and the cache lacks files, and where the model has no weights in
    transformers' form.
    """
    folder = _snapshot(model, _SMALL)
    for files in _WEIGHTS if weights else ():
        folder = _snapshot(model, (*_SMALL, files, f"{files}.index.json".replace("*", "")))
        if any(folder.glob(files)):
            break
    if weights and not holds_weights(folder):
        raise UserError(
            f"{model} has no weights that are read here ({' or '.join(_WEIGHTS)}), or they could not be "
            f"fetched; what there is lies in {folder}"
        )
    log.log(NOTICE, "%s of the Hugging Face Hub: %s", model, folder)
    return folder


def _snapshot(model: HubModel, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model.name, revision=model.revision, allow_patterns=list(files)))
    # The library hands on what its HTTP client raises, and which one that is changes with its version.
    except Exception as error:
        raise UserError(f"{model} is no folder here, and {_reason(model, error)}") from error


def _reason(model: HubModel, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    near_here = near(Path(model.name))
    meant = f"{near_here} Else " if near_here.endswith("?") else ""
    if isinstance(error, GatedRepoError):
        return (
            f"may be read only by some: accept its terms on its page of the Hugging Face Hub, and {_LOG_IN}"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"the Hugging Face Hub has no model {model.name}, or a private one: {meant}check its spelling, "
            f"or {_LOG_IN}"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{model.name} has no branch, tag or commit {model.revision} on the Hugging Face Hub"
    why = " ".join(str(error).partition("\n")[0].split())
    return (
        f"the Hugging Face Hub cannot be reached, nor are all of its files in the cache "
        f"({type(error).__name__}: {why}): {meant}fetch it where there is a network, "
        f"`hf download {model.name} --local-dir FOLDER`, and name that folder"
    )
