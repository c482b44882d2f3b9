"""`[[keys]]` over HTTP: names, limits, what they may use; and every route of every plugin asks for one."""

from __future__ import annotations

import hashlib

import pytest
from aiohttp import web
from server.serving import FakeService, call, make_config, make_context, serving, summaries_of

from llmd.config import Config, KeyConfig, PluginsConfig
from llmd.guard import built_routes
from llmd.plugin.catalog import build_catalog
from llmd.server.app import create_app


def config_of(*keys: KeyConfig, **server) -> Config:
    return Config.model_validate({"keys": [key.model_dump(exclude_none=True) for key in keys], "server": server})


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def context_of(*keys: KeyConfig, **changes):
    service = FakeService()
    return make_context(service, config=config_of(*keys), **changes), service


async def test_keys_in_the_clear_as_a_digest_and_from_a_file(tmp_path):
    file = tmp_path / "carol"
    file.write_text("# for carol\nthird\n")
    digest = "sha256:" + hashlib.sha256(b"second").hexdigest()
    keys = (
        KeyConfig(name="alice", key="first"),
        KeyConfig(name="bob", hash=digest),
        KeyConfig(name="carol", file=str(file)),
    )
    context, service = context_of(*keys)
    seen = summaries_of(context)
    async with serving(context) as url:
        for key in ("first", "second", "third"):
            assert (await call(url, "POST", "/v1/completions", {"prompt": "a"}, headers=bearer(key))).status == 200
        for wrong in ("fourth", digest, "alice", ""):
            assert (await call(url, "POST", "/v1/completions", {"prompt": "a"}, headers=bearer(wrong))).status == 401
    assert [request.key for request in service.requests] == ["alice", "bob", "carol"]
    assert [summary.key for summary in seen] == ["alice", "bob", "carol", "", "", "", ""]
    assert "first" not in repr(context.config)


