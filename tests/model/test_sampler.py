"""The sampler against a plain Python reference, row by row; its distribution; and that rows do not feel each other."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model.sampling_reference import CPU, MAX_LEN, NUM_ROWS, V, distribution, is_draw, make_admit, processed, python_uniform
from torch.utils._python_dispatch import TorchDispatchMode

from llmd.engine.params import PoolingParams, SamplingParams
from llmd.engine.step import RowAdmit
from llmd.model import sampler as sampler_module
from llmd.model.cuts import Cuts, draw_from_rows
from llmd.model.draw import first_max, uniforms
from llmd.model.logits import LogitsContext
from llmd.model.sampler import SamplerContext, TorchSampler
from llmd_kernels import native
from llmd_plugins.sampling.bad_words.processor import BadWords


@pytest.fixture(autouse=True, params=["kernel", "torch"])
def way(request, monkeypatch):
    """Every test runs with the kernel, and without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr("llmd_kernels.native.library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C++ compiler")
    return request.param


def make_sampler(vocab_size: int = V, num_rows: int = NUM_ROWS) -> TorchSampler:
    context = LogitsContext(max_num_rows=num_rows, max_model_len=MAX_LEN, vocab_size=vocab_size, device=CPU)
    return TorchSampler(
        SamplerContext(
            max_num_rows=num_rows,
            max_model_len=MAX_LEN,
            vocab_size=vocab_size,
            device=CPU,
            logits_processors=[BadWords(context)],
        )
    )


def run(sampler: TorchSampler, logits: torch.Tensor, admits: list[RowAdmit], *, admit: bool = True, host: bool = True):
    """One pass over these rows as they were admitted; the plain result."""
    token_ids = torch.full((NUM_ROWS, MAX_LEN), -7, dtype=torch.int32)
    for entry in admits:
        token_ids[entry.row, : len(entry.token_ids)] = torch.tensor(entry.token_ids, dtype=torch.int32)
        if admit:
            sampler.admit(entry)
    rows = torch.tensor([entry.row for entry in admits])
    num_tokens = torch.tensor([len(entry.token_ids) for entry in admits])
    known = {"host_rows": rows.tolist(), "max_tokens": int(num_tokens.max())} if host else {}
    return sampler.sample(logits.clone(), rows, num_tokens, token_ids, **known).to_host().result()


token = st.integers(0, V - 1)


@st.composite
def params_dicts(draw) -> dict:
    """Mixtures of everything, each wanted by about a third of the rows."""
    fields = {
        "temperature": st.sampled_from([0.0, 0.2, 1.0, 1.7]),
        "top_k": st.sampled_from([-1, 1, 5, 129, 250, V, V + 5]),
        "top_p": st.sampled_from([0.05, 0.5, 0.9, 0.999]),
        "min_p": st.sampled_from([1e-4, 0.05, 0.5, 1.0]),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.5, 2),
        "logit_bias": st.dictionaries(token, st.floats(-100, 100), max_size=4),
        "allowed_token_ids": st.lists(token, min_size=1, max_size=30),
        "stop_token_ids": st.lists(token, max_size=3),
        "min_tokens": st.integers(0, 6),
        "logprobs": st.integers(0, 5),
    }
    return {name: draw(values) for name, values in fields.items() if draw(st.integers(0, 2)) == 0}


@st.composite
def admits(draw) -> list[RowAdmit]:
    rows = draw(st.permutations(range(NUM_ROWS)))[: draw(st.integers(1, 6))]
    return [
        make_admit(
            row,
            tokens=(tokens := draw(st.lists(st.integers(0, 8) | token, min_size=1, max_size=20))),
            num_prompt=draw(st.integers(1, len(tokens))),
            seed=draw(st.integers(-(1 << 63), (1 << 64) - 1)),
            eos=draw(st.lists(token, max_size=2)),
            bad_words_ids=draw(st.just(()) | st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=3), max_size=3)),
            **draw(params_dicts()),
        )
        for row in rows
    ]


