"""Examples of given lengths that stand for the data of a plan, of which only lengths count."""

from __future__ import annotations

from collections.abc import Sequence

from nxdt_align.batch import Topology
from nxdt_align.config.schema import Config
from nxdt_align.data.layouts import LayoutChoice, LayoutOptions, RowOption
from nxdt_align.data.packing import RowPlanner
from nxdt_align.data.steps import UNPAIRED_ROLES, StepDataset
from nxdt_align.data.token_columns import TokenColumns
from nxdt_align.data.token_sets import TokenizedSet
from nxdt_align.data.tokenize import Encoded
from nxdt_align.errors import UserError


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
    topology: Topology,
    lengths: Sequence[int],
    *,
    window: int | None,
    only_local: bool,
    layouts: LayoutOptions,
    with_prompts: bool,
    fixed_micro_batches: bool,
    min_micro_batches: int = 1,
    round_size: int = 1,
) -> tuple[StepDataset, LayoutChoice | None]:
    """A step's examples, all of these ``lengths``, laid into rows as the data would be, see RowPlanner; and
    the choice of the layout, where there are several."""
    count, data = config.data.global_batch_size, config.data
    ids = [f"{number:032x}" for number in range(count)]
    example = Encoded([0] * lengths[0], [[0] * n for n in lengths[1:]], truncated=False)
    columns = TokenColumns.of(ids, [example] * count)
    examples = TokenizedSet.of(columns, ids)

    def plan(option: RowOption) -> RowPlanner:
        return RowPlanner(
            examples,
            option.layout,
            examples_per_step=count,
            seq_length=data.seq_length,
            buckets=data.buckets,
            ranks=topology.data_parallel_size,
            micro_batch_size=data.micro_batch_size,
            min_micro_batches=min_micro_batches,
            round_size=round_size,
            fixed_micro_batches=fixed_micro_batches,
            with_prompts=with_prompts,
            window=window,
            only_local=only_local,
            row_multiple=option.row_multiple,
            row_cost=option.row_cost,
            name="--lengths",
        )

    planner, choice = layouts.choose(plan)
    strategy = config.model_alignment_strategy
    dataset = StepDataset(
        *(examples, planner, planner.layout, topology),
        tail_weight=None if strategy.dpo is None else strategy.dpo.ld_alpha,
        roles=None if strategy.kto is None else UNPAIRED_ROLES,
        with_prompts=with_prompts,
    )
    return dataset, choice