async def test_a_credential_is_found(tmp_path, monkeypatch):
    (tmp_path / "dave").write_text("fifth\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    context, _ = context_of(KeyConfig(name="dave", file="credential:dave"))
    async with serving(context) as url:
        assert (await call(url, "GET", "/v1/models", headers=bearer("fifth"))).status == 200


async def test_rate_limits_are_429_with_retry_after():
    context, _ = context_of(KeyConfig(name="alice", key="first", requests_per_minute=1), KeyConfig(name="bob", key="other"))
    async with serving(context) as url:
        answer = await call(url, "POST", "/v1/completions", {"prompt": "a"}, headers=bearer("first"))
        assert answer.status == 200
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
        answer = await call(url, "POST", "/v1/completions", {"prompt": "a"}, headers=bearer("first"))
        assert answer.status == 429
        assert 55 <= int(answer.headers["Retry-After"]) <= 60
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert (await call(url, "GET", "/v1/models", headers=bearer("first"))).status == 200
        assert (await call(url, "POST", "/v1/completions", {"prompt": "a"}, headers=bearer("other"))).status == 200


async def test_a_key_sees_only_its_models():
    context, _ = context_of(KeyConfig(name="alice", key="first", models=("another",)), KeyConfig(name="bob", key="second"))
    async with serving(context) as url:
        assert (await call(url, "GET", "/v1/models", headers=bearer("first"))).json()["data"] == []
        assert (await call(url, "GET", "/v1/models/fake", headers=bearer("first"))).status == 404
        for body in ({"prompt": "a", "model": "fake"}, {"prompt": "a"}):
            answer = await call(url, "POST", "/v1/completions", body, headers=bearer("first"))
            assert answer.status == 404
            assert "none to this key" in answer.json()["error"]["message"]
        assert len((await call(url, "GET", "/v1/models", headers=bearer("second"))).json()["data"]) == 2


async def test_keys_of_the_server_table_still_work_beside_them():
    context = make_context(config=config_of(KeyConfig(name="alice", key="first"), api_keys=("old",)))
    async with serving(context) as url:
        for key in ("first", "old"):
            assert (await call(url, "GET", "/v1/models", headers=bearer(key))).status == 200


async def test_limits_change_with_the_configuration_of_the_context():
    context, _ = context_of(KeyConfig(name="alice", key="first"))
    async with serving(context) as url:
        context.quotas.configure([KeyConfig(name="alice", key="first", requests_per_minute=1)])
        statuses = [
            (await call(url, "POST", "/v1/completions", {"prompt": "a"}, headers=bearer("first"))).status for _ in range(2)
        ]
        assert statuses == [200, 429]
        context.config = config_of(KeyConfig(name="alice", key="first"), admin_keys=("root",), open_routes=("/v1/models",))
        assert (await call(url, "GET", "/v1/models")).status == 200
        assert (await call(url, "GET", "/health")).status == 401
        assert (await call(url, "GET", "/admin/plugins", headers=bearer("root"))).status == 200


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", "1e9"])
async def test_a_timeout_that_is_none_is_refused(value):
    async with serving(make_context()) as url:
        answer = await call(url, "POST", "/v1/completions", {"prompt": "a"}, headers={"X-Request-Timeout": value})
        assert answer.status == 400
        assert "X-Request-Timeout" in answer.json()["error"]["message"]


def served_routes(**changes):
    """The app of a daemon with every built-in plugin, and its context."""
    catalog = build_catalog(PluginsConfig(autoload=False))
    context = make_context(sections=dict(default_sections(catalog)), **changes)
    context.routes = built_routes(catalog, context)
    return create_app(context), context


def default_sections(catalog):
    return {name: spec.model() for name, spec in catalog.config_sections.items()}


def concrete(path: str) -> str:
    """A path with something in the place of each variable."""
    while "{" in path:
        head, _, rest = path.partition("{")
        path = head + "x" + rest.partition("}")[2]
    return path


async def test_every_route_is_refused_without_a_key_unless_it_is_open():
    config = make_config(api_keys=("user",), admin_keys=("root",), root_path="/llm")
    app, context = served_routes(config=config)
    admin_paths = {spec.path for spec in context.routes if spec.admin}
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = "http://{}:{}".format(*runner.addresses[0][:2])
    try:
        seen = set()
        for route in list(app.router.routes()):
            pattern = route.resource.canonical
            bare = pattern.removeprefix("/llm")
            seen.add(bare)
            status = (await call(url, route.method, concrete(pattern))).status
            if bare in config.server.open_routes:
                assert status in (200, 503), (route.method, pattern)
            else:
                assert status == 401, (route.method, pattern)
            if bare in admin_paths:
                assert (await call(url, route.method, concrete(pattern), headers=bearer("user"))).status == 403, pattern
        assert {"/v1/chat/completions", "/metrics", "/admin/reload", "/v1/messages", "/v1/responses"} <= seen
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("given", [{"headers": {"X-Request-Timeout": "0.1"}}, {"fields": {"timeout": 0.1}}])
async def test_a_client_says_how_long_it_waits(given):
    """The engine ends it: its deadline is told with the request."""
    told = []

    class Service(FakeService):
        async def generate(self, prompt, params, **options):
            told.append(options["timeout_s"])
            return await super().generate(prompt, params, **options)

    config = make_config(request_timeout_s=5.0)
    async with serving(make_context(Service(), config=config)) as url:
        body = {"prompt": "a", **given.get("fields", {})}
        assert (await call(url, "POST", "/v1/completions", body, headers=given.get("headers"))).status == 200
        assert (await call(url, "POST", "/v1/completions", {"prompt": "a"})).status == 200
        longer = {"X-Request-Timeout": "60"}
        assert (await call(url, "POST", "/v1/completions", {"prompt": "a"}, headers=longer)).status == 200
    assert told == [0.1, 5.0, 5.0]
