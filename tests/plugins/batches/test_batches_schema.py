"""/openapi.json tells the truth of these routes: schemathesis finds no 5xx and no answer of another shape."""

from __future__ import annotations

import pytest
from schemathesis import GenerationMode
from scripted import check_operation, make_folder, threaded

from llmd_plugins import batches as plugin
from llmd_plugins.batches import BatchesSettings

OPERATIONS = [
    ("/v1/files", "POST", GenerationMode.POSITIVE),
    ("/v1/files", "POST", GenerationMode.NEGATIVE),
    ("/v1/files", "GET", GenerationMode.POSITIVE),
    ("/v1/files/{file_id}", "GET", GenerationMode.POSITIVE),
    ("/v1/files/{file_id}", "DELETE", GenerationMode.POSITIVE),
    ("/v1/files/{file_id}/content", "GET", GenerationMode.POSITIVE),
    ("/v1/batches", "POST", GenerationMode.POSITIVE),
    ("/v1/batches", "POST", GenerationMode.NEGATIVE),
    ("/v1/batches", "GET", GenerationMode.POSITIVE),
    ("/v1/batches/{batch_id}", "GET", GenerationMode.POSITIVE),
    ("/v1/batches/{batch_id}/cancel", "POST", GenerationMode.POSITIVE),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    sections = {"batches": BatchesSettings(directory=str(tmp_path_factory.mktemp("state")))}
    with threaded(make_folder(tmp_path_factory.mktemp("schema") / "model"), plugin, sections=sections) as url:
        yield url


@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
def test_operation(url, path, method, mode):
    check_operation(url, path, method, mode)
