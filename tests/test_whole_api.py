"""The whole /openapi.json of a daemon with every built-in plugin and a model of each kind: schemathesis finds no 5xx, no
status that is not documented, and no answer of another shape.
"""

from __future__ import annotations

import json
from contextlib import suppress

import openai
import pytest
import schemathesis
from daemons import Daemon
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from model.tiny_encoders import make_encoder, save_tokenizer
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

CHECKS = [not_a_server_error, response_schema_conformance, status_code_conformance]
NUM_EXAMPLES = 3  # of each operation, right and wrong ones
LAST = "/admin/drain"  # which ends the daemon
CONFIG = """
[server]
api_keys = ["user-key"]
admin_keys = ["admin-key"]
[limits]
max_output_tokens = 8
[cache]
kv_cache_bytes = 16000000
[adapters]
enable_lora = true
[[models]]
model = "demo"
dtype = "float32"
device = "cpu"
"""
# which model a path is asked for; the others are of the demo model
MODELS = {
    "/v1/embeddings": "vectors", "/pooling": "vectors", "/classify": "labels", "/score": "pairs", "/v1/score": "vectors",
    "/rerank": "pairs", "/v1/rerank": "vectors", "/v2/rerank": "pairs",
}  # fmt: skip


def make_models(path):
    """Tiny encoders of each kind; their tables for the configuration."""
    models = {
        "vectors": make_encoder("BertModel"),
        "labels": make_encoder("BertForSequenceClassification", num_labels=3),
        "pairs": make_encoder("BertForSequenceClassification", num_labels=1),
    }
    tables = ""
    for name, model in models.items():
        model.save_pretrained(path / name)
        save_tokenizer(path / name, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
        tables += f'[[models]]\nmodel = "{path / name}"\nserved_model_name = ["{name}"]\ndevice = "cpu"\n'
    return tables


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    state = f'[plugins.batches]\ndirectory = "{path / "state"}"\n'
    (path / "llmd.toml").write_text(CONFIG + make_models(path) + state)
    arguments = ("--config", "llmd.toml")
    with Daemon(*arguments, cwd=path, fake=False, OMP_NUM_THREADS="1", GOMP_SPINCOUNT="1000") as daemon:
        yield daemon.ready()


@pytest.fixture(scope="module")
def schema(daemon):
    return schemathesis.openapi.from_url(f"{daemon.url}/openapi.json", headers={"Authorization": "Bearer user-key"})


def check_operation(operation, mode):
    """Requests as the document allows them, or as it does not; right ones ask for a model that there is. The statuses."""
    path, seen = operation.path, set()
    key = "admin-key" if path.startswith("/admin/") or path.endswith("_lora_adapter") else "user-key"

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=NUM_EXAMPLES, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def check(case):
        if isinstance(case.body, dict) and "model" in case.body and mode is GenerationMode.POSITIVE:
            case.body["model"] = MODELS.get(path, "demo")
        answer = case.call(headers={"Authorization": f"Bearer {key}"})
        seen.add(answer.status_code)
        case.validate_response(answer, checks=CHECKS)

    with suppress(Unsatisfiable):  # nothing about it can be wrong
        check()
    return seen


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
def test_every_operation(schema, daemon, mode):
    wrong, seen = [], {}
    for found in schema.get_all_operations():
        operation = found.ok()
        can_be_wrong = operation.body or operation.query
        if operation.path == LAST or (mode is GenerationMode.NEGATIVE and not can_be_wrong):
            continue
        try:
            seen[operation.method, operation.path] = check_operation(operation, mode)
        except (AssertionError, BaseExceptionGroup) as error:
            wrong.append(f"{operation.method.upper()} {operation.path}: {error}"[:2000])
    assert not wrong, "\n\n".join(wrong)
    assert len(seen) > (40 if mode is GenerationMode.POSITIVE else 20)
    if mode is GenerationMode.NEGATIVE:
        accepted = [name for name, statuses in seen.items() if name[0] == "post" and statuses - {400, 404, 200}]
        assert accepted == []
    assert daemon.get("/health", Authorization="Bearer user-key")[0] == 200


USER = [{"role": "user", "content": "Hello"}]
PAIRS = {"text_1": "a", "text_2": ["b", "c"]}
RANK = {"query": "a", "documents": ["b", {"text": "c"}]}
# one request of each kind that is served, so that the success of every operation is seen too
GOOD = [
    ("post", "/v1/chat/completions", {"messages": USER, "logprobs": True, "top_logprobs": 2}),
    ("post", "/v1/completions", {"prompt": "Hello", "echo": True, "logprobs": 1}),
    ("post", "/tokenize", {"prompt": "Hello"}),
    ("post", "/detokenize", {"tokens": [5, 6]}),
    ("post", "/v1/messages", {"messages": USER, "max_tokens": 4}),
    ("post", "/v1/messages/count_tokens", {"messages": USER}),
    ("post", "/v1/responses/input_tokens", {"input": "Hello"}),
    ("post", "/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"}),
    ("post", "/v1/embeddings", {"messages": USER}),
    ("post", "/pooling", {"input": "a", "task": "token_embed"}),
    ("post", "/classify", {"input": "a"}),
    ("post", "/score", PAIRS),
    ("post", "/v1/score", PAIRS),
    ("post", "/rerank", RANK),
    ("post", "/v1/rerank", RANK),
    ("post", "/v2/rerank", RANK),
    ("get", "/v1/models/{model}", {"model": "demo"}),
]