@settings(deadline=None, max_examples=100)
@given(admits(), st.integers(0, 1 << 30), st.sampled_from([0.5, 3.0]))
def test_any_mixture_is_what_each_row_alone_would_be(batch, seed, scale):
    logits = torch.randn(len(batch), V, generator=torch.Generator().manual_seed(seed)) * scale
    result = run(make_sampler(), logits, batch)
    for at, admit in enumerate(batch):
        alone = run(make_sampler(), logits[at : at + 1], [admit], host=False)
        assert alone.token_ids == result.token_ids[at : at + 1]
        assert alone.errors == {row: why for row, why in result.errors.items() if row == admit.row}
        assert alone.logprobs == {row: found for row, found in result.logprobs.items() if row == admit.row}
        check_row(logits[at].tolist(), admit, result, at)


def check_row(logits, admit, result, at) -> None:
    """The token that the reference draws with the same random number, where there is one to draw."""
    tokens = list(admit.token_ids)
    expected = processed(logits, admit, tokens)
    if max(expected) == -math.inf:
        assert "no token is left" in result.errors[admit.row]
        return
    assert admit.row not in result.errors
    drawn = result.token_ids[at]
    if admit.params.is_greedy:
        assert expected[drawn] == pytest.approx(max(expected), abs=1e-4)
    else:
        # A cut may fall between float32 and float64 rounding: then either side is right, seldom enough to be looked for.
        choices = [distribution(expected, nudged) for nudged in nudges(admit.params)]
        assert any(is_draw(p, python_uniform(admit.seed, len(tokens)), drawn) for p in choices)
    assert (admit.row in result.logprobs) == (admit.params.logprobs is not None)


def nudges(params: SamplingParams) -> list[SamplingParams]:
    return [
        params,
        *(dataclasses.replace(params, top_p=min(1.0, max(1e-8, params.top_p * by))) for by in (1 - 1e-5, 1 + 1e-5)),
        *(dataclasses.replace(params, min_p=min(1.0, params.min_p * by)) for by in (1 - 1e-5, 1 + 1e-5)),
    ]


DISTRIBUTIONS = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.5, "top_k": 20},
    {"top_p": 0.8},
    {"temperature": 3.0, "top_p": 0.95},
    {"min_p": 0.1},
    {"temperature": 1.2, "top_k": 150, "top_p": 0.9, "min_p": 0.01},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4, "top_k": 40},
    {"logit_bias": {5: 3.0}, "allowed_token_ids": list(range(60)), "top_p": 0.9},
]


@pytest.mark.parametrize("params", DISTRIBUTIONS, ids=str)
def test_draws_follow_the_filtered_softmax(params):
    """Chi-square over 20,000 draws of one row at as many positions; fixed seeds, so it passes always or never."""
    num, logits = 20_000, torch.randn(V, generator=torch.Generator().manual_seed(3)) * 2
    sampler, admit = make_sampler(num_rows=1), make_admit(seed=11, **params)
    sampler.admit(admit)
    seen = torch.zeros(V)
    token_ids = torch.tensor([[1, 2, 3] + [0] * (MAX_LEN - 3)], dtype=torch.int32)
    if "presence_penalty" in params:  # penalties look at num_tokens: vary the seed instead of the position
        num = 3000
        for seed in range(num):
            sampler.admit(make_admit(seed=seed, **params))
            drawn = sampler.sample(logits[None].clone(), torch.zeros(1, dtype=torch.int64), torch.tensor([3]), token_ids)
            seen[drawn.token_ids] += 1
    else:
        size = 2000
        for start in range(0, num, size):
            rows, num_tokens = torch.zeros(size, dtype=torch.int64), torch.arange(start, start + size)
            drawn = sampler.sample(logits.expand(size, V).clone(), rows, num_tokens, token_ids, max_tokens=3)
            seen += torch.bincount(drawn.token_ids, minlength=V)
    p = torch.tensor(distribution(processed(logits.tolist(), admit, [1, 2, 3]), admit.params), dtype=torch.float64)
    assert seen[p == 0].sum() == 0
    common = p * num >= 5
    expected, counts = p[common] * num, seen[common].double()
    if not common.all() and p[~common].sum() * num >= 5:
        expected = torch.cat([expected, p[~common].sum()[None] * num])
        counts = torch.cat([counts, seen[~common].sum()[None].double()])
    chi2, degrees = ((counts - expected) ** 2 / expected).sum().item(), max(1, len(counts) - 1)
    assert chi2 < degrees + 4 * math.sqrt(2 * degrees) + 6


