"""Records to tokens: one BOS and EOS, identical prompt tokens for every response, then truncation.

Prompt and response are tokenized separately, so no token spans their border. Chat messages go through the
tokenizer's chat template; text is used as it is.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from nxdt_align.data.chat import TEMPLATE_DATE, ChatTemplate
from nxdt_align.data.records import (
    BadRecord,
    DataError,
    Record,
    Response,
    content_of,
    excerpt,
    further_keys,
)
from nxdt_align.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RULES_VERSION = 1
"""Part of the fingerprint. Increment it when a change gives the same record different tokens."""
TruncationMode = Literal["keep_start", "keep_end"]
Tokens = list[int]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


class Encoded(NamedTuple):
    """The tokens of one record."""

    prompt: Tokens
    responses: list[Tokens]
    truncated: bool
    """Whether truncation cut any of them."""
    unread: tuple[str, ...] = ()
    """Keys of its messages with which its tokens do not change."""


class Rendered(NamedTuple):
    """The texts of one record."""

    prompt: str
    responses: list[str]
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example:
    """A tokenized record. The arrays are views of the whole set's arrays; do not write to them."""

    record_id: str
    """The content hash of its record, hex."""
    prompt: npt.NDArray[Any]
    """(P,) int32, P >= 1, BOS included."""
    responses: tuple[npt.NDArray[Any], ...]
    """(chosen, rejected) for a pair, (response,) otherwise; each (n,) int32, n >= 1, EOS (or the chat
    template's end of turn) included unless truncation cut it."""
    desirable: bool = True


@dataclass(frozen=True)
class Truncation:
    """Limits on the tokens of a prompt, and of a prompt with one response.

    1. A prompt over ``max_prompt_length`` keeps BOS and its last tokens.
    2. If the prompt and the longest response still exceed ``seq_length``: ``keep_start`` cuts the end
       of each response that is too long; ``keep_end`` first cuts the prompt after BOS, by what the
       longest response needs, and cuts the ends of responses only when one prompt token is left
       (BOS, or the last token if there is no BOS): something must predict the first response
       token.

    A response keeps at least one token. A truncated response has no EOS, as it does not end there.
    """

    seq_length: int
    max_prompt_length: int | None = None
    """None: ``seq_length - 1``."""
    mode: TruncationMode = "keep_start"

    def __post_init__(self) -> None:
        if self.seq_length < 2:
            raise UserError(
                "data.seq_length must be at least 2 (one prompt and one response token), "
                f"but is {self.seq_length}"
            )
        if self.mode not in ("keep_start", "keep_end"):
            raise UserError(f"truncation_mode must be keep_start or keep_end, but is {self.mode!r}")
        if self.max_prompt_length is not None and not 1 <= self.max_prompt_length < self.seq_length:
            raise UserError(
                f"max_prompt_length must be at least 1 and below data.seq_length ({self.seq_length}), "
                f"so that a response token fits after the prompt, but is {self.max_prompt_length}"
            )

    def __call__(
        self, prompt: Tokens, responses: Sequence[Tokens], bos: int | None
    ) -> tuple[Tokens, list[Tokens], bool]:
        """The prompt and its responses after truncation, and whether anything was cut."""
        longest = max(map(len, responses))
        prompt_room = self.max_prompt_length or self.seq_length - 1
        if self.mode == "keep_end":
            prompt_room = min(prompt_room, max(self.seq_length - longest, 1))
        kept = keep_last(prompt, prompt_room, bos)
        room = self.seq_length - len(kept)
        cut = len(kept) < len(prompt) or longest > room
        return kept, [response[:room] for response in responses], cut


def keep_last(prompt: Tokens, room: int, bos: int | None) -> Tokens:
    """The last ``room`` tokens, including BOS if the prompt begins with it."""
    if len(prompt) <= room:
        return prompt
    if bos is not None and prompt[0] == bos:
        return [bos, *prompt[len(prompt) - room + 1 :]]
    return prompt[len(prompt) - room :]


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


