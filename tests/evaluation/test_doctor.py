"""Each finding on data that have it and on data that do not; the verb's output and status."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from small_tokenizers import CHATML, make_tokenizer
from training_fixture import Project, sentence

from nxdt_align.cli import main
from nxdt_align.config.alignment import (
    CPOConfig,
    DPOConfig,
    ModelAlignmentStrategyConfig,
    ORPOConfig,
    SimPOConfig,
)
from nxdt_align.data.records import BadRecords, Record
from nxdt_align.data.tokenize import Encoded, Tokenization, Truncation
from nxdt_align.evaluation.doctor import Split, Tokens, examine, quantile
from nxdt_align.evaluation.near_duplicates import SIMILAR, similar_pairs
from nxdt_align.evaluation.show_tokens import show
from nxdt_align.run.doctor import _levers

PLAIN = Tokenization(make_tokenizer(), Truncation(1200, 600))


def pairs(count: int, seed: int) -> list[Record]:
    """Nothing is wrong with them: lengths are drawn alike, texts are long enough to differ."""
    rng = random.Random(seed)
    return [
        Record(
            f"{rng.random()} {sentence(rng, 4, 9)} {rng.random()}",
            (f"{rng.random()} {sentence(rng, 4, 9)}", f"{rng.random()} {sentence(rng, 4, 9)}"),
            source=f"f:{at + 1}",
        )
        for at in range(count)
    ]


def split(
    records: list[Record], name: Literal["train", "val"] = "train", tokenization: Tokenization = PLAIN
) -> Split:
    encoded = [each for each in tokenization.encode(records) if isinstance(each, Encoded)]
    return Split(name, records, encoded, BadRecords(read=len(records)))


def tokens(
    tokenization: Tokenization,
    ends: frozenset[int] | None = None,
    strategy: ModelAlignmentStrategyConfig | None = None,
) -> Tokens:
    tokenizer = tokenization.tokenizer
    strategy = strategy or ModelAlignmentStrategyConfig(dpo=DPOConfig())
    return Tokens(
        tokenization.truncation,
        f"model_alignment_strategy.{strategy.objective}",
        _levers(strategy),
        tokenizer.bos_token_id,
        frozenset((tokenizer.eos_token_id,)) if ends is None else ends,
        bool(tokenizer.chat_template),
    )


def change(what: str, of: Split, tokens: Tokens) -> str:
    (found,) = [each for each in examine([of], tokens, stops_at_bad=True, batch_size=8) if each.what == what]
    return found.change


def found(*splits: Split, of: Tokens | None = None, stops: bool = True) -> dict[str, str]:
    """What is found -> its weight."""
    findings = examine(splits, of or tokens(PLAIN), stops_at_bad=stops, batch_size=8)
    order = [("fault", "warning", "note").index(finding.weight) for finding in findings]
    assert order == sorted(order)
    assert all(finding.says.startswith("data.") and finding.change for finding in findings)
    return {finding.what: finding.weight for finding in findings}


def test_nothing_is_found_in_good_data() -> None:
    assert found(split(pairs(100, 1)), split(pairs(30, 2), "val")) == {}


def test_duplicates() -> None:
    """But for case and punctuation; 1 of 101 is below 1%, 10 of 110 are not."""
    good = pairs(100, 1)
    again = Record(good[0].prompt.upper(), (good[0].responses[0], f"{good[0].responses[1]}!"), source="f:x")  # type: ignore[union-attr]
    assert found(split([*good, again])) == {"duplicates": "note"}
    assert found(split([*good, *good[:10]])) == {"duplicates": "warning"}


def test_near_duplicates() -> None:
    good = pairs(100, 1)
    near = [
        Record(f"{r.prompt} {sentence(random.Random(3), 30, 30)}", r.responses, source="f:n")
        for r in good[:10]
    ]
    other = [Record(f"{r.prompt} indeed", r.responses, source="f:m") for r in near]
    assert found(split([*good, *near, *other])) == {"near-duplicates": "warning"}


def test_contradictions() -> None:
    good = pairs(100, 1)
    turned = [Record(r.prompt, r.responses[::-1], source="f:t") for r in good[:2]]
    assert found(split([*good, *turned]))["contradictions"] == "warning"
    labelled = [
        Record(r.prompt, r.responses[:1], label=at % 2 == 0, source="f:1") for at, r in enumerate(good)
    ]
    assert found(split(labelled)) == {}
    both = [Record(r.prompt, r.responses, label=not r.label, source="f:2") for r in labelled[:50]]
    assert found(split([*labelled, *both]))["contradictions"] == "fault"


def test_leakage() -> None:
    train, val = pairs(100, 1), pairs(30, 2)
    assert found(split(train), split([*val, train[3]], "val")) == {"leakage": "fault"}
    other = Record(train[3].prompt, val[0].responses, source="f:o")
    assert found(split(train), split([*val, other], "val")) == {"shared prompts": "warning"}
    long = Record(f"{train[0].prompt} {sentence(random.Random(3), 30, 30)}", val[1].responses, source="f:l")
    near = Record(f"{long.prompt} indeed", val[2].responses, source="f:n")
    assert found(split([*train, long]), split([*val, near], "val")) == {"near leakage": "warning"}


def biased(share: float, swap: bool = False) -> Split:
    """Chosen is the longer one in a share of the pairs, or the shorter one."""
    rng, records = random.Random(0), []
    for at, r in enumerate(pairs(200, 1)):
        long, short = f"{r.responses[0]} {sentence(rng, 40, 50)}", str(r.responses[1])
        answers = (long, short) if (at < share * 200) != swap else (short, long)
        records.append(Record(r.prompt, answers, source=r.source))
    return split(records)


def test_length_bias() -> None:
    """Chosen longer in all, in 70% and in 55% of the pairs; shorter counts alike."""
    assert found(biased(1.0)) == {"length bias": "fault"} == found(biased(1.0, swap=True))
    assert found(biased(0.7)) == {"length bias": "warning"} and found(biased(0.55)) == {}


@pytest.mark.parametrize(
    ("strategy", "keys"),
    [
        ({"dpo": DPOConfig()}, "label_smoothing ld_alpha length_normalization"),
        ({"dpo": DPOConfig(loss_type="hinge")}, "ld_alpha length_normalization"),
        ({"dpo": DPOConfig(loss_type="sigmoid_norm")}, "label_smoothing ld_alpha"),
        ({"dpo": DPOConfig(), "loss": "mine.loss"}, "ld_alpha"),
        ({"cpo": CPOConfig()}, "label_smoothing"),
        ({"simpo": SimPOConfig()}, "label_smoothing"),
        ({"orpo": ORPOConfig()}, ""),
        ({"orpo": ORPOConfig(), "loss": "mine.loss"}, ""),
    ],
)
def test_only_keys_that_the_objective_reads_are_named(strategy: dict[str, Any], keys: str) -> None:
    settings = ModelAlignmentStrategyConfig(**strategy)
    of = tokens(PLAIN, strategy=settings)
    turned = [Record(r.prompt, r.responses[::-1], source="f:t") for r in pairs(2, 1)]
    changes = [
        change("length bias", biased(1.0), of),
        change("contradictions", split([*pairs(100, 1), *turned]), of),
    ]
    named = [name for said in changes for name in re.findall(r"model_alignment_strategy\.(\w+\.\w+)", said)]
    assert sorted(named) == [f"{settings.objective}.{key}" for key in keys.split()]
    assert "data.train_dir: balance the pairs" in changes[0] and "data.train_dir: decide them" in changes[1]


def test_limits_that_are_named_are_allowed() -> None:
    """A prompt's is below seq_length, and that is not above the model's."""
    good = pairs(100, 1)
    lengths = [each.whole for each in split(good).encoded]
    longest = quantile([length[0] for length in lengths], 99)
    needed = quantile([length[0] + max(length[1:]) for length in lengths], 99)
    limit = "model_alignment_strategy.dpo.max_prompt_length"

    def said(what: str, seq_length: int, **more: Any) -> str:
        tokenization = Tokenization(make_tokenizer(), Truncation(seq_length, 20))
        return change(
            what, split(good, tokenization=tokenization), replace(tokens(tokenization), **more)
        ).removesuffix(" serves 99% of them")

    assert said("cut prompts", longest + 1) == f"{limit}={longest}"
    assert said("cut prompts", longest) == f"{limit}={longest} with data.seq_length={needed}"
    both = f"data.seq_length={needed} with model.encoder_seq_length={needed}"
    assert said("cut prompts", longest, model_length=longest) == f"{limit}={longest} with {both}"
    assert said("cut responses", 30, model_length=longest) == both
    assert said("cut responses", 30, model_length=needed) == f"data.seq_length={needed}"


def test_truncation() -> None:
    good = pairs(100, 1)
    short = Tokenization(make_tokenizer(), Truncation(60, 50))
    weights = found(split(good, tokenization=short), of=tokens(short))
    assert weights.items() >= {("cut prompts", "fault"), ("cut responses", "fault")}
    begin = sentence(random.Random(1), 1000, 1000)
    alike = Record("why", (f"{begin} a", f"{begin} b"), source="f:a")
    assert found(split([*good, alike])) == {"cut responses": "note", "ties after truncation": "warning"}


def test_template_audit() -> None:
    chats = [
        Record([{"role": "user", "content": str(r.prompt)}], r.responses, source=r.source)
        for r in pairs(90, 1)
    ]
    tokenization = Tokenization(make_tokenizer(template=CHATML), Truncation(500, 200))
    end = tokenization.turn_end()
    assert end is not None
    good = tokens(tokenization, frozenset((end,)))
    assert found(split(chats, tokenization=tokenization), of=good) == {}
    # With another's end of turn the same responses have none.
    assert found(split(chats, tokenization=tokenization), of=tokens(tokenization, frozenset((1,)))) == {
        "responses without an end": "warning"
    }
    texts = split(pairs(90, 1), tokenization=tokenization)
    assert found(texts, of=tokens(tokenization)) == {"text beside a chat template": "note"}
    with_bos = [Record(f"{r.prompt} <s> x", r.responses, source=r.source) for r in pairs(90, 1)]
    assert found(split(with_bos)) == {"BOS within prompts": "warning"}


def test_labels_and_few_records() -> None:
    singles = [Record(r.prompt, r.responses[:1], label=True, source=r.source) for r in pairs(100, 1)]
    assert found(split(singles)) == {"unbalanced labels": "fault"}
    assert found(split(pairs(30, 1))) == {"few records": "warning"}
    assert found(split(pairs(5, 1))) == {"few records": "fault"}


def test_similar_texts_are_all_found() -> None:
    """Against every pair, exactly: texts of 30 words of which some are changed."""
    rng = random.Random(0)
    texts = []
    for base in range(20):
        words = [f"w{rng.randrange(1000)}" for _ in range(40)]
        for changed in (0, 1, 2, 4, 12):
            copy = list(words)
            for at in rng.sample(range(40), changed):
                copy[at] = f"x{base}{at}{changed}"
            texts.append(" ".join(copy))

    def triples(text: str) -> set[str]:
        words = text.split()
        return {" ".join(words[at : at + 3]) for at in range(len(words) - 2)}

    sets = [triples(text) for text in texts]
    wanted = [
        (i, j)
        for i in range(len(sets))
        for j in range(i + 1, len(sets))
        if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= SIMILAR
    ]
    assert wanted and similar_pairs(texts) == wanted
    half = len(texts) // 2
    assert similar_pairs(texts[:half], texts[:half])[0] == (0, 0)
    assert similar_pairs(["", "a", "a"]) == [(1, 2)]


def test_tokens_are_shown_with_what_is_cut() -> None:
    record = Record("one two", ("a\x1b[2Jb is", "it"), source="f:1")
    short = Tokenization(make_tokenizer(), Truncation(8, 4))
    long = Tokenization(make_tokenizer(), Truncation(200, 100))
    kept, whole = short.encode([record])[0], long.encode([record])[0]
    assert isinstance(kept, Encoded) and isinstance(whole, Encoded)
    plain = show(record, kept, whole, short.tokenizer, colours=False)
    assert plain.splitlines()[0] == "f:1" and "prompt (4): <s>|[cut: o]|n|e| two" in plain
    assert "\x1b" not in plain and "\\x1b" in plain  # a text's own codes are not obeyed
    assert "\x1b[9;90m" in show(record, kept, whole, short.tokenizer, colours=True)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project.create(tmp_path, pairs=60)


def doctor(project: Project, *options: str) -> int:
    place = ("--config-path", str(project.root / "conf"), "--config-name", "run")
    return main(["doctor", *place, *options])


def add(file: Path, *rows: Any) -> None:
    file.write_text(file.read_text() + "".join(json.dumps(row) + "\n" for row in rows))


def test_the_verb(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(project, "--show", "2") == 0
    said = capsys.readouterr().out
    assert "data.train_dir: 60 records, 0 bad ones" in said and "data.val_dir: 6 records" in said
    assert "limit 128 (data.seq_length)" in said and "chosen (" in said and "train.jsonl:2" in said
    assert not (project.root / "experiments").exists()


def test_nothing_is_shown_as_cut_that_the_templates_variables_leave_out(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    thinks = "{% if enable_thinking is not defined or enable_thinking %}think well{% endif %}"
    make_tokenizer(template=thinks + CHATML).save_pretrained(project.root / "tokenizer")
    chats = [{"role": "user", "content": "why"}]
    rows = [{"prompt": chats, "chosen": f"yes {at}", "rejected": f"no {at}"} for at in range(30)]
    for name in ("train", "val"):
        (project.root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    doctor(project, "--show", "3", "data.chat_template_kwargs={enable_thinking: false}")
    said = capsys.readouterr().out
    assert "chosen (" in said and "[cut" not in said


def test_records_are_not_shown_as_json(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        doctor(project, "--json", "--show", "2")
    assert "argument --show: not allowed with argument --json" in capsys.readouterr().err


def test_faults_are_told_all_at_once_with_status_1(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where train would stop at the first kind."""
    train = project.root / "train.jsonl"
    first = json.loads(train.read_text().splitlines()[0])
    add(train, {"prompt": "p", "chosen": "a"}, {"prompt": "p", "chosen": "a", "rejected": "a"}, first)
    add(project.root / "val.jsonl", first)
    assert doctor(project, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    weights = {finding["what"]: finding["weight"] for finding in found["findings"]}
    assert weights["bad records"] == weights["ties"] == weights["leakage"] == "fault"
    assert found["splits"]["train"]["bad"] == 2 and found["splits"]["train"]["records"] == 61
    (bad,) = [finding for finding in found["findings"] if finding["what"] == "bad records"]
    assert bad["examples"][0].startswith(f"{train}:61: no `rejected`")
    assert doctor(project, "data.on_bad_record=drop", "data.val_dir=null") == 0


def test_what_stops_the_doctor(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(project, f"data.train_dir={project.root}/missing.jsonl") == 1
    assert "missing.jsonl" in capsys.readouterr().err
    (project.root / "train.jsonl").write_text('{"prompt": "p"}\n')
    assert doctor(project) == 1
    assert "data.train_dir: " in capsys.readouterr().err
    yaml = project.root / "conf" / "run.yaml"
    yaml.write_text(yaml.read_text().replace("data:\n", "data:\n  format: my_module.read\n"))
    assert doctor(project) == 1
    assert "--import-own-parts imports it here" in capsys.readouterr().err