@pytest.mark.parametrize(
    "params", [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 1000, "top_p": 0.5}, {"min_p": 1e-3}], ids=str
)
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_large_vocabularies_take_the_same_tokens_by_every_way(params, scale):
    """40,000 tokens, coarse logits with many ties: candidates suffice for some rows, others need the whole row."""
    width, num = 40_000, 12
    logits = (torch.randn(num, width, generator=torch.Generator().manual_seed(1)) * scale).bfloat16()
    batch = [make_admit(row, seed=row, **params) for row in range(num)]
    result = run(make_sampler(width), logits, batch)
    own, x = batch[0].params, logits.float()
    cuts = Cuts(
        inverse_temperature=torch.full((num,), 1 / own.temperature),
        top_k=torch.full((num,), own.top_k if own.top_k > 0 else width),
        top_p=torch.full((num,), own.top_p, dtype=torch.float64),
        min_p=torch.full((num,), own.min_p),
        any_top_k=own.top_k > 0,
        any_top_p=own.top_p < 1,
        any_min_p=own.min_p > 0,
    )
    by_rows = draw_from_rows(x, x.amax(1), cuts, uniforms(torch.arange(num), torch.full((num,), 3)))
    assert result.token_ids == by_rows.tolist()
    p = distribution(logits[0].float().tolist(), batch[0].params)
    assert is_draw(p, python_uniform(0, 3), result.token_ids[0], 1e-4)


def test_greedy_is_argmax_of_the_first_of_equals():
    logits = torch.zeros(2, V)
    logits[0, [7, 200]] = 5.0
    logits[1, [299]] = 1.0
    batch = [make_admit(0, temperature=0.0), make_admit(1, temperature=0.001, top_k=5, top_p=0.5, min_p=0.1)]
    assert run(make_sampler(), logits, batch).token_ids == [7, 299]


def test_a_seed_gives_its_tokens_whatever_the_row_the_batch_and_the_schedule():
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(30, V, generator=generator)
    tokens, sampler = [1, 2], make_sampler()
    for step in range(30):
        tokens.append(run(sampler, logits[step : step + 1], [make_admit(0, tokens=tokens, seed=5)]).token_ids[0])
    again, row, sampler = [1, 2], 3, make_sampler()
    for step in range(30):
        if step % 7 == 6:  # preempted: comes back in another row with what it has
            sampler.release(row)
            row = (row + 5) % NUM_ROWS
        others = [make_admit(r, seed=step * r, top_k=r) for r in range(NUM_ROWS) if r != row and (r + step) % 3]
        batch = [*others, make_admit(row, tokens=again, seed=5)]
        noise = torch.randn(len(others), V, generator=generator)
        again.append(run(sampler, torch.cat([noise, logits[step : step + 1]]), batch).token_ids[-1])
    assert again == tokens
    assert len(set(tokens)) > 20


def test_seeds_and_positions_give_different_tokens():
    logits = torch.zeros(1, V).expand(NUM_ROWS, V)
    by_seed = run(make_sampler(), logits, [make_admit(row, seed=row) for row in range(NUM_ROWS)]).token_ids
    by_place = run(
        make_sampler(), logits, [make_admit(row, seed=1, tokens=[1] * (row + 2)) for row in range(NUM_ROWS)]
    ).token_ids
    assert len(set(by_seed)) > 12
    assert len(set(by_place)) > 12


BROKEN = {"nan": math.nan, "inf": math.inf}


KINDS = [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.5, "presence_penalty": 1.0}]


@pytest.mark.parametrize("params", KINDS, ids=str)
@pytest.mark.parametrize("value", BROKEN)
def test_broken_logits_are_flagged_and_hurt_nobody_else(params, value):
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(0))
    batch = [make_admit(row, seed=row, logprobs=2, **params) for row in range(4)]
    well = run(make_sampler(), logits, batch)
    logits[2, 17] = BROKEN[value]
    result = run(make_sampler(), logits, batch)
    assert list(result.errors) == [2]
    assert "not finite" in result.errors[2]
    assert [result.token_ids[i] for i in (0, 1, 3)] == [well.token_ids[i] for i in (0, 1, 3)]
    assert set(result.logprobs) == {0, 1, 3}
    assert 0 <= result.token_ids[2] < V
    logits[2] = BROKEN[value]
    assert list(run(make_sampler(), logits, batch).errors) == [2]


