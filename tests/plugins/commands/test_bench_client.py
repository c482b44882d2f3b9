"""One request, and many, against a fake server that does all that servers do."""

import itertools
from asyncio import get_running_loop

import pytest
from aiohttp import ClientSession, ClientTimeout
from fake_openai import FakeOpenAI, serving

from llmd_plugins.commands.bench.client import Target, ask
from llmd_plugins.commands.bench.datasets import BenchRequest
from llmd_plugins.commands.bench.load import Load, arrivals, run_load, wait_until_ready
from llmd_plugins.commands.bench.stats import RequestResult


@pytest.fixture
def fake():
    return FakeOpenAI()


@pytest.fixture
def base_url(fake):
    with serving(fake) as url:
        yield url


@pytest.fixture
async def session():
    async with ClientSession(timeout=ClientTimeout(total=5)) as session:
        yield session


def target_of(base_url, model="good", *, is_chat=False, **fields) -> Target:
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    return Target(url=base_url + path, model=model, is_chat=is_chat, **fields)


REQUEST = BenchRequest("some words", 2, 5)


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("model", ["good", "pieces"])
async def test_a_good_answer(session, base_url, is_chat, model):
    result = await ask(session, target_of(base_url, model, is_chat=is_chat), REQUEST)
    assert result.is_ok, result.error
    assert result.text == "xxxxx"
    assert result.num_prompt_tokens == 11
    assert result.num_output_tokens == 10  # what usage says, not the five chunks
    assert result.is_counted_by_server
    assert len(result.itls_s) == 4
    assert 0 < result.ttft_s < result.e2e_s
    assert result.e2e_s == pytest.approx(result.ttft_s + sum(result.itls_s), abs=1e-6)


@pytest.mark.parametrize("is_chat", [False, True])
async def test_the_first_token_counts_not_the_first_chunk(session, base_url, is_chat):
    result = await ask(session, target_of(base_url, "slow", is_chat=is_chat), REQUEST)
    assert result.ttft_s >= 0.15
    assert all(gap < 0.15 for gap in result.itls_s)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("refuses", "HTTP 400: no such thing"),
        ("breaks", "HTTP 500: <html>oops</html>"),
        ("busy", "HTTP 429: full"),
        ("truncates", "the stream ended early"),
        ("errs", "error in the stream: device gone"),
        ("garbles", "a chunk is not JSON"),
        ("silent", "the stream held no choice"),
        ("cuts", "ClientPayloadError: "),
    ],
)
async def test_what_goes_wrong_is_told(session, base_url, model, reason):
    result = await ask(session, target_of(base_url, model), REQUEST)
    assert not result.is_ok
    assert result.error.startswith(reason)


async def test_no_server_and_no_answer_in_time(session, base_url):
    lost = await ask(session, Target(url="http://127.0.0.1:9/v1/completions", model="good", is_chat=False), REQUEST)
    assert lost.error.startswith("Client")
    async with ClientSession(timeout=ClientTimeout(total=0.05)) as hasty:
        late = await ask(hasty, target_of(base_url, "slow"), REQUEST)
    assert late.error == "no answer within the timeout"


async def test_a_429_is_tried_again_after_the_time_it_names(session, base_url, fake):
    result = await ask(session, target_of(base_url, "busy-once", max_retries=1), REQUEST)
    assert result.is_ok
    assert result.ttft_s >= 0.05
    result = await ask(session, target_of(base_url, "busy", max_retries=2), REQUEST)
    assert result.error == "HTTP 429: full"
    assert len(fake.bodies) == 2 + 3


async def test_without_usage_chunks_are_counted_and_said_to_be(session, base_url):
    result = await ask(session, target_of(base_url, "countless"), REQUEST)
    assert result.num_output_tokens == 5
    assert result.num_prompt_tokens == 2
    assert not result.is_counted_by_server


async def test_tokens_without_text_are_timed_by_their_chunks(session, base_url):
    result = await ask(session, target_of(base_url, "textless"), REQUEST)
    assert result.is_ok
    assert result.num_output_tokens == 10
    assert 0 < result.ttft_s <= result.e2e_s


async def test_bodies_and_headers(session, base_url, fake):
    target = target_of(base_url, headers={"Authorization": "Bearer k"}, ignore_eos=True, sampling={"temperature": 0})
    await ask(session, target, BenchRequest([1, 2], 2, 3))
    await ask(session, target_of(base_url, is_chat=True), REQUEST)
    completion, chat = fake.bodies
    assert completion == {
        "model": "good",
        "stream": True,
        "stream_options": {"include_usage": True},
        "prompt": [1, 2],
        "max_tokens": 3,
        "ignore_eos": True,
        "temperature": 0,
    }
    assert fake.headers[0]["Authorization"] == "Bearer k"
    assert chat["messages"] == [{"role": "user", "content": "some words"}]
    assert chat["max_completion_tokens"] == 5
    assert "ignore_eos" not in chat


async def test_concurrency_is_bounded_and_results_keep_their_order(session, base_url, fake):
    requests = [BenchRequest("x", 1, n) for n in (4, 1, 3, 2, 1, 2)]
    seen = []
    results, duration_s = await run_load(
        requests, Load(max_concurrency=2), lambda r: ask(session, target_of(base_url), r), on_done=seen.append
    )
    assert fake.most_running == 2
    assert [len(result.text) for result in results] == [4, 1, 3, 2, 1, 2]
    assert len(seen) == 6
    assert duration_s >= max(result.e2e_s for result in results)


async def test_all_at_once_without_a_bound(session, base_url, fake):
    await run_load([REQUEST] * 20, Load(), lambda r: ask(session, target_of(base_url), r))
    assert fake.most_running == 20


def test_arrivals_are_a_gamma_process_over_the_whole_time():
    load = Load(request_rate=50.0, seed=2)
    times = arrivals(2000, load)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert times[-1] == pytest.approx(40.0)
    assert times == sorted(times) == arrivals(2000, load)
    assert mean == pytest.approx(0.02, rel=0.01)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation == pytest.approx(mean, rel=0.1)  # exponential gaps
    even = arrivals(2000, Load(request_rate=50.0, burstiness=100.0))
    gaps = [b - a for a, b in itertools.pairwise(even)]
    assert (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 < 0.2 * mean
    assert arrivals(3, Load()) == [0, 0, 0]


async def test_requests_are_sent_at_their_times():
    sent = []

    async def send(request):
        sent.append(get_running_loop().time())
        return RequestResult()

    load = Load(request_rate=100.0, seed=1)
    start = get_running_loop().time()
    await run_load([REQUEST] * 20, load, send)
    assert all(at - start >= planned - 0.002 for at, planned in zip(sent, arrivals(20, load), strict=True))


async def test_the_ready_check_gives_up_on_a_mistake_and_passes_a_good_server(session, base_url):
    assert await wait_until_ready(session, target_of(base_url), REQUEST, 5) == ""
    assert await wait_until_ready(session, target_of(base_url, "refuses"), REQUEST, 60) == "HTTP 400: no such thing"
    assert (await wait_until_ready(session, target_of(base_url, "breaks"), REQUEST, 0)).startswith("HTTP 500")
