"""Objects of wheels in the step: timed, named when they raise or are slow, replaced where something can stand in."""

import logging

import pytest
from fake_wheels import Wheels
from prometheus_client import CollectorRegistry, generate_latest

from llmd.api.v1.testing import StepDriver
from llmd.config import CacheConfig, ModelConfig, PluginsConfig, SchedulerConfig
from llmd.daemon import model_parts
from llmd.model.runner import Runner
from llmd.plugin.catalog import build_catalog
from llmd.plugin_guards import SLOW_S, CostCollector, StepCost, status_rows

ATTENTION = """
    from llmd.api.v1 import AttentionBackendSpec, hookimpl

    class Weak:
        calls = 0

        def why_not(self, needs):
            return []

        def kv_shape(self, block_size, num_kv_heads, head_dim):
            return (2, block_size, num_kv_heads, head_dim){cut}

        def prepare(self, batch):
            return batch

        def forward(self, q, k, v, kv, meta, **options):
            raise RuntimeError("no luck")

    @hookimpl
    def llmd_register_attention_backends():
        return [AttentionBackendSpec(name="weak", summary="raises", build=Weak, priority=1000)]
"""
SAMPLER = """
    from llmd.api.v1 import SamplerSpec, hookimpl

    def build(context):
        from llmd.api.v1 import TorchSampler

        class Weak(TorchSampler):
            steps = 0

            def sample(self, *args, **options):
                self.steps += 1
                if self.steps > 3:
                    raise RuntimeError("no luck")
                return super().sample(*args, **options)

        return Weak(context)

    @hookimpl
    def llmd_register_samplers():
        return [SamplerSpec(name="weak", summary="raises in the fourth step", build=build, priority=1000)]
"""


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    made = Wheels(folder)
    yield made
    made.forget()


def made_runner(folder, **plugins):
    catalog = build_catalog(PluginsConfig(**plugins))
    config = ModelConfig(model=str(folder), dtype="float32", device="cpu", load_format="dummy")
    cache, scheduler = CacheConfig(block_size=4, kv_cache_bytes=1 << 20), SchedulerConfig(max_num_seqs=4)
    runner = Runner(config, cache, scheduler, folder, model_parts(catalog))
    runner.info = runner.load(lambda progress: None)
    return runner, catalog


def spoken(runner):
    driver = StepDriver(runner)
    sequences = [driver.sequence([1, 2, 3, 4, 5]), driver.sequence([7])]
    driver.generate(sequences, 8)
    return [sequence.tokens for sequence in sequences]


@pytest.mark.parametrize(("family", "source"), [("attention_backends", ATTENTION), ("samplers", SAMPLER)])
def test_builtin_takes_over(family, source, wheels, llmd_tiny_model, caplog):
    expected = spoken(made_runner(llmd_tiny_model)[0])
    wheels.add("acme-weak", source.replace("{cut}", ""))
    with caplog.at_level(logging.WARNING):
        runner, catalog = made_runner(llmd_tiny_model)
        assert spoken(runner) == expected
    cost = catalog.step_costs[f"{family}.weak"]
    assert cost.failures == 1
    (steps,) = [row["steps"] for row in status_rows(catalog) if row["steps"]]
    assert steps == {f"{family}.weak": cost.plain()}
    told = f"{family}.weak raised RuntimeError: no luck"
    assert catalog.manager.statuses["acme-weak.main"].reason == told
    assert caplog.text.count(f"plugin acme-weak.main: in a step {told}") == 1
    assert caplog.text.count("takes over") == 1


@pytest.mark.parametrize("source", [ATTENTION, SAMPLER])
def test_fail_means_fail(source, wheels, llmd_tiny_model):
    wheels.add("acme-weak", source.replace("{cut}", ""))
    with pytest.raises(RuntimeError, match="no luck"):
        spoken(made_runner(llmd_tiny_model, on_plugin_failure="fail")[0])


def test_cache_of_another_shape_has_no_substitute(wheels, llmd_tiny_model):
    wheels.add("acme-weak", ATTENTION.replace("{cut}", "[::-1]"))
    with pytest.raises(RuntimeError, match="no luck"):
        spoken(made_runner(llmd_tiny_model)[0])


def test_builtins_are_not_guarded(llmd_tiny_model):
    runner, catalog = made_runner(llmd_tiny_model)
    assert model_parts(catalog).samplers is catalog.samplers
    spoken(runner)
    assert catalog.step_costs == {}
    registry = CollectorRegistry()
    registry.register(CostCollector(catalog.step_costs))
    assert generate_latest(registry) == b""


def test_costs_are_metrics_and_slowness_is_told_once(caplog):
    told = []
    cost = StepCost("acme.slow", "samplers.slow", lambda plugin, reason: told.append((plugin, reason)))
    assert cost.timed(lambda value: value + 1, 1) == 2
    for _ in range(30):
        cost._count(2 * SLOW_S)
    with pytest.raises(ZeroDivisionError):
        cost.timed(lambda: 1 // 0)
    assert told[0] == ("acme.slow", "samplers.slow took 100 ms in a step")
    assert caplog.text.count("is slow") == 1
    registry = CollectorRegistry()
    registry.register(CostCollector({"samplers.slow": cost}))
    page = generate_latest(registry).decode()
    assert 'llmd_plugin_calls_total{plugin="acme.slow",provides="samplers.slow"} 32.0' in page
    assert 'llmd_plugin_failures_total{plugin="acme.slow",provides="samplers.slow"} 1.0' in page
    assert "llmd_plugin_seconds_total" in page
