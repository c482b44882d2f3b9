"""Encoders and classifiers against Hugging Face: alone, in a batch of other lengths, with pairs, by every spelling."""

import json

import numpy as np
import pytest
import torch
from model.tiny_encoders import VOCAB_SIZE, make_encoder, make_runner, pool
from safetensors.torch import load_file, save_file

from llmd.engine.params import PoolingParams
from llmd.errors import ModelError

LENGTHS = (5, 1, 40, 23, 2, 97, 64, 11)
RAW = PoolingParams(pooling="all", normalize=False)
SCORES = PoolingParams(task="classify", use_activation=False)
KV = {"num_key_value_heads": 1, "head_dim": 20}
MODELS = {
    "bert": ("BertModel", {}),
    "bert-relu-3-types": ("BertModel", {"hidden_act": "relu", "type_vocab_size": 3, "layer_norm_eps": 1e-5}),
    "roberta": ("RobertaModel", {"type_vocab_size": 1}),
    "xlm-roberta": ("XLMRobertaModel", {"type_vocab_size": 1, "pad_token_id": 4}),
    "modernbert": ("ModernBertModel", {"local_attention": 12}),
    "modernbert-biases": (
        "ModernBertModel",
        {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "local_attention": 300},
    ),
    "llama": ("LlamaModel", KV),
    "mistral": ("MistralModel", {**KV, "sliding_window": 9}),
    "qwen2": ("Qwen2Model", {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3Model", {**KV, "hidden_size": 40}),
}
CLASSIFIERS = {
    "bert": ("BertForSequenceClassification", {"num_labels": 1}),
    "bert-3": ("BertForSequenceClassification", {"num_labels": 3}),
    "roberta": ("RobertaForSequenceClassification", {"num_labels": 2, "type_vocab_size": 1}),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", {"num_labels": 1, "type_vocab_size": 1}),
    "modernbert": ("ModernBertForSequenceClassification", {"num_labels": 3, "local_attention": 12}),
    "modernbert-mean": (
        "ModernBertForSequenceClassification",
        {"num_labels": 1, "classifier_pooling": "mean", "classifier_bias": True, "classifier_activation": "relu"},
    ),
    "llama": ("LlamaForSequenceClassification", {**KV, "num_labels": 2}),
    "qwen2": ("Qwen2ForSequenceClassification", {"num_key_value_heads": 1, "num_labels": 1}),
    "qwen3": ("Qwen3ForSequenceClassification", {**KV, "num_labels": 4}),
}


def prompts(*lengths):
    """Random token ids, none of which stands for padding."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def pair_types(prompt):
    """The second half is the other text."""
    return [int(index >= len(prompt) // 2) for index in range(len(prompt))]


@torch.no_grad()
def reference(model, prompt, types=None):
    """Hidden states or scores of a prompt alone."""
    inputs = {"input_ids": torch.tensor([prompt])}
    if types is not None:
        inputs["token_type_ids"] = torch.tensor([types])
    output = model(**inputs)
    return (output.logits if hasattr(output, "logits") else output.last_hidden_state)[0].numpy()


def close(found, expected, atol=1e-4):
    np.testing.assert_allclose(found, expected, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("case", MODELS)
def test_hidden_states(tmp_path, case):
    name, changes = MODELS[case]
    model = make_encoder(name, **changes)
    model.save_pretrained(tmp_path)
    runner = make_runner(tmp_path)
    is_encoder = "Bert" in name or "Roberta" in name or "ModernBert" in name
    assert runner.info.kv_groups == () if is_encoder else runner.info.kv_groups
    assert runner.info.needs_whole_prompts is is_encoder
    assert not runner.info.can_generate
    given = prompts(*LENGTHS)
    expected = [reference(model, prompt) for prompt in given]
    for found, wanted in zip(pool(runner, given, RAW), expected, strict=True):
        close(found, wanted)
    close(pool(runner, given[2:3], RAW)[0], expected[2])
    [vector] = pool(runner, given[3:4], PoolingParams())
    state = expected[3][0 if is_encoder else -1]
    close(vector, state / np.linalg.norm(state))


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_scores(tmp_path, case):
    name, changes = CLASSIFIERS[case]
    model = make_encoder(name, **changes)
    model.save_pretrained(tmp_path)
    runner = make_runner(tmp_path)
    assert runner.info.labels == tuple(f"LABEL_{index}" for index in range(changes["num_labels"]))
    given = prompts(*LENGTHS)
    expected = [reference(model, prompt) for prompt in given]
    for found, wanted in zip(pool(runner, given, SCORES), expected, strict=True):
        close(found, wanted)
    close(pool(runner, given[2:3], SCORES)[0], expected[2])
    scores = torch.tensor(expected[3])
    wanted = scores.sigmoid() if changes["num_labels"] == 1 else scores.softmax(-1)
    close(pool(runner, given[3:4], PoolingParams(task="classify"))[0], wanted.numpy())


@pytest.mark.parametrize("name", ["BertModel", "BertForSequenceClassification"])
def test_pairs_beside_single_texts(tmp_path, name):
    model = make_encoder(name)
    model.save_pretrained(tmp_path)
    runner = make_runner(tmp_path)
    given = prompts(*LENGTHS)
    types = [pair_types(prompt) if index % 2 else [] for index, prompt in enumerate(given)]
    found = pool(runner, given, SCORES if name.endswith("Classification") else RAW, types)
    for prompt, kinds, vector in zip(given, types, found, strict=True):
        close(vector, reference(model, prompt, kinds or None))
    [again] = pool(runner, given[1:2], SCORES if name.endswith("Classification") else RAW)
    close(again, reference(model, given[1]))  # the types of the row's last user are forgotten


@pytest.mark.parametrize(
    ("facts", "activation"),
    [
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, lambda scores: scores),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"}, torch.sigmoid),
        ({"problem_type": "multi_label_classification"}, torch.sigmoid),
        ({"problem_type": "regression"}, lambda scores: scores),
        ({}, lambda scores: scores.softmax(-1)),
    ],
)
def test_what_turns_scores_into_probabilities(tmp_path, facts, activation):
    model = make_encoder("BertForSequenceClassification", id2label={0: "no", 1: "yes", 2: "so so"})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **facts}))
    runner = make_runner(tmp_path)
    assert runner.info.labels == ("no", "yes", "so so")
    expected = activation(torch.tensor(reference(model, prompts(9)[0])))
    close(pool(runner, prompts(9), PoolingParams(task="classify"))[0], expected.numpy())


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "ModernBertModel"])
def test_int8_and_random_weights_load(tmp_path, name):
    make_encoder(name, hidden_size=64, intermediate_size=128, num_attention_heads=4).save_pretrained(tmp_path)
    for options in ({"quantization": "int8"}, {"load_format": "dummy"}):
        runner = make_runner(tmp_path, **options)
        assert np.isfinite(pool(runner, prompts(9), PoolingParams())[0]).all()


def test_bfloat16(tmp_path):
    model = make_encoder("BertForSequenceClassification", initializer_range=0.05)
    model.save_pretrained(tmp_path)
    runner = make_runner(tmp_path, dtype="bfloat16")
    given = prompts(17, 4)
    for prompt, found in zip(given, pool(runner, given, SCORES), strict=True):
        close(found, reference(model, prompt), atol=0.1)


def rename(path, change):
    tensors = {change(name): tensor.contiguous() for name, tensor in load_file(path / "model.safetensors").items()}
    save_file({name: tensor for name, tensor in tensors.items() if name}, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("BertModel", lambda name: f"bert.{name}"),
        ("BertModel", lambda name: name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")),
        ("BertModel", lambda name: "" if name.startswith("pooler") else name),
        ("RobertaModel", lambda name: f"roberta.{name}"),
        ("ModernBertModel", lambda name: f"model.{name}"),
        ("BertForSequenceClassification", lambda name: name.removeprefix("bert.")),
        ("Qwen3Model", lambda name: f"model.{name}"),
    ],
    ids=["bert-prefix", "bert-gamma", "bert-no-pooler", "roberta-prefix", "modernbert-prefix", "bert-bare", "qwen3-prefix"],
)  # fmt: skip
def test_other_spellings_of_a_checkpoint(tmp_path, name, change):
    model = make_encoder(name, **(KV if name == "Qwen3Model" else {}))
    model.save_pretrained(tmp_path)
    rename(tmp_path, change)
    params = SCORES if name.endswith("Classification") else RAW
    close(pool(make_runner(tmp_path), prompts(9), params)[0], reference(model, prompts(9)[0]))


def test_masked_lm_checkpoints_give_hidden_states(tmp_path):
    for name in ("BertForMaskedLM", "RobertaForMaskedLM", "ModernBertForMaskedLM"):
        model = make_encoder(name)
        model.save_pretrained(tmp_path / name)
        close(pool(make_runner(tmp_path / name), prompts(9), RAW)[0], reference(model.base_model, prompts(9)[0]))


def test_a_missing_tensor_is_named(tmp_path):
    make_encoder("BertModel").save_pretrained(tmp_path)
    rename(tmp_path, lambda name: "" if name == "encoder.layer.2.attention.self.key.bias" else name)
    with pytest.raises(ModelError, match=r"lacks tensor encoder\.layer\.2\.attention\.self\.key\.bias"):
        make_runner(tmp_path)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("BertModel", "position_embedding_type", "relative_key", "position_embedding_type must be 'absolute'"),
        ("BertModel", "is_decoder", True, "is_decoder must be false"),
        ("BertModel", "hidden_act", "gelu_fast", "hidden_act must be one of"),
        ("BertModel", "layer_norm_eps", "small", "layer_norm_eps must be a number"),
        ("ModernBertForSequenceClassification", "classifier_pooling", "max", "classifier_pooling must be 'cls' or 'mean'"),
        ("BertForSequenceClassification", "sbert_ce_default_activation_function", "torch.nn.Tanh", "activation_fn must be"),
    ],
)
def test_configs_that_are_refused(tmp_path, name, key, value, message):
    make_encoder(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ModelError, match=message):
        make_runner(tmp_path)


def test_contexts(tmp_path):
    make_encoder("RobertaModel", max_position_embeddings=50, type_vocab_size=1).save_pretrained(tmp_path)
    runner = make_runner(tmp_path)
    assert runner.info.max_model_len == 48
    pool(runner, prompts(48), RAW)
    with pytest.raises(ModelError, match="max_model_len 49 is beyond the model's context of 48 tokens"):
        make_runner(tmp_path, max_model_len=49)


def test_a_causal_backend_is_refused_for_an_encoder(tmp_path):
    make_encoder("BertModel").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'cpu' cannot serve this model, which is an encoder; those that can are encoder"):
        make_runner(tmp_path, attention_backend="cpu")