@pytest.mark.parametrize("params", KINDS, ids=str)
def test_a_row_without_a_possible_token_is_flagged(params):
    logits = torch.randn(3, V)
    batch = [
        make_admit(0, **params),
        make_admit(1, allowed_token_ids=[4], eos=[4], min_tokens=9, max_tokens=20, **params),
        make_admit(2, allowed_token_ids=[V + 3], **params),
    ]
    result = run(make_sampler(), logits, batch)
    assert list(result.errors) == [1, 2]
    assert all("no token is left" in why for why in result.errors.values())


def test_nan_where_no_token_is_allowed_does_not_count():
    """What is masked is not looked at: the draw among the allowed tokens is well."""
    logits = torch.zeros(1, V)
    logits[0, 9] = math.nan
    result = run(make_sampler(), logits, [make_admit(allowed_token_ids=[3], temperature=0.0)])
    assert result.token_ids == [3]
    assert not result.errors


def test_is_bad_is_on_the_device():
    logits = torch.zeros(2, V)
    logits[1] = math.nan
    sampler = make_sampler()
    for row in range(2):
        sampler.admit(make_admit(row))
    token_ids = torch.zeros(NUM_ROWS, MAX_LEN, dtype=torch.int32)
    sampled = sampler.sample(logits, torch.tensor([0, 1]), torch.tensor([3, 3]), token_ids)
    assert sampled.is_bad.tolist() == [False, True]
    assert sampled.token_ids.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logprobs_are_of_the_raw_logits(dtype):
    logits = (torch.randn(3, V, generator=torch.Generator().manual_seed(4)) * 3).to(dtype)
    batch = [
        make_admit(5, logprobs=4, temperature=0.7, repetition_penalty=1.5, logit_bias={9: 50.0}),
        make_admit(1, temperature=0.0),
        make_admit(3, logprobs=0),
    ]
    result = run(make_sampler(), logits, batch)
    assert set(result.logprobs) == {5, 3}
    expected = logits.double().log_softmax(1)
    for row, at, num_top in ((5, 0, 4), (3, 2, 0)):
        (found,) = result.logprobs[row]
        assert found.token_id == result.token_ids[at]
        assert found.logprob == pytest.approx(expected[at, found.token_id].item(), abs=1e-4)
        assert found.rank == 1 + (logits[at] > logits[at, found.token_id]).sum().item()
        assert len(found.top_ids) == len(found.top_logprobs) == num_top
        top = expected[at].topk(max(num_top, 1)).values[:num_top]
        assert found.top_logprobs == pytest.approx(top.tolist(), abs=1e-4)
    assert result.logprobs[5][0].token_id == 9


def test_a_released_row_leaves_nothing_behind():
    logits, sampler = torch.zeros(1, V), make_sampler()
    logits[0, 5] = 1.0
    odd = make_admit(0, temperature=0.0, logit_bias={7: 10.0}, presence_penalty=1.0, logprobs=1, bad_words_ids=[[5]])
    assert run(sampler, logits, [odd]).token_ids == [7]
    sampler.release(0)
    sampler.release(0)  # once more does no harm
    result = run(sampler, logits, [make_admit(0, temperature=0.0)])
    assert result.token_ids == [5]
    assert not result.logprobs


def test_rows_that_pool_are_ignored():
    sampler = make_sampler()
    pooling = RowAdmit(row=1, seq_id=1, request_id="p", token_ids=[1], num_prompt_tokens=1, params=PoolingParams(), seed=0)
    sampler.admit(pooling)
    assert run(sampler, torch.zeros(1, V), [make_admit(0, temperature=0.0)]).token_ids == [0]
    sampler.release(1)


class Recorder:
    """A processor of a third party that says when it is asked."""

    def __init__(self, keeps_argmax: bool = False) -> None:
        self.keeps_argmax, self.calls = keeps_argmax, []

    def wants(self, params: SamplingParams) -> bool:
        return params.top_k == 3

    def admit(self, admit: RowAdmit) -> None:
        self.calls.append(("admit", admit.row))

    def release(self, row: int) -> None:
        self.calls.append(("release", row))

    def apply(self, logits, rows):
        self.calls.append(("apply", rows.host_ids, rows.at.tolist(), rows.ids.tolist(), rows.num_tokens.tolist()))
        logits[rows.at] = 0.0
        logits[rows.at, 42] = 9.0
        return logits


