"""A tokenizer: loaded from its folder or the Hub, and what it does as text, to be hashed."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from nxdt_align.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_tokenizer(path_or_id: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or of a Hub id. Never runs code from the folder.

    Raises UserError if the folder is missing or has no tokenizer, or the id cannot be reached.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_file():
        raise UserError(f"data.tokenizer.type must name a tokenizer's folder, but {path_or_id} is a file")
    if folder.is_dir():
        if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            raise UserError(
                f"data.tokenizer.type: {path_or_id} is not a tokenizer's folder: it holds none of "
                f"{', '.join(_TOKENIZER_FILES)}"
            )
    elif path_or_id.startswith(("/", ".", "~")) or path_or_id.count("/") > 1:
        raise UserError(f"data.tokenizer.type: the folder {path_or_id} does not exist")
    return _from_pretrained(path_or_id, folder)


def _from_pretrained(path_or_id: str, folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    local = folder.is_dir()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder) if local else path_or_id, trust_remote_code=False
        )
    # The tokenizers library (Rust) raises a bare Exception for a file that it cannot parse.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if local:
            message = (
                f"{path_or_id} holds a tokenizer that cannot be read ({reason}): copy or download it again"
            )
        else:
            message = f"{path_or_id} is neither a folder here nor a model id that can be reached: {reason}"
        raise UserError(f"data.tokenizer.type: {message}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's behaviour as text: vocabulary, merges, normalization, added tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # A fast tokenizer's state includes the padding and truncation of its last call; neither is used here.
        for passing in ("padding", "truncation"):
            content.pop(passing, None)
        return json.dumps(content, sort_keys=True)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_vocabulary(folder)
        digests = {p.name: hashlib.blake2b(p.read_bytes()).hexdigest() for p in Path(folder).iterdir()}
    added = {str(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    return json.dumps([type(tokenizer).__name__, digests, added], sort_keys=True)
