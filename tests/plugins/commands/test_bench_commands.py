"""`llmd bench` as it is typed."""

import json
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from fake_openai import FakeOpenAI, serving

from llmd_plugins.commands import bench as plugin
from llmd_plugins.commands.bench import offline


@pytest.fixture(scope="module")
def bench():
    (spec,) = plugin.llmd_register_commands()
    assert spec.name == "bench"
    return spec.build()


@pytest.fixture
def fake():
    return FakeOpenAI()


@pytest.fixture
def base_url(fake):
    with serving(fake) as url:
        yield url


def run(bench, *arguments, code=0):
    result = CliRunner().invoke(bench, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_serve_measures_shows_and_saves(bench, fake, base_url, tmp_path):
    output = run(
        bench, "serve", "--base-url", base_url, "--num-prompts", 12, "--random-input-len", 8, "--random-output-len", 4,
        "--random-prefix-len", 3, "--random-range-ratio", 0.5, "--vocab-size", 100, "--max-concurrency", 4,
        "--request-rate", 200, "--goodput", "ttft:5000", "tpot:5000", "--percentile-metrics", "ttft,tpot,e2el",
        "--metric-percentiles", "50,99.9", "--ignore-eos", "--temperature", 0, "--seed", 3, "--api-key", "k",
        "--header", "X-A=1", "X-B: 2", "--metadata", "note=here", "--save-detailed", "--result-dir", tmp_path / "new",
        "--result-filename", "r.json", "--extra-body", '{"top_k": 3}', "--disable-tqdm",
    )  # fmt: skip
    assert "Successful requests:" in output
    assert "P99.9 TTFT (ms):" in output
    assert "Request goodput" in output
    saved = json.loads((tmp_path / "new" / "r.json").read_text())
    assert saved["completed"] == saved["num_prompts"] == 12
    assert saved["failed"] == 0
    assert saved["request_goodput"] == saved["request_throughput"]
    assert saved["total_input_tokens"] == 12 * 11
    assert saved["note"] == "here"
    assert saved["model_id"] == "good"
    assert saved["max_concurrent_requests"] <= 4
    assert len(saved["errors"]) == len(saved["ttfts"]) == 12
    assert {"date", "machine", "command", "p50_tpot_ms", "median_e2el_ms"} <= set(saved)
    assert "mean_itl_ms" not in saved
    assert len(fake.bodies) == 13  # and the ready check
    assert all(body["top_k"] == 3 and body["temperature"] == 0 and body["ignore_eos"] for body in fake.bodies)
    assert len({tuple(body["prompt"][:3]) for body in fake.bodies}) == 1
    assert {"Bearer k"} == {headers["Authorization"] for headers in fake.headers}
    assert {("1", "2")} == {(headers["X-A"], headers["X-B"]) for headers in fake.headers}


def test_serve_over_chat_sends_words(bench, fake, base_url):
    output = run(
        bench, "serve", "--base-url", base_url, "--backend", "openai-chat", "--num-prompts", 2, "--random-output-len", 2,
        "--num-warmups", 1, "--random-input-len", 5,
    )  # fmt: skip
    assert "Mean E2EL (ms):" in output
    assert len(fake.bodies) == 4
    assert all(len(body["messages"][0]["content"].split()) == 5 for body in fake.bodies)


def test_failures_are_counted_by_reason_and_all_of_them_fail_the_command(bench, base_url):
    output = run(
        bench, "serve", "--base-url", base_url, "--model", "truncates", "--num-prompts", 3, "--random-input-len", 2,
        "--ready-check-timeout-sec", 0, code=1,
    )  # fmt: skip
    assert "failed 3 x: the stream ended early" in output


def test_the_servers_lack_of_usage_is_said(bench, base_url):
    arguments = ["--base-url", base_url, "--model", "countless", "--num-prompts", 1, "--random-input-len", 2]
    assert "chunks were counted" in run(bench, "serve", *arguments)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--goodput", "itl:3"], "goodput must be given as"),
        (["--request-rate", "0"], "above 0 or inf"),
        (["--metric-percentiles", "50,x"], "between 0 and 100"),
        (["--metric-percentiles", "101"], "between 0 and 100"),
        (["--percentile-metrics", "ttft,ttf"], "'ttf' is none of ttft, tpot, itl, e2el"),
        (["--extra-body", "{"], "is not JSON"),
        (["--extra-body", "[]"], "must be a JSON object"),
        (["--header", "nothing"], "expected KEY=VALUE"),
        (["--dataset-name", "sharegpt"], "needs --dataset-path"),
        (["--backend", "openai-chat", "--vocab-size", "5"], "chat messages are text"),
        (["--tokenizer", "/"], "no tokenizer.json"),
        (["--random-range-ratio", "1"], "0<=x<1"),
    ],
)
def test_mistakes_are_named(bench, base_url, arguments, problem):
    result = CliRunner().invoke(bench, ["serve", "--base-url", base_url, "--num-prompts", "1", *arguments])
    assert result.exit_code != 0
    assert problem in result.output


