"""Keys: every route asks, open ones do not, admin has its own, and whatever breaks shuts the door."""

from __future__ import annotations

import aiohttp
import pytest
from server.serving import FakeService, all_routes, broken_authenticator, call, make_config, make_context, serving

from llmd.plugin.specs import AuthenticatorSpec, RouteSpec
from llmd.server.auth import KeySet, Principal, bearer_token


async def get(url, path, **headers):
    async with aiohttp.ClientSession() as session, session.get(url + path, headers=headers) as answer:
        return answer.status, await answer.read(), answer.headers


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


async def test_every_route_asks_for_a_key_but_the_open_ones():
    context = make_context(config=make_config(api_keys=("alpha", "beta")))
    async with serving(context) as url:
        for path in ("/v1/models", "/v1/models/fake", "/metrics", "/openapi.json", "/no/such/path", "/v1/completions"):
            status, body, headers = await get(url, path)
            assert status == 401, path
            assert headers["WWW-Authenticate"] == "Bearer"
            assert b"invalid_api_key" in body
        for path in ("/health", "/ready", "/version"):
            assert (await get(url, path))[0] == 200
        for key in ("alpha", "beta"):
            assert (await get(url, "/v1/models", **bearer(key)))[0] == 200
            assert (await get(url, "/v1/models", **{"x-api-key": key}))[0] == 200
        for wrong in (
            "Bearer gamma",
            "Bearer alph",
            "Bearer alphaa",
            "Basic alpha",
            "Bearer",
            "alpha",
            "Bearer  ",
            "Bearer ä",
        ):
            assert (await get(url, "/v1/models", Authorization=wrong))[0] == 401


async def test_config_opens_routes():
    config = make_config(api_keys=("alpha",), open_routes=("/v1/models", "/v1/models/{model}"), root_path="/llm")
    async with serving(make_context(config=config)) as url:
        assert (await get(url, "/v1/models"))[0] == 200
        assert (await get(url, "/v1/models/fake"))[0] == 200
        assert (await get(url, "/llm/v1/models"))[0] == 200
        assert (await get(url, "/health"))[0] == 401


async def test_without_keys_nothing_is_asked_and_admin_is_refused():
    async with serving(make_context()) as url:
        assert (await get(url, "/v1/models"))[0] == 200
        status, body, _ = await get(url, "/admin/plugins", **bearer("anything"))
        assert status == 403
        assert b"admin_disabled" in body


async def test_admin_routes_want_the_admin_key():
    service = FakeService()
    config = make_config(api_keys=("user",), admin_keys=("root",), root_path="/llm")
    rows = [{"name": "openai", "state": "loaded"}]
    async with serving(make_context(service, config=config, plugin_status=lambda: rows)) as url:
        for path in ("/admin/plugins", "/llm/admin/plugins"):
            assert (await get(url, path))[0] == 401
            assert (await get(url, path, **bearer("user")))[0] == 403
            status, body, _ = await get(url, path, **bearer("root"))
            assert status == 200
            assert b"loaded" in body
        assert (await get(url, "/admin/status", **bearer("root")))[0] == 200
        assert (await get(url, "/v1/models", **bearer("root")))[0] == 200
        async with aiohttp.ClientSession() as session:
            async with session.head(url + "/admin/plugins", headers=bearer("user")) as answer:
                assert answer.status == 403
            async with session.post(url + "/admin/reset_prefix_cache", headers=bearer("root")) as answer:
                assert answer.status == 200
    assert service.engine.resets == 1


async def test_admin_keys_alone_do_not_close_the_other_routes():
    async with serving(make_context(config=make_config(admin_keys=("root",)))) as url:
        assert (await get(url, "/v1/models"))[0] == 200
        assert (await get(url, "/admin/plugins"))[0] == 401


async def test_a_broken_authenticator_lets_nobody_in():
    specs = [broken_authenticator()]
    async with serving(make_context(config=make_config(admin_keys=("root",)), authenticators=specs)) as url:
        status, body, _ = await get(url, "/v1/models", **bearer("alpha"))
        assert status == 503
        assert b"/srv" not in body
        assert (await get(url, "/health"))[0] == 200


async def test_authenticators_are_asked_in_order_and_admins_come_from_any():
    class Fixed:
        def __init__(self, name, principal):
            self.name, self.principal = name, principal

        async def authenticate(self, headers, peer):
            asked.append(self.name)
            return self.principal

    asked = []
    specs = [
        AuthenticatorSpec(name="b", summary="b", order=2, build=lambda c: Fixed("b", Principal(key="b", is_admin=True))),
        AuthenticatorSpec(name="a", summary="a", order=1, build=lambda c: Fixed("a", None)),
        AuthenticatorSpec(name="c", summary="c", order=3, build=lambda c: None),
    ]
    async with serving(make_context(authenticators=specs)) as url:
        assert (await get(url, "/admin/plugins"))[0] == 200
    assert asked == ["a", "b"]


async def test_the_principal_is_counted_by_a_name_that_is_not_the_key():
    service = FakeService()
    async with serving(make_context(service, config=make_config(api_keys=("alpha",)))) as url:
        assert (await call(url, "POST", "/v1/completions", {"prompt": "a"}, headers=bearer("alpha"))).status == 200
    assert service.requests[0].key.startswith("key-")
    assert "alpha" not in service.requests[0].key


async def test_admin_routes_of_plugins_are_closed_with_patterns_too():
    def build(context):
        async def handle(request):
            raise AssertionError("reached")

        return handle

    route = RouteSpec(name="x", summary="x", method="GET", path="/admin/x/{name:.+}", build=build, admin=True)
    async with serving(make_context(config=make_config(admin_keys=("root",)), routes=[*all_routes(), route])) as url:
        assert (await get(url, "/admin/x/a/b"))[0] == 401


@pytest.mark.parametrize(
    ("headers", "token"),
    [
        ({"Authorization": "Bearer abc"}, "abc"),
        ({"Authorization": "bearer  abc "}, "abc"),
        ({"x-api-key": "abc"}, "abc"),
        ({"Authorization": "Basic abc", "x-api-key": "def"}, "def"),
        ({}, None),
    ],
)
def test_bearer_token(headers, token):
    assert bearer_token(headers) == token


def test_key_set():
    keys = KeySet(["alpha", "ümläut"])
    assert keys.find("alpha") == KeySet(["alpha"]).find("alpha")
    assert keys.find("ümläut")
    assert keys.find("\udcff") is None
    assert keys.find("") is None
    assert keys.find(None) is None
    assert keys.find("a" * 10_000) is None