def served(schema, method, path, given=None):
    """The answer to a request that must be served, checked against the document; ids in the path are taken from `given`."""
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    parameters = {name: given[name] for name in names} if names else {}
    body = {"model": MODELS.get(path, "demo"), **given} if given is not None and not names and method == "post" else None
    options = {"body": body, "media_type": "application/json"} if body is not None else {}
    case = schema[path][method].Case(path_parameters=parameters, **options)
    key = "admin-key" if path.startswith("/admin/") else "user-key"
    answer = case.call(headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.content
    case.validate_response(answer, checks=CHECKS)
    return answer


@pytest.mark.parametrize(("method", "path", "given"), GOOD, ids=[good[1] for good in GOOD])
def test_success(schema, method, path, given):
    served(schema, method, path, given)


def test_success_of_what_is_stored(schema, daemon):
    response = served(schema, "post", "/v1/responses", {"input": "Hello", "background": True}).json()["id"]
    for path in ("/v1/responses/{response_id}", "/v1/responses/{response_id}/input_items"):
        served(schema, "get", path, {"response_id": response})
    served(schema, "post", "/v1/responses/{response_id}/cancel", {"response_id": response})
    served(schema, "delete", "/v1/responses/{response_id}", {"response_id": response})
    with openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="user-key", max_retries=0) as api:
        file = api.files.create(file=("in.jsonl", b"{}"), purpose="batch").id
        batch = api.batches.create(input_file_id=file, endpoint="/v1/responses", completion_window="24h").id
    for path in ("/v1/batches/{batch_id}", "/v1/files/{file_id}"):
        served(schema, "get", path, {"batch_id": batch, "file_id": file})
    served(schema, "post", "/v1/batches/{batch_id}/cancel", {"batch_id": batch})
    served(schema, "get", "/v1/files/{file_id}/content", {"file_id": file})
    served(schema, "delete", "/v1/files/{file_id}", {"file_id": file})


def test_every_route_is_in_it(daemon):
    """Whatever plugin a route is of, admin or not."""
    document = daemon.get("/openapi.json", Authorization="Bearer user-key")[1]
    named = {operation["operationId"] for path in document["paths"].values() for operation in path.values()}
    for name in ("openai.", "pooling.", "responses.", "anthropic.", "batches.", "adapters.", "admin.", "server."):
        assert any(one.startswith(name) for one in named), name
    operation = document["paths"][LAST]["post"]
    assert set(operation["responses"]) >= {"200", "401"}
    assert json.dumps(document).count("additionalProperties") > 10


def test_the_last_operation(schema, daemon):
    served(schema, "post", LAST)
    assert daemon.process.wait(30) == 0
