"""LLM.embed, encode, classify and score over tiny models of each kind, with vLLM's objects."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model.tiny_encoders import make_encoder, save_tokenizer, write_dense, write_sentence_files
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from llmd import LLM, PoolingParams, SamplingParams
from llmd.errors import InvalidRequest, ModelError
from llmd.offline import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    PoolingRequestOutput,
    ScoringRequestOutput,
)

TEXTS = ["HELLO", "A LONGER TEXT", "B"]


def load(path, model, **sentence):
    """The saved model and an LLM of it."""
    model.save_pretrained(path)
    save_tokenizer(path)
    if sentence:
        write_sentence_files(path, **sentence)
    return LLM(str(path), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def model():
    return make_encoder("BertModel")


@pytest.fixture(scope="module")
def encoder(model, tmp_path_factory):
    with load(tmp_path_factory.mktemp("encoder") / "m", model, pooling="mean", prompts={"query": "find: "}) as llm:
        yield llm


@torch.no_grad()
def hidden(model, llm, text):
    """Hugging Face's hidden states of a text."""
    inputs = AutoTokenizer.from_pretrained(llm._path)(text, return_tensors="pt", return_token_type_ids=True)
    return model(**inputs).last_hidden_state[0]


def test_embed(encoder, model):
    outputs = encoder.embed(TEXTS, use_tqdm=False)
    for output, text in zip(outputs, TEXTS, strict=True):
        assert isinstance(output, EmbeddingRequestOutput)
        expected = F.normalize(hidden(model, encoder, text).mean(0), dim=0)
        assert output.outputs.embedding == pytest.approx(expected.tolist(), abs=1e-4)
        assert len(output.prompt_token_ids) == len(text) + 2
    [led] = encoder.embed("HELLO", use_tqdm=False, prompt_name="query")
    assert led.outputs.embedding == pytest.approx(
        encoder.embed("find: HELLO", use_tqdm=False)[0].outputs.embedding, abs=1e-5
    )
    [cut] = encoder.embed("HELLO", use_tqdm=False, truncate_prompt_tokens=3, pooling_params=PoolingParams(dimensions=60))
    assert cut.outputs.hidden_size == 60
    with pytest.raises(InvalidRequest, match="does not support Matryoshka"):
        encoder.embed("HELLO", use_tqdm=False, pooling_params=PoolingParams(dimensions=5))
    assert len(cut.prompt_token_ids) == 3


def test_encode(encoder, model):
    raw = PoolingParams(pooling="all", normalize=False)
    outputs = encoder.encode(TEXTS, [raw, PoolingParams(pooling="cls", normalize=False), PoolingParams()], use_tqdm=False)
    assert all(isinstance(output, PoolingRequestOutput) for output in outputs)
    np.testing.assert_allclose(outputs[0].outputs.data, hidden(model, encoder, TEXTS[0]), atol=1e-4)
    np.testing.assert_allclose(outputs[1].outputs.data, hidden(model, encoder, TEXTS[1])[0], atol=1e-4)


def test_scores_of_vectors(encoder):
    vectors = [np.array(output.outputs.embedding) for output in encoder.embed(TEXTS, use_tqdm=False)]
    outputs = encoder.score(TEXTS[0], TEXTS[1:], use_tqdm=False)
    assert all(isinstance(output, ScoringRequestOutput) for output in outputs)
    assert [output.outputs.score for output in outputs] == pytest.approx([vectors[0] @ v for v in vectors[1:]], abs=1e-4)
    with pytest.raises(ValueError, match="2 texts cannot be scored with 3"):
        encoder.score(TEXTS[:2], TEXTS, use_tqdm=False)


def test_what_an_encoder_refuses(encoder):
    with pytest.raises(InvalidRequest, match="is not a classifier"):
        encoder.classify("HELLO", use_tqdm=False)
    with pytest.raises(InvalidRequest, match="prompt 1: the prompt has 402 tokens"):
        encoder.embed(["a", "b" * 400], use_tqdm=False)
    with pytest.raises(InvalidRequest, match="generates no text"):
        encoder.generate("HELLO", SamplingParams(), use_tqdm=False)


def test_classify(tmp_path):
    model = make_encoder("RobertaForSequenceClassification", num_labels=3, type_vocab_size=1)
    with load(tmp_path / "m", model) as llm:
        outputs = llm.classify(TEXTS, use_tqdm=False)
        assert all(isinstance(output, ClassificationRequestOutput) for output in outputs)
        ids = torch.tensor([outputs[1].prompt_token_ids])
        with torch.no_grad():
            expected = model(ids).logits[0].softmax(-1).tolist()
        assert outputs[1].outputs.probs == pytest.approx(expected, abs=1e-4)
        assert outputs[1].outputs.num_classes == 3
        assert list(llm.encode(TEXTS[1], use_tqdm=False)[0].outputs.data) == pytest.approx(expected, abs=1e-4)
        with pytest.raises(InvalidRequest, match="gives scores and no vectors"):
            llm.embed("HELLO", use_tqdm=False)
        with pytest.raises(InvalidRequest, match="no single score"):
            llm.score("a", "b", use_tqdm=False)


def test_scores_of_pairs(tmp_path):
    model = make_encoder("BertForSequenceClassification", num_labels=1)
    with load(tmp_path / "m", model) as llm:
        tokenizer = AutoTokenizer.from_pretrained(llm._path)
        outputs = llm.score("QUESTION", TEXTS, use_tqdm=False)
        for output, text in zip(outputs, TEXTS, strict=True):
            with torch.no_grad():
                inputs = tokenizer("QUESTION", text, return_tensors="pt", return_token_type_ids=True)
                assert output.outputs.score == pytest.approx(model(**inputs).logits.sigmoid().item(), abs=1e-4)
            assert output.prompt_token_ids == inputs["input_ids"][0].tolist()


