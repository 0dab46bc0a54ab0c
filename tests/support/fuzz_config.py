"""Broken configurations, made from a good YAML by a seeded generator.

``broken_configs(seed, good)`` yields them without end, the same for the same seed: a YAML's text and
overrides. Most are wrong, some are right by chance. Whatever reads them may raise the package's own error and
nothing else, soon, with a message of moderate length::

    for case in itertools.islice(broken_configs(7, text), 1000):
        path.write_text(case.text, encoding="utf-8", errors="surrogatepass")
        main(["config", "--config-name", str(path), *case.overrides])
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from nxdt_align.config.keys import all_keys

_TEXTS = [
    *("", " ", "null", "~", "true", "nan", ".inf", "-0", "1e308", "0x1f", "1_000", "2024-01-01", "12:30:45"),
    *(
        "a" * 300,
        "x" * 5000,
        "é",
        "日本",
        "\u202e",
        "🦙" * 20,
        "\ud800",
        "a\0b",
        "\n",
        "a\tb",
        "'",
        '"',
        "\\",
        "%s",
    ),
    *("{}", "[]", "{", "]", "${", "${}", "${a}", "${..}", "${seed}", "${trainer}", "${multiply:}", "}${seed"),
    *("${multiply:a,b}", "${multiply:1e308,1e308}", "${oc.env:HOME}", "${oc.env:NOPE}", "${oc.decode:'['}"),
    *("${oc.create:{a:1}}", "${oc.select:x}", "${oc.dict.keys:trainer}", "${hydra:runtime.cwd}", "${now:%Y}"),
    *(
        "${python_version:}",
        "${name}${name}",
        "../..",
        "/",
        "/dev/null",
        "/dev/full",
        "/proc/self/mem",
        "$HOME",
    ),
    *(
        "~",
        "file:///etc/passwd",
        "s3://x",
        "os.system",
        "subprocess.Popen",
        "a.b",
        ".",
        "..",
        "a..b",
        "{step}",
    ),
    *("{step:zz}", "{0}", "{step.__class__}", "!!python/object/apply:os.system", "*a", "&a", "- x", "? x"),
    *("none", "off", "adamw", "dpo", "hf", "1h", "00:00:00:00", "99:99:99:99", "-1:0:0:0"),
]
_NUMBERS: list[Any] = [
    *(0, -1, 1, 2, 3, 7, 255, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**399),
    *(0.0, -0.0, 0.5, -0.5, 1.5, 1e-320, 1e308, -1e308, float("inf"), float("-inf"), float("nan")),
]
_TAGS = (
    "!!int",
    "!!float",
    "!!bool",
    "!!timestamp",
    "!!binary",
    "!!set",
    "!!omap",
    "!!python/name:os.system",
    "!x",
)
_TAILS = (
    *(
        "[" * 50,
        "{" * 50,
        "a: [1, 2",
        "a: 'x",
        'a: "\\',
        "\t- a",
        "- a\nb: 1",
        "a: &x [*x]",
        "*nope: 1",
        "%YAML 9.9",
    ),
    *(
        "---\nb: 1",
        "a: !!int x",
        "\x00",
        "\x07",
        "<<: 3",
        "<<: [1]",
        "defaults: [nope]",
        "defaults: 3",
        "? [a]\n: 1",
    ),
    *(
        "defaults: [{a: b}]",
        "hydra: {searchpath: [pkg://os]}",
        "hydra: 3",
        "1: 2",
        "true: 1",
        "2024-01-01: x",
    ),
    "a0: &a0 [x, x]\n" + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)),
)


@dataclass(frozen=True)
class Case:
    """A configuration that is probably broken."""

    number: int
    seed: int
    text: str
    overrides: tuple[str, ...]

    def __str__(self) -> str:
        return f"case {self.number} of seed {self.seed}: overrides {list(self.overrides)}\n{self.text}"


def broken_configs(seed: int, good: str) -> Iterator[Case]:
    """Variants of the YAML text ``good``, without end. Each depends on ``seed`` and its number alone."""
    content = yaml.safe_load(good)
    number = 0
    while True:
        rng = random.Random(f"{seed}-{number}")
        changed = copy.deepcopy(content)
        for _ in range(rng.choice((0, 1, 1, 1, 2, 5))):
            rng.choice(_CHANGES)(changed, rng)
        text = _dump(changed)
        if rng.random() < 0.3:
            text = rng.choice(_TEXT_CHANGES)(text, rng)
        overrides = tuple(_override(rng) for _ in range(rng.choice((0, 0, 1, 1, 3))))
        yield Case(number, seed, text, overrides)
        number += 1


def _dump(content: Any) -> str:
    # Not safe_dump: texts that no YAML can hold are what the reader must refuse.
    return yaml.dump(content, allow_unicode=True, sort_keys=False)


# Values


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any value of a YAML: texts, numbers out of bounds, collections within each other."""
    kind = rng.random()
    if kind < 0.35 or depth > 4:
        return rng.choice(_TEXTS)
    if kind < 0.65:
        return rng.choice(_NUMBERS)
    if kind < 0.75:
        return rng.choice((None, True, False))
    if kind < 0.78:
        return nested(rng.choice((10, 40, 200)), rng)
    if kind < 0.88:
        return [value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    return {_key(rng): value(rng, depth + 1) for _ in range(rng.randint(0, 3))}


def nested(depth: int, rng: random.Random) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found] if rng.random() < 0.5 else {"a": found}
    return found