def test_no_server_is_a_clear_error(bench):
    output = run(bench, "serve", "--port", 9, "--ready-check-timeout-sec", 0, code=1)
    assert "no server at http://127.0.0.1:9" in output


def test_a_server_that_still_loads_is_waited_for(bench, fake, base_url):
    fake.num_lists_without_model = 1
    run(bench, "serve", "--base-url", base_url, "--num-prompts", 1, "--random-input-len", 2)
    assert fake.num_lists_without_model == 0
    fake.num_lists_without_model = 9
    output = run(bench, "serve", "--base-url", base_url, "--ready-check-timeout-sec", 0, code=1)
    assert "names no model" in output


def test_a_first_request_that_is_refused_stops_the_run(bench, base_url):
    output = run(bench, "serve", "--base-url", base_url, "--model", "refuses", "--num-prompts", 5, code=1)
    assert "the first request to" in output
    assert "HTTP 400: no such thing" in output


def test_sharegpt_and_custom_files(bench, fake, base_url, tmp_path):
    turns = [{"value": "what a long question this is, really"}, {"value": "and what an answer it gets"}]
    (tmp_path / "chats.json").write_text(json.dumps([{"conversations": turns}]))
    (tmp_path / "own.jsonl").write_text('{"prompt": [4, 5, 6], "output_tokens": 2}\n')
    for name, file in (("sharegpt", "chats.json"), ("custom", "own.jsonl")):
        run(
            bench, "serve", "--base-url", base_url, "--dataset-name", name, "--dataset-path", tmp_path / file,
            "--num-prompts", 2, "--ready-check-timeout-sec", 0,
        )  # fmt: skip
    assert [body["prompt"] for body in fake.bodies] == [turns[0]["value"]] * 2 + [[4, 5, 6]] * 2
    assert [body["max_tokens"] for body in fake.bodies] == [6, 6, 2, 2]


class FakeLLM:
    """llmd.LLM as far as the commands use it."""

    def __init__(self, **arguments) -> None:
        self.arguments, self.calls = arguments, []

    def get_tokenizer(self):
        return range(64)  # all that is asked of it is its length

    def generate(self, prompts, sampling_params, use_tqdm=True):
        self.calls.append((prompts, sampling_params, use_tqdm))
        params = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
        return [
            SimpleNamespace(
                prompt_token_ids=prompt["prompt_token_ids"],
                outputs=[SimpleNamespace(token_ids=[1] * p.max_tokens)] * p.n,
            )
            for prompt, p in zip(prompts, params, strict=True)
        ]


@pytest.fixture
def llms(monkeypatch):
    made = []

    def make(options):
        named = {name: options[name] for name in ("model", "dtype", "max_model_len")}
        made.append(FakeLLM(**named))
        return made[-1]

    monkeypatch.setattr(offline, "make_llm", make)
    return made


def test_throughput_counts_prompt_and_output_tokens(bench, llms, tmp_path):
    output = run(
        bench, "throughput", "--model", "demo", "--input-len", 6, "--output-len", 3, "--num-prompts", 5, "--n", 2,
        "--output-json", tmp_path / "t.json", "--disable-tqdm",
    )  # fmt: skip
    assert "requests/s" in output
    saved = json.loads((tmp_path / "t.json").read_text())
    assert saved["total_input_tokens"] == 30
    assert saved["total_output_tokens"] == 5 * 2 * 3
    assert saved["num_requests"] == 5
    assert saved["tokens_per_second"] == pytest.approx(60 / saved["elapsed_time"])
    ((prompts, params, use_tqdm),) = llms[0].calls
    assert all(len(prompt["prompt_token_ids"]) == 6 for prompt in prompts)
    assert all(p.ignore_eos and p.max_tokens == 3 for p in params)
    assert not use_tqdm


def test_latency_runs_warm_ups_and_iterations_with_new_prompts(bench, llms, tmp_path):
    output = run(
        bench, "latency", "--model", "demo", "--input-len", 4, "--output-len", 2, "--batch-size", 3, "--num-iters", 4,
        "--num-iters-warmup", 2, "--output-json", tmp_path / "l.json", "--disable-tqdm",
    )  # fmt: skip
    assert "99% percentile latency" in output
    saved = json.loads((tmp_path / "l.json").read_text())
    assert len(saved["latencies"]) == 4
    assert saved["avg_latency"] == pytest.approx(sum(saved["latencies"]) / 4)
    assert len(llms[0].calls) == 6
    prompts = [tuple(prompt["prompt_token_ids"]) for call in llms[0].calls for prompt in call[0]]
    assert len(set(prompts)) == len(prompts) == 18
