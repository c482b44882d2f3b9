"""PEFT's files: what is read of them, and every way in which they can be wrong."""

import json
import os

import pytest
import torch
from model.made_adapters import WEIGHTS, make_adapter
from model.tiny_models import make_model
from safetensors.torch import load_file, save_file

from llmd.errors import AdapterError
from llmd.model.adapters import BaseModule, find_module, read_adapter
from llmd_plugins.adapters.peft import llmd_register_adapter_formats

FORMATS = {spec.name: spec for spec in llmd_register_adapter_formats()}
HIDDEN, KV, VOCAB = 60, 40, 97


def base_modules():
    """The modules of the tiny model that adapters may change, as its layers tell them."""
    modules = {
        "model.embed_tokens": BaseModule("embedding", VOCAB, HIDDEN),
        "lm_head": BaseModule("head", HIDDEN, VOCAB),
    }
    for layer in range(3):
        folder, whole = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.self_attn.qkv_proj"
        modules[f"{folder}.q_proj"] = BaseModule("linear", HIDDEN, 120, whole)
        modules[f"{folder}.k_proj"] = BaseModule("linear", HIDDEN, KV, whole)
        modules[f"{folder}.v_proj"] = BaseModule("linear", HIDDEN, KV, whole)
        modules[whole] = BaseModule("merged", HIDDEN, 200)
        modules[f"{folder}.o_proj"] = BaseModule("linear", 120, HIDDEN)
    return modules


MODULES = base_modules()
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(scope="module")
def model():
    return make_model("Qwen2")


@pytest.fixture
def folder(model, tmp_path):
    """An adapter that is in order."""
    return make_adapter(model, tmp_path / "adapter", rank=4, targets=ATTENTION).path


def load(folder, max_rank=16):
    return read_adapter(folder, FORMATS, MODULES, max_rank)


def change_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def name_of(module, kind):
    return f"base_model.model.{module}.{kind}"


Q = "model.layers.1.self_attn.q_proj"


def test_an_adapter_is_read(folder):
    adapter = load(folder)
    assert len(adapter.modules) == 12
    assert adapter.rank == 4
    part = adapter.modules[Q]
    assert (part.a.shape, part.b.shape, part.scaling, part.magnitude) == ((4, HIDDEN), (120, 4), 4.0, None)


@pytest.mark.parametrize(
    ("settings", "rank", "scaling"),
    [
        ({"lora_alpha": 2}, 4, 0.5),
        ({"use_rslora": True}, 4, 8.0),
        ({"alpha_pattern": {"q_proj": 8}}, 4, 2.0),
        ({"alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 8, "q_proj": 2}}, 4, 2.0),
        ({"alpha_pattern": {"proj": 8}}, 4, 4.0),  # the end of a name means whole words
        ({"alpha_pattern": {r".*\.layers\.[01]\..*": 8}}, 4, 2.0),
    ],
)
def test_scaling_follows_the_config(folder, settings, rank, scaling):
    part = load(change_config(folder, **settings)).modules[Q]
    assert (part.rank, part.scaling) == (rank, scaling)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type must be 'LORA', got 'LOHA'"),
        ({"peft_type": None}, "peft_type must be 'LORA', got None"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' starts from a changed base"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is not served"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is not served"),
        ({"use_qalora": True}, "use_qalora is not served"),
        ({"something_new": 1}, "something_new is not served"),
        ({"r": 0}, "r must be an integer above 0, got 0"),
        ({"r": True}, "r must be an integer above 0, got True"),
        ({"lora_alpha": "x"}, "lora_alpha must be a number above 0, got 'x'"),
        ({"bias": "some"}, "bias must be 'none', 'all' or 'lora_only', got 'some'"),
        ({"use_dora": 1}, "use_dora must be true or false, got 1"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern must give a number above 0"),
        ({"rank_pattern": {"(a+)+": 1}}, r"the pattern '\(a\+\)\+' is too long or repeats what repeats"),
        ({"rank_pattern": {"(": 1}}, "no regular expression"),
        ({"target_modules": [1]}, "target_modules must be a list of str"),
        ({"layers_to_transform": ["a"]}, "layers_to_transform must be a list of int"),
        ({"r": 5}, r"has shape \[4, 60\], the base model and adapter_config.json ask for \[5, 60\]"),
        ({"use_dora": True}, "lacks tensor lora_magnitude_vector of model.layers.0.self_attn"),
        ({"target_modules": [*ATTENTION, "lm_head"]}, "lacks tensor lora_A.weight of lm_head"),
        ({"target_modules": r".*\.(q_proj|o_proj)|lm_head"}, "lacks tensor lora_A.weight of lm_head"),
    ],
)
def test_a_config_that_cannot_be_served_is_told_by_its_key(folder, settings, message):
    with pytest.raises(AdapterError, match=message):
        load(change_config(folder, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "gaussian"},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|k|v|o)_proj"},
        {
            "peft_version": "0.19.0",
            "revision": "main",
            "lora_dropout": 0.1,
            "runtime_config": {"ephemeral_gpu_offload": False},
        },
        {"exclude_modules": ["lm_head"], "fan_in_fan_out": True},
    ],
)
def test_settings_that_change_nothing_are_taken(folder, settings):
    assert len(load(change_config(folder, **settings)).modules) == 12


