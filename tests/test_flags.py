"""Flags of `llmd serve`: vLLM's names, nothing ignored in silence."""

import pytest

from llmd.config import Config, dotted
from llmd.config_keys import config_keys, field_of
from llmd.config_load import load_config
from llmd.errors import ConfigError
from llmd.flags import parse_flags, settings_of
from llmd.flags_help import render
from llmd.flags_table import FLAGS


def words(text):
    """A command line."""
    return text.split()


# the flags that the first release must know, as vLLM spells them
WANTED = words("""
host port api-key dtype max-model-len max-num-seqs max-num-batched-tokens gpu-memory-utilization quantization
served-model-name enable-prefix-caching seed trust-remote-code generation-config override-generation-config chat-template
tokenizer revision load-format block-size kv-cache-dtype scheduling-policy tensor-parallel-size pipeline-parallel-size
enable-lora lora-modules enable-auto-tool-choice tool-call-parser reasoning-parser enforce-eager hf-overrides rope-scaling
download-dir hf-token uds root-path ssl-keyfile ssl-certfile allowed-origins swap-space cpu-offload-gb max-logprobs
speculative-config kv-transfer-config data-parallel-size limit-mm-per-prompt disable-log-requests disable-log-stats
uvicorn-log-level async-scheduling compilation-config structured-outputs-config shutdown-timeout attention-backend""")


def config_of(*arguments):
    """The configuration that a command line gives."""
    parsed = parse_flags(arguments)
    assert parsed.problems == []
    return load_config(env={}, settings=parsed.settings)


def problems_of(*arguments):
    return parse_flags(arguments).problems


@pytest.mark.parametrize("name", WANTED)
def test_flag_is_known(name):
    assert name in FLAGS


def test_there_are_hundreds_and_each_has_a_meaning():
    assert len(FLAGS) > 300
    for flag in FLAGS.values():
        assert flag.path or flag.why
        if flag.path:
            assert field_of(Config, flag.path)


def test_every_key_can_be_set_by_a_flag():
    set_by = {flag.path for flag in FLAGS.values()}
    assert [dotted(path) for path in config_keys(Config) if path not in set_by] == []


@pytest.mark.parametrize("flag", ["--kv-cache-memory-bytes", "--kv-cache-bytes"])
def test_the_pools_size_by_vllms_name_and_by_the_keys(flag):
    assert config_of("demo", flag, "25G").cache.kv_cache_bytes == 25 << 30


def test_everything_that_vllm_users_write():
    config = config_of(
        *words("meta/x --host 0.0.0.0 --port=8080 --api-key a b --dtype bfloat16 --max_model_len 4k --max-num-seqs 64"),
        *words("--gpu-memory-utilization .8 -q int8 --served-model-name one two --no-enable-prefix-caching --seed -1"),
        *words("--trust-remote-code --generation-config vllm --scheduling-policy priority --enforce-eager"),
        *words("--tensor-parallel-size 1 -pp 1 --disable-log-requests --disable-log-stats --uvicorn-log-level trace"),
        *["--override-generation-config", '{"temperature": 0.5}', "--allowed-origins", '["*"]', "--max-logprobs", "-1"],
        *["--revision", "None", "--no-enable-lora", "--kv-cache-memory-bytes", "2G", "--cache.isolate-keys"],
    )
    model = config.models[0]
    assert (model.model, model.dtype, model.max_model_len, model.quantization, model.seed) == (
        "meta/x",
        "bfloat16",
        4000,
        "int8",
        -1,
    )
    assert model.served_model_name == ("one", "two")
    assert (model.trust_remote_code, model.generation_config, model.enforce_eager, model.revision) == (
        True,
        "llmd",
        True,
        None,
    )
    assert model.override_generation_config == {"temperature": 0.5}
    assert (config.server.host, config.server.port, config.server.api_keys) == ("0.0.0.0", 8080, ("a", "b"))
    assert config.server.cors_allowed_origins == ("*",)
    assert (config.scheduler.policy, config.scheduler.max_num_seqs) == ("priority", 64)
    assert (config.cache.gpu_memory_utilization, config.cache.enable_prefix_caching) == (0.8, False)
    assert (config.cache.kv_cache_bytes, config.cache.isolate_keys) == (2 << 30, True)
    assert (config.log.access, config.log.stats_interval_s, config.log.level) == (False, 0.0, "debug")
    assert config.limits.max_logprobs == 100


def test_json_flags_whole_or_key_by_key():
    assert config_of("--hf_overrides", '{"is_matryoshka": true}').models[0].hf_overrides == {"is_matryoshka": True}
    whole = config_of("--override-generation-config", '{"a": {"b": 1}, "c": [1, "x"]}')
    parts = config_of(
        *words("--override-generation-config.a.b 1 --override_generation_config.c+ 1 --override-generation-config.c+ x")
    )
    assert whole.models[0].override_generation_config == parts.models[0].override_generation_config
    assert problems_of("--override-generation-config", "{") == [
        "--override-generation-config: '{' is not JSON: "
        "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
    ]


