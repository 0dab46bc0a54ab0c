"""How much of a host's memory the data of a run take, on a node of several ranks."""

from __future__ import annotations

from collections.abc import Mapping

from nxdt_align.data.steps import Split, StepDataset


def host_memory(splits: Mapping[Split, StepDataset], ranks_per_node: int, *, keeps_reference: bool) -> str:
    """In words: what all ranks of a node share, what each has of its own, and what both come to.

    Args:
        keeps_reference: the reference's values are computed before training, and mapped from their file.
    """
    mapped = own = 0
    for dataset in splits.values():
        examples = dataset.examples
        mapped += examples.mapped_bytes
        own += examples.own_bytes + 4 * len(examples)  # an epoch's order
        if keeps_reference:
            mapped += 4 * examples.response_lengths.size
    total = mapped + ranks_per_node * own
    return (
        f"host memory per node for data: {_megabytes(total)}, {_megabytes(mapped)} of it mapped by all "
        f"{ranks_per_node} rank(s), {_megabytes(own)} in each; imports, weights and batches not counted"
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
