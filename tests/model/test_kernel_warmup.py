"""What is compiled on a device that only compiles is what the same steps look up on a real one."""

import contextlib
import json
import os

import pytest
import torch
from model.fake_cuda import Driver, fake_cuda
from model.tiny_models import make_model, save_model

from llmd.api.v1.testing.driver import installed_parts
from llmd.config import AdaptersConfig, CacheConfig, Config, ModelConfig, PluginsConfig, SchedulerConfig
from llmd.engine.params import SamplingParams
from llmd.engine.step import BlockUpdate, RowAdmit, StepPlan
from llmd.errors import ConfigError
from llmd.model import gpu_target, kernels_ahead
from llmd.model.gpu_target import GpuTarget, find_target, parse_target

pytest.importorskip("triton")

SM_90, GFX942 = parse_target("sm_90"), parse_target("gfx942")
CACHE = CacheConfig(block_size=16)
SCHEDULER = SchedulerConfig(
    max_num_seqs=3, max_num_batched_tokens=256
)  # with which every table begins where Triton's mocks say
GREEDY, DRAWN = {"temperature": 0.0}, {"top_k": 5, "top_p": 0.8, "presence_penalty": 0.3, "logprobs": 2}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model(make_model("Qwen2"), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def compiled(path, tmp_path_factory):
    """Triton's cache, filled for sm_90, and what was said of it."""
    folder = tmp_path_factory.mktemp("triton")
    with in_cache(folder):
        yield folder, warm_up(path)


@contextlib.contextmanager
def in_cache(folder):
    from triton import knobs

    before, knobs.cache.dir = knobs.cache.dir, str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    try:
        yield
    finally:
        knobs.cache.dir = before
        del os.environ["TRITON_CACHE_DIR"]


def warm_up(path, target=SM_90, **kwargs):
    from llmd.model.kernel_warmup import compile_kernels

    model = ModelConfig(model=str(path), dtype="bfloat16")
    return compile_kernels(model, CACHE, SCHEDULER, path, installed_parts(), target, num_threads=2, **kwargs)


def test_everything_is_compiled_once(path, compiled):
    _, first = compiled
    assert first.failures == ()
    assert first.num_compiled > 20
    begun = []
    again = warm_up(path, started=lambda: begun.append(True))
    assert (again.num_compiled, again.num_known, again.failures) == (0, first.num_compiled, ())
    assert begun == [True]


def test_a_start_on_the_device_compiles_nothing(path, compiled, monkeypatch):
    from triton import knobs

    from llmd.model.runner import Runner

    missed, device = [], object()  # kernels remember what was compiled by device: this one is new to them

    def listen(*, src, cache_hit, **_):
        if not cache_hit:
            missed.append(f"{src.name} {src.signature} {src.constants} {src.attrs}")

    monkeypatch.setattr(Driver, "get_current_device", lambda self: device)
    monkeypatch.setattr(knobs.compilation, "listener", listen)
    with fake_cuda(compiles=True) as fake:
        config = ModelConfig(model=str(path), dtype="bfloat16", device="cuda")
        runner = Runner(config, CACHE.model_copy(update={"kv_cache_bytes": 8 << 20}), SCHEDULER, path, installed_parts())
        runner.load(lambda progress: None)
        for wanted in (GREEDY, {}, DRAWN):
            for counts in ([7], [20, 1, 33], [1, 1, 1]):
                step(runner, counts, wanted)
        assert {"prefill", "decode", "pick", "narrow", "apply", "parts"} <= set(fake.launches)
    assert "\n".join(missed) == ""


def step(runner, counts, wanted):
    rows, params = list(range(len(counts))), SamplingParams(max_tokens=9, **wanted)
    admits = [
        RowAdmit(row=row, seq_id=row, request_id="", token_ids=(1,) * 40, num_prompt_tokens=40, params=params, seed=row)
        for row in rows
    ]
    columns = {"rows": rows, "num_logits": [1] * len(rows), "samples": [True] * len(rows)}
    blocks = [BlockUpdate(row, 0, 0, range(3 * row, 3 * row + 3)) for row in rows]
    starts = [40 - count for count in counts]
    runner.run(StepPlan(step_id=1, admitted=admits, block_updates=blocks, starts=starts, counts=counts, **columns))
    runner.run(StepPlan(step_id=2, starts=[40] * len(rows), counts=[1] * len(rows), **columns))
    runner.run(StepPlan(step_id=3, released=rows))


def test_an_amd_device_without_one(path, tmp_path, monkeypatch):
    from llmd.model import kernel_warmup

    monkeypatch.setattr(kernel_warmup._Client, "ask", lambda self: None)  # what a start launches
    with in_cache(tmp_path):
        done = warm_up(path, GFX942)
    assert done.failures == ()
    assert done.num_compiled == len(list(tmp_path.glob("*/*.hsaco"))) >= 10
    assert torch.version.hip is None
    assert not torch.cuda.is_available()


def test_a_step_that_fails_is_told_and_the_others_go_on(path, compiled, monkeypatch):
    from llmd.model.runner import Runner

    run = Runner.run

    def fail(self, plan, masks=None):
        if len(plan.rows) == 3 and plan.step_id > 0:  # none of a start's
            raise RuntimeError("three is too many")
        return run(self, plan, masks)

    monkeypatch.setattr(Runner, "run", fail)
    assert warm_up(path).failures == ("a step of 3 rows: RuntimeError: three is too many",)


def test_a_kernel_that_cannot_be_compiled_is_told(path, compiled, monkeypatch):
    from triton import compiler

    from llmd.model import kernel_warmup

    compile_one = compiler.compile

    def refuse(source, *args, **kwargs):
        if source.name == "prefill":
            raise RuntimeError("ptxas is ill")
        return compile_one(source, *args, **kwargs)

    monkeypatch.setattr(kernel_warmup._Client, "ask", lambda self: None)
    monkeypatch.setattr(compiler, "compile", refuse)
    assert warm_up(path).failures == ("RuntimeError: ptxas is ill",)


def test_pointers_tell_alignment_and_reach():
    from llmd.model.dry_device import Pointer, dry_device

    with dry_device(SM_90):
        whole = torch.empty(1 << 20, 4096, dtype=torch.bfloat16, device="cuda")
        pointers = [Pointer(whole), Pointer(whole[:, 8:]), Pointer(whole[1:, 1:])]
    assert [pointer.data_ptr() % 16 for pointer in pointers] == [0, 0, 2]
    assert {pointer.ptr_range() for pointer in pointers} == {8 << 30}


def test_the_host_reads_zeros_and_its_own_tensors_stay_real():
    from llmd.model.dry_device import dry_device

    with dry_device(SM_90), torch.inference_mode():
        there = torch.arange(5).pin_memory().to("cuda", non_blocking=True)
        assert (there[1:].shape, there.sum().item(), there.tolist()) == ((4,), 0, [0] * 5)
        there[2] = 7
        assert torch.zeros(5, dtype=torch.int64).copy_(there).sum() == 0
        assert bool((there > 3).all())
        assert not bool((there > 3).any())
        assert torch.tensor([1, 2], device="cuda").is_cuda
        assert there.cpu().sum() == 0
        assert (torch.arange(4) + 1).sum() == 10
        assert torch.cuda.get_device_properties(0).multi_processor_count == 132
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.Event().record()
    assert torch.arange(3)[1] == 1


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("sm_90", GpuTarget("sm_90", 132)), ("sm_90:114", GpuTarget("sm_90", 114)), ("sm_75:40", GpuTarget("sm_75", 40)),
        ("gfx942", GpuTarget("gfx942", 304)),
    ],
)  # fmt: skip
def test_targets_by_name(text, target):
    assert parse_target(text) == target
    assert parse_target(str(target)) == target


