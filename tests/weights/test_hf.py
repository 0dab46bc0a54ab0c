"""Hugging Face folders: read against transformers' own, written for transformers, and everything broken."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nxdt_align.errors import UserError
from nxdt_align.models.presets import TINY, DecoderConfig, ModelConfigError, RopeScaling, weight_shapes
from nxdt_align.named_tensors import content_fingerprint
from nxdt_align.weights.detect import check_weights
from nxdt_align.weights.extents import WeightsError
from nxdt_align.weights.hf import FreshWeights, HFFolder
from nxdt_align.weights.hf_writer import write_hf_folder
from nxdt_align.weights.names import from_hf

TIED = replace(TINY, tie_word_embeddings=True)


def fresh(config: DecoderConfig, seed: int = 0) -> dict[str, Tensor]:
    source = FreshWeights(replace(config, initializer_range=0.3), seed)
    return {name: source.read(name) for name in source.names()}


def hf_model(config: DecoderConfig, seed: int = 0) -> Any:
    import transformers

    torch.manual_seed(seed)
    auto: Any = transformers.AutoModelForCausalLM
    return auto.from_config(transformers.AutoConfig.for_model(**config.to_hf_dict()))


def assert_same(source: HFFolder, model: Any) -> None:
    theirs = {from_hf(name): p for name, p in model.named_parameters()}
    assert source.names() == sorted(theirs)
    for name, parameter in theirs.items():
        assert torch.equal(source.read(name), parameter) and source.read(name).dtype == parameter.dtype
        assert source.shape(name) == tuple(parameter.shape)


# Reading what transformers writes


@pytest.mark.parametrize(
    "config", [TINY, TIED, replace(TINY, model_type="mistral")], ids=["llama", "tied", "mistral"]
)
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folders_of_transformers_are_read_bit_for_bit(
    config: DecoderConfig, shard: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = hf_model(config).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    source = HFFolder(tmp_path)
    assert_same(source, model)
    check_weights(source, config)


def as_bin(folder: Path, shards: int, legacy: bool = False) -> None:
    """Turn a folder's safetensors into pytorch_model.bin files, as transformers 4 wrote them."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        return
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(("shards", "legacy"), [(1, False), (3, False), (1, True)])
def test_bin_files_are_read_bit_for_bit(shards: int, legacy: bool, tmp_path: Path) -> None:
    model = hf_model(TINY)
    model.save_pretrained(tmp_path)
    before = HFFolder(tmp_path).fingerprint()
    as_bin(tmp_path, shards, legacy)
    assert_same(HFFolder(tmp_path), model)
    assert HFFolder(tmp_path).fingerprint() == before


def test_a_head_stored_beside_its_tie_is_left_out(tmp_path: Path) -> None:
    hf_model(TIED).save_pretrained(tmp_path)
    plain = HFFolder(tmp_path).fingerprint()
    edit_tensors(tmp_path, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    assert "lm_head.weight" not in HFFolder(tmp_path).names()
    assert HFFolder(tmp_path).fingerprint() == plain
    edit_tensors(tmp_path, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1})
    with pytest.raises(WeightsError, match=r"`tie_word_embeddings` true, but lm_head.weight and .* differ"):
        HFFolder(tmp_path)


def test_fingerprint_follows_content_alone(tmp_path: Path) -> None:
    tensors = fresh(TINY)
    write_hf_folder(tmp_path / "one", TINY, tensors)
    write_hf_folder(tmp_path / "many", TINY, reversed(list(tensors.items())), max_shard_bytes=10_000)
    one = HFFolder(tmp_path / "one").fingerprint()
    assert HFFolder(tmp_path / "many").fingerprint() == one == content_fingerprint(sorted(tensors.items()))
    write_hf_folder(tmp_path / "half", TINY, tensors, dtype=torch.float16)
    tensors["model.norm.weight"][5] += 1e-6
    write_hf_folder(tmp_path / "nudged", TINY, tensors)
    prints = {HFFolder(tmp_path / name).fingerprint() for name in ("one", "half", "nudged")}
    assert len(prints) == 3


def test_fingerprint_tells_names_shapes_and_dtypes_apart() -> None:
    base = torch.arange(6.0)
    variants = [
        [("a", base)],
        [("b", base)],
        [("a", base.reshape(2, 3))],
        [("a", base.view(torch.int32))],
        [("a", base[:3]), ("b", base[3:])],
    ]
    assert len({content_fingerprint(variant) for variant in variants}) == len(variants)
    assert content_fingerprint([("a", torch.arange(12.0)[::2] / 2)]) == content_fingerprint([("a", base)])


