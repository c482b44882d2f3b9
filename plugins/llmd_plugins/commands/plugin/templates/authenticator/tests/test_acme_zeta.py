"""Who is known and who is not; a daemon in front of which it stands."""

from acme_zeta import Zeta

from llmd.api.v1.testing import check_authenticator

KNOWN = {"Authorization": "Bearer sesame"}


def test_authenticator():
    check_authenticator(Zeta(["sesame"]), known=[KNOWN, {"x-api-key": "sesame"}], unknown=[{"x-api-key": "other"}])


def test_server(llmd_server):
    server = llmd_server(ZETA_KEYS="sesame")
    assert server.request("GET", "/v1/models").status == 401
    assert server.request("GET", "/v1/models", headers=KNOWN).status == 200
