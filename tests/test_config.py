"""Configuration: layers, the line of every mistake, and the committed file."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from llmd import config as config_module
from llmd.checks import parse_sections
from llmd.config import Config, Section, dotted
from llmd.config_keys import config_keys, field_of
from llmd.config_load import Setting, load_config, variable_name
from llmd.config_messages import Text
from llmd.config_text import render
from llmd.config_toml import key_lines
from llmd.errors import ConfigError

ROOT = Path(__file__).parent.parent


def problems(tmp_path, text, **options):
    """What is wrong with a file, without its folder."""
    file = tmp_path / "llmd.toml"
    file.write_text(text)
    options.setdefault("env", {})
    with pytest.raises(ConfigError) as caught:
        load_config(file, **options)
    return [problem.replace(f"{tmp_path}/", "") for problem in caught.value.problems]


def load(tmp_path, text, env=None, settings=()):
    file = tmp_path / "llmd.toml"
    file.write_text(text)
    return load_config(file, env=env or {}, settings=settings)


# --- the committed file


def test_committed_file_is_what_the_models_say():
    assert (ROOT / "etc" / "llmd.toml").read_text() == render(), "run: llmd config > etc/llmd.toml"


def test_committed_file_is_the_default():
    assert load_config(ROOT / "etc" / "llmd.toml", env={}).model_dump() == Config().model_dump()


def test_every_key_has_a_default_and_a_description():
    for path in config_keys(Config):
        info = field_of(Config, path)
        assert info.description, dotted(path)
        assert "\n" not in info.description
        assert not info.is_required(), dotted(path)


def test_every_section_is_frozen():
    models = [item for item in vars(config_module).values() if isinstance(item, type) and issubclass(item, BaseModel)]
    for model in models:
        if model not in (BaseModel, config_module.PluginsConfig):
            assert issubclass(model, Section)
        if model is not BaseModel:
            assert model.model_config["frozen"]


def test_printed_configuration_reads_back_and_tells_no_secret(tmp_path):
    text = """
    [[models]]
    model = "./a folder"
    override_generation_config = { temperature = 0.5, "a b" = ["ü", true] }
    hf_token = "hf_secret"
    [server]
    port = 1
    api_keys = ["secret"]
    [plugins.zeta]
    depth = 3
    key = "secret"
    [plugins.other]
    key = "secret"
    """

    class Zeta(Section):
        depth: int = 1
        key: str = Field("", repr=False)

    config = load(tmp_path, text)
    printed = render(config, {"zeta": Zeta})
    assert "secret" not in printed.replace("secrets", "")
    again = load(tmp_path, printed)
    assert again.models[0].override_generation_config == {"temperature": 0.5, "a b": ["ü", True]}
    assert again.plugins.model_extra == {"zeta": {"depth": 3}, "other": {}}
    assert again.server.port == 1


# --- mistakes in the file


def test_all_mistakes_at_once_each_with_its_line(tmp_path):
    text = """\
[server]
prot = 8000
port = 70000
api_keys = ["secret", 5]

[[models]]
dtype = "int3"

[[models]]
max_model_len = true
tool_parser_plugin = "x.py"

