"""No YAML and no override ends in a traceback or a hang, however deep, long or large it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nxdt_align.config.bounds import MAX_DEPTH
from nxdt_align.config.load import find_config, load_config
from nxdt_align.config.schema import Config
from nxdt_align.errors import UserError

Load = Callable[..., Config]
SECONDS = 120.0
"""Far above what each takes, far below what it took or would take without its bound."""


def bomb(item: str, alias: str, levels: int = 9, width: int = 10) -> str:
    """Levels of a list, or of a text, each of which holds the one before ``width`` times."""
    lines = [f"a0: {item}"]
    for level in range(1, levels + 1):
        lines.append(alias.format(level=level, body=", ".join([f"*a{level - 1}"] * width), before=level - 1))
    return "\n".join(lines)


TEXTS: dict[str, tuple[str, str]] = {
    "nested 200 deep": ("a: " + "[" * 200 + "]" * 200, "line 1, column 35: is nested more than 32 deep"),
    "nested 3,000 deep and not closed": ("[" * 3000, "is nested more than 32 deep"),
    "sections 200 deep": (
        "\n".join(" " * level + "a:" for level in range(200)),
        "line 33, column 33: is nested more than 32 deep; no key here is",
    ),
    "dashes 3,000 deep": ("a:\n " + "- " * 3000 + "1", "is nested more than 32 deep"),
    "interpolations 200 deep": ("name: '" + "${" * 200 + "'", "is nested more than 32 deep"),
    "an alias of itself": ("a: &a [*a]", "line 1, column 8: the alias *a lies inside what it stands for"),
    "an alias of itself, in a section": ("a: &a {b: {c: *a}}", "lies inside what it stands for"),
    "an interpolation of itself": ("model: {optim: {x: '${model.optim}'}}", "Interpolation to parent node"),
    "sections of each other": ("a: {x: '${b}'}\nb: {y: '${a}'}", "must not lie inside what it stands for"),
    "sections of each other, twice": (
        "a: {x: '${b}', z: '${b}'}\nb: {y: '${a}', z: '${a}'}",
        "interpolations give more than 20,000 values",
    ),
    "two interpolations of each other": ("name: ${seed}\nseed: ${name}", "name: cannot be resolved: "),
    "an anchor bomb": (
        bomb("&a0 [x, x]", "a{level}: &a{level} [{body}]"),
        "stands for more than 20,000 values",
    ),
    "an anchor bomb of merged keys": (
        bomb("&a0 {x: 1}", "a{level}: &a{level} {{<<: [{body}]}}"),
        "stands for more than 20,000 values",
    ),
    "a bomb of interpolated texts": (
        "\n".join(["a0: x", *(f"a{n}: " + f"${{a{n - 1}}}" * 10 for n in range(1, 10))]),
        "stands for more than 20,000 values; write the values out",
    ),
    "a bomb of interpolated sections": (
        "\n".join(["a0: [x]", *(f"a{n}: [" + f"'${{a{n - 1}}}'," * 10 + "]" for n in range(1, 10))]),
        "stands for more than 20,000 values; write the values out",
    ),
    "a tower of aliases": (
        "\n".join(["a0: &a0 [1]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 3000))]),
        "is nested more than 32 deep",
    ),
    "many values": ("a: [" + "1," * 100_000 + "]", "stands for more than 20,000 values"),
    "a long text": ("name: " + "x" * 2_000_000, "characters; a configuration has at most 1,048,576"),
    "an integer of 5,000 digits": ("seed: " + "1" * 5000, "line 1, column 7: a number of 5,000 digits"),
    "a hexadecimal of 5,000 digits": ("seed: 0x" + "f" * 5000, "a number of 5,002 digits"),
    "an integer of 300 digits": ("seed: " + "1" * 300, "seed: must be an integer below 2^63"),
    "a surrogate in a key": ('"\\ud800": 1', "line 1, column 1: the text '\\ud800' holds"),
    "a surrogate in a setting": (
        'model: {optim: {"a\\udfff": 1}}',
        "half a character (a surrogate); remove it",
    ),
    "a zero byte": ('data: {train_dir: "a\\0b"}', "holds a zero byte"),
    "a tag that does not fit": ("seed: !!int x", "not valid YAML: a value cannot be read"),
    "a truth that is none": ("seed: !!bool 4", "not valid YAML: a value cannot be read"),
    "a date that is none": ("name: !!timestamp x", "not valid YAML: a value cannot be read"),
    "a key of 5,000 characters": ("? " + "x" * 5000 + "\n: 1", "is not a known key"),
}


@pytest.mark.parametrize(("text", "message"), TEXTS.values(), ids=TEXTS)
def test_a_yaml_beyond_the_bounds(load: Load, text: str, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        load(text)
    assert message in str(error.value)
    assert len(str(error.value)) < 2000
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize(
    "defaults", ["[part: bad]", "[part/bad]", "[{/part@x: [bad]}]", "[one]", "['part/${seed}']"]
)
def test_the_files_that_a_list_of_defaults_adds_are_held_to_the_bounds(
    load: Load, tmp_path: Path, defaults: str
) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "bad.yaml").write_text(bomb("&a0 [x, x]", "a{level}: &a{level} [{body}]"))
    (tmp_path / "one.yaml").write_text("defaults: [one, part: bad]")
    with pytest.raises(
        UserError, match=r"part/bad.yaml, line 5, column \d+: stands for more than 20,000 values"
    ):
        load(f"defaults: {defaults}")
    with pytest.raises(UserError, match=r"part/bad.yaml, line 5"):
        load("seed: 1", "+part=bad")


OVERRIDES = {
    "a list 200 deep": ("x=" + "[" * 200 + "]" * 200, "is nested more than 32 deep"),
    "a key 200 deep": ("a." * 90 + "b=1", "is nested more than 32 deep"),
    "a key of 5,000 characters": ("a." * 2500 + "b=1", "its key has 5,001 characters"),
    "interpolations 200 deep": ("name=" + "${" * 200, "is nested more than 32 deep"),
    "functions 200 deep": ("seed=" + "int(" * 200 + "1" + ")" * 200, "is nested more than 32 deep"),
    "an integer of 5,000 digits": ("seed=" + "1" * 5000, "holds a number of more than 400 digits"),
    "in a list": ("data.buckets=[" + "1" * 5000 + "]", "holds a number of more than 400 digits"),
    "in an interpolation": ("seed=${multiply:" + "1" * 5000 + "}", "holds a number of more than 400 digits"),
    "a surrogate": ("name=\udcff", "bytes that are not UTF-8"),
    "a surrogate in a key": ("\udcff=1", "bytes that are not UTF-8"),
    "a zero byte": ("data.train_dir=a\0b", "holds a zero byte"),
    "a very long text": ("name=" + "x" * 200_000, "has 200,005 characters"),
}


@pytest.mark.parametrize(("override", "message"), OVERRIDES.values(), ids=OVERRIDES)
def test_an_override_beyond_the_bounds(load: Load, override: str, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        load("", override)
    assert message in str(error.value)
    assert len(str(error.value)) < 2000
    assert time.monotonic() - start < SECONDS


def test_what_is_within_the_bounds(load: Load) -> None:
    """A nesting as deep as allowed, anchors and merged keys as users write them, a text of many digits."""
    inner = MAX_DEPTH - 3  # below exp_manager, its key, and the document
    text = f"""
name: '{"1" * 100}'
exp_manager: {{wandb_logger_kwargs: {{x: {"[" * inner}{"]" * inner}}}}}
model: {{optim: &optim {{lr: 0.1, betas: [0.9, 0.95]}}}}
data: {{columns: {{<<: {{prompt: p}}, chosen: c}}}}
"""
    config = load(text)
    assert config.data.columns == {"prompt": "p", "chosen": "c"}
    assert len(config.name) == 100


@pytest.mark.parametrize("name", ["x" * 5000, "\udcff", "a\0b"])
def test_a_name_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"^no config ") as error:
        find_config(name, tmp_path)
    assert len(str(error.value)) < 2000
    with pytest.raises(UserError, match=r"^no config "):
        load_config(name)
