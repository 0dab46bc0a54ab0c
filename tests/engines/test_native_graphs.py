"""Graphs that torch.compile makes, as a manifest lists them."""

from __future__ import annotations

import torch
from parallel_fixture import Case, examples_of
from rank_processes import run_parallel
from torch import Tensor

from nxdt_align.engines.native.graphs import GraphRecorder


def recorded(rank: int, world: int) -> list[tuple[str, str, int]]:
    """For ``run_parallel``: key, name and tokens of each graph of two row lengths, with and without
    gradients."""
    torch._dynamo.reset()
    recorder = GraphRecorder()

    def layer(hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.silu(hidden @ weight)

    compiled = torch.compile(layer, backend=recorder.noting("layer", "eager"), dynamic=False)
    weight = torch.zeros(4, 4, requires_grad=True)
    for tokens in (64, 96, 64):
        batches = Case(buckets=(tokens,)).micro_batches(0, examples_of(4, 3))
        recorder.begin("training step", batches)
        for _ in batches:
            compiled(torch.zeros(1, tokens, 4), weight)
        recorder.begin("validation step", batches)
        with torch.no_grad():
            compiled(torch.zeros(1, tokens, 4), weight)
    steps = [(name, shapes[0][1]) for name, shapes in recorder.begun()]
    assert steps == [(f"{kind} step", n) for n in (64, 96) for kind in ("training", "validation")]
    assert recorder.count() == len(recorder.graphs())
    return [(key, graph.name, graph.shapes[0][1]) for key, graph in recorder.graphs().items()]


def test_a_graph_has_one_key_in_every_process() -> None:
    """And another for other shapes, and for the one that has a backward pass."""
    first, second = run_parallel(2, recorded)
    assert first == second
    assert [graph[1:] for graph in first] == [
        (f"{kind} step: layer", tokens) for tokens in (64, 96) for kind in ("training", "validation")
    ]
    assert len({key for key, *_ in first}) == 4


def test_the_same_operations_with_other_guards_are_graphs_of_their_own() -> None:
    torch._dynamo.reset()
    recorder = GraphRecorder()

    def part(hidden: Tensor, kind: str) -> Tensor:
        return hidden + 1 if kind != "none" else hidden

    compiled = torch.compile(part, backend=recorder.noting("layer", "eager"), dynamic=False)
    for kind in ("a", "b", "a"):
        compiled(torch.zeros(4), kind)
    first, second = recorder.graphs()
    assert recorder.count() == 2 and second == f"{first}-2"
