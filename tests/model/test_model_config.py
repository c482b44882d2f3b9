"""config.json in its old and new spellings, and each mistake named by its key."""

import json

import pytest

from llmd.errors import ModelError
from llmd.model.config import parse_config, read_config

BASE = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 60, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 77, "max_position_embeddings": 1000,
}  # fmt: skip


def parse(**changes):
    return parse_config({key: value for key, value in {**BASE, **changes}.items() if value != "absent"})


def test_what_is_not_said():
    config = parse(num_key_value_heads="absent")
    assert (config.head_dim, config.num_kv_heads, config.rms_norm_eps) == (10, 6, 1e-6)
    assert config.windows == (None,) * 4
    assert config.rope.kind == "default"
    assert config.dtype is None
    assert config.eos_token_ids == ()


def test_spellings_of_the_same():
    assert (
        parse(torch_dtype="bfloat16").dtype
        == parse(dtype="bfloat16").dtype
        == parse(dtype="torch.bfloat16").dtype
        == "bfloat16"
    )
    assert parse(eos_token_id=3).eos_token_ids == (3,)
    assert parse(eos_token_id=[3, 4]).eos_token_ids == (3, 4)
    old = parse(rope_theta=5000.0, rope_scaling={"type": "linear", "factor": 2.0})
    new = parse(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0})
    assert old.rope == new.rope
    assert old.rope.theta == 5000.0
    assert parse(rope_theta=7.0, rope_scaling=None).rope.theta == 7.0


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 1000),
        ({"rope_type": "linear", "factor": 2.5}, 2500),
        ({"rope_type": "dynamic", "factor": 2.0}, 1000),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 500}, 2000),
        ({"rope_type": "yarn", "original_max_position_embeddings": 250}, 1000),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 1000),
    ],
)
def test_context_length(rope, expected):
    assert parse(rope_parameters=rope).context_length == expected


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"sliding_window": 9}, (9, 9, 9, 9)),
        ({"sliding_window": None}, (None,) * 4),
        ({"sliding_window": 9, "use_sliding_window": False}, (None,) * 4),
        ({"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 9)),
        ({"sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"] * 2}, (None, 9, None, 9)),
    ],
)
def test_windows(keys, expected):
    assert parse(**keys).windows == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"vocab_size": "many"}, "vocab_size must be a positive integer, got 'many'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer"),
        ({"intermediate_size": 2.5}, "intermediate_size must be"),
        ({"hidden_size": 1 << 40}, "hidden_size must be"),
        ({"num_key_value_heads": 4}, r"num_attention_heads \(6\) must be a multiple of num_key_value_heads \(4\)"),
        ({"hidden_size": 61}, r"hidden_size \(61\) must be a multiple of num_attention_heads"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"architectures": []}, "architectures must be"),
        ({"architectures": "absent"}, "architectures must be"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"torch_dtype": "int4"}, "dtype must be one of float32, float16, bfloat16"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id must be a token id"),
        ({"quantization_config": "gptq"}, "quantization_config must be an object"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "su"}}, "rope_scaling.rope_type must be one of default, linear"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "needs factor > 0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters by layer type"),
        ({"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}}, "low_freq_factor"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor must be"),
        ({"layer_types": ["full_attention"]}, "layer_types must be a list"),
        ({"layer_types": ["mamba"] * 4}, "layer_types may hold"),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding_window is not set"),
    ],
)
def test_mistakes_name_the_key(changes, message):
    with pytest.raises(ModelError, match=message):
        parse(**changes)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ModelError, match=r"config.json is missing"):
        read_config(tmp_path)
    for content in (b"{", b"\xff\xfe", b"[1]"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ModelError, match=r"config.json"):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    assert read_config(tmp_path).vocab_size == 100
