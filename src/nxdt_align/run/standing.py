"""Examples of given lengths that stand for the data of a plan, of which only lengths count."""

from __future__ import annotations

from collections.abc import Sequence

from nxdt_align.batch import Topology
from nxdt_align.config.schema import Config
from nxdt_align.data.packing import RowPlanner
from nxdt_align.data.steps import UNPAIRED_ROLES, StepDataset
from nxdt_align.data.token_columns import TokenColumns
from nxdt_align.data.token_sets import TokenizedSet
from nxdt_align.data.tokenize import Encoded
from nxdt_align.errors import UserError
from nxdt_align.models.presets import ModelShape
from nxdt_align.run import assemble


def require_lengths(config: Config, lengths: Sequence[int]) -> None:
    """Raise UserError unless they are tokens of a prompt and of each of its responses, within
    ``data.seq_length``."""
    responses = 1 if config.model_alignment_strategy.sft is not None else 2
    longest = config.data.seq_length
    if len(lengths) != responses + 1 or min(lengths) < 1 or lengths[0] + max(lengths[1:]) > longest:
        raise UserError(
            f"--lengths must be tokens of a prompt and of {responses} response(s), 1 or more each, "
            f"a prompt and a response at most data.seq_length ({longest}), but is "
            f"{','.join(map(str, lengths))}"
        )


def standing_for_data(
    config: Config,
    model: ModelShape,
    topology: Topology,
    lengths: Sequence[int],
    *,
    with_prompts: bool,
    fixed_micro_batches: bool,
    on_trainium: bool,
    row_multiple: int,
    min_micro_batches: int = 1,
    round_size: int = 1,
) -> StepDataset:
    """A step's examples, all of these ``lengths``, laid into rows as the data would be; see RowPlanner."""
    count, data = config.data.global_batch_size, config.data
    ids = [f"{number:032x}" for number in range(count)]
    example = Encoded([0] * lengths[0], [[0] * n for n in lengths[1:]], truncated=False)
    columns = TokenColumns.of(ids, [example] * count)
    planner = RowPlanner(
        examples := TokenizedSet.of(columns, ids),
        config.layout,
        examples_per_step=count,
        seq_length=data.seq_length,
        buckets=data.buckets,
        ranks=topology.data_parallel_size,
        micro_batch_size=data.micro_batch_size,
        min_micro_batches=min_micro_batches,
        round_size=round_size,
        fixed_micro_batches=fixed_micro_batches,
        with_prompts=with_prompts,
        **assemble.row_needs(config, model, on_trainium=on_trainium),
        row_multiple=row_multiple,
        name="--lengths",
    )
    strategy = config.model_alignment_strategy
    return StepDataset(
        *(examples, planner, config.layout, topology),
        tail_weight=None if strategy.dpo is None else strategy.dpo.ld_alpha,
        roles=None if strategy.kto is None else UNPAIRED_ROLES,
        with_prompts=with_prompts,
    )
