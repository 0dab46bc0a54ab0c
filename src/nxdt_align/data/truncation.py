"""Truncation: one rule for every layout, decided for a pair as a whole, so that it keeps one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nxdt_align.errors import UserError

TruncationMode = Literal["keep_start", "keep_end"]
Tokens = list[int]


@dataclass(frozen=True)
class Truncation:
    """How many tokens a prompt, and a prompt with one response, may have.

    1. A prompt over ``max_prompt_length`` keeps BOS and its last tokens.
    2. If the prompt and the longest response still exceed ``seq_length``: ``keep_start`` cuts the end
       of each response that is too long; ``keep_end`` first cuts the prompt after BOS, by what the
       longest response needs, and cuts the ends of responses only when of the prompt one token is
       left (BOS, or the last token where there is no BOS): something must predict the first
       response token.

    A response keeps at least one token. One whose end is cut has no EOS: it does not end there.
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
                f"so that a response token fits behind the prompt, but is {self.max_prompt_length}"
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
    """The last ``room`` tokens, BOS among them where the prompt begins with it."""
    if len(prompt) <= room:
        return prompt
    if bos is not None and prompt[0] == bos:
        return [bos, *prompt[len(prompt) - room + 1 :]]
    return prompt[len(prompt) - room :]
