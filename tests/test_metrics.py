"""What is counted: buckets, names, bounds on labels."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st
from server.serving import FakeService

from llmd import metrics
from llmd.metrics import ANONYMOUS, MAX_USAGE_ROWS, OTHER, Metrics
from llmd.metrics_tables import ALWAYS_ZERO, HISTOGRAMS, READINGS, STEP_TOKENS
from llmd.plugin.specs import RequestSummary

# https://docs.vllm.ai: Production Metrics, as far as they mean something here
VLLM_NAMES = (
    "num_requests_running", "num_requests_waiting", "num_requests_swapped", "kv_cache_usage_perc",
    "gpu_cache_usage_perc", "cpu_cache_usage_perc", "prefix_cache_queries", "prefix_cache_hits",
    "gpu_prefix_cache_queries", "gpu_prefix_cache_hits", "num_preemptions", "prompt_tokens", "generation_tokens",
    "request_success", "time_to_first_token_seconds", "inter_token_latency_seconds", "time_per_output_token_seconds",
    "request_time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
    "request_prefill_time_seconds", "request_decode_time_seconds", "request_inference_time_seconds",
    "request_prompt_tokens", "request_generation_tokens", "request_params_n", "request_params_max_tokens",
    "iteration_tokens_total", "lora_requests_info",
)  # fmt: skip


def summary(**changes):
    values = {
        "request_id": "abc", "model": "demo", "key": "", "route": "/v1/completions", "status": 200,
        "finish_reasons": ("stop", "length"), "num_prompt_tokens": 5, "num_cached_tokens": 2, "num_output_tokens": 10,
        "queue_s": 0.1, "ttft_s": 0.3, "e2e_s": 1.1, "prefill_s": 0.2, "decode_s": 0.8,
        "facts": {"method": "POST", "n": [2], "max_tokens": [16]},
    }  # fmt: skip
    return RequestSummary(**{**values, **changes})


def samples(collector):
    """Name, labels → value, of all that is collected."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in collector.collect()
        for sample in family.samples
    }


def value(found, name, **labels):
    return found[name, tuple(sorted(labels.items()))]


def test_every_name_of_vllm_is_there_with_its_labels():
    found = Metrics(lambda: [FakeService()])
    found.observe(summary())
    families = {family.name: family for family in found.collect()}
    for name in VLLM_NAMES:
        family = families[f"vllm:{name}"]
        expected = (
            {"waiting_lora_adapters", "running_lora_adapters", "max_lora"} if "lora" in name else {"model_name", "engine"}
        )
        assert expected <= set(family.samples[0].labels), name
    assert len(families) == len({family.name for family in found.collect()})


def test_a_request_is_in_every_histogram_once():
    found = Metrics()
    found.observe(summary())
    seen = samples(found)
    for name in HISTOGRAMS:
        count = value(seen, f"llmd_{name}_count", model_name="demo")
        assert count == (0 if name == "inter_token_latency_seconds" else 1), name
        assert count == value(seen, f"vllm:{name}_count", model_name="demo", engine="0")
    assert value(seen, "llmd_request_inference_time_seconds_sum", model_name="demo") == 1.0
    assert (
        value(seen, "vllm:request_time_per_output_token_seconds_sum", model_name="demo", engine="0") == (1.1 - 0.3) * 2 / 8
    )
    assert value(seen, "llmd_request_success_total", model_name="demo", finished_reason="length") == 1


def test_usage_by_key_and_adapter():
    found = Metrics()
    for _ in range(3):
        found.observe(summary(key="ann", adapter="sql"))
    found.observe(summary(status=400, finish_reasons=(), num_prompt_tokens=0, num_cached_tokens=0, num_output_tokens=0))
    found.observe(summary(model="", key="ann"))  # a probe
    expected = {"key": "ann", "model": "demo", "requests": 3, "prompt_tokens": 15, "cached_tokens": 6, "output_tokens": 30}
    assert found.usage("key")[0] == expected
    assert found.usage("key")[1]["key"] == ANONYMOUS
    assert [row["adapter"] for row in found.usage("adapter")] == ["sql"]
    assert value(samples(found), "llmd_adapter_output_tokens_total", adapter="sql", model_name="demo") == 30


def test_labels_are_bounded():
    found = Metrics()
    for index in range(MAX_USAGE_ROWS + 50):
        found.observe(summary(key=f"key-{index}", facts={"method": f"M{index}"}))
    rows = found.usage("key")
    assert len(rows) == MAX_USAGE_ROWS + 1
    assert rows[-1]["key"] == OTHER
    assert rows[-1]["requests"] == 50
    assert value(samples(found), "llmd_http_requests_total", method=OTHER, route="/v1/completions", status="200") == 562


@given(st.lists(st.integers(1, 20000), max_size=50))
def test_step_sizes_become_vllms_buckets(steps):
    sizes = [0] * 18
    for num_tokens in steps:
        sizes[min((num_tokens - 1).bit_length(), 17)] += 1
    buckets = dict(metrics._step_buckets(sizes))
    assert buckets.pop("+Inf") == len(steps)
    assert buckets == {str(float(bound)): sum(num <= bound for num in steps) for bound in STEP_TOKENS}


def test_what_the_engine_says_is_read_at_the_scrape():
    service = FakeService()
    stats = service.engine.stats()
    seen = samples(Metrics(lambda: [service, SimpleNamespace(state="loading")]))
    for reading in READINGS:
        name = f"llmd_{reading.name}" + ("_total" if reading.is_counter else "")
        assert value(seen, name, model_name="fake") == getattr(stats, reading.field)
    for name in ALWAYS_ZERO:
        assert value(seen, f"vllm:{name}", model_name="fake", engine="0") == 0
    assert value(seen, "llmd_step_tokens_sum", model_name="fake") == stats.num_step_tokens
    labels = {"max_lora": "4", "running_lora_adapters": "tiny", "waiting_lora_adapters": "late"}
    assert value(seen, "vllm:lora_requests_info", **labels) > 1.6e9
