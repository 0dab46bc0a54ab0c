"""What the Lightning strategy asks of all ranks."""

from __future__ import annotations

import threading

import pytest
from fake_engine import Exchange, FakeEngine
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from nxdt_align.batch import Topology
from nxdt_align.training.strategy import EngineStrategy


def decide(decisions: list[bool], sizes: dict[str, int], *, all: bool) -> list[bool]:
    """Each rank's answer to its own decision."""
    ranks = len(decisions)
    exchange = Exchange(ranks)
    answers: list[bool] = [False] * ranks

    def ask(rank: int) -> None:
        engine = FakeEngine(rank, ranks, exchange)
        engine.topology = Topology.of_rank(rank, ranks, **sizes)
        strategy = EngineStrategy(engine, LightningEnvironment(), {})
        answers[rank] = strategy.reduce_boolean_decision(decisions[rank], all=all)

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    return answers


SPREADS: dict[str, dict[str, int]] = {
    "data parallel": {},
    "tensor parallel": {"tensor_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2},
}


@pytest.mark.parametrize("spread", SPREADS)
def test_every_rank_has_a_vote(spread: str) -> None:
    """A rank that would go on alone would wait for the others for ever."""
    for decisions in ([True, False], [False, True]):
        assert decide(decisions, SPREADS[spread], all=True) == [False, False]
        assert decide(decisions, SPREADS[spread], all=False) == [True, True]
    assert decide([True, True], SPREADS[spread], all=True) == [True, True]
    assert decide([False, False], SPREADS[spread], all=False) == [False, False]