def test_what_targets_are():
    assert [target.capability for target in (SM_90, parse_target("sm_120"), GFX942)] == [(9, 0), (12, 0), (9, 4)]
    assert [(target.backend, target.arch, target.warp_size) for target in (SM_90, GFX942)] == [
        ("cuda", 90, 32), ("hip", "gfx942", 64),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "h200", "sm_9x", "sm_90:", "sm_90:x", "gfx", "sm_75", "sm_90:132:1"])
def test_bad_targets_name_what_was_written(text):
    with pytest.raises(ConfigError, match=r"^--device: "):
        parse_target(text)


def test_amd_gpus_are_read_from_the_kernel(tmp_path):
    facts = {
        "0": "cpu_cores_count 64\ngfx_target_version 0\n",
        "10": "simd_count 1216\nsimd_per_cu 4\ngfx_target_version 90402\n",
        "2": "simd_count 416\nsimd_per_cu 4\ngfx_target_version 90010\nbroken\n",
    }
    for node, text in facts.items():
        (tmp_path / node).mkdir()
        (tmp_path / node / "properties").write_text(text)
    found = [gpu_target._amd(index, tmp_path) for index in range(3)]
    assert found == [GpuTarget("gfx90a", 104), GpuTarget("gfx942", 304), None]


class CudaLibrary:
    """The driver, with one GPU."""

    def cuInit(self, flags):
        return 0

    def cuDeviceGet(self, device, index):
        return 0 if index == 0 else 101

    def cuDeviceGetAttribute(self, number, attribute, device):
        number._obj.value = {75: 8, 76: 9, 16: 142}[attribute]
        return 0


def test_nvidia_gpus_are_asked_of_the_driver(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_target.ctypes, "CDLL", lambda name: CudaLibrary())
    assert [find_target(0), gpu_target._nvidia(1)] == [GpuTarget("sm_89", 142), None]


