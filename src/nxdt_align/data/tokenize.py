"""Records to tokens: BOS and EOS once, the prompt's tokens the same beside every response, then truncation.

Prompt and response are tokenized apart, so no token spans their border. Chat messages go through the
tokenizer's chat template (``chat.py``), text is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nxdt_align.data.chat import TEMPLATE_DATE, ChatTemplate
from nxdt_align.data.files import DataError
from nxdt_align.data.record_types import Record, UnpairedRecord
from nxdt_align.data.token_cache import TokenColumns, cache_path, load_columns, save_columns
from nxdt_align.data.truncation import Tokens, Truncation
from nxdt_align.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Example",
    "Tokenization",
    "TokenizedSet",
    "Truncation",
    "WholeSequences",
    "load_tokenizer",
    "tokenize_records",
]

log = logging.getLogger(__name__)
RULES_VERSION = 1
"""Part of the fingerprint. Raise it when the same record gets other tokens than before."""
CHUNK = 1000
"""Records handed to the tokenizer at once."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class Example:
    """A tokenized record. The arrays are views into the whole set's: not to be written to."""

    record_id: str
    """The content hash of its record, hex."""
    prompt: npt.NDArray[Any]
    """(P,) int32, P >= 1, BOS included."""
    responses: tuple[npt.NDArray[Any], ...]
    """(chosen, rejected) for a pair, (response,) otherwise; each (n,) int32, n >= 1, EOS (or the chat
    template's end of turn) included unless truncation cut it."""
    desirable: bool = True