[scheduler]
max_num_seqs = "many"
watermark = nan
[nonsense]
x = 1
[cache]
gpu_memory_utilization = 1.5
kv_cache_bytes = 0
"""
    assert problems(tmp_path, text) == [
        "llmd.toml:2: unknown key server.prot; did you mean port?",
        "llmd.toml:3: server.port: 70000 is not valid; allowed: an integer between 0 and 65535",
        "llmd.toml:4: server.api_keys[1]: the value is not valid; allowed: a list of strings",
        "llmd.toml:7: models[0].dtype: 'int3' is not valid; "
        "allowed: 'auto', 'half', 'float16', 'bfloat16', 'float', 'float32'",
        "llmd.toml:10: models[1].max_model_len: true is not valid; allowed: an integer between 1 and 16777216",
        "llmd.toml:11: models[1].tool_parser_plugin: not built in yet: parsers in files that are no plugins",
        "llmd.toml:14: scheduler.max_num_seqs: 'many' is not valid; allowed: an integer between 1 and 65536",
        "llmd.toml:15: scheduler.watermark: nan is not valid; allowed: a number at least 0 and below 1",
        "llmd.toml:16: unknown key nonsense; "
        "allowed: models, cache, scheduler, adapters, server, keys, limits, plugins, log, health",
        "llmd.toml:19: cache.gpu_memory_utilization: 1.5 is not valid; allowed: a number above 0 and at most 1",
        "llmd.toml:20: cache.kv_cache_bytes: 0 is not valid; allowed: an integer at least 1",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[server\nport = 1\n", "llmd.toml:1: Expected ']' at the end of a table declaration"),
        ("a = 1\nb = \n", "llmd.toml:2: Invalid value"),
        ("[log]\nlevel = 'x", 'llmd.toml:2: Expected "\'"'),
        ("port = 1\n[[port]]\n", "llmd.toml:2: Cannot overwrite a value"),
        ("models = []\n", "llmd.toml:1: models: () is not valid; allowed: at least one [[models]] table"),
        ("models = 3\n", "llmd.toml:1: models: 3 is not valid; allowed: at least one [[models]] table"),
        ("server = 3\n", "llmd.toml:1: server: 3 is not valid; allowed: a table"),
        ("[server]\nhost = 5\n", "llmd.toml:2: server.host: 5 is not valid; allowed: a string"),
        ("[server]\nport = 1\nssl_keyfile = 'k'\n", "llmd.toml:3: server.ssl_keyfile: is set alone; "),
        ("[server]\nroot_path = 'x'\n", "llmd.toml:2: server.root_path: 'x' is not valid; "),
        ("[[models]]\n[[models]]\n", "llmd.toml:2: models[1].served_model_name: 'demo' is not valid; "),
        (
            "[[models]]\nmax_model_len = 9000\n[scheduler]\nenable_chunked_prefill = false\n",
            "llmd.toml:2: models[0].max_model_len: 9000 is not valid; allowed: at most scheduler.max_num_batched_tokens",
        ),
        ("[plugins]\nprefer = { a = 1 }\n", "llmd.toml:2: plugins.prefer.a: 1 is not valid; allowed: a table"),
        ("server.prot = 1\n", "llmd.toml:1: unknown key server.prot; did you mean port?"),
        (
            "cache = { block_size = 16,\n  block_sise = 3 }\n",
            "llmd.toml:2: unknown key cache.block_sise; did you mean block_size?",
        ),
    ],
)
def test_one_mistake(tmp_path, text, expected):
    if text.startswith("cache") and tomllib_refuses(text):
        text, expected = text.replace("\n ", ""), expected.replace(":2:", ":1:")
    assert problems(tmp_path, text)[0].startswith(expected)


def tomllib_refuses(text):
    """Inline tables over several lines are TOML 1.1, which older Pythons do not read."""
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return True
    return False


def test_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(ConfigError, match=r"none.toml: the configuration file cannot be read: No such file"):
        load_config(tmp_path / "none.toml", env={})
    (tmp_path / "x.toml").write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match=r"x.toml: the configuration file is not UTF-8: byte 5"):
        load_config(tmp_path / "x.toml", env={})


# --- layers


def test_precedence_default_file_environment_flags(tmp_path):
    text = "[server]\nhost = 'file'\nport = 1\nroot_path = '/file'\n"
    env = {"LLMD_SERVER__PORT": "2", "LLMD_SERVER__ROOT_PATH": "/env"}
    flags = [Setting(("server", "root_path"), Text("/flag"), "--root-path")]
    server = load(tmp_path, text, env, flags).server
    assert (server.host, server.port, server.root_path, server.max_body_bytes) == ("file", 2, "/flag", 32 << 20)


def test_environment_values_take_the_type_of_their_key(tmp_path):
    env = {
        "LLMD_SERVER__API_KEYS": "a, b",
        "LLMD_SERVER__OPEN_ROUTES": '["/x"]',
        "LLMD_CACHE__ENABLE_PREFIX_CACHING": "no",
        "LLMD_SERVER__REQUEST_TIMEOUT_S": "1.5",
        "LLMD_MODELS__0__OVERRIDE_GENERATION_CONFIG": '{"top_k": 3}',
        "LLMD_MODELS__0__MAX_MODEL_LEN": "4K",
        "LLMD_MODELS__0__QUANTIZATION": "",
        "LLMD_MODELS__1__MODEL": "./two",
        "LLMD_LIMITS__MAX_OUTPUT_TOKENS": "",
    }
    config = load(tmp_path, "", env)
    assert config.server.api_keys == ("a", "b")
    assert config.server.open_routes == ("/x",)
    assert config.cache.enable_prefix_caching is False
    assert config.server.request_timeout_s == 1.5
    assert config.models[0].override_generation_config == {"top_k": 3}
    assert config.models[0].max_model_len == 4096
    assert config.models[0].quantization is None
    assert [model.model for model in config.models] == ["demo", "./two"]


def test_mistakes_in_the_environment_are_told_by_its_names(tmp_path):
    env = {"LLMD_SERVR__PORT": "1", "LLMD_SERVER__PORT": "x", "LLMD_CACHE__ENABLE_PREFIX_CACHING": "maybe"}
    assert problems(tmp_path, "", env=env) == [
        "unknown variable LLMD_SERVR__PORT; did you mean LLMD_SERVER__PORT?",
        "LLMD_CACHE__ENABLE_PREFIX_CACHING: cache.enable_prefix_caching: 'maybe' is not valid; allowed: true or false",
        "LLMD_SERVER__PORT: server.port: 'x' is not valid; allowed: an integer between 0 and 65535",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "LLMD_PLUGINS",
        "LLMD_USE_MODELSCOPE",
        "LLMD_CACHE_DIR",
        "LLMD_SERVICE_HOST",
        "LLMD_PORT",
        "LLMD_PORT_8000_TCP_ADDR",
        "PATH",
    ],
)
def test_variables_that_are_no_keys_are_left_alone(tmp_path, name):
    assert load(tmp_path, "", {name: "tcp://10.0.0.1:8000"}) == Config()


@given(st.sampled_from(list(config_keys(Config))))
@settings(max_examples=100, deadline=None)
def test_every_key_can_be_set_by_a_variable(path):
    value = field_of(Config, path).get_default(call_default_factory=True)
    if isinstance(value, bool | int | float | str) and path[0] != "keys":  # a key alone has no name or no secret
        assert load_config(env={variable_name(path): str(value)}).model_dump() == Config().model_dump()


def test_keys_have_a_name_one_secret_and_models_that_are_served(tmp_path):
    digest = "sha256:" + 64 * "0"
    text = f"""\
