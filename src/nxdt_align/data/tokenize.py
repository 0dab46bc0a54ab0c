"""Records to tokens: one BOS and EOS, identical prompt tokens for every response, then truncation.

Chat messages go through the tokenizer's chat template, and a conversation has the tokens that its whole text
has. Of text, prompt and response are tokenized separately, so no token spans their border, except where white
space is at it and the tokenizer would add a space of its own (SentencePiece): then as a conversation.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from nxdt_align.data.chat import TEMPLATE_DATE, THINKING, ChatTemplate
from nxdt_align.data.long_texts import LongTexts
from nxdt_align.data.records import (
    BadRecord,
    DataError,
    Message,
    Record,
    Response,
    content_of,
    excerpt,
    further_keys,
)
from nxdt_align.data.rendering import MEMORY, SECONDS, Limits, OutOfTime
from nxdt_align.data.special_tokens import SpecialTexts
from nxdt_align.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RULES_VERSION = 2
"""Increment it when a change gives some records different tokens. 2: a special token that the data write
counts once; conversations are tokenized whole. A record whose tokens this changed is known under another id,
and token caches that may hold such records under another name, so that nothing older is used for them."""
_FIRST_RULES = 1
"""The version in the fingerprint, under which records with unchanged tokens keep what is stored."""
_KNOWN_TAILS, _KNOWN_ENDINGS = 4096, 7
_TAIL = 200
"""Characters at a prompt's end that are searched for a place from which on to tokenize the conversation."""
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
    changed: bool = False
    """Whether an earlier version of the rules gave it other tokens."""
    whole: tuple[int, ...] = ()
    """Tokens of the prompt and of each response before truncation; of a very long text at least
    ``seq_length`` of them."""


class Texts(NamedTuple):
    prompt: str
    responses: list[str]


class Rendered(NamedTuple):
    """The texts of one record."""

    texts: Texts
    unread: tuple[str, ...] = ()
    before: Texts | None = None
    """What the first version of the rules tokenized, if it was another text."""


class Parts(NamedTuple):
    """Tokens before BOS and EOS are seen to."""

    prompt: Tokens
    responses: list[Tokens]


Asking = Generator[list[str], list[Tokens], tuple[Parts, Parts]]
"""Asks for the tokens of texts, so that many records' are made in one call; ends with a record's tokens by
today's rules and by the first ones."""


