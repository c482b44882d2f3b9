"""Faults of the device and of prompts, in a real process: survived with the others unharmed, or a truthful end."""

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import pytest
from daemons import Daemon

# A device that does what the file named by FAULT_FILE says, once; and a processor that breaks one row's numbers.
FAULTY = """
    import os, time
    from pathlib import Path
    from llmd.api.v1 import ExecutorSpec, LogitsProcessorSpec, hookimpl

    def take_fault():
        file = Path(os.environ["FAULT_FILE"])
        if not file.exists():
            return ""
        fault = file.read_text()
        file.unlink()
        return fault

    def build(config, *, path, cache, scheduler, parts):
        import torch
        from llmd.api.v1 import ThreadExecutor

        executor = ThreadExecutor(config, cache, scheduler, path, parts)
        launch = executor._runner.launch

        def faulty(plan, masks=None):
            fault = take_fault() if plan.admitted else ""  # not a step whose sequences have ended meanwhile
            if fault == "hang":
                time.sleep(1000)
            pending = launch(plan, masks)
            if fault == "raise":
                raise ValueError("something is wrong with this step")
            if fault == "memory":
                raise torch.OutOfMemoryError("the device is full")
            if fault == "lost":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return pending

        executor._runner.launch = faulty
        return executor

    class NotANumber:
        keeps_argmax = False

        def wants(self, params):
            return params.seed == 666

        def admit(self, admit):
            self.rows = True

        def release(self, row):
            self.rows = False

        def apply(self, logits, rows):
            logits[rows.at] = float("nan")
            return logits

    @hookimpl
    def llmd_register_executors():
        return [ExecutorSpec(name="faulty", summary="for tests", build=build)]

    @hookimpl
    def llmd_register_logits_processors():
        return [LogitsProcessorSpec(name="nan", summary="for tests", build=lambda context: NotANumber())]
"""


# A device that kills the process where a prompt holds the token 97.
KILLER = """
    import os, signal
    from llmd.api.v1 import ExecutorSpec, hookimpl

    def build(config, *, path, cache, scheduler, parts):
        from fakes import FakeExecutor, fake_info

        class Killer(FakeExecutor):
            def submit(self, plan, masks=None):
                if any(97 in admit.token_ids for admit in plan.admitted):
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().submit(plan, masks)

        return Killer(fake_info(vocab_size=4096, num_blocks=512), step_s=0.01)

    @hookimpl
    def llmd_register_executors():
        return [ExecutorSpec(name="killer", summary="for tests", build=build)]
"""


@contextmanager
def killer(folder: Path):
    settings = {"LLMD_MODELS__0__EXECUTOR": "killer", "LLMD_HEALTH__STATE_DIR": str(folder / "state")}
    with Daemon("serve", "demo", cwd=folder, wheel=KILLER, fake=False, **settings) as daemon:
        yield daemon.ready()


@contextmanager
def faulty(folder: Path, **environment):
    settings = {
        "FAULT_FILE": str(folder / "fault"),
        "LLMD_MODELS__0__EXECUTOR": "faulty",
        "LLMD_CACHE__KV_CACHE_BYTES": "16M",
        "LLMD_HEALTH__STATE_DIR": str(folder / "state"),
        "LLMD_HEALTH__HANG_TIMEOUT_S": "1.5",
    }
    with Daemon("serve", "demo", cwd=folder, fake=False, wheel=FAULTY, **settings | environment) as daemon:
        yield daemon.ready()


def break_next_step(folder: Path, fault: str) -> None:
    draft = folder / "draft"
    draft.write_text(fault)
    draft.rename(folder / "fault")


def records(folder: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted((folder / "state").glob("flight-*.json"))]


def many(daemon: Daemon, count: int, **fields) -> list[tuple[int, dict]]:
    with ThreadPoolExecutor(count) as pool:
        asked = {"max_tokens": 24, "ignore_eos": True, "temperature": 0, **fields}
        return list(pool.map(lambda index: daemon.complete(f"Once upon {index}", **asked), range(count)))


def figure(daemon: Daemon, name: str) -> float:
    lines = daemon.get("/metrics")[1].splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