def _key(rng: random.Random) -> Any:
    names = [path.rpartition(".")[2] for path in rng.sample(sorted(all_keys()), 3)]
    return rng.choice([*names, *_TEXTS, 3, None, True, 1.5])


# Changes of the content


def _sections(content: Any) -> list[Any]:
    below = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    found = [content] if isinstance(content, dict) and content else []
    # Not recursive, since a change may have nested it deeply.
    return found + [item for item in below if isinstance(item, dict) and item]


def _section(content: Any, rng: random.Random) -> Any:
    section = rng.choice(_sections(content) or [content])
    return rng.choice(_sections(section) or [section])


def _replace(content: Any, rng: random.Random) -> None:
    section = _section(content, rng)
    if section:
        section[rng.choice(list(section))] = value(rng)


def _delete(content: Any, rng: random.Random) -> None:
    section = _section(content, rng)
    if section:
        del section[rng.choice(list(section))]


def _unknown(content: Any, rng: random.Random) -> None:
    _section(content, rng)[_key(rng)] = value(rng)


def _known(content: Any, rng: random.Random) -> None:
    """Any key of the schema, with any value."""
    *sections, name = rng.choice(sorted(all_keys())).split(".")
    for section in sections:
        if not isinstance(content.get(section), dict):
            content[section] = {}
        content = content[section]
    content[name] = value(rng)


def _swap(content: Any, rng: random.Random) -> None:
    if len(content) > 1:
        one, other = rng.sample(list(content), 2)
        content[one], content[other] = content[other], content[one]


def _misspell(content: Any, rng: random.Random) -> None:
    section = _section(content, rng)
    if section:
        key = rng.choice(list(section))
        name = str(key)
        at = rng.randrange(len(name) + 1)
        section[name[:at] + rng.choice("xé._ -\u0301") + name[at + 1 :]] = section.pop(key)


def _refer(content: Any, rng: random.Random) -> None:
    section = _section(content, rng)
    if section:
        path = rng.choice(sorted(all_keys()))
        section[rng.choice(list(section))] = rng.choice(("", "x", "-")) + f"${{{path}}}"


_CHANGES: tuple[Callable[[Any, random.Random], None], ...] = (
    *(_replace, _replace, _known, _known, _delete, _unknown, _swap, _misspell, _refer),
)


# Changes of the text


def _cut(text: str, rng: random.Random) -> str:
    return text[: rng.randrange(len(text) + 1)]


def _insert(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice([*_TEXTS, *"[]{}:,&*!|>%@`'\"\t#"]) + text[at:]


def _tag(text: str, rng: random.Random) -> str:
    return text.replace(": ", f": {rng.choice(_TAGS)} ", rng.randint(1, 3))


def _append(text: str, rng: random.Random) -> str:
    return f"{text}\n{rng.choice(_TAILS)}\n"


def _shuffle(text: str, rng: random.Random) -> str:
    lines = text.splitlines()
    rng.shuffle(lines)
    return "\n".join(lines)


def _double(text: str, rng: random.Random) -> str:
    return text + text


_TEXT_CHANGES: tuple[Callable[[str, random.Random], str], ...] = (
    *(_cut, _insert, _insert, _tag, _append, _append, _append, _shuffle, _double),
)


# Overrides


def _override(rng: random.Random) -> str:
    key = rng.choice(sorted(all_keys())) if rng.random() < 0.8 else str(_key(rng))
    given = value(rng)
    text = given if isinstance(given, str) else yaml.dump(given, default_flow_style=True, width=10**9).strip()
    text = text.removesuffix("...").strip()
    forms = (
        f"{key}={text}",
        f"{key}={text}",
        f"+{key}={text}",
        f"++{key}={text}",
        f"~{key}",
        f"~{key}={text}",
    )
    odd = (
        *(
            key,
            "=",
            f"={text}",
            f"{key}==x",
            f"{key}=a,b",
            f"{key}@x={text}",
            f"{key}=choice(1,2)",
            "hydra=3",
        ),
        *(
            f"{key}=range(1,5)",
            f"{key}=glob(*)",
            f"{key}=sort(3,1)",
            f"{key}=int({text})",
            f"+{key}",
            "~",
            "+",
        ),
        *(
            f"{key}=[{text}",
            f"{key}={{{text}",
            f"{key}=extend_list(1)",
            f"{key}.0={text}",
            f"{key}[0]={text}",
        ),
        *("hydra.searchpath=[file:///]", f"{key}='{text}'", f'{key}="{text}"', f"{key} = {text}", "a/b=c"),
    )
    return rng.choice(forms if rng.random() < 0.6 else odd)
