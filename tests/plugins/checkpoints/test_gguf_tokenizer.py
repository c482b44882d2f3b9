"""Tokenizers and settings out of GGUF files, against the tokenizers and configs that they were made of."""

import json

import gguf_files
import made_tokenizers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model.tiny_models import make_model
from tokenizers import Tokenizer as Backend

from llmd.errors import ModelError
from llmd.model.config import parse_config
from llmd.text.tokenizer import Tokenizer
from llmd_plugins.checkpoints.gguf.config import llama3_divisors, make_config
from llmd_plugins.checkpoints.gguf.folder import make_folder
from llmd_plugins.checkpoints.gguf.header import TYPES, GgufHeader, TensorEntry
from llmd_plugins.checkpoints.gguf.tokenizer import make_tokenizer

KINDS = {"byte_level": "gpt2", "byte_level_bos": "gpt2", "llama": "llama", "gemma": "llama"}
TEXTS = [
    *made_tokenizers.LINES, "", " ", "  two  spaces ", "It's he'LL 12345 a\u0301", "<|im_start|>user\nHi<|im_end|>",
    "<s>x</s>",
    "tab\tand\r\nlines\n\n\n", "🇩🇪👩‍👩‍👧‍👦", "<tool é>", "\x00\x7f", "price: $12,345.67!!!",
]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A tokenizer from its folder and the same out of a GGUF file's metadata."""
    folder, made = tmp_path_factory.mktemp("given"), tmp_path_factory.mktemp("made")
    backend, config = getattr(made_tokenizers, request.param)()
    backend.save(str(folder / "tokenizer.json"))
    config = {key: value for key, value in config.items() if key != "extra_special_tokens"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    text, facts = make_tokenizer(gguf_files.tokenizer_metadata(folder, KINDS[request.param]))
    (made / "tokenizer.json").write_text(text)
    (made / "tokenizer_config.json").write_text(json.dumps(facts))
    return Tokenizer.from_folder(folder), Tokenizer.from_folder(made)


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_cut_alike(pair, text):
    given, made = pair
    ids = given.encode(text)
    assert made.encode(text) == ids
    assert made.encode(text, add_special_tokens=False) == given.encode(text, add_special_tokens=False)
    assert made.decode(ids) == given.decode(ids)
    assert made.decode(ids, skip_special_tokens=True) == given.decode(ids, skip_special_tokens=True)


@given(st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_text_is_cut_alike(pair, text):
    wanted, made = pair
    text = text.encode("utf-8", "ignore").decode()
    assert made.encode(text) == wanted.encode(text)


def test_special_tokens_are_the_same(pair):
    given, made = pair
    assert made.vocab_size == given.vocab_size
    assert made.special_ids == given.special_ids
    assert (made.bos_token_id, made.eos_token_id) == (given.bos_token_id, given.eos_token_id)


def metadata(**changes):
    found = gguf_files.plain_tokenizer(5) | {"tokenizer.ggml.tokens": ["a", "b", "ab", "<s>", "</s>"]}
    found |= {"tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.token_type": [1, 1, 1, 3, 3]}
    found |= {"tokenizer.ggml.bos_token_id": 3, "tokenizer.ggml.eos_token_id": 4}
    return {key: value for key, value in (found | changes).items() if value is not None}


def encode(found, text):
    return Backend.from_str(make_tokenizer(found)[0]).encode(text).ids


def test_what_is_put_around_a_text():
    assert encode(metadata(), "ab") == [2]
    assert encode(metadata(**{"tokenizer.ggml.add_bos_token": True}), "ab") == [3, 2]
    both = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    assert encode(metadata(**both), "ab") == [3, 2, 4]
    assert encode(metadata(**{"tokenizer.ggml.pre": "llama-bpe"}), "ab") == [3, 2]


def test_digits_are_cut_as_each_kind_does():
    tokens = [*"0123456789", "12", "123"]
    found = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["1 2", "12 3"], "tokenizer.ggml.token_type": None}
    found |= {"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.eos_token_id": None}
    wanted = {"gpt-2": [11, 4], "qwen2": [1, 2, 3, 4], "llama-bpe": [11, 4], "smollm": [1, 2, 3, 4], "tekken": [1, 2, 3, 4]}
    for pre, ids in wanted.items():
        assert encode(metadata(**found, **{"tokenizer.ggml.pre": pre}), "1234") == ids


def test_a_whole_tokenizer_json_goes_first():
    backend, _ = made_tokenizers.unigram()
    found = metadata(**{"tokenizer.huggingface.json": backend.to_str(), "tokenizer.ggml.model": "t5"})
    assert make_tokenizer(found)[0] == backend.to_str()


def test_chat_templates():
    one = make_tokenizer(metadata(**{"tokenizer.chat_template": "{{ messages }}"}))[1]
    assert one["chat_template"] == "{{ messages }}"
    two = make_tokenizer(metadata(**{"tokenizer.chat_template": "A", "tokenizer.chat_template.tool_use": "B"}))[1]
    assert two["chat_template"] == [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens of the GGUF file must be a list of strings, got None"),
        ({"tokenizer.ggml.token_type": [1]}, "5 tokens, but 1 in tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.merges": ["ab"]}, "holds 'ab', which is no pair"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a", "c", "d"]}, "names a token twice"),
        ({"tokenizer.ggml.model": "llama"}, "scores of the GGUF file must be 5 numbers"),
    ],
)
def test_tokenizers_that_are_wrong(changes, message):
    with pytest.raises(ModelError, match=message):
        make_tokenizer(metadata(**changes))