@dataclass(frozen=True)
class Example:
    """A tokenized record. The arrays are views of the whole set's arrays; do not write to them."""

    record_id: str
    """The content hash of its record, hex; another for one whose tokens later rules changed."""
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

    @property
    def prompt_limit(self) -> int:
        return self.max_prompt_length or self.seq_length - 1

    @property
    def cuts_of_sequences(self) -> str:
        """What ``seq_length`` cuts, in words."""
        return "the responses" if self.mode == "keep_start" else "the prompts, or the responses,"

    def __call__(
        self, prompt: Tokens, responses: Sequence[Tokens], bos: int | None
    ) -> tuple[Tokens, list[Tokens], bool]:
        """The prompt and its responses after truncation, and whether anything was cut."""
        longest = max(map(len, responses))
        prompt_room = self.prompt_limit
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

    The prompt starts with one BOS if the tokenizer has one, a response ends with one EOS and nothing behind
    it, and begins with no BOS, whatever the text or the chat template writes. A chat response ends with its
    template's end-of-turn token, without the white space that the template writes after it (generation stops
    there), and gets EOS only if the template writes no such token.

    A conversation has the tokens of its whole text. Its prompt are those that lie wholly before the response
    and that all responses have in common; one that straddles the border is the response's.

    ``template_variables``: of the chat template, such as ``{"enable_thinking": False}``.

    Raises UserError if the tokenizer has no EOS, or its chat template does not read one of these variables.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        truncation: Truncation,
        template_variables: Mapping[str, Any] | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no eos_token, so a model could not learn where a response ends; "
                "set eos_token in its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.truncation = truncation
        self._chat = ChatTemplate(tokenizer, template_variables)
        self._special = SpecialTexts.of(tokenizer)
        self._long = LongTexts(tokenizer, lambda text: self._ids([text])[0], truncation.seq_length)
        self._limits = Limits()
        self._tails: dict[str, Tokens] = {}
        self._endings: list[tuple[str, str]] = []
        """The last prompts' ends, each with its tail: most prompts of a template end alike."""
        self._bos: int | None = tokenizer.bos_token_id
        self._eos: int = tokenizer.eos_token_id

    def __call__(self, record: Record) -> Example:
        """Raises DataError where a chat record meets no template, or one that refuses it, or a prompt gives
        no token."""
        encoded = self.encode([record])[0]
        if isinstance(encoded, BadRecord):
            raise DataError(f"{record.source}: {encoded.detail}") from encoded
        record_id = changed_id(record.id) if encoded.changed else record.id
        return Example(record_id, _array(encoded.prompt), tuple(map(_array, encoded.responses)))

    def encode(self, records: Sequence[Record]) -> list[Encoded | BadRecord]:
        """The tokens of each record, or why it has none. Raises DataError where a chat record meets no
        template, or one that does not come to an end."""
        rendered = self._render(records)
        found = self._answered([self._tokens(record, r) for record, r in zip(records, rendered, strict=True)])
        return [
            each if isinstance(each, BadRecord) else self._finish(record, *each, texts)
            for record, each, texts in zip(records, found, rendered, strict=True)
        ]

    def prompts(self, records: Sequence[Record]) -> list[Tokens | BadRecord]:
        """The tokens of each prompt, to be answered: whole, with BOS if there is one. Responses are not read.

        Raises DataError where a chat prompt meets no template, or one that does not come to an end.
        """
        rendered = self._render([replace(record, responses=()) for record in records])
        texts = [each.texts.prompt for each in rendered if isinstance(each, Rendered)]
        ids = iter(self._ids(texts))
        return [each if isinstance(each, BadRecord) else self._opened(next(ids)) for each in rendered]

    def turn_end(self) -> int | None:
        """The token that ends an assistant's turn in the chat template; None where it writes none."""
        return self._chat.turn_end[0]

    def _opened(self, prompt: Tokens) -> Tokens:
        return prompt if self._bos is None or prompt[:1] == [self._bos] else [self._bos, *prompt]

    def as_before(self, record: Record) -> bool:
        """Whether all versions of the rules surely give the record the same tokens, without tokenizing it."""
        if not isinstance(record.prompt, str):
            return False
        texts = Texts(record.prompt, [content_of(response) for response in record.responses])
        return not self._are_joined(texts) and self._once(texts) == texts

    # Texts

    def _render(self, records: Sequence[Record]) -> list[Rendered | BadRecord]:
        found: list[Rendered | BadRecord] = []
        while len(found) < len(records):
            begin = len(found)
            try:
                with self._limits.applied():
                    for record in records[begin:]:
                        found.append(self._texts(record))
            except OutOfTime:
                raise self._endless(records[len(found)], f"takes more than {SECONDS:.0f} s") from None
            except MemoryError:
                # Those before it have taken their share of the memory: the next round begins with this one.
                if len(found) == begin:
                    size = f"takes more than {MEMORY / 2**30:.0f} GiB of memory"
                    raise self._endless(records[begin], size) from None
        return found

    def _endless(self, record: Record, what: str) -> DataError:
        return DataError(
            f"{record.source}: the chat template of {self.tokenizer.name_or_path or 'the tokenizer'} {what} "
            "for this one conversation: mend its chat_template, use the tokenizer of another model "
            "(data.tokenizer.type), or give prompt and responses as text"
        )

    def _texts(self, record: Record) -> Rendered | BadRecord:
        keys = tuple(record.further_keys)
        if isinstance(record.prompt, str):
            before = Texts(record.prompt, [content_of(r) for r in record.responses])
            rendered = Rendered(self._once(before), keys, before)
        else:
            self._limits.start()
            try:
                rendered = self._of_chat(record, record.prompt, keys)
            except BadRecord as fault:
                return fault
            finally:
                self._limits.stop()
        if rendered.before == rendered.texts:
            rendered = rendered._replace(before=None)
        return (_fault_of_unread(record, rendered) if rendered.unread else None) or rendered

    def _of_chat(self, record: Record, prompt: list[Message], keys: tuple[str, ...]) -> Rendered:
        before = Texts(*self._chat.split(prompt, record.responses, record.source, record.tools))
        turns, answers = self._chat.once(prompt, record.responses)
        texts = before
        if turns is not prompt:
            texts = Texts(*self._chat.split(turns, answers, record.source, record.tools))
        once = self._once(texts, ends=self._chat.turn_end[0] is None)
        thinks = any("</think>" in content_of(response) for response in record.responses)
        return Rendered(once, self._chat.unread_keys(record, before) if keys or thinks else (), before)

    def _once(self, texts: Texts, ends: bool = True) -> Texts:
        """The texts with each special token once; ``ends``: EOS, too."""
        if not any(map(self._special.occur_in, (texts.prompt, *texts.responses))):
            return texts  # As in most texts: the quick answer.
        of_response = self._special.response if ends else self._special.without_bos
        return Texts(self._special.prompt(texts.prompt), [of_response(text) for text in texts.responses])

    # Tokens

    def _answered(self, asking: Sequence[Asking | BadRecord]) -> list[tuple[Parts, Parts] | BadRecord]:
        """What each ends with, with one call of the tokenizer for what all of them ask for at a time: the
        Rust tokenizer then works in parallel."""
        found: list[Any] = list(asking)
        waiting: list[tuple[int, list[Tokens] | None]] = [
            (at, None) for at, each in enumerate(asking) if not isinstance(each, BadRecord)
        ]
        while waiting:
            asked: list[tuple[int, list[str]]] = []
            for at, answer in waiting:
                try:
                    asked.append((at, asking[at].send(answer)))  # type: ignore[union-attr, arg-type]
                except StopIteration as end:
                    found[at] = end.value
                except BadRecord as fault:
                    found[at] = fault
            ids, begin = self._ids([text for _, texts in asked for text in texts]), 0
            waiting = []
            for at, texts in asked:
                waiting.append((at, ids[begin : begin + len(texts)]))
                begin += len(texts)
        return found

    def _tokens(self, record: Record, rendered: Rendered | BadRecord) -> Asking | BadRecord:
        if isinstance(rendered, BadRecord):
            return rendered
        if isinstance(record.prompt, str) and not self._are_joined(rendered.texts):
            return self._apart(rendered)
        return self._together(rendered)

    def _are_joined(self, texts: Texts) -> bool:
        """Whether texts that have white space at their border are one text: the space that the tokenizer puts
        before a text would be a second one. Where they have none, that space is what parts them."""
        if not self._long.adds_prefix:
            return False
        return texts.prompt[-1:].isspace() or any(answer[:1].isspace() for answer in texts.responses)

    def _apart(self, rendered: Rendered) -> Asking:
        now = yield from self._parts(rendered.texts)
        if rendered.before is None:
            return now, now
        return now, (yield from self._parts(rendered.before))

    def _together(self, rendered: Rendered) -> Asking:
        head, answers = rendered.texts
        tail = self._tail(head)
        known = self._tails.get(tail)
        # The prompt's tokens up to its tail are the same with any response behind it.
        alone, *wholes = yield from self._several(
            head, [*(() if known is not None else (tail,)), *(tail + a for a in answers)], len(tail)
        )
        if known is None:
            known, *wholes = wholes
            if len(self._tails) < _KNOWN_TAILS and len(tail) <= _TAIL:
                self._tails[tail] = known
        if alone[len(alone) - len(known) :] != known:
            tail, known = head, alone
            _, *wholes = yield from self._several(head, [tail + a for a in answers], len(tail))
        ends = [
            len(known) if whole[: len(known)] == known else self._before_border(tail, answer, whole, known)
            for whole, answer in zip(wholes, answers, strict=True)
        ]
        shared = min(ends)
        while any(whole[:shared] != wholes[0][:shared] for whole in wholes):
            shared -= 1
        prompt = [*alone[: len(alone) - len(known)], *wholes[0][:shared]]
        now = Parts(prompt, [whole[shared:] for whole in wholes])
        if rendered.before is not None:
            return now, (yield from self._parts(rendered.before))
        if shared == len(known) and self._long.splits:
            return now, now  # A border between words: each part has its own tokens.
        apart = yield from self._parts(Texts("", answers))
        return now, Parts(alone, apart.responses)

    def _parts(self, texts: Texts) -> Generator[list[str], list[Tokens], Parts]:
        prompt, *responses = yield from self._several(texts.prompt, texts.responses, 0)
        return Parts(prompt, responses)

    def _several(
        self, prompt: str, others: list[str], more: int
    ) -> Generator[list[str], list[Tokens], list[Tokens]]:
        """The tokens of a prompt, of which the last count, and of other texts, of which the first count,
        after ``more`` characters. Long ones are not tokenized any further than that."""
        long = self._long
        texts = [prompt, *others]
        if max(map(len, texts)) <= long.piece:
            return (yield texts)
        short = iter((yield [text for text in texts if len(text) <= long.piece]))
        return [
            next(short) if len(text) <= long.piece else (long.first(text, more) if at else long.last(text))
            for at, text in enumerate(texts)
        ]

    def _tail(self, head: str) -> str:
        """The end of a prompt from which on its tokens depend on what follows: an added token, which is a
        token whatever stands around it, or the border of a word."""
        known = next((tail for ending, tail in self._endings if head.endswith(ending)), None)
        if known is not None:
            return known
        for within in (_TAIL, len(head)):
            begin = max(len(head) - within, 0)
            found = [] if self._chat.added is None else self._chat.added.findall(head, begin)
            token = head.rindex(found[-1]) if found else -1
            border = self._long.last_border(head, within) or -1
            if max(token, border) >= 0:
                # Of a border, the letter before it belongs to what tells it.
                ending = head[token:] if token > border else head[border - 1 :]
                tail = head[max(token, border) :]
                if len(ending) <= _TAIL:
                    self._endings = [(ending, tail), *self._endings[:_KNOWN_ENDINGS]]
                return tail
        return head

    def _before_border(self, tail: str, answer: str, whole: Tokens, known: Tokens) -> int:
        """How many of the tokens of ``tail + answer`` lie wholly before the answer."""
        if not self.tokenizer.is_fast:
            return next((i for i, (a, b) in enumerate(zip(whole, known, strict=False)) if a != b), 0)
        count = 0
        for token, (begin, end) in zip(whole, self._long.offsets(tail + answer), strict=False):
            # An added token may take white space behind it, of the answer, too.
            if end > len(tail) and not (begin < len(tail) and token in self._chat.special):
                break
            count += 1
        return count

    def _finish(self, record: Record, now: Parts, before: Parts, rendered: Any) -> Encoded | BadRecord:
        prompt, responses, cut, whole = self._closed(record, now)
        if not prompt:
            found = f"the tokenizer makes no token of the prompt {excerpt(record.prompt)}"
            return BadRecord("prompt without tokens", found)
        changed = before is not now and self._closed(record, before)[:2] != (prompt, responses)
        return Encoded(prompt, responses, cut, rendered.unread, changed, whole)

    def _closed(self, record: Record, parts: Parts) -> tuple[Tokens, list[Tokens], bool, tuple[int, ...]]:
        """Prompt and responses with BOS and EOS, truncated; whether anything was cut; the lengths before. The
        prompt may be empty."""
        prompt = self._opened(parts.prompt)
        closed = [self._close(*each, record) for each in zip(parts.responses, record.responses, strict=True)]
        lengths = (len(prompt), *map(len, closed))
        if not prompt:
            return prompt, closed, False, lengths
        return *self.truncation(prompt, closed, self._bos), lengths

    def _ids(self, texts: list[str]) -> list[Tokens]:
        if not texts:
            return []
        backend = self._backend
        if backend is not None:
            if backend.truncation is not None:
                backend.no_truncation()
            if backend.padding is not None:
                backend.no_padding()
            backend.encode_special_tokens = self.tokenizer.split_special_tokens
            # The fast one keeps no offsets, which take half of the time.
            return [each.ids for each in backend.encode_batch_fast(texts, add_special_tokens=False)]
        # verbose=False: no warning about texts over model_max_length, which are truncated later.
        encoded = self.tokenizer(
            texts, add_special_tokens=False, padding=False, truncation=False, verbose=False
        )
        ids: list[Tokens] = encoded["input_ids"]
        return ids

    @cached_property
    def _backend(self) -> Any | None:
        """What the tokenizer only hands texts to; None where it is no fast one, or does more than that."""
        from transformers import PreTrainedTokenizerFast

        own, plain = type(self.tokenizer), PreTrainedTokenizerFast
        names = ("__call__", "_encode_plus", "_batch_encode_plus")
        is_plain = all(getattr(own, name, None) is getattr(plain, name, None) for name in names)
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return backend if is_plain and hasattr(backend, "encode_batch_fast") else None

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
            "version": _FIRST_RULES,
            "tokenizer": _tokenizer_content(tokenizer),
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "chat_template": tokenizer.chat_template,
            "template_date": TEMPLATE_DATE,
            "truncation": asdict(self.truncation),
            **self._chat.settings,
        }
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def changed_id(record_id: str) -> str:
    """The id under which reference values of a record are stored whose tokens this version of the rules
    changed: 32 hex digits."""
    return hashlib.blake2b(f"{record_id} rules {RULES_VERSION}".encode(), digest_size=16).hexdigest()


def _fault_of_unread(record: Record, rendered: Rendered) -> BadRecord | None:
    """Why the record cannot be used without the keys that the template does not read."""
    turns = [turn for turn in record.responses if not isinstance(turn, str)]
    turns += [] if isinstance(record.prompt, str) else record.prompt
    for turn in turns:
        keys = further_keys(turn)
        if keys and not turn["content"].strip() and set(keys) <= set(rendered.unread):
            found = f"a turn of {turn['role']} has nothing but {_listed(keys)}"
            return BadRecord("empty turn", f"{found}, which the chat template does not read")
    if THINKING in rendered.unread and any(
        not content_of(response).rpartition("</think>")[2].strip() for response in record.responses
    ):
        found = f"a response has nothing but `{THINKING}`"
        return BadRecord("empty turn", f"{found}, which the chat template does not read")
    responses = rendered.texts.responses
    if record.label is None and len(set(responses)) < len(responses):
        both = excerpt(responses[0])
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