[[keys]]
name = "a"
hash = "{digest}"
[[keys]]
name = "a"
key = "x"
file = "y"
[[keys]]
models = ["demo", "dmo"]
[[keys]]
name = "spaces are not"
hash = "md5:0"
"""
    assert problems(tmp_path, text) == [
        "llmd.toml:11: keys[3].name: 'spaces are not' is not valid; allowed: letters, digits and '._@-', at most 64, "
        "the first a letter or digit",
        "llmd.toml:12: keys[3].hash: 'md5:0' is not valid; allowed: 'sha256:' and 64 hexadecimal digits",
    ]
    assert problems(tmp_path, text.partition('[[keys]]\nname = "spaces')[0]) == [
        "llmd.toml:5: keys[1].name: 'a' is not valid; allowed: a name that keys[0] does not have",
        "llmd.toml:7: keys[1].file: key and file are set; allowed: one of key, hash and file",
        "llmd.toml:8: keys[2].name: is not set; allowed: the name of who has the key",
        "llmd.toml:8: keys[2]: has no key; allowed: one of key, hash and file",
        "llmd.toml:9: keys[2].models: 'dmo' is not served; did you mean demo?",
    ]
    one = load(tmp_path, "", env={"LLMD_KEYS__0__NAME": "env", "LLMD_KEYS__0__HASH": digest, "LLMD_KEYS__0__WEIGHT": "2"})
    assert (one.keys[0].name, one.keys[0].weight) == ("env", 2.0)


# --- plugins' tables


class Zeta(Section):
    depth: int = 3
    names: tuple[str, ...] = ()


class FakeSpec:
    model = Zeta


class FakeCatalog:
    config_sections = {"acme.zeta": FakeSpec}
    broken = ()


def test_plugin_tables_are_checked_when_plugins_are_known(tmp_path):
    text = '[plugins."acme.zeta"]\ndepth = 4\nnames = ["a"]\n'
    found = []
    assert parse_sections(load(tmp_path, text), FakeCatalog, found) == {"acme.zeta": Zeta(depth=4, names=("a",))}
    assert found == []
    env = {"LLMD_PLUGINS__ACME_ZETA__DEPTH": "5"}
    assert parse_sections(load(tmp_path, "", env), FakeCatalog, found) == {"acme.zeta": Zeta(depth=5)}
    assert parse_sections(Config(), FakeCatalog, found) == {"acme.zeta": Zeta()}


def test_mistakes_in_plugin_tables(tmp_path):
    text = '[plugins]\ndisabel = []\n[plugins."acme.zeta"]\ndepth = "x"\ndeep = 1\n[plugins."acme.zetta"]\nx = 1\n'
    found = []
    parse_sections(load(tmp_path, text), FakeCatalog, found)
    assert [problem.replace(f"{tmp_path}/", "") for problem in found] == [
        "llmd.toml:4: plugins.acme.zeta.depth: 'x' is not valid; allowed: an integer",
        "llmd.toml:5: unknown key plugins.acme.zeta.deep; did you mean depth?",
        "llmd.toml:2: unknown key plugins.disabel; did you mean disable?",
        "llmd.toml:6: unknown key plugins.acme.zetta; did you mean acme.zeta?",
    ]


# --- the scanner of lines


def test_lines_of_all_ways_to_write_a_key():
    text = '''\
# comment with "quotes" and [brackets]
a.b = 1 # tail ] }
"quoted \\u0041.key" = "x = 1"
'single' = \'\'\'
fake = 1
[no.table]
\'\'\'
text = """
more = 2 \\""" still
"""
list = [ # comment
  1, { x = 1, y = [2, { z = 3 }] },
  "]", # comment ]
]