# Broken folders


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_hf_folder(tmp_path / "hf", TINY, fresh(TINY))
    return tmp_path / "hf"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_hf_folder(tmp_path / "hf", TINY, fresh(TINY), max_shard_bytes=20_000)
    return tmp_path / "hf"


def truncate(file: Path, keep: float = 0.5) -> None:
    os.truncate(file, int(file.stat().st_size * keep))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def bin_of(content: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "pytorch_model.bin")

    return make


def truncated_bin(folder: Path) -> None:
    as_bin(folder, 1)
    truncate(folder / "pytorch_model.bin")


def empty_bin(folder: Path) -> None:
    bin_of({})(folder)
    truncate(folder / "pytorch_model.bin", 0)


BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    ("no folder", shutil.rmtree, "is not a folder: give a Hugging Face folder"),
    ("empty", empty, "is empty: it must hold config.json and weights"),
    ("no config.json", lambda f: (f / "config.json").unlink(), "no model configuration at .*config.json"),
    (
        "no weights",
        lambda f: (f / "model.safetensors").unlink(),
        "has no weights: it must hold one of model.safete",
    ),
    (
        "truncated",
        lambda f: truncate(f / "model.safetensors"),
        r"model.safetensors is damaged or not a safetensors",
    ),
    (
        "header cut",
        lambda f: os.truncate(f / "model.safetensors", 5),
        r"model.safetensors is damaged or not a",
    ),
    ("zero bytes", lambda f: truncate(f / "model.safetensors", 0), r"model.safetensors is damaged or not a"),
    (
        "no zip",
        empty_bin,
        "bin is damaged or not a PyTorch file",
    ),
    ("truncated bin", truncated_bin, "pytorch_model.bin is damaged or not a PyTorch file"),
    ("code in a bin", bin_of({"a": os.system}), "pytorch_model.bin is damaged or not a PyTorch file"),
    ("a bin of something else", bin_of({"step": 3}), "pytorch_model.bin must hold a dictionary of tensors"),
    (
        "norms and layers of others",
        lambda f: edit_tensors(
            f, lambda t: t | {f"model.layers.{i}.mlp_norm.weight": torch.ones(1) for i in range(2)}
        ),
        r"holds tensors that no LlamaForCausalLM has: model.layers.\{0-1\}.mlp_norm.weight. Give",
    ),
]


@pytest.mark.parametrize(("damage", "fault"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_broken_folder_is_refused(folder: Path, damage: Callable[[Path], object], fault: str) -> None:
    damage(folder)
    with pytest.raises((WeightsError, ModelConfigError), match=fault) as error:
        HFFolder(folder)
    assert isinstance(error.value, UserError) and str(folder) in str(error.value)


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(change(index) or index))


def lose_two_shards(folder: Path) -> None:
    for file in sorted(folder.glob("model-*"))[1:3]:
        file.unlink()


BROKEN_INDEX: list[tuple[str, Callable[[Path], object], str]] = [
    (
        "shards missing",
        lose_two_shards,
        "index.json names files that are missing: model-00002-of-.*, model-00003-of-",
    ),
    (
        "surplus shard",
        lambda f: shutil.copy(f / "model-00002-of-00007.safetensors", f / "model-00009-of-00009.safetensors"),
        "holds shards that model.safetensors.index.json does not name: model-00009-of-00009",
    ),
    (
        "tensor that it does not name",
        lambda f: edit_index(f, lambda i: i["weight_map"].pop("model.norm.weight") is None),
        "does not name tensors that its files hold: model.norm.weight",
    ),
    (
        "tensor not in its shard",
        lambda f: edit_index(
            f, lambda i: i["weight_map"].update({"lm_head.weight": "model-00002-of-00007.safetensors"})
        ),
        "names tensors that their files do not hold: lm_head.weight",
    ),
    (
        "no JSON",
        lambda f: (f / "model.safetensors.index.json").write_text("{"),
        "index.json cannot be read as JSON",
    ),
    ("no map", lambda f: edit_index(f, lambda i: {"metadata": {}}), "must have a `weight_map`"),
    (
        "outside",
        lambda f: edit_index(f, lambda i: i["weight_map"].update({"lm_head.weight": "../hf/x.safetensors"})),
        "must name files of its own folder, but names '../hf/x.safetensors'",
    ),
    (
        "shard cut",
        lambda f: truncate(f / "model-00001-of-00007.safetensors"),
        "model-00001-of-00007.safetensors is dam",
    ),
]


@pytest.mark.parametrize(("damage", "fault"), [c[1:] for c in BROKEN_INDEX], ids=[c[0] for c in BROKEN_INDEX])
def test_a_broken_index_is_refused(sharded: Path, damage: Callable[[Path], object], fault: str) -> None:
    assert (sharded / "model-00007-of-00007.safetensors").exists()
    damage(sharded)
    with pytest.raises(WeightsError, match=fault):
        HFFolder(sharded)


def test_all_that_does_not_fit_is_named_at_once(folder: Path) -> None:
    config = replace(TINY, num_hidden_layers=4, intermediate_size=48, tie_word_embeddings=True)
    with pytest.raises(WeightsError) as error:
        check_weights(HFFolder(folder), config)
    message = str(error.value)
    assert "missing: model.layers.{2-3}.mlp.down_proj.weight" in message
    assert "surplus: lm_head.weight" in message
    layers = "model.layers.{0-1}.mlp."
    assert f"{layers}up_proj.weight must have shape [48, 32], but has [64, 32]" in message
    assert f"{layers}gate_proj.weight must have shape [48, 32], but has [64, 32]" in message
    assert f"{layers}down_proj.weight must have shape [32, 48], but has [32, 64]" in message
    assert message.count("must have shape") == 3
    check_weights(HFFolder(folder), TINY)


def test_a_weight_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"hf has no weight model.layers.9.mlp.up_proj.weight"):
        HFFolder(folder).read("model.layers.9.mlp.gate_up_proj.up_proj.weight")