class Tokenization:
    """``record -> Example``: a tokenizer, its chat template and a truncation.

    The prompt starts with one BOS if the tokenizer has one, even if the text or the chat template writes it
    too. A response ends with one EOS. A chat response ends with its template's end-of-turn token, without the
    white space that the template writes after it (generation stops there), and gets EOS only if the template
    writes no such token.

    Raises UserError if the tokenizer has no EOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, truncation: Truncation) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no eos_token, so a model could not learn where a response ends; "
                "set eos_token in its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.truncation = truncation
        self._chat = ChatTemplate(tokenizer)
        self._bos: int | None = tokenizer.bos_token_id
        self._eos: int = tokenizer.eos_token_id

    def __call__(self, record: Record) -> Example:
        """Raises DataError where a chat record meets no template, or one that refuses it, or a prompt gives
        no token."""
        encoded = self.encode([record])[0]
        if isinstance(encoded, BadRecord):
            raise DataError(f"{record.source}: {encoded.detail}") from encoded
        return Example(record.id, _array(encoded.prompt), tuple(map(_array, encoded.responses)))

    def encode(self, records: Sequence[Record]) -> list[Encoded | BadRecord]:
        """The tokens of each record, or why it has none. Raises DataError where a chat record meets no
        template."""
        rendered = [self._texts(record) for record in records]
        good = [texts for texts in rendered if isinstance(texts, Rendered)]
        tokens = iter(self._ids([text for texts in good for text in (texts.prompt, *texts.responses)]))
        encoded: list[Encoded | BadRecord] = []
        for record, texts in zip(records, rendered, strict=True):
            if isinstance(texts, BadRecord):
                encoded.append(texts)
                continue
            prompt, *answers = (next(tokens) for _ in range(1 + len(texts.responses)))
            encoded.append(self._finish(record, prompt, answers, texts.unread))
        return encoded

    def _finish(
        self, record: Record, prompt: Tokens, answers: list[Tokens], unread: tuple[str, ...]
    ) -> Encoded | BadRecord:
        if self._bos is not None and prompt[:1] != [self._bos]:
            prompt = [self._bos, *prompt]
        if not prompt:
            found = f"the tokenizer makes no token of the prompt {excerpt(record.prompt)}"
            return BadRecord("prompt without tokens", found)
        closed = [self._close(*each, record) for each in zip(answers, record.responses, strict=True)]
        return Encoded(*self.truncation(prompt, closed, self._bos), unread)

    def _texts(self, record: Record) -> Rendered | BadRecord:
        keys = tuple(record.further_keys)
        if isinstance(record.prompt, str):
            rendered = Rendered(record.prompt, [content_of(r) for r in record.responses], keys)
        else:
            try:
                texts = self._chat.split(record.prompt, record.responses, record.source)
            except BadRecord as fault:
                return fault
            rendered = Rendered(*texts, self._chat.unread_keys(record, texts) if keys else ())
        return (_fault_of_unread(record, rendered) if rendered.unread else None) or rendered

    def _ids(self, texts: list[str]) -> list[Tokens]:
        if not texts:
            return []
        # verbose=False: no warning about texts over model_max_length, which are truncated later.
        # One call for all texts: the Rust tokenizer then works in parallel.
        encoded = self.tokenizer(
            texts, add_special_tokens=False, padding=False, truncation=False, verbose=False
        )
        ids: list[Tokens] = encoded["input_ids"]
        return ids

    def _close(self, ids: Tokens, response: Response, record: Record) -> Tokens:
        if not isinstance(record.prompt, str):
            end, behind = self._chat.turn_end
            if end is not None and ids[-len(behind) - 1 :] == [end, *behind]:
                return ids[: len(ids) - len(behind)]
            # A turn that calls tools may end with another token than one that speaks.
            if end is not None and further_keys(response):
                last = max((i for i, token in enumerate(ids) if token in self._chat.special), default=-1)
                if last >= 0 and not str(self.tokenizer.decode(ids[last + 1 :])).strip():
                    return ids[: last + 1]
        return ids if ids[-1:] == [self._eos] else [*ids, self._eos]

    def fingerprint(self) -> str:
        """A digest of everything but the content that determines a record's tokens: 32 hex digits."""
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


def _fault_of_unread(record: Record, rendered: Rendered) -> BadRecord | None:
    """Why the record cannot be used without the keys that the template does not read."""
    turns = [turn for turn in record.responses if not isinstance(turn, str)]
    turns += [] if isinstance(record.prompt, str) else record.prompt
    for turn in turns:
        keys = further_keys(turn)
        if keys and not turn["content"].strip() and set(keys) <= set(rendered.unread):
            found = f"a turn of {turn['role']} has nothing but {_listed(keys)}"
            return BadRecord("empty turn", f"{found}, which the chat template does not read")
    if record.label is None and len(set(rendered.responses)) < len(rendered.responses):
        both = excerpt(rendered.responses[0])
        found = f"both are {both}: the chat template does not read {_listed(rendered.unread)}"
        return BadRecord("chosen equal to rejected", found)
    return None


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)


def _tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> str:
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


def _array(ids: Tokens) -> npt.NDArray[Any]:
    return np.asarray(ids, dtype=np.int32)
