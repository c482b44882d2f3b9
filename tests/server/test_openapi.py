"""/openapi.json is valid, complete, and true: schemathesis finds no 5xx behind it."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from server.serving import FakeService, call, make_context, serving

from llmd.server.admin import routes as admin_routes

POST_PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
PATHS = (*POST_PATHS, "/v1/models", "/v1/models/{model}", "/health", "/ready", "/version", "/metrics")


@contextmanager
def served_by_thread():
    """A server on its own loop; schemathesis calls it as a stranger does."""
    ready, stop, urls = threading.Event(), asyncio.Event(), []
    loop = asyncio.new_event_loop()

    async def main():
        async with serving(make_context(FakeService())) as url:
            urls.append(url)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


@pytest.fixture(scope="module")
def url():
    with served_by_thread() as url:
        yield url


async def test_document():
    async with serving(make_context()) as url:
        document = (await call(url, "GET", "/openapi.json")).json()
    assert document["openapi"] == "3.1.0"
    admin = {spec.path for spec in admin_routes()}
    assert set(document["paths"]) == {*PATHS, "/openapi.json", "/tokenizer_info", *admin}
    schemas = document["components"]["schemas"]
    assert {"ChatRequest", "CompletionRequest", "StreamOptions", "Error"} <= set(schemas)
    assert "temperature" in schemas["ChatRequest"]["properties"]
    assert schemas["ChatRequest"]["additionalProperties"] is False


@pytest.mark.parametrize(
    ("path", "mode"),
    [(path, GenerationMode.POSITIVE) for path in PATHS] + [(path, GenerationMode.NEGATIVE) for path in POST_PATHS],
)
def test_no_server_errors(url, path, mode):
    schema = schemathesis.openapi.from_url(url + "/openapi.json")
    (operation,) = (found.ok() for found in schema.include(path=path).get_all_operations())
    seen = []

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def check(case):
        answer = case.call()
        seen.append(answer.status_code)
        case.validate_response(answer, checks=[not_a_server_error])
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    check()
    assert seen
