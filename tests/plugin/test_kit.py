"""The author's kit: the built-in plugins pass it, and each check finds what it is there for."""

import json
import threading

import pytest
import torch
from plugin.test_guide import EXAMPLES

from llmd.api.v1 import AttentionBackend, Principal, RouteSpec, SamplingParams
from llmd.api.v1.testing import (
    PagedRows,
    Wanted,
    check_architecture,
    check_attention_backend,
    check_authenticator,
    check_grammar,
    check_logits_processor,
    check_parser,
    check_plugin,
    check_route,
    on_one_thread,
)
from llmd.errors import ConfigError
from llmd_plugins.attention.reference import ReferenceAttention
from llmd_plugins.parsers.hermes import HermesParser
from llmd_plugins.sampling.bad_words import llmd_register_logits_processors

MAX_SKIPPED = 60  # encoders, formats that need a checkpoint, paths with parameters


def test_builtins_keep_the_contract():
    verdict = check_plugin("llmd")
    assert not [finding for finding in verdict.findings if finding.result == "failed"]
    skipped = [finding for finding in verdict.findings if finding.result == "skipped"]
    assert all(finding.detail for finding in skipped)
    assert len(skipped) <= MAX_SKIPPED
    assert json.loads(json.dumps(verdict.as_json()))["is_good"] is True


def test_plugin_that_is_not_there():
    with pytest.raises(ConfigError, match=r"no plugin is named 'nobody'; installed: .*llmd"):
        check_plugin("nobody")


class Wrong(ReferenceAttention):
    """Right, but for the first query head."""

    def forward(self, q, *args, **kwargs):
        out = super().forward(q, *args, **kwargs)
        out[:, 0] *= 1.01
        return out


class Forgetful(ReferenceAttention):
    """Right for prompts computed whole: it stores nothing of a step that is not the row's first."""

    def forward(self, q, k, v, kv, meta, **kwargs):
        out = super().forward(q, k, v, kv, meta, **kwargs)
        kv[:] = float("nan")
        return out


class Picky(ReferenceAttention):
    def why_not(self, needs):
        return ["never"]


@pytest.mark.parametrize(
    ("backend", "told"),
    [
        (Wrong(), "row 0: relative error"),
        (Forgetful(), "relative error nan"),
        (Picky(), "why_not refuses all of 20 shapes: never"),
    ],
)
def test_attention_backend_that_is_wrong(backend: AttentionBackend, told):
    with pytest.raises(AssertionError, match=told):
        check_attention_backend(backend)


def test_architecture_that_is_wrong(llmd_tiny_model):
    with pytest.raises(AssertionError, match="against the reference: relative error"):
        check_architecture(llmd_tiny_model, reference=lambda ids: torch.randn(len(ids), 258), load_format="dummy")


@pytest.mark.parametrize(
    ("written", "instead", "told"),
    [
        (", has_state=True", "", "its spec must say has_state=True"),
        (
            "self.sums = ",
            "self.own = nn.Parameter(torch.zeros(3)); self.sums = ",
            "a subclass of llmd.api.v1.Layer",
        ),
        ("linear_recurrence(decay, (1 - decay) * values, self.sums, batch)", "values.cumsum(0)", "tokens, "),
    ],
)
def test_architecture_with_a_mistake_in_its_states(written, instead, told, wheels):
    """Each is a failure, not a model that it does not know."""
    source = EXAMPLES["An architecture with states of its own"]
    assert source.count(written) == 1
    wheels.add("acme-zeta", source.replace(written, instead), name="acme.zeta")
    (finding,) = [finding for finding in check_plugin("acme-zeta").findings if finding.check == "contract"]
    assert finding.result == "failed"
    assert told in finding.detail


class Impatient(HermesParser):
    """Looks for its tag in each piece of text by itself."""

    def feed(self, text, token_ids=()):
        return super().feed(text.replace("<tool_call>", "<Tool_call>"), token_ids)


def test_parser_that_depends_on_the_cuts():
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    check_parser(HermesParser, [text])
    with pytest.raises(AssertionError, match="the same text at once"):
        check_parser(Impatient, [text])


