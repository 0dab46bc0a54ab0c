"""Combinations of values: those of Hydra's own basic sweeper, under names that are folders."""

from __future__ import annotations

import re

import pytest

from nxdt_align.config.sweep import combinations, first_values, key_by_name
from nxdt_align.errors import UserError

DPO = "model_alignment_strategy.dpo.kl_beta"


def made(*overrides: str) -> list[tuple[str, ...]]:
    return [each.overrides for each in combinations(overrides, lambda key: key)]


GIVEN = [
    ("a=0.05,0.1", "b=2"),
    ("a=1,2", "b=[1,2],[3]", "c=5"),
    ("a='x,y',z", "+b.c={d: 1},{d: 2}"),
    ("a=choice(1,2)", "b=range(1,4)"),
    ("a=null,1e-6", "b=true,false"),
    ("a=data/x.jsonl,data/y.jsonl",),
]


@pytest.mark.parametrize("overrides", GIVEN)
def test_they_are_those_of_hydra(overrides: tuple[str, ...]) -> None:
    """Hydra's BasicSweeper, whose ``split_arguments`` is what its multirun starts. It writes a fixed
    override anew, ~c as ~c=null; here it stays as it is."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(list(overrides))
    (theirs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    assert [list(each) for each in made(*overrides)] == theirs


def test_labels_are_folders_of_their_own() -> None:
    given = ("model.optim.lr=1e-6,3e-6", "data.train_dir=/a/b.jsonl,/c:b.jsonl", "trainer.max_steps=5")
    found = combinations(given, lambda key: key)
    assert found[0].label == "lr=1e-06,train_dir=a_b.jsonl" and len({each.label for each in found}) == 4
    assert all("/" not in each.label for each in found)
    assert all(not set("?*") & set(label) for label in labels("x.lr=1,2", "y.lr='?','*'"))
    assert labels("x=5", "x=1,2") == ["x=1", "x=2"], "of what is swept alone"


def labels(*overrides: str) -> list[str]:
    return [each.label for each in combinations(overrides, lambda key: key)]


LONG = "/shared/team/projects/preference/data/2026/{}_set.jsonl"


def test_labels_do_not_depend_on_the_order() -> None:
    """A sweep goes on where each value has its folder. The file's name is at a path's end; 31 characters of
    it and 8 of a digest are at most 40."""
    first, second = LONG.format("first"), LONG.format("second")
    found = labels(f"train_dir={first},{second}")
    assert found == labels(f"train_dir={second},{first}")[::-1]
    assert re.fullmatch(r"train_dir=[\w.]{1,31}_first_set\.jsonl-[0-9a-f]{8}", found[0])
    assert found[1].startswith("train_dir=") and "_second_set.jsonl-" in found[1]
    assert max(map(len, found)) <= len("train_dir=") + 40
    alike = labels("a=x/y,x:y,z")
    assert alike == labels("a=z,x:y,x/y")[::-1] and len(set(alike)) == 3 and alike[2] == "a=z"
    assert all(re.fullmatch("a=x_y-[0-9a-f]{8}", label) for label in alike[:2])


def test_a_value_has_one_label() -> None:
    """What is given twice, in other words, is the same run."""
    assert labels("a=0.1,0.10,0.2") == ["a=0.1", "a=0.1", "a=0.2"]


def test_short_names() -> None:
    """``kl_beta`` is one key, ``beta`` one of the objective's, ``name`` many, ``seed`` a key itself."""
    assert key_by_name("kl_beta", "dpo") == DPO
    assert key_by_name("beta", "orpo") == "model_alignment_strategy.orpo.beta"
    assert key_by_name("name", "dpo") == "name" and key_by_name("seed", "dpo") == "seed"
    assert key_by_name("beta", "sft") == "beta"
    (first, _) = combinations(["kl_beta=1,2"], lambda key: key_by_name(key, "dpo"))
    assert first.overrides == (f"{DPO}=1",)


def test_first_values() -> None:
    assert first_values(["a=[1,2],[3]", "b=x(y,z", "~c"]) == ["a=[1,2]", "b=x(y,z", "~c"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["a=1", "b=[1,2]"], "no key has several values"),
        ([], "no key has several values"),
        (["a=1,2", "a=3,4"], "a: is given several values twice"),
        (["a=interval(0,1)"], "a=interval.*: an interval or a glob is no list of values"),
        (["a=glob(*)"], "an interval or a glob"),
    ],
)
def test_faults(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        combinations(overrides, lambda key: key)
