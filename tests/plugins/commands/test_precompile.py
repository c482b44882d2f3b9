"""`llmd precompile`, by hand and beside a start: the second finds nothing to do."""

import pytest
from model.tiny_models import make_model, save_model

from llmd.api.v1.testing.driver import installed_parts
from llmd.cli import run
from llmd.config import Config, ModelConfig, SchedulerConfig
from llmd.errors import ExitCode
from llmd.model import kernels_ahead
from llmd.model.gpu_target import parse_target

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = save_model(make_model("Qwen2"), tmp_path_factory.mktemp("model"))
    (path / "model.safetensors").unlink()  # nobody needs the weights
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-1.safetensors"}}')
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refused(capsys, *arguments):
    codes = []
    run(["precompile", *arguments], fail=codes.append)
    assert codes == [ExitCode.CONFIGURATION]
    return capsys.readouterr().err


def test_what_is_wrong_is_told(capsys, monkeypatch, tmp_path):
    assert "--device: 'h200' is no GPU; write one such as sm_90" in refused(capsys, "--device", "h200")
    monkeypatch.setattr("llmd.model.gpu_target.find_target", lambda index=0: None)
    assert "this machine has no GPU" in refused(capsys)
    monkeypatch.setattr("llmd.model.kernels_ahead.can_compile", lambda: False)
    assert "Triton is not installed" in refused(capsys, "--device", "sm_90")


def test_what_is_compiled_beside_a_start_is_known_at_the_next_one(path, cache, monkeypatch, caplog, tmp_path):
    caplog.set_level("INFO", "llmd.model")
    monkeypatch.setattr(kernels_ahead, "GPU_FILES", (str(path),))
    monkeypatch.setattr(kernels_ahead, "find_target", lambda index: parse_target("sm_90"))
    model = ModelConfig(model="some/name", dtype="bfloat16", device="cuda", hf_token="secret")
    config, parts = Config(models=(model,), scheduler=SchedulerConfig(max_num_seqs=1)), installed_parts()
    kernels_ahead.begin(config, model, path, parts)
    [ahead] = kernels_ahead._running
    kernels_ahead.wait()
    compiled = len(list(cache.glob("*/*.cubin")))
    assert compiled >= 8, caplog.text
    ahead.thread.join(240)
    mark = kernels_ahead.mark_of(config, model, path, parts, parse_target("sm_90"))
    assert mark.exists(), caplog.text
    assert "kernels compiled, 0 were there" in caplog.text
    monkeypatch.setattr(kernels_ahead.subprocess, "Popen", lambda *_, **__: pytest.fail("nothing is left to do"))
    kernels_ahead.begin(config, model, path, parts)
    [ahead] = kernels_ahead._running
    kernels_ahead.wait()
    ahead.thread.join(240)