def test_tensors_are_checked_one_by_one(folder):
    def expect(message, change):
        kept = (folder / WEIGHTS).read_bytes()
        change_tensors(folder, change)
        with pytest.raises(AdapterError, match=message):
            load(folder)
        (folder / WEIGHTS).write_bytes(kept)

    a, b = name_of(Q, "lora_A.weight"), name_of(Q, "lora_B.weight")
    expect(f"lacks tensor lora_B.weight of {Q}", lambda tensors: tensors.pop(b))
    expect(f"lacks tensor lora_A.weight of {Q}", lambda tensors: tensors.pop(a))
    expect(
        "lacks tensor lora_A.weight of .* 3 more modules",
        lambda tensors: [tensors.pop(k) for k in list(tensors) if ".0." in k],
    )
    expect("tensor extra.thing belongs to no module", lambda tensors: tensors.update({"extra.thing": torch.zeros(1)}))
    expect(
        f"tensor {name_of('model.layers.9.self_attn.q_proj', 'lora_A.weight')} belongs to no module",
        lambda tensors: tensors.update({name_of("model.layers.9.self_attn.q_proj", "lora_A.weight"): torch.zeros(4, 60)}),
    )
    expect(f"tensor {a} has shape \\[4, 61\\]", lambda tensors: tensors.update({a: torch.zeros(4, 61)}))
    expect(f"tensor {b} has shape \\[4, 120\\]", lambda tensors: tensors.update({b: torch.zeros(4, 120)}))
    expect(f"tensor {a} has dtype I64", lambda tensors: tensors.update({a: torch.zeros(4, 60, dtype=torch.int64)}))
    expect(f"tensor {a} holds numbers that are not finite", lambda tensors: tensors[a].fill_(float("nan")))
    expect("does not set bias", lambda tensors: tensors.update({name_of(Q, "bias"): torch.zeros(120)}))
    expect("does not set use_dora", lambda tensors: tensors.update({name_of(Q, "lora_magnitude_vector"): torch.zeros(120)}))
    twice = {f"base_model.{Q}.lora_A.weight": torch.zeros(4, 60)}
    expect("are the same", lambda tensors: tensors.update(twice))
    assert len(load(folder).modules) == 12


def test_rank_above_the_limit_is_told(folder):
    with pytest.raises(AdapterError, match=r"lora_A.weight: rank 4 is above max_lora_rank \(3\)"):
        load(folder, max_rank=3)


def test_pickles_and_missing_or_broken_files_are_told(folder, tmp_path):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors cannot be read"):
        load(folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model.bin is a pickle, which can run code"):
        load(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors is missing"):
        load(folder)
    (folder / "adapter_config.json").write_text("[1")
    with pytest.raises(AdapterError, match=r"adapter_config.json cannot be read: JSONDecodeError"):
        load(folder)
    (folder / "adapter_config.json").write_text("[1]")
    with pytest.raises(AdapterError, match="must be an object, got list"):
        load(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="'empty' holds no adapter; formats looked for: peft"):
        load(tmp_path / "empty")
    with pytest.raises(AdapterError, match="folder 'none' does not exist") as told:
        load(tmp_path / "none")
    assert str(tmp_path) not in str(told.value)


def test_only_some_layers(model, tmp_path):
    folder = make_adapter(model, tmp_path, rank=4, targets=("q_proj",), layers=(1,)).path
    assert list(load(folder).modules) == [Q]
    change_config(folder, layers_to_transform=None)
    with pytest.raises(AdapterError, match=r"lacks tensor lora_A.weight of model.layers.0.self_attn.q_proj and of 1 more"):
        load(folder)


def test_a_merged_module_stands_for_its_parts(folder):
    whole = "model.layers.1.self_attn.qkv_proj"

    def merge(tensors):
        for part in ("q_proj", "k_proj", "v_proj"):
            for kind in ("lora_A.weight", "lora_B.weight"):
                tensors.pop(name_of(f"model.layers.1.self_attn.{part}", kind))
        tensors[name_of(whole, "lora_A.weight")] = torch.zeros(4, HIDDEN)
        tensors[name_of(whole, "lora_B.weight")] = torch.zeros(200, 4)

    assert whole in load(change_tensors(folder, merge)).modules


def test_a_table_saved_along_is_kept_for_comparison(model, tmp_path):
    folder = make_adapter(model, tmp_path, rank=4, targets=("embed_tokens",)).path
    table = model.model.embed_tokens.weight.detach().clone()
    name = name_of("model.embed_tokens", "base_layer.weight")
    adapter = load(change_tensors(folder, lambda tensors: tensors.update({name: table})))
    assert torch.equal(adapter.copies["model.embed_tokens"], table)
    assert adapter.modules["model.embed_tokens"].a.shape == (4, VOCAB)


def test_names_with_a_leading_part_more_or_less_are_found():
    modules = {"model.layers.0.q": BaseModule("linear", 1, 1), "head": BaseModule("head", 1, 1)}
    assert find_module("layers.0.q", modules) == "model.layers.0.q"
    assert find_module("model.head", modules) == "head"
    assert find_module("head", modules) == "head"
    assert find_module("0.q", modules) is None
    assert find_module("q", modules) is None


def test_no_file_stays_open(folder):
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(50):
        load(folder)
        with pytest.raises(AdapterError):
            load(folder, max_rank=1)
    assert len(set(os.listdir("/proc/self/fd"))) <= len(before)