class _Matcher:
    finished = False

    def accept(self, token_ids):
        return True

    def fill(self, mask_row):
        mask_row[:] = 0

    def forced(self):
        return []


class _Grammar:
    def compile(self, kind, source):
        return self

    def matcher(self):
        return _Matcher()


def test_grammar_whose_mask_and_accept_differ():
    with pytest.raises(AssertionError, match="b'a' of an accepted text has no bit"):
        check_grammar(lambda context: _Grammar(), "regex", "a", accepts=["a"], rejects=[])
    with pytest.raises(AssertionError, match="the mask and accept differ about b'x'"):
        check_grammar(lambda context: _Grammar(), "regex", "a", accepts=[], rejects=["x"])


class Greedy:
    """Changes every row of the batch."""

    keeps_argmax = False

    def __init__(self, context):
        pass

    def wants(self, params):
        return params.bad_words != ()

    def admit(self, admit):
        """Nothing to keep."""

    release = admit

    def apply(self, logits, rows):
        return logits.mul_(2)


def test_logits_processor_that_touches_others():
    (spec,) = llmd_register_logits_processors()
    params = SamplingParams(bad_words=("b",))
    check_logits_processor(spec.build, params)
    with pytest.raises(AssertionError, match="row 1 wants nothing, and was changed"):
        check_logits_processor(Greedy, params)


class Open:
    async def authenticate(self, headers, peer):
        return Principal(key=headers.get("Authorization", "x"))


class Blocking:
    def authenticate(self, headers, peer):
        return None


def test_authenticator_that_lets_everybody_in():
    with pytest.raises(AssertionError, match="expected: None"):
        check_authenticator(Open(), known=[])
    with pytest.raises(AssertionError, match="tells the secret of"):
        check_authenticator(Open(), known=[{"Authorization": "secret"}])
    with pytest.raises(AssertionError, match="must be `async def`"):
        check_authenticator(Blocking(), known=[])


def test_route_that_breaks():
    def build(context):
        async def answer(request):
            return await request.json()

        return answer

    spec = RouteSpec(name="x", summary="for tests", method="POST", path="/x", build=build)
    with pytest.raises(AssertionError, match="a body of b'' was answered with 500"):
        check_route(spec, [])
    with pytest.raises(AssertionError, match="was answered with 405"):
        check_route(spec, [Wanted(200)])


def test_object_of_one_thread():
    guarded = on_one_thread(["a"])
    guarded.append("b")
    seen = []

    def elsewhere():
        try:
            guarded.append("c")
        except AssertionError as error:
            seen.append(str(error))

    thread = threading.Thread(target=elsewhere, name="executor")
    thread.start()
    thread.join()
    assert seen == ["list.append is called on thread 'executor'; its owner is 'MainThread'"]


def test_paged_rows_never_share_a_slot(llmd_paged_kv):
    assert llmd_paged_kv is PagedRows
    rows = PagedRows([5, 33, 1], block_size=4, seed=3)
    batch = rows.batch([0, 0, 0], [5, 33, 1])
    assert len(set(batch.slot_mapping.tolist())) == batch.num_tokens == 39
    assert batch.query_start.tolist() == [0, 5, 38, 39]


def test_triton_is_interpreted(llmd_triton):
    source = "import os; print(os.environ['TRITON_INTERPRET'])"
    assert llmd_triton(source).strip() == "1"
    with pytest.raises(AssertionError, match="ouch"):
        llmd_triton("raise RuntimeError('ouch')")


def test_pytest_plugin_loads_nothing_heavy():
    import subprocess
    import sys

    program = "import sys, llmd.api.v1.pytest_plugin; print('torch' in sys.modules, 'aiohttp' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]


def test_timing_lists_the_slowest_first():
    from click.testing import CliRunner

    from llmd.cli import main_command

    lines = CliRunner().invoke(main_command, ["plugins", "--timing"]).stdout.splitlines()
    times = [float(found) for line in lines if (found := line.partition(" ms")[0].split()[-1]).replace(".", "").isdigit()]
    assert times[:-1] == sorted(times[:-1], reverse=True)
    assert lines[-1].endswith("ms of imports")
