"""The rounds on engines of a made-up speed, with a made-up clock."""

import pytest

from benchmarks.cpu.figures import summarize, table
from benchmarks.cpu.found import Key, Plan
from benchmarks.cpu.machine import Quiet
from benchmarks.cpu.models import TINY
from benchmarks.cpu.process import EngineFailure
from benchmarks.cpu.rounds import Machine, Noisy, Rounds

QUIET = Quiet(0.01, 0.5, True)


class FakeEngine:
    """Takes `cost` seconds a token, by the world's clock."""

    def __init__(self, world, name, cost, start_s=1.0):
        self.world, self.name, self.cost = world, name, cost
        self.is_closed = False
        world.now += start_s

    def order(self, timeout_s, op, **order):
        self.world.log.append((self.name, op))
        assert not self.is_closed
        if op != "generate":
            return {"seconds": 0.0, "facts": {"version": self.name}, "foreign": 0.0}
        if self.name in self.world.failing and len(order["prompts"]) == 16:
            raise EngineFailure(f"{self.name} has not answered")
        count = order["num_tokens"] - (self.name in self.world.short and order["num_tokens"] > 2)
        seconds = self.cost * (len(order["prompts"][0]) / 100 + len(order["prompts"]) * order["num_tokens"])
        self.world.now += seconds
        counts = [count] * len(order["prompts"])
        return {
            "seconds": seconds,
            "counts": counts,
            "first": [sum(prompt) % 7 for prompt in order["prompts"]],
            "foreign": self.world.foreign,
        }

    def peak_bytes(self):
        return int(self.cost * 1e12)

    def close(self):
        self.is_closed = True


class World:
    """What Rounds sees of a machine."""

    def __init__(self, costs, start_s=None):
        self.costs, self.start_s = costs, start_s or {}
        self.now, self.log, self.said, self.engines = 0.0, [], [], []
        self.failing, self.short, self.foreign, self.quiet = set(), set(), 0.0, QUIET

    def launch(self, name, model_format):
        self.log.append((name, "launch"))
        self.engines.append(FakeEngine(self, name, self.costs[name], self.start_s.get(name, 1.0)))
        return self.engines[-1]

    def run(self, **plan):
        settings = {
            "engines": {"bf16": list(self.costs)},
            "works": ["start", "decode", "many16"],
            "options": {"kv_bytes": 0},
        }
        self.plan = Plan(**(settings | plan))
        self.written = []
        machine = Machine(
            launch=self.launch,
            model_path=lambda name, model_format: f"{name}-{model_format}",
            read_through=lambda path: self.log.append((path, "read")),
            wait_until_quiet=lambda: self.quiet,
            read_bandwidth=lambda: 2e9,
            say=self.said.append,
            clock=lambda: self.now,
        )
        found = Rounds(self.plan, machine).run(lambda found: self.written.append(sum(map(len, found.samples.values()))))
        assert all(engine.is_closed for engine in self.engines)
        return found

    def order_of(self, op):
        return [name for name, done in self.log if done == op]


def test_every_engine_runs_every_work_in_every_round():
    world = World({"llmd": 0.001, "llama.cpp": 0.0012, "openvino": 0.0011})
    found = world.run(rounds=2)
    assert {key: len(samples) for key, samples in found.samples.items()} == {
        Key("bf16", work, name): 2 for work in ("start", "decode", "many16", "memory") for name in world.costs
    }
    decode = found.samples["bf16", "decode", "llmd"]
    assert [sample.value for sample in decode] == pytest.approx([1000.0, 1000.0])
    assert world.written == [12, 24]
    assert found.facts["openvino"] == {"version": "openvino"}
    assert found.bandwidths == {("bf16", 1): 2e9, ("bf16", 2): 2e9}


def test_another_engine_is_first_in_each_round():
    world = World({"llmd": 0.001, "llama.cpp": 0.001, "openvino": 0.001})
    world.run(rounds=3, works=["decode"])
    launched = world.order_of("launch")
    assert [launched[i] for i in (0, 3, 6)] == ["llmd", "llama.cpp", "openvino"]
    assert len(launched) == 9


def test_all_get_the_same_prompts_and_each_round_has_its_own():
    world = World({"llmd": 0.001, "openvino": 0.001})
    found = world.run(rounds=2, works=["many16"])
    ours, theirs = (found.samples["bf16", "many16", name] for name in world.costs)
    assert [sample.first for sample in ours] == [sample.first for sample in theirs]
    assert ours[0].first != ours[1].first


def test_a_peer_far_behind_runs_a_work_once():
    world = World({"llmd": 0.001, "llama.cpp": 0.002, "openvino": 0.0011})
    found = world.run(rounds=3)
    assert len(found.samples["bf16", "many16", "llama.cpp"]) == 1
    assert len(found.samples["bf16", "many16", "openvino"]) == 3
    assert len(found.samples["bf16", "start", "llama.cpp"]) == 3
    assert "llama.cpp sits out bf16 many16 and many64 from now on: a peer is far better" in found.notes


def test_who_is_far_behind_at_16_does_not_run_64():
    world = World({"llmd": 0.001, "llama.cpp": 0.002, "openvino": 0.0011})
    found = world.run(rounds=1, works=["many16", "many64"])
    assert set(found.of("bf16", "many64")) == {"llmd", "openvino"}


def test_a_peer_with_nothing_left_to_do_is_not_started():
    world = World({"llmd": 0.001, "llama.cpp": 0.002, "openvino": 0.0011}, start_s={"llama.cpp": 5.0})
    found = world.run(rounds=3)
    assert len(found.samples["bf16", "start", "llama.cpp"]) == 1
    assert world.order_of("launch").count("openvino") == 3