# Writing


WRITTEN = {
    "tiny": TINY,
    "tied": TIED,
    "llama3": replace(TINY, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64), rope_theta=5e5),
    "mistral": replace(TINY, model_type="mistral", head_dim=16),
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 20_000])
def test_transformers_loads_our_folder_and_generates_the_same(
    name: str, shard_bytes: int, tmp_path: Path
) -> None:
    import transformers

    from nxdt_align.models.decoder import Decoder

    config = WRITTEN[name]
    tensors = fresh(config)
    write_hf_folder(tmp_path / "out", config, tensors, max_shard_bytes=shard_bytes)
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.float32
    found = {from_hf(key): value for key, value in theirs.named_parameters()}
    assert all(torch.equal(found[key], tensors[key]) for key in tensors) and len(found) == len(tensors)

    ours = Decoder(config, attend)
    ours.load_state_dict(tensors)
    prompt = torch.tensor([[1, 17, 90, 33]])
    generated = theirs.generate(prompt, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generated, greedy(ours, prompt, 16))
    assert len(set(generated[0].tolist())) > 4


def attend(q: Tensor, k: Tensor, v: Tensor, context: object) -> Tensor:
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


@torch.no_grad()
def greedy(model: Any, ids: Tensor, count: int) -> Tensor:
    for _ in range(count):
        logits = model.logits(model(ids, torch.arange(ids.shape[1])[None], None))
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
    return ids


def test_dtype_ids_and_tokenizer_are_written(tmp_path: Path) -> None:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    library: Any = transformers
    tokenizer = library.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = replace(TINY, eos_token_id=(2, 5), bos_token_id=None)
    write_hf_folder(
        tmp_path / "out", config, fresh(TINY), tokenizer_dir=tmp_path / "tokenizer", dtype=torch.bfloat16
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id == [2, 5]
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("a b").input_ids == [3, 4] and again.chat_template == tokenizer.chat_template
    source = HFFolder(tmp_path / "out")
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in fresh(TINY).items()}
    assert all(torch.equal(source.read(name), expected[name]) for name in expected)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 5]


def test_files_are_readable_by_those_whom_the_umask_allows(tmp_path: Path) -> None:
    earlier = os.umask(0o022)
    try:
        write_hf_folder(tmp_path / "out", TINY, fresh(TINY), max_shard_bytes=20_000)
    finally:
        os.umask(earlier)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "out").iterdir()} == {"0o644"}


def test_views_of_one_storage_are_written_whole(tmp_path: Path) -> None:
    """As parameters that an engine keeps in one flat buffer."""
    shapes = weight_shapes(TINY)
    flat = torch.randn(sum(torch.Size(shape).numel() for shape in shapes.values()))
    tensors, start = {}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        tensors[name] = flat[start : start + size].view(shape)
        start += size
    write_hf_folder(tmp_path / "out", TINY, tensors)
    source = HFFolder(tmp_path / "out")
    assert all(torch.equal(source.read(name), tensors[name]) for name in tensors)


