"""The hub source against a small hub of our own, in fresh processes: the client reads its environment once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import SHA, Hub

from llmd.config import ModelConfig
from llmd_plugins.sources.hub import llmd_register_model_sources

PROGRAM = """
import json, sys
from llmd.config import ModelConfig
from llmd.errors import ModelError
from llmd_plugins.sources.hub import resolve

for settings in json.loads(sys.argv[1]):
    seen = []
    try:
        answer = {"path": str(resolve(ModelConfig(**settings), seen.append))}
    except ModelError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer | {"progress": seen[-1] if seen else None}))
"""


@pytest.fixture(scope="module")
def hub():
    """A hub on a free port."""
    made = Hub()
    yield made
    made.close()


def resolve(endpoint, folder, *models, **environment):
    """What the source says of each model, with its own cache."""
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "*"} | environment
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(models)], env=env, capture_output=True, text=True, check=False, timeout=60
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_download_takes_only_what_is_served_then_works_offline(hub, tmp_path):
    first, second = resolve(hub.url, tmp_path, {"model": "good/model"}, {"model": "good/model", "load_format": "dummy"})
    folder = Path(first["path"])
    assert folder.name == SHA
    names = ["2_Dense", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(file.name for file in folder.iterdir()) == names
    assert [file.name for file in (folder / "2_Dense").iterdir()] == ["model.safetensors"]
    assert (folder / "model.safetensors").stat().st_size == 300_000
    phase, fraction = first["progress"]
    assert phase.startswith("downloading good/model: ")
    assert fraction == 1.0
    assert second["path"] == first["path"]
    offline = resolve(hub.url, tmp_path, {"model": "good/model"}, HF_HUB_OFFLINE="1")
    assert offline[0]["path"] == first["path"]
    away = resolve("http://127.0.0.1:9", tmp_path, {"model": "good/model"})
    assert away[0]["path"] == first["path"]


def test_dummy_weights_are_not_downloaded(hub, tmp_path):
    (answer,) = resolve(hub.url, tmp_path, {"model": "good/model", "load_format": "dummy"})
    assert sorted(file.name for file in Path(answer["path"]).iterdir()) == ["config.json", "tokenizer.json"]


def test_every_failure_says_what_is_at_fault(hub, tmp_path):
    answers = resolve(
        hub.url,
        tmp_path,
        {"model": "no/model"},
        {"model": "gated/model"},
        {"model": "good/model", "revision": "v9"},
        {"model": "empty/model"},
        {"model": "down/model"},
    )
    unknown, gated, revision, empty, down = (answer["error"] for answer in answers)
    assert unknown.startswith("model 'no/model' is neither a local folder nor known at the hub")
    assert gated.startswith("model 'gated/model' is gated: ask for access")
    assert revision == "model 'good/model' has no revision 'v9' at the hub"
    assert empty == "model 'empty/model' at the hub holds no config.json, so it is not a model that can be served"
    assert down.startswith("model 'down/model' is not in the hub's cache, and the hub cannot be reached: ")


def test_token_and_folder_of_the_configuration_are_used(hub, tmp_path):
    settings = {"model": "gated/model", "hf_token": "hf_good", "download_dir": str(tmp_path / "here")}
    (answer,) = resolve(hub.url, tmp_path / "home", settings)
    assert answer["path"].startswith(str(tmp_path / "here"))
    assert "Bearer hf_good" in hub.tokens


def test_without_network_or_cache(tmp_path):
    (away,) = resolve("http://127.0.0.1:9", tmp_path, {"model": "good/model"})
    assert away["error"].startswith("model 'good/model' is not in the hub's cache, and the hub cannot be reached: ")
    (offline,) = resolve("http://127.0.0.1:9", tmp_path, {"model": "good/model"}, HF_HUB_OFFLINE="1")
    assert offline["error"] == "model 'good/model' is not in the hub's cache, and HF_HUB_OFFLINE forbids to download it"


@pytest.mark.parametrize(
    ("name", "claimed"),
    [("Qwen/Qwen2.5-0.5B", True), ("gpt2", True), ("./x", False), ("/x/y", False), ("a/b/c", False), ("a b", False)],
)
def test_names_of_the_hub(name, claimed):
    (spec,) = llmd_register_model_sources()
    assert spec.claims(ModelConfig(model=name)) is claimed
