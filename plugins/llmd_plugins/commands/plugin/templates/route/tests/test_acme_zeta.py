"""The route by the kit, and in a daemon."""

from acme_zeta import llmd_register_routes

from llmd.api.v1.testing import Wanted, check_route


def test_route():
    (spec,) = llmd_register_routes()
    requests = [
        Wanted(200, "POST", body={"text": "abc"}),
        Wanted(400, "POST", body={"text": 5}),
        Wanted(400, "POST", body={"txt": "abc"}),
        Wanted(405, "GET"),
    ]
    check_route(spec, requests)


def test_server(llmd_server):
    answer = llmd_server().request("POST", "/zeta/reverse", {"text": "abc"})
    assert answer.json() == {"text": "cba"}