def sampler_with(processor) -> TorchSampler:
    return TorchSampler(
        SamplerContext(max_num_rows=NUM_ROWS, max_model_len=MAX_LEN, vocab_size=V, device=CPU, logits_processors=[processor])
    )


def test_processors_are_called_for_rows_that_want_them_only():
    processor = Recorder()
    sampler, logits = sampler_with(processor), torch.zeros(3, V)
    batch = [make_admit(4, temperature=0.0), make_admit(2, tokens=[1] * 5, temperature=0.0, top_k=3), make_admit(0)]
    assert run(sampler, logits, batch).token_ids[:2] == [0, 42]
    assert run(sampler, logits[:1], batch[:1], admit=False).token_ids == [0]
    sampler.release(2)
    assert processor.calls == [("admit", 2), ("apply", (2,), [1], [2], [5]), ("release", 2)]


def test_a_processor_that_keeps_the_argmax_is_spared_for_greedy_rows():
    processor = Recorder(keeps_argmax=True)
    run(sampler_with(processor), torch.zeros(2, V), [make_admit(0, top_k=3, temperature=0.0), make_admit(1, top_k=3)])
    assert [call[:2] for call in processor.calls] == [("admit", 1), ("apply", (1,))]


def test_a_processor_that_raises_fails_its_own_rows_only(caplog):
    processor = Recorder()
    processor.apply = lambda logits, rows: logits[:, 10 * V]
    batch = [make_admit(0, top_k=3), make_admit(1, temperature=0.0, logprobs=0)]
    result = run(sampler_with(processor), torch.zeros(2, V), batch)
    assert list(result.errors) == [0]
    assert result.errors[0].startswith("a logits processor failed: IndexError: ")
    assert result.token_ids[1] == 0
    assert "Recorder failed" in caplog.text


def test_plain_rows_get_no_copy_and_no_processor():
    sampler, logits = make_sampler(), torch.randn(2, V)
    kept = logits.clone()
    batch = [make_admit(row, temperature=float(row), top_p=0.9) for row in range(2)]
    for entry in batch:
        sampler.admit(entry)
    sampled = sampler.sample(
        logits, torch.tensor([0, 1]), torch.tensor([3, 3]), torch.zeros(NUM_ROWS, MAX_LEN, dtype=torch.int32)
    )
    assert torch.equal(logits, kept)
    assert sampled.logprobs is None
    assert sampler._pass.processors == []
    assert all(p._scratch is None for p in sampler._processors if hasattr(p, "_scratch"))


class NoHostSync(TorchDispatchMode):
    """Fails on operations that make the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}, func
        return func(*args, **(kwargs or {}))


def test_a_step_on_a_gpu_never_waits_for_it(monkeypatch):
    """With the way that devices other than the CPU take, and with what the host knows given to it."""

    def draw_as_on_a_gpu(x, cuts, uniform):
        best, _ = first_max(x)
        return draw_from_rows(x, best, cuts, uniform), best

    monkeypatch.setattr(sampler_module, "draw_cut", draw_as_on_a_gpu)
    batch = [
        make_admit(0, temperature=0.0, logprobs=3, logit_bias={1: 2.0}),
        make_admit(1, top_k=5, top_p=0.5, min_p=0.1, allowed_token_ids=[4, 5, 6], bad_words_ids=[[4], [3, 5]]),
        make_admit(2, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.1, min_tokens=3, eos=[2]),
        make_admit(3),
    ]
    sampler, logits = make_sampler(), torch.randn(4, V)
    for entry in batch:
        sampler.admit(entry)
    token_ids = torch.ones(NUM_ROWS, MAX_LEN, dtype=torch.int32)
    rows, num_tokens = torch.arange(4), torch.full((4,), 3)
    with NoHostSync():
        sampled = sampler.sample(logits.clone(), rows, num_tokens, token_ids, host_rows=range(4), max_tokens=3)
        pending = sampled.to_host()
    monkeypatch.undo()
    as_on_a_cpu = sampler.sample(logits, rows, num_tokens, token_ids).to_host().result()
    assert pending.result() == as_on_a_cpu