def test_a_buffer_that_is_used_again_is_copied(tmp_path: Path) -> None:
    """As of an engine that gathers every weight into the same memory."""
    tensors = fresh(TINY)
    buffer = torch.empty(TINY.vocab_size * TINY.hidden_size)

    def gathered() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            yield name, buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)

    write_hf_folder(tmp_path / "out", TINY, gathered())
    source = HFFolder(tmp_path / "out")
    assert all(torch.equal(source.read(name), tensors[name]) for name in tensors)


def test_an_existing_folder_is_kept_unless_asked(folder: Path) -> None:
    before = HFFolder(folder).fingerprint()
    with pytest.raises(
        WeightsError, match=r"exists already: choose another folder, remove it, or ask to overwrite"
    ):
        write_hf_folder(folder, TINY, fresh(TINY, seed=1))
    assert HFFolder(folder).fingerprint() == before
    (folder / "stale.txt").write_text("x")
    write_hf_folder(folder, TINY, fresh(TINY, seed=1), overwrite=True)
    assert HFFolder(folder).fingerprint() == content_fingerprint(sorted(fresh(TINY, seed=1).items()))
    assert not (folder / "stale.txt").exists()


def test_an_empty_folder_is_filled_and_a_folder_of_something_else_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_hf_folder(tmp_path / "empty", TINY, fresh(TINY))
    check_weights(HFFolder(tmp_path / "empty"), TINY)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(WeightsError, match="is not a model folder"):
        write_hf_folder(tmp_path / "home", TINY, fresh(TINY), overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").exists()


def without_norm(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in tensors.items() if name != "model.norm.weight")


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        (without_norm(fresh(TINY)), r"does not fit the model \(1 tensor\):\n  missing: model.norm.weight"),
        (
            fresh(TINY) | {"model.norm.weight": torch.ones(3)},
            r"model.norm.weight must have shape \[32\], but has \[3\]",
        ),
        (fresh(TINY) | {"extra.weight": torch.ones(3)}, "surplus: extra.weight"),
        (iter(2 * list(fresh(TINY).items())), "came twice"),
    ],
)
def test_wrong_weights_leave_the_earlier_folder_whole(folder: Path, tensors: Any, fault: str) -> None:
    before = HFFolder(folder).fingerprint()
    with pytest.raises(WeightsError, match=fault):
        write_hf_folder(folder, TINY, tensors, overwrite=True)
    assert HFFolder(folder).fingerprint() == before
    assert [entry.name for entry in folder.parent.iterdir()] == ["hf"]


def test_a_folder_without_tokenizer_is_named_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(WeightsError, match=r"tokenizer has no tokenizer: it must hold tokenizer.json"):
        write_hf_folder(tmp_path / "out", TINY, fresh(TINY), tokenizer_dir=tmp_path / "tokenizer")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_refuses_leaves_the_earlier_folder_whole(folder: Path) -> None:
    """A limit on the size of files stands in for a full disk."""
    import signal

    before = HFFolder(folder).fingerprint()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(WeightsError, match=r"cannot write .*hf"):
            write_hf_folder(folder, TINY, fresh(TINY, seed=1), overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert HFFolder(folder).fingerprint() == before
    assert [entry.name for entry in folder.parent.iterdir()] == ["hf"]


def test_a_path_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(WeightsError, match=r"cannot write .*file/out"):
        write_hf_folder(tmp_path / "file" / "out", TINY, fresh(TINY))


# Fresh weights


def test_fresh_weights_follow_seed_and_shape() -> None:
    source = FreshWeights(TINY, 7)
    assert {name: source.shape(name) for name in source.names()} == weight_shapes(TINY)
    name = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(source.read(name), FreshWeights(TINY, 7).read(name))
    assert not torch.equal(source.read(name), FreshWeights(TINY, 8).read(name))
    assert source.fingerprint() == FreshWeights(TINY, 7).fingerprint()
    others = [
        FreshWeights(TINY, 8),
        FreshWeights(TIED, 7),
        FreshWeights(replace(TINY, initializer_range=0.1), 7),
    ]
    assert source.fingerprint() not in {other.fingerprint() for other in others}
    # What does not change the weights does not change the fingerprint.
    assert FreshWeights(replace(TINY, rope_theta=5.0), 7).fingerprint() == source.fingerprint()
