"""/openapi.json tells the truth of these routes: schemathesis finds no 5xx and no answer of another shape."""

from __future__ import annotations

import pytest
from schemathesis import GenerationMode
from scripted import check_operation, make_folder, threaded

from llmd_plugins import anthropic as plugin

OPERATIONS = [
    ("/v1/messages", "POST", GenerationMode.POSITIVE),
    ("/v1/messages", "POST", GenerationMode.NEGATIVE),
    ("/v1/messages/count_tokens", "POST", GenerationMode.POSITIVE),
    ("/v1/messages/count_tokens", "POST", GenerationMode.NEGATIVE),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with threaded(make_folder(tmp_path_factory.mktemp("schema") / "model"), plugin) as url:
        yield url


@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
def test_operation(url, path, method, mode):
    check_operation(url, path, method, mode)