def test_backend_of_structured_outputs():
    for arguments in (
        ["--structured-outputs-config", '{"backend": "guidance", "disable_fallback": false}'],
        ["--structured-outputs-config.backend", "guidance"],
        ["--guided-decoding-backend", "guidance"],
    ):
        assert config_of(*arguments).models[0].structured_outputs_backend == "llguidance"
    assert problems_of("--structured-outputs-config", '{"disable_any_whitespace": true}') == [
        "--structured-outputs-config.disable_any_whitespace: not built in yet; allowed: backend"
    ]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--tensor-parallel-size 2", "--tensor-parallel-size: not built in yet: tensor parallelism; allowed: 1"),
        ("-tp 2", "-tp: not built in yet: tensor parallelism; allowed: 1"),
        ("--pipeline_parallel_size=4", "--pipeline_parallel_size: not built in yet: pipeline parallelism; allowed: 1"),
        ("--fully-sharded-loras", "--fully-sharded-loras: not built in yet: this setting of adapters"),
        ("--default-mm-loras {}", "--default-mm-loras: not built in yet: this setting of adapters"),
        (
            "--tool-parser-plugin x.py",
            "--tool-parser-plugin: not built in yet: parsers in files that are no plugins",
        ),
        ('--pooler-config {"a":1}', "--pooler-config: not built in yet: pooling settings"),
        ("--pooler-config.a 1", "--pooler-config: not built in yet: pooling settings"),
        ("--no-async-scheduling", "--no-async-scheduling: false cannot be had: steps are always planned"),
        ("--api-server-count 4", "--api-server-count: 4 cannot be had: one process serves HTTP"),
        ("--prot 80", "unknown flag --prot; did you mean --port?"),
        ("--max-num-seq 8", "unknown flag --max-num-seq; did you mean --max-num-seqs?"),
        ("--zzzzzz", "unknown flag --zzzzzz; see llmd serve --help"),
        ("-x", "unknown flag -x"),
        ("--port", "--port: a value is missing"),
        ("--api-key --port 1", "--api-key: a value is missing"),
        ("--enforce-eager=maybe", "--enforce-eager: 'maybe' is not valid; allowed: true or false, or nothing"),
        ("demo other", "'other' is one argument too many: the model is 'demo' already"),
    ],
)
def test_what_is_refused(arguments, problem):
    found = problems_of(*arguments.split(" "))
    assert found[0].startswith(problem)


def test_one_unknown_flag_is_one_problem():
    assert len(problems_of("demo", "--max-num-seq", "8", "--prot", "3")) == 2


@pytest.mark.parametrize(
    "arguments", ["--swap-space 4", "--async-scheduling", "-O3", "--task generate", "--use-v2-block-manager"]
)
def test_what_llmd_decides_is_accepted_and_told(arguments):
    parsed = parse_flags(arguments.split())
    assert parsed.problems == []
    assert "llmd decides this by itself: " in parsed.notes[0]


def test_bad_values_are_told_by_their_flag():
    parsed = parse_flags(["--port", "x", "--dtype", "int3"])
    with pytest.raises(ConfigError) as caught:
        load_config(env={}, settings=parsed.settings)
    assert caught.value.problems == [
        "--dtype: models[0].dtype: 'int3' is not valid; allowed: 'auto', 'half', 'float16', 'bfloat16', 'float', 'float32'",
        "--port: server.port: 'x' is not valid; allowed: an integer between 0 and 65535",
    ]


def test_keywords_of_serve():
    settings = settings_of({"model": "demo", "port": 0, "api_key": "k", "enable_prefix_caching": False, "host": None,
                            "tensor_parallel_size": 1, "override_generation_config": {"top_k": 1}})  # fmt: skip
    config = load_config(env={}, settings=settings)
    assert (config.server.port, config.server.api_keys, config.cache.enable_prefix_caching) == (0, ("k",), False)
    assert config.models[0].override_generation_config == {"top_k": 1}
    with pytest.raises(ConfigError, match=r"unknown setting prot; did you mean port\?"):
        settings_of({"prot": 1})
    with pytest.raises(ConfigError, match="tensor_parallel_size: not built in yet: tensor parallelism; allowed: 1"):
        settings_of({"tensor_parallel_size": 2})


def test_help_names_every_flag():
    text = render()
    assert [name for name in FLAGS if f"--{name}" not in text] == []
    assert "\n  --port VALUE\n      port to listen on" in text


@pytest.mark.parametrize(
    "modules",
    [
        ["sql=/a", "chat=/b"],
        ["sql=/a,chat=/b"],
        ['{"name": "sql", "path": "/a"}', '{"name": "chat", "path": "/b", "base_model_name": "meta/x"}'],
        ['[{"name": "sql", "path": "/a"}, {"name": "chat", "path": "/b"}]'],
    ],
)
def test_adapters_are_named_in_both_of_vllms_forms(modules):
    limits = words("--enable-lora --max-loras 4 --max-lora-rank 64 --max-cpu-loras 9")
    adapters = config_of("meta/x", *limits, "--lora-modules", *modules).adapters
    assert adapters.modules() == {"sql": "/a", "chat": "/b"}
    assert (adapters.enable_lora, adapters.max_loras, adapters.max_lora_rank, adapters.host_slots) == (True, 4, 64, 9)


@pytest.mark.parametrize("flags", ["--lora-modules sql=/a", "--enable-lora --lora-modules meta/x=/a"])
def test_adapters_that_could_not_be_asked_for_are_refused(flags):
    with pytest.raises(ConfigError, match=r"adapters\.lora_modules: "):
        config_of("meta/x", *words(flags))