def test_llmd_never_sits_out():
    found = World({"llmd": 0.5, "openvino": 0.001}).run(rounds=2, budget_s=1e9)
    assert len(found.samples["bf16", "decode", "llmd"]) == 2


def test_noise_makes_nobody_sit_out():
    world = World({"llmd": 0.001, "llama.cpp": 0.002, "openvino": 0.001})
    world.foreign = 0.4
    found = world.run(rounds=2)
    assert len(found.samples["bf16", "many16", "llama.cpp"]) == 2
    assert all(sample.is_noisy for sample in found.samples["bf16", "many16", "llama.cpp"])


def test_an_engine_that_fails_is_out_and_the_others_go_on():
    world = World({"llmd": 0.001, "llama.cpp": 0.001})
    world.failing = {"llama.cpp"}
    found = world.run(rounds=2)
    assert found.failures == {"llama.cpp bf16": "llama.cpp has not answered"}
    assert len(found.samples["bf16", "decode", "llama.cpp"]) == 1
    assert ("bf16", "many16", "llama.cpp") not in found.samples
    assert len(found.samples["bf16", "many16", "llmd"]) == 2
    assert world.order_of("launch").count("llama.cpp") == 1


def test_missing_tokens_are_a_failure():
    world = World({"llmd": 0.001, "openvino": 0.001})
    world.short = {"openvino"}
    found = world.run(rounds=1, works=["decode"])
    assert "gave [127] tokens instead of 128 each" in found.failures["openvino bf16"]


def test_what_takes_long_to_start_is_started_once():
    world = World({"llmd": 0.001, "vllm": 0.001}, start_s={"vllm": 80.0})
    found = world.run(rounds=3)
    assert world.order_of("launch").count("vllm") == 1
    assert len(found.samples["bf16", "start", "vllm"]) == 1
    assert len(found.samples["bf16", "decode", "vllm"]) == 3
    assert len(found.samples["bf16", "memory", "vllm"]) == 3


def test_the_dearest_work_is_left_out_where_time_is_short():
    world = World({"llmd": 0.001, "openvino": 0.001})
    found = world.run(rounds=3, works=["decode", "many64"], budget_s=20.0)
    assert len(found.samples["bf16", "decode", "llmd"]) == 3
    assert len(found.samples["bf16", "many64", "llmd"]) == 1
    assert "round 2: no time for bf16 many64" in found.notes


def test_http_is_a_matter_between_llmd_and_its_server():
    world = World({"llmd": 0.001, "llmd-http": 0.00104, "openvino": 0.001})
    found = world.run(rounds=1, works=["decode", "http"])
    assert set(found.of("bf16", "http")) == {"llmd", "llmd-http"}
    assert set(found.of("bf16", "decode")) == {"llmd", "openvino"}
    assert set(found.of("bf16", "start")) == {"llmd", "openvino"}
    http = summarize(found, world.plan, TINY)["formats"]["bf16"]["http"]
    assert http["best_peer"] == "llmd"
    assert http["ratio"] == pytest.approx(1 / 1.04, rel=0.01)


def test_without_a_server_there_is_no_http():
    found = World({"llmd": 0.001, "openvino": 0.001}).run(rounds=1, works=["decode", "http"])
    assert not found.of("bf16", "http")


def test_a_start_without_prepacked_weights_is_measured_aside():
    world = World({"llmd": 0.001, "llmd-fresh": 0.001, "openvino": 0.001}, start_s={"llmd-fresh": 1.5, "openvino": 0.9})
    found = world.run(rounds=2)
    assert {key.work for key in found.samples if key.engine == "llmd-fresh"} == {"start"}
    assert len(found.samples["bf16", "start", "llmd-fresh"]) == 2
    start = summarize(found, world.plan, TINY)["formats"]["bf16"]["start"]
    assert start["best_peer"] == "openvino"
    assert start["engines"]["llmd-fresh"]["llmd_is_times_better"] == pytest.approx(1.5, rel=0.05)
    assert found.notes == []


def test_a_start_is_measured_where_nothing_follows_it():
    world = World({"llmd": 0.001, "openvino": 0.001})
    found = world.run(rounds=2, works=["start", "http"])
    assert {key: len(samples) for key, samples in found.samples.items() if key.work == "start"} == {
        Key("bf16", "start", name): 2 for name in world.costs
    }


def test_starts_alone():
    found = World({"llmd": 0.001, "openvino": 0.001}).run(rounds=3, works=["start"])
    assert {key.work for key in found.samples} == {"start"}
    assert [sample.round for sample in found.samples["bf16", "start", "openvino"]] == [1, 2, 3]


def test_a_machine_that_does_not_get_quiet_marks_the_figures():
    world = World({"llmd": 0.001})
    world.quiet = Quiet(0.5, 20.0, False)
    found = world.run(rounds=1, works=["decode"])
    assert found.samples["bf16", "decode", "llmd"][0].is_noisy
    assert any("noisy: others take 50%" in line for line in world.said)


def test_or_ends_the_run():
    world = World({"llmd": 0.001})
    world.quiet = Quiet(0.5, 20.0, False)
    with pytest.raises(Noisy, match="others take 50% of the machine, still after 20 s"):
        world.run(rounds=1, is_strict=True)


def test_the_table_tells_all(monkeypatch):
    world = World({"llmd": 0.001, "llama.cpp": 0.0015})
    found = world.run(rounds=2)
    lines = table(summarize(found, world.plan, TINY))
    assert lines[1] == "bf16"
    (row,) = [line for line in lines if line.startswith("decode") and "llama.cpp" in line]
    assert row.split()[:6] == ["decode", "llama.cpp", "666.67", "tokens/s", "1.50x", "1.50"]
