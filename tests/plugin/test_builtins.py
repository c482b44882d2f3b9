"""What the built-in plugins provide, family by family: the features that the first release promises."""

import inspect

import pytest

from llmd.config import PluginsConfig
from llmd.plugin.catalog import build_catalog
from llmd.plugin.manager import SPEC_TYPES

PROMISED = {
    "commands": {"bench"},
    "config_sections": set(),
    "model_sources": {"demo", "local", "hub", "modelscope"},
    "checkpoint_formats": {"safetensors", "dummy"},
    "architectures": {"llama", "qwen2", "qwen3", "bert", "roberta", "modernbert", "qwen3_embedder", "bert_classifier"},
    "quantizations": {"int8"},
    "attention_backends": {"reference", "cpu", "encoder"},
    "executors": {"thread"},
    "scheduling_policies": {"fair", "fcfs", "priority"},
    "logits_processors": {"bad_words"},
    "samplers": {"torch"},
    "authenticators": {"api_keys"},
    "middlewares": {"cors"},
    "routes": set(),
    "metrics": set(),
    "services": set(),
}
ARCHITECTURES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}


@pytest.fixture(scope="module")
def catalog():
    """The built-in plugins alone."""
    return build_catalog(PluginsConfig(autoload=False))


def test_every_builtin_is_loaded(catalog):
    assert [(row.name, row.reason) for row in catalog.plugins if row.builtin and row.state != "loaded"] == []


@pytest.mark.parametrize("family", PROMISED)
def test_promised_names_are_there(catalog, family):
    names = set(catalog.registry(family))
    assert PROMISED[family] <= {name.rpartition(".")[2] for name in names} | names
    assert names


@pytest.mark.parametrize("family", SPEC_TYPES)
def test_every_spec_has_a_one_line_summary_and_can_be_built(catalog, family):
    for name, spec in catalog.registry(family).items():
        assert spec.summary, name
        assert "\n" not in spec.summary
        assert callable(getattr(spec, "build", None) or getattr(spec, "resolve", None) or spec.model)


def test_promised_architectures(catalog):
    assert {name for spec in catalog.architectures.values() for name in spec.architectures} >= ARCHITECTURES


def test_implementations_are_plain_functions(catalog):
    for hook in catalog.manager._arguments:
        for impl in catalog.manager.impls(hook):
            assert inspect.isfunction(impl.function), impl