def header(path, **changes):
    """Of a small llama, without weights."""
    found = {
        "general.architecture": "llama", "llama.context_length": 131072, "llama.embedding_length": 2048,
        "llama.block_count": 1, "llama.feed_forward_length": 4096, "llama.attention.head_count": 32,
        "llama.attention.head_count_kv": [8], "llama.rope.freq_base": 500000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    entry = TensorEntry("token_embd.weight", TYPES[8], (1000, 2048), 0, 0, path)
    return GgufHeader((path,), found | changes, {entry.name: entry})


def test_config_of_llama_3(tmp_path):
    settings = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    divisors = llama3_divisors(500000.0, 64, **settings)
    config = parse_config(make_config(header(tmp_path), divisors))
    assert (config.rope.kind, config.rope.factor, config.rope.original_max_position) == ("llama3", 32.0, 8192)
    assert (config.head_dim, config.num_kv_heads, config.vocab_size, config.rms_norm_eps) == (64, 8, 1000, 1e-5)
    assert config.tie_word_embeddings
    with pytest.raises(ModelError, match="divisors that are not Llama 3"):
        make_config(header(tmp_path), [2.0] * 32)


def test_divisors_are_those_that_transformers_computes():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    shape = {"hidden_size": 512, "num_attention_heads": 4, "head_dim": 128, "max_position_embeddings": 131072}
    config = LlamaConfig(**shape, rope_parameters=rope)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    settings = {key: value for key, value in rope.items() if key not in ("rope_type", "rope_theta")}
    for index, divisor in enumerate(llama3_divisors(500000.0, 128, **settings)):
        assert 500000.0 ** (-2 * index / 128) / divisor == pytest.approx(float(frequencies[index]), rel=1e-4)


def test_scaled_ropes(tmp_path):
    linear = make_config(header(tmp_path, **{"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}), None)
    assert parse_config(linear).rope.factor == 4.0
    changes = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    yarn = parse_config(make_config(header(tmp_path, **changes), None)).rope
    assert (yarn.kind, yarn.factor, yarn.original_max_position) == ("yarn", 4.0, 32768)


def test_the_daemon_talks_from_one_file(tmp_path, monkeypatch):
    """The demo model as a GGUF file answers as the folder does."""
    import transformers

    from llmd import LLM, SamplingParams
    from llmd_plugins.sources.demo_source import folder

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder(), dtype="float32")
    tokenizer = gguf_files.tokenizer_metadata(folder(), "gpt2")
    tokenizer["tokenizer.huggingface.json"] = (folder() / "tokenizer.json").read_text()
    tokenizer["tokenizer.chat_template"] = (folder() / "chat_template.jinja").read_text()
    gguf_files.write_model(model, tmp_path / "demo-f32.gguf", "F32", tokenizer)
    params = SamplingParams(temperature=0.0, max_tokens=16)
    answers = {}
    for name in ("demo", str(tmp_path / "demo-f32.gguf")):
        with LLM(name, dtype="float32", device="cpu", kv_cache_bytes=8 << 20) as llm:
            (answer,) = llm.chat([{"role": "user", "content": "Hello! What is the capital of France?"}], params)
            answers[name] = answer.outputs[0].text
    assert len(set(answers.values())) == 1
    assert answers["demo"]


def test_make_folder_is_idempotent_and_follows_the_file(tmp_path, monkeypatch):
    import os

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = make_model("Llama", hidden_size=64, head_dim=16, num_attention_heads=4)
    path = tmp_path / "model.gguf"
    gguf_files.write_model(model, path, "F32")
    first = make_folder(path)
    assert make_folder(path) == first
    os.utime(path, (1, 1))
    assert make_folder(path) != first
    assert not [each for each in first.parent.iterdir() if each.name.startswith("tmp")]
