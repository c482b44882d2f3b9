"""Decoders that score pairs: the logits of "no" and "yes" as Qwen3-Reranker compares them, and the converted form."""

import json

import numpy as np
import pytest
import torch
from model.tiny_encoders import make_encoder, make_runner, pool, save_tokenizer

from llmd.engine.params import PoolingParams
from llmd.errors import ModelError
from llmd.model.config import read_config

KV = {"num_key_value_heads": 1, "head_dim": 20}
PROMPTS = [[20, 21, 22], [40] * 9, [7]]
ORIGINAL = {
    "architectures": ["Qwen3ForSequenceClassification"], "classifier_from_token": ["n", "y"],
    "is_original_qwen3_reranker": True,
}  # fmt: skip
SCORES, RAW = PoolingParams(task="classify"), PoolingParams(task="classify", use_activation=False)


def token_ids(path):
    vocab = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    return vocab["n"], vocab["y"]


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_no_and_yes(tmp_path, tied):
    model = make_encoder("Qwen3ForCausalLM", **KV, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    no, yes = token_ids(save_tokenizer(tmp_path))
    runner = make_runner(tmp_path, hf_overrides=ORIGINAL)
    assert runner.info.labels == ("y",)
    assert not runner.info.can_generate
    logits = [model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS]
    for found, raw, wanted in zip(pool(runner, PROMPTS, SCORES), pool(runner, PROMPTS, RAW), logits, strict=True):
        assert found == pytest.approx(wanted[[no, yes]].softmax(-1)[1:].tolist(), abs=1e-4)
        assert raw == pytest.approx([float(wanted[yes] - wanted[no])], abs=1e-4)


@torch.no_grad()
def test_each_token_a_score(tmp_path):
    model = make_encoder("LlamaForCausalLM", **KV, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    no, yes = token_ids(save_tokenizer(tmp_path))
    over = {"architectures": ["LlamaForSequenceClassification"], "classifier_from_token": ["n", "y"]}
    runner = make_runner(tmp_path, hf_overrides=over)
    assert runner.info.labels == ("n", "y")
    for found, prompt in zip(pool(runner, PROMPTS, RAW), PROMPTS, strict=True):
        np.testing.assert_allclose(found, model(torch.tensor([prompt])).logits[0, -1, [no, yes]], atol=1e-4)


@torch.no_grad()
def test_the_converted_form(tmp_path):
    """A head of one label whose weight is the difference of the two tokens' rows."""
    language = make_encoder("Qwen3ForCausalLM", **KV, tie_word_embeddings=True)
    no, yes = token_ids(save_tokenizer(tmp_path))
    model = make_encoder("Qwen3ForSequenceClassification", **KV, num_labels=1)
    model.model.load_state_dict(language.model.state_dict())
    model.score.weight.copy_(language.lm_head.weight[[yes]] - language.lm_head.weight[[no]])
    model.save_pretrained(tmp_path)
    for found, prompt in zip(pool(make_runner(tmp_path), PROMPTS, SCORES), PROMPTS, strict=True):
        logits = language(torch.tensor([prompt])).logits[0, -1, [no, yes]]
        assert found == pytest.approx(logits.softmax(-1)[1:].tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classifier_from_token": ["n", "yes!"]}, "classifier_from_token: 'yes!' is no token of tokenizer.json"),
        ({"classifier_from_token": "n"}, "classifier_from_token must be a list of tokens, got 'n'"),
        ({"classifier_from_token": ["n"]}, "must be two tokens for 'from_2_way_softmax'"),
        ({"method": "magic"}, "method must be 'from_2_way_softmax' or 'no_post_processing', got 'magic'"),
    ],
)
def test_what_is_refused(tmp_path, changes, words):
    make_encoder("Qwen3ForCausalLM", **KV).config.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(ModelError, match=words):
        read_config(tmp_path, {**ORIGINAL, **changes})


def test_a_tokenizer_of_pieces_and_none(tmp_path):
    make_encoder("Qwen3ForCausalLM", **KV).config.save_pretrained(tmp_path)
    vocab = {"model": {"vocab": [["a", 0.0], ["n", -1.0]]}, "added_tokens": [{"id": 9, "content": "y"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocab))
    assert read_config(tmp_path, ORIGINAL).classifier_tokens.token_ids == (1, 9)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer.json cannot be read \(FileNotFoundError\)"):
        read_config(tmp_path, ORIGINAL)