[table . sub] # comment
key = 2020-01-01 00:00:00
[[many]]
one = 1
[many.inner]
two = 2
[[many]]
[[many.deep]]
three = { four.five = 5, "six" = 6 }
'''
    tomllib.loads(text)
    assert key_lines(text) == {
        ("a",): 2, ("a", "b"): 2,
        ("quoted A.key",): 3,
        ("single",): 4,
        ("text",): 8,
        ("list",): 11, ("list", 0): 12, ("list", 1): 12, ("list", 1, "x"): 12, ("list", 1, "y"): 12,
        ("list", 1, "y", 0): 12, ("list", 1, "y", 1): 12, ("list", 1, "y", 1, "z"): 12, ("list", 2): 13,
        ("table", "sub"): 16, ("table", "sub", "key"): 17,
        ("many",): 18, ("many", 0): 18, ("many", 0, "one"): 19,
        ("many", 0, "inner"): 20, ("many", 0, "inner", "two"): 21,
        ("many", 1): 22, ("many", 1, "deep"): 23, ("many", 1, "deep", 0): 23,
        ("many", 1, "deep", 0, "three"): 24, ("many", 1, "deep", 0, "three", "four"): 24,
        ("many", 1, "deep", 0, "three", "four", "five"): 24, ("many", 1, "deep", 0, "three", "six"): 24,
    }  # fmt: skip


def leaves(value, path=()):
    """The paths of a parsed document, elements of lists included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from leaves(item, (*path, key))


KEYS = st.sampled_from(["a", "b-1", '"q.x"', "'s'"])
SCALARS = st.sampled_from(
    ["1", "true", '"x # ]"', "'}'", "1e3", '"""a\n]"""', "[]", "[1, [2]]", "{ k = 1, l = [{ m = 2 }] }"]
)
LINES = st.one_of(
    st.builds("{} = {}".format, KEYS, SCALARS),
    st.builds("{}.{} = {}".format, KEYS, KEYS, SCALARS),
    st.builds("[{}]".format, KEYS),
    st.builds("[[{}]]".format, KEYS),
    st.builds("[{}.{}]".format, KEYS, KEYS),
    st.sampled_from(["", "# c"]),
)


@given(st.lists(LINES, max_size=8))
@settings(max_examples=300, deadline=None)
def test_scanner_finds_every_key_that_tomllib_finds(lines):
    text = "\n".join(lines)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    found = key_lines(text)
    # a header such as [a.b] makes the table a without a line of its own
    assert {path for path in leaves(document) if path not in found} <= {path[:1] for path in found if len(path) > 1}
    assert set(found) <= set(leaves(document))
    assert all(1 <= line <= len(text.split("\n")) for line in found.values())


@pytest.mark.parametrize(
    "text",
    [
        '[adapters]\nenable_lora = true\nlora_modules = ["sql=/srv/sql", "chat=/srv/a=b"]',
        '[adapters]\nenable_lora = true\n[adapters.lora_modules]\nsql = "/srv/sql"\nchat = "/srv/a=b"',
        "[adapters]\nenable_lora = true\n"
        'lora_modules = [{name = "sql", path = "/srv/sql"}, {name = "chat", path = "/srv/a=b"}]',
    ],
)
def test_adapters_are_named_as_a_list_a_table_or_objects(tmp_path, text):
    file = tmp_path / "llmd.toml"
    file.write_text(text)
    adapters = load_config(file, env={}).adapters
    assert adapters.modules() == {"sql": "/srv/sql", "chat": "/srv/a=b"}
    assert adapters.host_slots == 64


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('["sql"]', "adapters.lora_modules: must be 'name=folder', got 'sql'"),
        ('["=x"]', "adapters.lora_modules: must be 'name=folder', got '=x'"),
        ('["a=x", "a=y"]', "adapters.lora_modules: names 'a' twice"),
    ],
)
def test_adapters_that_are_misnamed_are_told(tmp_path, value, message):
    file = tmp_path / "llmd.toml"
    file.write_text(f"[adapters]\nenable_lora = true\nlora_modules = {value}\n")
    with pytest.raises(ConfigError) as told:
        load_config(file, env={})
    assert told.value.problems == [f"{file}:3: {message}"]


@pytest.mark.parametrize(
    ("devices", "cache", "shares"),
    [
        (["auto"], {}, [0.9]),
        (["auto", "cuda", "cuda:0"], {}, [0.3, 0.3, 0.3]),
        (["cuda:0", "cuda:1"], {}, [0.9, 0.9]),
        (["auto", "cpu"], {}, [0.9, 0.9]),
        (["auto", "auto"], {"gpu_memory_utilization": 0.5}, [0.5, 0.5]),
        (["auto", "auto"], {"kv_cache_bytes": 1000}, [0.9, 0.9]),
    ],
)
def test_a_share_that_nobody_set_is_divided_among_a_gpus_models(devices, cache, shares):
    models = [{"model": f"m{index}", "device": device} for index, device in enumerate(devices)]
    config = Config.model_validate({"models": models, "cache": cache})
    assert [config.cache_of(model).gpu_memory_utilization for model in config.models] == shares