def load_tokenizer(path_or_id: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or of a model id. No code out of the folder is ever run.

    Raises UserError where the folder is missing or no tokenizer, or the id cannot be reached.
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
    # The Rust tokenizers raise bare Exception for a file that they cannot parse.
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


class Tokenization:
    """``record -> Example``: a tokenizer, its chat template and a truncation.

    BOS stands once at the prompt's start if the tokenizer has one, also where the text or the chat
    template writes it. EOS stands once at the response's end. A chat response ends with its
    template's end-of-turn token, whatever white space the template puts behind that (a model stops
    there when it generates), and gets EOS only where the template writes no such token.

    Raises UserError where the tokenizer has no EOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, truncation: Truncation) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no eos_token, so no model could learn where a response ends; "
                "set eos_token in its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.truncation = truncation
        self._chat = ChatTemplate(tokenizer)
        self._bos: int | None = tokenizer.bos_token_id
        self._eos: int = tokenizer.eos_token_id

    def __call__(self, record: Record) -> Example:
        """Raises DataError where a chat record meets no template, or a prompt gives no token."""
        (prompt, responses, _), *_ = self.encode([record])
        return Example(record.id, _array(prompt), tuple(map(_array, responses)))

    def encode(self, records: Sequence[Record]) -> list[tuple[Tokens, list[Tokens], bool]]:
        """For each record: prompt, responses, and whether truncation cut any of them."""
        texts: list[str] = []
        for record in records:
            prompt, responses = self._texts(record)
            texts += [prompt, *responses]
        tokens = iter(self._ids(texts))
        encoded = []
        for record in records:
            prompt_ids = self._open(next(tokens), record)
            answers = [self._close(next(tokens), record) for _ in record.responses]
            encoded.append(self.truncation(prompt_ids, answers, self._bos))
        return encoded

    def _texts(self, record: Record) -> tuple[str, Sequence[str]]:
        if isinstance(record.prompt, str):
            return record.prompt, record.responses
        return self._chat.split(record.prompt, record.responses, record.source)

    def _ids(self, texts: list[str]) -> list[Tokens]:
        # verbose=False: texts over the tokenizer's model_max_length are ours to cut.
        encoded = self.tokenizer(
            texts, add_special_tokens=False, padding=False, truncation=False, verbose=False
        )
        ids: list[Tokens] = encoded["input_ids"]
        return ids

    def _open(self, ids: Tokens, record: Record) -> Tokens:
        if self._bos is not None and ids[:1] != [self._bos]:
            ids = [self._bos, *ids]
        if not ids:
            raise DataError(f"{record.source}: the tokenizer makes no token of the prompt {record.prompt!r}")
        return ids

    def _close(self, ids: Tokens, record: Record) -> Tokens:
        if not isinstance(record.prompt, str):
            end, behind = self._chat.turn_end
            if end is not None and ids[-len(behind) - 1 :] == [end, *behind]:
                return ids[: len(ids) - len(behind)]
        return ids if ids[-1:] == [self._eos] else [*ids, self._eos]

    def fingerprint(self) -> str:
        """A digest of all that decides a record's tokens beside its content: 32 hex digits."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        tokenizer = self.tokenizer
        content = {
            "version": RULES_VERSION,
            "tokenizer": _tokenizer_content(tokenizer),
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "chat_template": tokenizer.chat_template,
            "template_date": TEMPLATE_DATE,
            "truncation": asdict(self.truncation),
        }
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the tokenizer does, as text: vocabulary, merges, normalization, added tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # A tokenizer remembers the padding and truncation of its last call; neither is used here.
        for passing in ("padding", "truncation"):
            content.pop(passing, None)
        return json.dumps(content, sort_keys=True)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_vocabulary(folder)
        digests = {p.name: hashlib.blake2b(p.read_bytes()).hexdigest() for p in Path(folder).iterdir()}
    added = {str(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    return json.dumps([type(tokenizer).__name__, digests, added], sort_keys=True)


def _array(ids: Tokens) -> npt.NDArray[Any]:
    return np.asarray(ids, dtype=np.int32)


class TokenizedSet:
    """Tokenized records in their order; those of equal content share their tokens."""

    def __init__(
        self, columns: TokenColumns, record_ids: Sequence[str], desirable: Sequence[bool] | None = None
    ) -> None:
        row_of = {record: row for row, record in enumerate(columns.record_ids)}
        self._columns = columns
        self._rows = np.array([row_of[record] for record in record_ids], dtype=np.int64)
        self._desirable = None if desirable is None else list(desirable)
        self.record_ids = list(record_ids)
        """The content hash of each record, (N)."""
        self.prompt_lengths: npt.NDArray[Any] = np.diff(columns.prompt_offsets)[self._rows]
        """(N,) int64, tokens."""
        lengths = np.diff(columns.response_offsets).reshape(len(columns.record_ids), -1)
        self.response_lengths: npt.NDArray[Any] = lengths[self._rows]
        """(N, k) int64, tokens; k is 2 for pairs (chosen, rejected), otherwise 1."""
        self.truncated = int(columns.truncated[self._rows].sum())
        """How many examples were cut."""
        self.identical_after_truncation = int(columns.identical_responses()[self._rows].sum())
        """How many pairs have the same tokens twice, though their texts differ. They are kept: their
        margin is 0 and stays 0."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = int(self._rows[index])
        desirable = True if self._desirable is None else self._desirable[index]
        return Example(
            self.record_ids[index], self._columns.prompt(row), self._columns.responses(row), desirable
        )


class WholeSequences(TokenizedSet):
    """Single responses with all of their prompt but its first token counted as response.

    So supervised fine-tuning trains on everything that can be predicted. No token is added or lost.
    """

    def __init__(self, examples: TokenizedSet) -> None:
        self._columns, self._rows = examples._columns, examples._rows
        self._desirable = examples._desirable
        self.record_ids = examples.record_ids
        self.prompt_lengths = np.ones_like(examples.prompt_lengths)
        self.response_lengths = examples.response_lengths + examples.prompt_lengths[:, None] - 1
        self.truncated = examples.truncated
        self.identical_after_truncation = examples.identical_after_truncation

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        whole = tuple(np.concatenate([example.prompt[1:], response]) for response in example.responses)
        return replace(example, prompt=example.prompt[:1], responses=whole)


def tokenize_records(
    records: Sequence[Record], tokenization: Tokenization, cache_dir: Path | None
) -> TokenizedSet:
    """Tokenize all records, each content once, or read what an earlier run kept in ``cache_dir``.

    Raises DataError as Tokenization does, and where the cache folder cannot be written to.
    """
    distinct = {record.id: record for record in records}
    if not distinct:
        raise DataError("there are no records to tokenize")
    ids = list(distinct)
    path = None if cache_dir is None else cache_path(cache_dir, tokenization.fingerprint(), ids)
    columns = None if path is None else load_columns(path, ids)
    if columns is None:
        columns = _encode_all(list(distinct.values()), tokenization)
        if path is not None:
            save_columns(path, columns)
    labels = [not isinstance(record, UnpairedRecord) or record.desirable for record in records]
    result = TokenizedSet(columns, [record.id for record in records], labels)
    if result.identical_after_truncation:
        log.warning(
            "%d of %d pairs have the same tokens as chosen and as rejected once truncated and tokenized",
            result.identical_after_truncation,
            len(result),
        )
    return result


def _encode_all(records: list[Record], tokenization: Tokenization) -> TokenColumns:
    encoded: list[tuple[Tokens, list[Tokens], bool]] = []
    for start in range(0, len(records), CHUNK):
        encoded += tokenization.encode(records[start : start + CHUNK])
    prompts, responses, truncated = zip(*encoded, strict=True)
    return TokenColumns.of([record.id for record in records], prompts, responses, truncated)