def test_one_step_raises_or_finds_no_memory_or_numbers_break(tmp_path):
    """Each costs at most the sequences of one step; what the others say stays the same."""
    with faulty(tmp_path) as daemon:
        before = many(daemon, 4)
        assert [status for status, _ in before] == [200] * 4
        texts = [answer["choices"][0]["text"] for _, answer in before]

        break_next_step(tmp_path, "raise")
        status, answer = daemon.complete("alone", max_tokens=4)
        assert (status, answer["error"]["code"]) == (500, "generation_failed")

        break_next_step(tmp_path, "memory")
        after = many(daemon, 4)
        assert [answer["choices"][0]["text"] for _, answer in after] == texts
        assert figure(daemon, "llmd_out_of_memory_total") == 1
        assert figure(daemon, "llmd_num_preemptions_total") >= 1

        with ThreadPoolExecutor(2) as pool:
            bad = pool.submit(daemon.complete, "bad numbers", seed=666, temperature=1.0)
            good = many(daemon, 4)
            status, answer = bad.result()
        assert status == 500
        assert "not finite" in answer["error"]["message"]
        assert [answer["choices"][0]["text"] for _, answer in good] == texts
        assert figure(daemon, "llmd_nonfinite_total") == 1

        assert daemon.get("/health")[0] == 200
        daemon.signal(signal.SIGQUIT)
        daemon.wait_for("SIGQUIT: the last .* steps are in")
        assert daemon.complete()[0] == 200
        assert daemon.stop() == 0
    (record,) = records(tmp_path)
    assert record["reason"] == "SIGQUIT"
    errors = [step["error"] for step in record["steps"] if step["error"]]
    assert [error.partition(":")[0] for error in errors] == ["StepFailed", "StepOutOfMemory"]
    assert "token_ids" not in json.dumps(record)


def test_a_device_that_hangs_ends_the_process_with_70(tmp_path):
    with faulty(tmp_path) as daemon:
        assert daemon.complete()[0] == 200
        started_s = time.monotonic()
        break_next_step(tmp_path, "hang")
        with ThreadPoolExecutor(1) as pool:
            stream = pool.submit(daemon.complete, "streamed", stream=True)
            answers = many(daemon, 2)
        assert [status for status, _ in answers] == [503, 503]
        assert answers[0][1]["error"]["code"] == "engine_failed"
        status, text = stream.result()
        assert status == 503 or ('"code":"engine_failed"' in text and text.rstrip().endswith("data: [DONE]"))
        assert daemon.process.wait(30) == 70
        assert time.monotonic() - started_s < 10
        daemon.wait_for("no step ended and nothing moved", 5)
    (record,) = records(tmp_path)
    assert record["reason"] == "hang"
    assert "running" in {request["state"] for request in record["requests"]}
    (stack,) = [lines for name, lines in record["threads"].items() if name.startswith("llmd-executor")]
    assert stack[-1].endswith("faulty")


def test_a_device_that_is_lost_ends_the_process_with_69(tmp_path):
    with faulty(tmp_path) as daemon:
        break_next_step(tmp_path, "lost")
        assert daemon.complete()[0] == 503
        assert daemon.process.wait(30) == 69
    (record,) = records(tmp_path)
    assert record["reason"] == "failure"
    assert any("the device is lost" in (step["error"] or "") for step in record["steps"])


def test_a_prompt_that_kills_is_run_alone_and_then_refused(tmp_path):
    with killer(tmp_path) as daemon, ThreadPoolExecutor(4) as pool:
        asked = {"max_tokens": 100, "ignore_eos": True}
        others = [pool.submit(daemon.complete, [5, 6, 7, index], **asked) for index in range(3)]
        while figure(daemon, "llmd_num_requests_running") < 3:
            time.sleep(0.01)
        culprit = pool.submit(daemon.complete, [1, 2, 97])
        assert daemon.process.wait(30) == -signal.SIGKILL
        for lost in (*others, culprit):
            assert isinstance(lost.exception(20), OSError | HTTPException)
    with killer(tmp_path) as daemon:
        assert daemon.log.count("its prompt will be run alone") == 4
        assert daemon.complete([5, 6, 7, 0])[0] == 200  # innocent
        with pytest.raises((OSError, HTTPException)):
            daemon.complete([1, 2, 97])
        assert daemon.process.wait(30) == -signal.SIGKILL
    with killer(tmp_path) as daemon:
        status, answer = daemon.complete([1, 2, 97])
        assert (status, answer["error"]["code"]) == (400, "suspected_of_crash")
        assert [status for status, _ in many(daemon, 2)] == [200, 200]
        assert daemon.complete([5, 6, 7, 1])[0] == 200  # was running in the first crash only
        assert daemon.stop() == 0


def test_a_full_kv_pool_preempts_and_every_answer_is_whole(tmp_path):
    with Daemon(
        "serve", "demo", "--max-model-len", "256", cwd=tmp_path, fake=False, LLMD_CACHE__KV_CACHE_BYTES="600K"
    ) as daemon:
        daemon.ready()
        alone = [daemon.complete(f"Once upon {index}", max_tokens=120, ignore_eos=True, temperature=0) for index in range(3)]
        crowd = many(daemon, 8, max_tokens=120)
        assert [answer["usage"]["completion_tokens"] for _, answer in crowd] == [120] * 8
        # Where a story has ended the model babbles: two tokens may be equally likely but for the last bit of a batch's sums.
        stories = [[answer["choices"][0]["text"][:100] for _, answer in answers[:3]] for answers in (alone, crowd)]
        assert stories[0] == stories[1]
        assert figure(daemon, "llmd_num_preemptions_total") > 0
        assert daemon.stop() == 0
