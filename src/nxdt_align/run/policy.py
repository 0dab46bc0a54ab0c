"""A model's log-probabilities of preference pairs, for scripts and notebooks, in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nxdt_align.batch import SlotRole, Topology
from nxdt_align.config.alignment import MAX_PROMPT_LENGTH
from nxdt_align.data.packing import Layout, RowPlanner
from nxdt_align.data.reading import Source, load_records
from nxdt_align.data.steps import StepDataset
from nxdt_align.data.token_sets import TokenizedSet, tokenize_records
from nxdt_align.data.tokenize import Tokenization, Truncation
from nxdt_align.data.tokenizer import load_tokenizer
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.engines.native.settings import Precision
from nxdt_align.errors import UserError
from nxdt_align.losses.types import ResponseLogps
from nxdt_align.models.presets import ModelShape
from nxdt_align.run import assemble, computing
from nxdt_align.run.conversion import open_weights
from nxdt_align.run.locate import locate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Policy:
    """A model that computes log-probabilities of responses as training does."""

    def __init__(self, engine: NativeEngine, name: str) -> None:
        self._engine, self._name = engine, name
        carries = assemble.refusal_of_layouts(engine.config) is None
        self._layout: Layout = "shared_prompt" if carries else "none"

    def __repr__(self) -> str:
        return f"Policy({self._name})"

    @property
    def config(self) -> ModelShape:
        """The model's shape."""
        return self._engine.config

    def logps(self, pairs: TokenizedSet, batch_size: int = 8) -> ResponseLogps:
        """Summed log-probabilities of each pair's chosen and rejected response, in the order of ``pairs``.

        Args:
            pairs: from ``load_pairs``.
            batch_size: pairs packed into rows together; affects only the speed.

        Returns sums and token counts, float32 on the CPU, without gradients, for any loss of pairs. Raises
        UserError if a token is not in the model's vocabulary.
        """
        sums = self.response_sums(pairs, batch_size)
        counts = torch.as_tensor(pairs.response_lengths, dtype=torch.float32)
        return ResponseLogps.of_pairs(sums[:, 0], sums[:, 1], counts[:, 0], counts[:, 1])

    def response_sums(self, records: TokenizedSet, batch_size: int = 8) -> torch.Tensor:
        """As ``logps``, of records with one response or two: (records, responses) float32 on the CPU."""
        examples = [records[index] for index in range(len(records))]
        largest = max(int(ids.max()) for each in examples for ids in (each.prompt, *each.responses))
        if largest >= self.config.vocab_size:
            raise UserError(
                f"a record has the token {largest}, but {self._name} has a vocabulary of "
                f"{self.config.vocab_size}: the tokenizer and the model do not belong together"
            )
        longest = int((records.prompt_lengths + records.response_lengths.max(1)).max())
        # Rows must hold the longest record, prompt and all responses.
        planner = RowPlanner(
            records,
            self._layout,
            examples_per_step=batch_size,
            seq_length=longest,
            window=self.config.sliding_window,
            only_local=self.config.layer_types is None,
        )
        rows = StepDataset(records, planner, self._layout, Topology())
        sums = torch.zeros(len(records), len(examples[0].responses))
        for start in range(0, len(records), batch_size):
            for batch in rows[range(start, min(start + batch_size, len(records)))]:
                values = self._engine.response_logps(batch.to(self._engine.device)).cpu()
                column = torch.where(batch.slot_role == SlotRole.REJECTED, 1, 0)
                there = batch.slot_valid
                sums[batch.record_index[there], column[there]] = values[there]
        return sums


def load_policy(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Policy:
    """The model at ``folder``: a run's folder (its newest checkpoint, else its export), a checkpoint, a
    Hugging Face folder or NxD Training's shards.

    Args:
        device: ``cpu`` or a CUDA device.
        dtype: of weights and activations; log-probabilities are always float32.

    Raises UserError if there are no weights, or they do not fit their config.json.
    """
    place = locate(Path(folder))
    source, config = open_weights(place)
    where = torch.device(device)
    attention = computing.kernel(config, where)
    engine = NativeEngine(config, attention, precision=Precision(compute=dtype), device=where)
    engine.load_weights(source)
    return Policy(engine, str(place))


def load_pairs(
    path: str | Path | Sequence[str],
    tokenizer: str | Path | PreTrainedTokenizerBase,
    *,
    seq_length: int = 4096,
    max_prompt_length: int = MAX_PROMPT_LENGTH,
    format: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> TokenizedSet:
    """Preference pairs as training tokenizes them: a sequence of ``Example``, each with ``record_id``,
    ``prompt`` and ``responses`` (chosen, rejected), int32 token ids.

    Args:
        path: a file in any format of ``data.train_dir``, several of them, or a data set's name on the Hub.
        tokenizer: a folder or hub id, or a tokenizer of transformers.
        seq_length: maximum tokens of prompt and response; longer ones are truncated as in training.
        max_prompt_length: maximum tokens of a prompt, at most ``seq_length // 2``.
        format: a format's name; None detects it from the keys.
        chat_template_kwargs: variables of the chat template, as ``data.chat_template_kwargs``.

    Raises UserError that names each bad record by file and line.
    """
    paths = [path] if isinstance(path, str | Path) else list(path)
    found = load_records([Source(str(p), None) for p in paths], "pair", format=format)
    made = load_tokenizer(str(tokenizer)) if isinstance(tokenizer, str | Path) else tokenizer
    limit = min(max_prompt_length, seq_length // 2)
    tokenization = Tokenization(made, Truncation(seq_length, limit, "keep_start"), chat_template_kwargs)
    return tokenize_records(found.records, tokenization, None, report=found.report)