def test_a_last_token_embedder_ends_with_eos(tmp_path):
    model = make_encoder("MistralModel", num_key_value_heads=1, head_dim=20, sliding_window=None)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, eos_token="[EOS]", add_eos_token=True)  # which tokenizer.json does not do by itself
    with LLM(str(tmp_path), dtype="float32", device="cpu", kv_cache_bytes=8 << 20) as llm:
        [output] = llm.embed("HELLO", use_tqdm=False)
        assert output.prompt_token_ids[-1] == 4
        with torch.no_grad():
            state = model(torch.tensor([output.prompt_token_ids])).last_hidden_state[0, -1]
        assert output.outputs.embedding == pytest.approx(F.normalize(state, dim=0).tolist(), abs=1e-4)


def test_a_dense_module_by_the_weighted_mean(tmp_path):
    model, linear = make_encoder("BertModel"), torch.nn.Linear(60, 24)
    write_dense(tmp_path / "m", 2, linear)
    with load(tmp_path / "m", model, kinds=["Dense"], pooling={"pooling_mode_weightedmean_tokens": True}) as llm:
        for output, text in zip(llm.embed(TEXTS, use_tqdm=False), TEXTS, strict=True):
            states = hidden(model, llm, text)
            weights = torch.arange(1, len(states) + 1)[:, None]
            with torch.no_grad():
                expected = linear((states * weights).sum(0) / weights.sum()).tanh()
            assert output.outputs.embedding == pytest.approx(F.normalize(expected, dim=0).tolist(), abs=1e-4)


def test_modules_that_are_not_served(tmp_path):
    with pytest.raises(ModelError, match="the module 'LSTM'"):
        load(tmp_path / "m", make_encoder("BertModel"), kinds=["LSTM"])


def test_a_reranker_that_says_yes_or_no(tmp_path):
    model = make_encoder("Qwen3ForCausalLM", num_key_value_heads=1, head_dim=20, max_position_embeddings=600)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    over = {
        "architectures": ["Qwen3ForSequenceClassification"], "classifier_from_token": ["n", "y"],
        "is_original_qwen3_reranker": True,
    }  # fmt: skip
    with LLM(str(tmp_path), dtype="float32", device="cpu", kv_cache_bytes=8 << 20, hf_overrides=over) as llm:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        for output in llm.score("QUESTION", TEXTS, use_tqdm=False):
            with torch.no_grad():
                logits = model(torch.tensor([output.prompt_token_ids])).logits[0, -1]
            wanted = logits[tokenizer.convert_tokens_to_ids(["n", "y"])].softmax(-1)[1].item()
            assert output.outputs.score == pytest.approx(wanted, abs=1e-4)
            assert "QUESTION" in tokenizer.decode(output.prompt_token_ids).replace(" ", "")


def test_a_language_model_with_an_embedders_files(tmp_path):
    """As Qwen3-Embedding is published: a tied language model saved without its head, EOS by the tokenizer, last token."""
    model = make_encoder("Qwen3ForCausalLM", num_key_value_heads=1, head_dim=20, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    save_tokenizer(tmp_path, ends_with_eos=True)
    prompts = {"query": "Instruct: find\nQuery:", "document": ""}
    write_sentence_files(tmp_path, pooling={"pooling_mode_lasttoken": True}, prompts=prompts)
    with LLM(str(tmp_path), dtype="float32", device="cpu", kv_cache_bytes=8 << 20) as llm:
        for text, name, led in (("HELLO", None, "HELLO"), ("HELLO", "query", "Instruct: find\nQuery:HELLO")):
            [output] = llm.embed(text, use_tqdm=False, prompt_name=name)
            assert output.prompt_token_ids == [*llm._service.tokenizer.encode(led, add_special_tokens=False), 4]
            with torch.no_grad():
                state = model.model(torch.tensor([output.prompt_token_ids])).last_hidden_state[0, -1]
            assert output.outputs.embedding == pytest.approx(F.normalize(state, dim=0).tolist(), abs=1e-4)
        [cut] = llm.embed("HELLO", use_tqdm=False, truncate_prompt_tokens=3)
        assert cut.prompt_token_ids == [*output.prompt_token_ids[-6:-4], 4]
        assert llm.generate("HELLO", SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)[0].outputs[0].token_ids


def test_a_template_of_pairs(tmp_path):
    """One that the configuration gives, as vLLM's examples for converted rerankers do; whole words stay when it is cut."""
    model = make_encoder("Qwen3ForSequenceClassification", num_key_value_heads=1, head_dim=20, num_labels=1)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}!"
    with LLM(str(tmp_path), dtype="float32", device="cpu", kv_cache_bytes=8 << 20, chat_template=template) as llm:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        whole = tokenizer("<query>Q<document>A LONGER TEXT!", add_special_tokens=False)["input_ids"]
        [output] = llm.score("Q", "A LONGER TEXT", use_tqdm=False)
        assert output.prompt_token_ids == whole
        with torch.no_grad():
            wanted = model(torch.tensor([whole])).logits.sigmoid().item()
        assert output.outputs.score == pytest.approx(wanted, abs=1e-4)
        [cut] = llm.score("Q", "A LONGER TEXT", use_tqdm=False, truncate_prompt_tokens=len(whole) - 4)
        assert cut.prompt_token_ids == [*whole[:-5], whole[-1]]
        [tiny] = llm.score("Q", "A LONGER TEXT", use_tqdm=False, truncate_prompt_tokens=3)
        assert tiny.prompt_token_ids == whole[:3]
