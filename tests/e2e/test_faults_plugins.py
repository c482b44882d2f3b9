"""Wheels that raise, in every hook and in what they build: a row of errors in the status, and everybody else is served."""

import inspect

import pytest
from daemons import Daemon

from llmd.plugin import hookspecs

HOOKS = [name for name, _ in inspect.getmembers(hookspecs, inspect.isfunction) if name.startswith("llmd_")]
REGISTERING = [name for name in HOOKS if name.startswith("llmd_register_")]


def raising(hooks) -> str:
    """A wheel all of whose hooks raise."""
    source = ["from llmd.api.v1 import hookimpl"]
    for hook in hooks:
        arguments = ", ".join(inspect.signature(getattr(hookspecs, hook)).parameters)
        source.append(f"@hookimpl\ndef {hook}({arguments}):\n    raise RuntimeError('ouch from {hook}')")
    return "\n\n".join(source) + "\n"


def test_every_hook_but_that_of_authenticators_may_raise(tmp_path):
    hooks = [name for name in HOOKS if name != "llmd_register_authenticators"]
    assert len(hooks) > 20
    settings = {"LLMD_SERVER__ADMIN_KEYS": '["boss"]'}
    with Daemon("serve", "demo", cwd=tmp_path, wheel=raising(hooks), **settings) as daemon:
        daemon.ready()
        for _ in range(3):
            assert daemon.complete()[0] == 200
        assert daemon.get("/metrics")[0] == 200
        rows = daemon.get("/admin/plugins", Authorization="Bearer boss")[1]
        row = next(row for row in rows["plugins"] if row["name"] == "acme-more.main")
        assert "ouch from llmd_" in row["reason"]
        assert daemon.stop() == 0
    assert "ouch from llmd_" in daemon.log


@pytest.mark.parametrize("hook", ["llmd_select_parsers", "llmd_resolve_adapter", "llmd_request_finished"])
def test_hooks_at_the_edge_of_a_request_may_raise_alone(tmp_path, hook):
    with Daemon("serve", "demo", cwd=tmp_path, wheel=raising([hook])) as daemon:
        daemon.ready()
        assert [daemon.complete()[0] for _ in range(3)] == [200] * 3
        assert daemon.get("/v1/completions", {"prompt": "x", "model": "no/such-adapter"})[0] == 404
        assert daemon.stop() == 0


def test_a_wheel_that_may_have_been_the_authenticator_stops_the_start(tmp_path):
    with Daemon("serve", "demo", cwd=tmp_path, wheel=raising(REGISTERING)) as daemon:
        assert daemon.process.wait(60) == 78


# What is built by a wheel and raises while it is used.
RAISES_IN_USE = """
from llmd.api.v1 import LogitsProcessorSpec, MetricsSpec, MiddlewareSpec, RouteSpec, hookimpl

class Processor:
    keeps_argmax = False

    def wants(self, params):
        return params.seed in (1, 2, 3)

    def admit(self, admit):
        self.seed = admit.params.seed
        if self.seed == 1:
            raise RuntimeError("ouch in admit")

    def release(self, row):
        if self.seed == 3:
            raise RuntimeError("ouch in release")

    def apply(self, logits, rows):
        if self.seed == 2:
            raise RuntimeError("ouch in apply")
        return logits

def middleware(config):
    from aiohttp import web

    @web.middleware
    async def wrap(request, handler):
        if request.headers.get("X-Ouch"):
            raise RuntimeError("ouch in the middleware")
        return await handler(request)

    return wrap

def route(context):
    async def answer(request):
        raise RuntimeError("ouch in the route")

    return answer

class Collector:
    def collect(self):
        raise RuntimeError("ouch in the collector")

@hookimpl
def llmd_register_logits_processors():
    return [LogitsProcessorSpec(name="bad", summary="for tests", build=lambda context: Processor())]

@hookimpl
def llmd_register_metrics():
    return [MetricsSpec(name="bad", summary="for tests", build=lambda registry, context: registry.register(Collector()))]

@hookimpl
def llmd_register_middlewares():
    return [MiddlewareSpec(name="bad", summary="for tests", build=middleware)]

@hookimpl
def llmd_register_routes():
    return [RouteSpec(name="bad", summary="for tests", method="GET", path="/ouch", build=route)]
"""