def test_no_gpu_no_target(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(gpu_target.ctypes, "CDLL", missing)
    assert gpu_target._nvidia(0) is None


# --- beside a start


def marked(folder, config=None, model=None, target=SM_90, **parts):
    from dataclasses import replace

    config, model = config or Config(), model or ModelConfig(model="x")
    return kernels_ahead.mark_of(config, model, folder, replace(installed_parts(), **parts), target)


def test_a_mark_is_of_all_that_launches_depend_on(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    others = [
        marked(tmp_path),
        marked(tmp_path, model=ModelConfig(dtype="float16")),
        marked(tmp_path, Config(cache=CacheConfig(block_size=32))),
        marked(tmp_path, Config(scheduler=SchedulerConfig(max_num_seqs=8))),
        marked(tmp_path, adapters=AdaptersConfig(enable_lora=True)),
        marked(tmp_path, target=GpuTarget("sm_90", 114)),
    ]
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    assert len({*others, marked(tmp_path)}) == 7
    assert marked(tmp_path, model=ModelConfig(model="elsewhere", seed=3)) == marked(tmp_path)


def test_marks_lie_in_tritons_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert marked(tmp_path).parent == tmp_path / "cache"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    assert kernels_ahead.triton_cache() == tmp_path / ".triton" / "cache"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine that seems to have one, and where compiling is said to fail at once."""
    monkeypatch.setattr(kernels_ahead, "GPU_FILES", (str(tmp_path),))
    monkeypatch.setattr(kernels_ahead, "find_target", lambda index: SM_90)
    monkeypatch.setattr(kernels_ahead, "can_compile", lambda: True)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def begin(folder, **model):
    kernels_ahead.begin(Config(), ModelConfig(model=str(folder), **model), folder, installed_parts())


def program(monkeypatch, text):
    monkeypatch.setattr(kernels_ahead, "_COMMAND", (kernels_ahead.sys.executable, "-c", text))


def test_a_start_waits_for_the_first_line_alone(gpu, monkeypatch, caplog):
    caplog.set_level("INFO", "llmd.model")
    program(monkeypatch, "import sys; print('started', flush=True); sys.stdin.read()")
    begin(gpu)
    [ahead] = kernels_ahead._running
    kernels_ahead.wait(30)
    assert ahead.has_started.is_set()
    assert kernels_ahead._running == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import sys; sys.exit('no such model')", "kernels ahead: not compiled, exit code 1: no such model"),
        ("import sys; sys.exit(3)", "kernels ahead: not compiled, exit code 3: it does not say why"),
        (
            "import sys; print('x' * (1 << 18), file=sys.stderr); print('started'); print('3 kernels')",
            "kernels ahead: 3 kernels",
        ),
    ],
)
def test_what_became_of_it_is_told(gpu, monkeypatch, caplog, text, told):
    caplog.set_level("INFO", "llmd.model")
    program(monkeypatch, text)
    begin(gpu)
    [ahead] = kernels_ahead._running
    kernels_ahead.wait(30)
    ahead.thread.join(30)
    assert told in caplog.text


def test_a_process_that_hangs_does_not_hold_the_start(gpu, monkeypatch, caplog):
    program(monkeypatch, "import sys; sys.stdin.read()")
    begin(gpu)
    kernels_ahead.wait(0.1)
    assert "the model starts without them" in caplog.text


def test_nothing_is_begun_for_a_cpu_or_what_is_marked(gpu, monkeypatch):
    program(monkeypatch, "raise SystemExit('it was begun')")
    begin(gpu, device="cpu")
    assert kernels_ahead._running == []
    mark = kernels_ahead.mark_of(Config(), ModelConfig(model=str(gpu)), gpu, installed_parts(), SM_90)
    mark.parent.mkdir()
    mark.touch()
    monkeypatch.setattr(kernels_ahead.subprocess, "Popen", lambda *_, **__: pytest.fail("it was begun"))
    begin(gpu)
    kernels_ahead.wait(30)


def test_the_process_is_told_of_the_model_and_of_nothing_secret(gpu, monkeypatch):
    folder = gpu / "model"
    config = Config(
        models=(ModelConfig(model="org/name", hf_token="hf_secret"),), plugins=PluginsConfig(disable=("x.y",)),
        scheduler=SchedulerConfig(max_num_seqs=7),
    )  # fmt: skip
    monkeypatch.setenv("LLMD_SCHEDULER__MAX_NUM_SEQS", "9")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    text = kernels_ahead.render(kernels_ahead._only_model(config, config.models[0], folder, installed_parts()))
    assert "hf_secret" not in text
    assert f"model = {json.dumps(str(folder))}" in text
    assert "max_num_seqs = 7" in text
    assert 'disable = ["x.y"]' in text
    assert not {"LLMD_SCHEDULER__MAX_NUM_SEQS", "NOTIFY_SOCKET"} & kernels_ahead._environment().keys()
