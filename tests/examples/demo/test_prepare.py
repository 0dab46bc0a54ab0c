"""The demo's files: deterministic, train and held-out apart, tokenized as the package tokenizes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from demo.prepare import Sizes, main, make_data, make_tokenizer, prepare
from demo.task import is_right, read_problem

from nxdt_align.errors import UserError

SMALL = Sizes(sft=800, train=150, heldout=50)


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    prepare(out, seed=5, sizes=SMALL)
    return out


def test_every_chosen_is_right_and_every_rejected_wrong(folder: Path) -> None:
    for name, count in (("train", 150), ("heldout", 50)):
        records = _read(folder / "data" / f"{name}.jsonl")
        assert len(records) == count
        assert all(set(record) == {"prompt", "chosen", "rejected"} for record in records)
        assert all(is_right(record["prompt"], record["chosen"]) for record in records)
        assert not any(is_right(record["prompt"], record["rejected"]) for record in records)


def test_no_heldout_instruction_occurs_in_training(folder: Path) -> None:
    heldout, train, sft = (
        {record["prompt"] for record in _read(folder / "data" / f"{name}.jsonl")}
        for name in ("heldout", "train", "sft")
    )
    assert len(heldout) == 50 and len(train) == 150
    assert not heldout & train
    assert not heldout & sft


def test_the_full_size_keeps_train_and_heldout_apart_too() -> None:
    data = make_data(1234)
    heldout = {record["prompt"] for record in data.heldout}
    assert len(heldout) == len(data.heldout) == Sizes().heldout
    assert len(data.train) == Sizes().train and len(data.sft) == Sizes().sft
    assert not heldout & {record["prompt"] for record in (*data.train, *data.sft)}


def test_demonstrations_are_mostly_wrong_where_it_is_hard() -> None:
    """CARELESS_HARD 0.65 and CARELESS_EASY 0.1, each over about 2,000 records: a standard error of 0.011."""
    share = {True: [0, 0], False: [0, 0]}
    for record in make_data(3, Sizes(sft=4000, train=1, heldout=1)).sft:
        counts = share[read_problem(record["prompt"]).is_hard]
        counts[0] += not is_right(record["prompt"], record["response"])
        counts[1] += 1
    assert share[True][0] / share[True][1] == pytest.approx(0.65, abs=0.045)
    assert share[False][0] / share[False][1] == pytest.approx(0.1, abs=0.03)


def test_a_seed_gives_the_same_files_in_another_process(folder: Path, tmp_path: Path) -> None:
    """String hashing differs between the two processes; the files must not."""
    code = (
        "import sys; from pathlib import Path; from demo.prepare import Sizes, prepare; "
        "prepare(Path(sys.argv[1]), 5, Sizes(800, 150, 50))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=_environment(folder))
    assert _digests(tmp_path) == _digests(folder)


def _environment(folder: Path) -> dict[str, str]:
    source = Path(sys.modules["nxdt_align"].__path__[0]).parent
    examples = Path(prepare.__code__.co_filename).parents[1]
    return {"PYTHONPATH": f"{source}:{examples}", "PYTHONHASHSEED": "77", "HOME": str(folder)}


def test_another_seed_gives_other_instructions(folder: Path) -> None:
    first = {record["prompt"] for record in _read(folder / "data" / "heldout.jsonl")}
    other = {record["prompt"] for record in make_data(6, SMALL).heldout}
    assert len(first & other) < 10


def test_the_tokenizer_gives_each_item_a_token_and_reads_its_text_back(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    config = json.loads((folder / "model_config.json").read_text())
    for text in ("c a b l", "7 3 9 1"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id == config["bos_token_id"]
        assert len(ids) == 5
        assert str(tokenizer.decode(ids, skip_special_tokens=True)).strip() == text
    assert tokenizer("a")["input_ids"][1:] == tokenizer("b a")["input_ids"][2:]
    assert tokenizer.eos_token_id == config["eos_token_id"]
    assert len(tokenizer) <= config["vocab_size"] and config["vocab_size"] % 64 == 0
    # Byte level: any other text can be written, and read back.
    other = "Zürich → 42!"
    assert str(tokenizer.decode(tokenizer(other)["input_ids"], skip_special_tokens=True)).strip() == other


def test_a_prompt_has_the_same_tokens_alone_and_before_a_response() -> None:
    tokenizer = make_tokenizer(record["prompt"] for record in make_data(0, SMALL).sft)
    prompt, response = "Count these letters: a b.", "2"
    assert (
        tokenizer(f"{prompt} {response}")["input_ids"]
        == tokenizer(prompt)["input_ids"] + tokenizer(response, add_special_tokens=False)["input_ids"]
    )


def test_the_model_config_makes_a_small_llama(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig.from_json_file(folder / "model_config.json"))
    assert 500_000 < sum(p.numel() for p in model.parameters()) < 1_000_000


def test_a_second_call_replaces_the_files_and_leaves_nothing_unfinished(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("a user's file")
    prepare(tmp_path, seed=1, sizes=SMALL)
    first = _digests(tmp_path)
    prepare(tmp_path, seed=2, sizes=SMALL)
    second = _digests(tmp_path)
    assert set(second) == set(first)
    assert second["data/train.jsonl"] != first["data/train.jsonl"]
    assert second["kept"] == first["kept"]


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the demo's data to .*file/out.*not a folder"):
        main(["--out", str(tmp_path / "file" / "out")])