def test_what_a_wheel_built_raises_only_for_whom_it_concerns(tmp_path):
    settings = {"LLMD_CACHE__KV_CACHE_BYTES": "16M"}
    with Daemon("serve", "demo", cwd=tmp_path, fake=False, wheel=RAISES_IN_USE, **settings) as daemon:
        daemon.ready()
        before = daemon.complete(temperature=0)
        assert before[0] == 200
        for seed in (1, 2):
            status, answer = daemon.complete(seed=seed)
            assert (status, answer["error"]["code"]) == (500, "generation_failed")
            assert daemon.complete(temperature=0)[1]["choices"][0]["text"] == before[1]["choices"][0]["text"]
        daemon.complete(seed=3)
        for _ in range(2):
            assert "llmd_steps_total" in daemon.get("/metrics")[1]
        status, answer = daemon.get("/ouch")
        assert (status, answer["error"]["code"]) == (500, "internal_error")
        assert daemon.get("/version", **{"X-Ouch": "1"})[0] == 500
        for _ in range(3):
            assert daemon.complete(temperature=0)[1]["choices"][0]["text"] == before[1]["choices"][0]["text"]
        assert daemon.get("/health")[0] == 200
        assert daemon.log.count("the collector Collector raised RuntimeError: ouch") == 1
        assert daemon.stop() == 0


# Parts that the engine and the text layer lean on in the midst of a request.
RAISES_DEEP = """
from llmd.api.v1 import GrammarSpec, ParserSpec, SchedulingPolicySpec, hookimpl

class Parser:
    needs_special_tokens = splits_reasoning = False

    def feed(self, text, token_ids=()):
        raise RuntimeError("ouch in the parser")

    def finish(self):
        return []

class Matcher:
    finished = False

    def accept(self, token_ids):
        return True

    def fill(self, mask_row):
        raise RuntimeError("ouch in the grammar")

    def forced(self):
        return []

class Grammar:
    def matcher(self):
        return Matcher()

class Compiler:
    def compile(self, constraint):
        return Grammar()

class Queue(list):
    def push(self, sequence):
        if sequence.request.params.seed == 13:
            raise RuntimeError("ouch in push")
        self.append(sequence)

    def push_front(self, sequence):
        self.insert(0, sequence)

    def ordered(self, now_s):
        for sequence in list(self):
            if sequence.request.params.seed == 14:
                raise RuntimeError("ouch in ordered")
            yield sequence

@hookimpl
def llmd_register_reasoning_parsers():
    return [ParserSpec(name="bad", summary="for tests", build=lambda prompt="": Parser())]

@hookimpl
def llmd_register_grammars():
    return [GrammarSpec(name="bad", summary="for tests", build=lambda context: Compiler(), kinds=("regex",), order=1)]

@hookimpl
def llmd_register_scheduling_policies():
    return [SchedulingPolicySpec(name="bad", summary="for tests", build=lambda config: Queue())]
"""


def test_deep_parts_of_a_wheel_raise_for_one_request_or_end_truthfully(tmp_path):
    settings = {
        "LLMD_MODELS__0__REASONING_PARSER": "bad",
        "LLMD_MODELS__0__STRUCTURED_OUTPUTS_BACKEND": "bad",
        "LLMD_SCHEDULER__POLICY": "bad",
    }
    with Daemon("serve", "demo", cwd=tmp_path, wheel=RAISES_DEEP, **settings) as daemon:
        daemon.ready()
        asked = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        answer = daemon.get("/v1/chat/completions", asked)
        assert answer[0] == 500, answer
        assert '"code":"internal_error"' in daemon.get("/v1/chat/completions", {**asked, "stream": True})[1]
        assert daemon.complete()[0] == 200
        assert daemon.complete(guided_regex="a+")[0] == 500
        assert daemon.complete(seed=13)[0] == 500
        assert daemon.complete(seed=12)[0] == 200
        assert daemon.complete(seed=14)[0] == 503  # who goes next is not known any more
        assert daemon.process.wait(30) == 70
