"""Folders, the embedded model and ModelScope; which source claims which name (llmd_register_model_sources)."""

import sys
import types

import pytest

from llmd.checks import find_source
from llmd.config import ModelConfig, PluginsConfig
from llmd.errors import ModelError
from llmd.plugin.catalog import build_catalog
from llmd_plugins.sources import demo_source, local, modelscope


@pytest.fixture(scope="module")
def catalog():
    """The built-in plugins."""
    return build_catalog(PluginsConfig(autoload=False))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("demo", "demo"),
        ("./demo", "local"),
        ("~/m", "local"),
        ("/m", "local"),
        ("a/b/c", "local"),
        ("org/m", "hub"),
        ("m", "hub"),
    ],
)
def test_who_claims_a_name(catalog, name, source):
    assert find_source(catalog, ModelConfig(model=name)).name == source


def test_modelscope_goes_before_the_hub_where_it_is_wanted(catalog, monkeypatch, tmp_path):
    for variable in ("LLMD_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE"):
        monkeypatch.setenv(variable, "True")
        assert find_source(catalog, ModelConfig(model="org/m")).name == "modelscope"
        assert find_source(catalog, ModelConfig(model="demo")).name == "demo"
        assert find_source(catalog, ModelConfig(model=str(tmp_path))).name == "local"
        monkeypatch.delenv(variable)


def test_folder_with_a_name_of_the_hub_is_taken_from_here(catalog, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    assert find_source(catalog, ModelConfig(model="m")).name == "local"


def test_local_folder(tmp_path):
    folder = tmp_path / "m"
    config = ModelConfig(model=str(folder))
    for problem, mend in [
        ("does not exist; allowed: a folder with config.json, a hub name, or 'demo'", lambda: folder.write_text("")),
        ("is not a folder; allowed: a folder with config.json", lambda: (folder.unlink(), folder.mkdir())),
        ("holds no config.json, so it is not a model's folder", lambda: (folder / "config.json").write_text("{}")),
    ]:
        assert problem in local.why_not(config)
        with pytest.raises(ModelError, match=f"model {str(folder)!r} {problem.split(';')[0]}"):
            local._resolve(config, print)
        mend()
    assert local.why_not(config) is None
    assert local._resolve(config, print) == folder


def test_demo_model_lies_in_the_package(monkeypatch, tmp_path):
    assert (demo_source.folder() / "config.json").is_file()
    assert demo_source._check(ModelConfig()) is None
    monkeypatch.setattr(demo_source.resources, "files", lambda package: tmp_path)
    assert demo_source._check(ModelConfig()) == "the embedded demo model is missing from this installation; reinstall llmd"


def fake_modelscope(monkeypatch, download):
    """Pretend that the package is installed."""
    package, hub, module = (
        types.ModuleType(name) for name in ("modelscope", "modelscope.hub", "modelscope.hub.snapshot_download")
    )
    module.snapshot_download = download
    for made in (package, hub, module):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.setattr(modelscope.util, "find_spec", lambda name: object())


def test_modelscope_without_its_package():
    config = ModelConfig(model="org/m")
    assert "pip install 'llmd[modelscope]'" in modelscope.why_not(config)
    with pytest.raises(ModelError, match="the package modelscope is not installed"):
        modelscope.resolve(config, print)


def test_modelscope_download(monkeypatch, tmp_path):
    asked = {}
    fake_modelscope(monkeypatch, lambda name, **options: asked.update(options, name=name) or str(tmp_path))
    seen = []
    config = ModelConfig(model="org/m", revision="v1", download_dir="/d")
    assert modelscope.resolve(config, seen.append) == tmp_path
    assert (asked["name"], asked["revision"], asked["cache_dir"]) == ("org/m", "v1", "/d")
    assert [progress.fraction for progress in seen] == [0.0, 1.0]


def test_modelscope_failure_is_told_in_its_words(monkeypatch):
    def fail(name, **options):
        raise RuntimeError("no such model")

    fake_modelscope(monkeypatch, fail)
    with pytest.raises(ModelError, match="model 'org/m' cannot be fetched from ModelScope: no such model"):
        modelscope.resolve(ModelConfig(model="org/m"), print)
