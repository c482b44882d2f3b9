"""Configuration: defaults < TOML file < LLMD_* environment < flags, into frozen pydantic models, all errors at once."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator

Path = tuple[str | int, ...]  # a key: ("server", "port"), ("models", 0, "dtype")
ModelImpl = Literal["auto", "llmd", "transformers"]
KVCacheDType = Literal["auto", "float16", "bfloat16", "float32", "int8", "fp8"]
_KV_CACHE_DTYPES = {"fp8_e4m3": "fp8", "fp8_per_token_head": "fp8", "int8_per_token_head": "int8"}  # vLLM's other names
_CPUS = re.compile(r"[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*")
DType = Literal["auto", "half", "float16", "bfloat16", "float", "float32"]


class Section(BaseModel):
    """A table of the file: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), defer_build=True)


class ModelConfig(Section):
    """`[[models]]`: one served model. The first is the default for requests that name none."""

    model: str = Field(
        default="demo", description="'demo', a local folder, or a hub name such as 'Qwen/Qwen2.5-0.5B-Instruct'"
    )
    served_model_name: tuple[str, ...] = Field(default=(), description="names clients may use; empty: the model's own name")
    tokenizer: str | None = Field(
        default=None, description="folder or hub name of the tokenizer, where it is not the model's"
    )
    revision: str | None = Field(default=None, description="branch, tag or commit at the hub")
    download_dir: str | None = Field(default=None, description="where hub downloads are kept; default: the hub's own cache")
    hf_token: str | None = Field(default=None, description="hub token; default: the hub's own login", repr=False)
    trust_remote_code: bool = Field(
        default=False, description="allow code from the model's folder to run; there is no finer gate"
    )
    load_format: str = Field(
        default="auto", description="'auto', 'safetensors', 'dummy' (random weights), or a plugin's format"
    )
    device: str = Field(default="auto", description="'auto', 'cpu', 'cuda', 'cuda:1' …")
    cpu_threads: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="threads that compute on a CPU; default: OMP_NUM_THREADS, or one a core of a NUMA node that affinity "
        "and cgroup grant, less one for the event loop where there are more than two",
    )
    cpu_affinity: str = Field(
        default="auto",
        description="CPUs that they run on: 'auto' (a core each, where all are theirs), 'none' (any), or such as '0-3,8'",
    )
    dtype: DType = Field(
        default="auto", description="weights and activations; auto: the checkpoint's (on a CPU float16 becomes bfloat16)"
    )
    quantization: str | None = Field(default=None, description="quantization method; default: what the checkpoint says")
    quantization_options: dict[str, Any] = Field(
        default_factory=dict,
        description="settings of a method that quantizes while loading: ignore (names of layers), group_size (int4)",
    )
    max_model_len: int | None = Field(
        default=None, ge=1, le=1 << 24, description="context length; default: the model's own, as far as the KV pool allows"
    )
    merge_adapter: str | None = Field(
        default=None, description="folder of an adapter that is merged into the weights as they load"
    )
    seed: int = Field(default=0, description="base of the random seeds of requests that bring none")
    generation_config: str = Field(
        default="auto", description="sampling defaults: 'auto' (the model's), 'llmd' (none), or a folder"
    )
    override_generation_config: dict[str, Any] = Field(default_factory=dict, description="sampling defaults set here")
    hf_overrides: dict[str, Any] = Field(default_factory=dict, description="entries that go over those of config.json")
    chat_template: str | None = Field(default=None, description="a template or the path of one; default: the tokenizer's")
    attention_backend: str = Field(
        default="auto", description="'auto' or a backend's name; 'llmd check --device' says which are usable, and why not"
    )
    structured_outputs_backend: str = Field(
        default="auto", description="'auto' or a grammar plugin's name, for JSON schemas, regexes and grammars"
    )
    tool_call_parser: str = Field(
        default="auto", description="'auto' (by the chat template), 'none', or a parser's name: what finds tool calls"
    )
    reasoning_parser: str = Field(
        default="auto", description="'auto' (by the chat template), 'none', or a parser's name: what sets reasoning apart"
    )
    model_impl: ModelImpl = Field(
        default="auto",
        description="'llmd' (a plugin knows the architecture), 'transformers' (Hugging Face's code, slower), or 'auto': "
        "the second where there is no first",
    )
    prepacked_cache: bool = Field(
        default=True,
        description="on a CPU, keep quantized and packed weights on disk (below LLMD_CACHE_DIR), for the next start to read",
    )
    prepacked_cache_bytes: int = Field(
        default=32 << 30, ge=0, description="room for those of all models; what was not used for longest goes first"
    )
    executor: str = Field(default="thread", description="what drives the device")
    enforce_eager: bool = Field(default=False, description="no CUDA graphs")

    @property
    def gpu(self) -> str:
        """The GPU that it names, as "cuda:1"; the first where it names none, though there may be none; "" on a CPU."""
        if self.device == "cpu":
            return ""
        number = self.device.partition(":")[2]
        return f"cuda:{int(number)}" if number.isdecimal() else "cuda:0"

    @field_validator("cpu_affinity")
    @classmethod
    def _check_cpus(cls, value: str) -> str:
        if value not in ("auto", "none") and not _CPUS.fullmatch(value):
            raise ValueError(f"must be 'auto', 'none' or CPUs such as '0-3,8', got {value!r}")
        return value


class CacheConfig(Section):
    """`[cache]`: the KV block pool."""

    block_size: int = Field(default=16, ge=1, le=1024, description="tokens a KV block")
    gpu_memory_utilization: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="a model's share of a GPU's memory, weights included, whatever neighbours have; at most what is free. "
        "The default is divided among the models of a GPU",
    )
    kv_cache_bytes: int | None = Field(
        default=None,
        ge=1,
        description="bytes of the KV pool; default: by gpu_memory_utilization, on a CPU a quarter of free memory to 4 GiB, "
        "as far as weights and steps leave it",
    )
    kv_cache_dtype: KVCacheDType = Field(
        default="auto",
        description="'auto': the model's dtype; int8 or fp8 (e4m3), with scales a token and head: half of bfloat16's bytes",
    )
    enable_prefix_caching: bool = Field(default=True, description="reuse KV blocks of equal prefixes")
    isolate_keys: bool = Field(default=False, description="each API key has its own prefix cache")

    @field_validator("kv_cache_dtype", mode="before")
    @classmethod
    def _plain_name(cls, value: object) -> object:
        return _KV_CACHE_DTYPES.get(value, value) if isinstance(value, str) else value


class SchedulerConfig(Section):
    """`[scheduler]`: what a step may hold and who waits."""

    policy: str = Field(
        default="fair", description="'fair' (between keys), 'fcfs', 'priority' (between requests), or a plugin's"
    )
    max_num_seqs: int = Field(default=256, ge=1, le=65536, description="sequences running at once")
    max_num_batched_tokens: int = Field(default=2048, ge=1, le=1 << 20, description="token budget of a step")
    enable_chunked_prefill: bool = Field(
        default=True, description="long prompts are computed in pieces beside decoding rows"
    )
    max_waiting_requests: int = Field(default=4096, ge=1, description="requests waiting before new ones get 429")
    max_waiting_tokens: int = Field(default=4_000_000, ge=1, description="prompt tokens waiting before new requests get 429")
    watermark: float = Field(default=0.01, ge=0, lt=1, description="share of KV blocks kept free when a request is admitted")
    priority_aging_s: float = Field(
        default=30.0, gt=0, description="a waiting request gains one level of priority each so many seconds"
    )
    shared_prompt_tokens: int = Field(
        default=256,
        ge=1,
        le=1 << 20,
        description="prompt tokens a step while several keys are served ('fair'): nobody waits for another's long step",
    )
    adapter_drain_threshold: int = Field(
        default=16, ge=1, description="sequences that an adapter may start while others wait for its slot on the device"
    )


class AdaptersConfig(Section):
    """`[adapters]`: LoRA adapters on the served model, the first of several."""

    enable_lora: bool = Field(default=False, description="serve adapters; without it no layer keeps room for them")
    max_loras: int = Field(default=8, ge=1, le=1024, description="adapters on the device at once: those a step can mix")
    max_lora_rank: int = Field(default=16, ge=1, le=512, description="largest rank that is taken; memory grows with it")
    max_cpu_loras: int | None = Field(
        default=None, ge=1, le=65536, description="adapters kept in host memory; default: 64, or max_loras if that is more"
    )
    lora_modules: tuple[str, ...] = Field(default=(), description="adapters served from the start, 'name=folder' each")
    lora_dir: str | None = Field(
        default=None, description="folder whose subfolders are adapters, each found by its name when first asked for"
    )
    lora_allowed_roots: tuple[str, ...] = Field(
        default=(), description="folders below which POST /v1/load_lora_adapter may load, besides lora_dir"
    )
    lora_target_modules: tuple[str, ...] = Field(
        default=(), description="modules that adapters may change, such as 'q_proj'; none named: all"
    )

    @field_validator("lora_modules", mode="before")
    @classmethod
    def _spell_modules(cls, value: Any) -> Any:
        """A table name → folder and vLLM's JSON objects become 'name=folder'."""
        if isinstance(value, Mapping):
            return tuple(f"{name}={path}" for name, path in value.items())
        return tuple(map(_spell_module, value)) if isinstance(value, list | tuple) else value

    @field_validator("lora_modules")
    @classmethod
    def _check_modules(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = [entry.partition("=")[0] for entry in value]
        for name, entry in zip(names, value, strict=True):
            if not name or not entry.partition("=")[2]:
                raise ValueError(f"must be 'name=folder', got {entry!r}")
            if names.count(name) > 1:
                raise ValueError(f"names {name!r} twice")
        return value

    def modules(self) -> dict[str, str]:
        """lora_modules as name → folder."""
        return {name: path for name, _, path in (entry.partition("=") for entry in self.lora_modules)}

    @property
    def host_slots(self) -> int:
        """max_cpu_loras, or its default."""
        return self.max_cpu_loras or max(self.max_loras, 64)


def _spell_module(entry: Any) -> Any:
    if isinstance(entry, str) and entry.lstrip().startswith("{"):
        try:
            entry = json.loads(entry)
        except ValueError:
            return entry
    if isinstance(entry, Mapping) and {"name", "path"} <= entry.keys() <= {"name", "path", "base_model_name"}:
        return f"{entry['name']}={entry['path']}"
    return entry


class ServerConfig(Section):
    """`[server]`: the HTTP listener."""

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0: any free one")
    uds: str | None = Field(default=None, description="UNIX socket to listen on instead")
    admin_socket: str | None = Field(
        default=None,
        description="UNIX socket of the admin routes, its permission is the key; '': none; "
        "default: admin.sock in systemd's RUNTIME_DIRECTORY, else none",
    )
    admin_socket_mode: Literal["0600", "0660"] = Field(
        default="0600", description="permission of the admin socket: only the daemon's user and root, or its group too"
    )
    metrics_host: str = Field(default="127.0.0.1", description="address of the metrics listener")
    metrics_port: int | None = Field(
        default=None, ge=0, le=65535, description="port that serves /metrics alone, without a key; none: no such listener"
    )
    root_path: str = Field(default="", description="prefix of every path behind a proxy")
    api_keys: tuple[str, ...] = Field(
        default=(), description="keys that clients may send; none: no key is asked for", repr=False
    )
    api_key_file: str | None = Field(
        default=None, description="file with one key a line; 'credential:NAME': one that systemd handed over"
    )
    admin_keys: tuple[str, ...] = Field(
        default=(), description="keys for admin routes; none: admin routes are refused", repr=False
    )
    open_routes: tuple[str, ...] = Field(default=("/health", "/ready", "/version"), description="paths served without a key")
    cors_allowed_origins: tuple[str, ...] = Field(default=(), description="origins that browsers may call from; ['*']: any")
    cors_allowed_methods: tuple[str, ...] = Field(
        default=("GET", "POST", "OPTIONS"), description="methods that browsers may use"
    )
    cors_allowed_headers: tuple[str, ...] = Field(default=("*",), description="headers that browsers may send")
    ssl_certfile: str | None = Field(default=None, description="TLS certificate (PEM)")
    ssl_keyfile: str | None = Field(default=None, description="TLS key (PEM)")
    max_body_bytes: int = Field(default=32 << 20, ge=1024, description="largest request body")
    max_header_bytes: int = Field(default=16384, ge=1024, description="largest header field")
    max_stream_buffer_bytes: int = Field(
        default=4 << 20, ge=1024, description="unread output of a slow client before it is cut off"
    )
    request_timeout_s: float | None = Field(default=None, gt=0, description="deadline of a request; none: no deadline")
    drain_timeout_s: float = Field(default=30.0, ge=0, description="seconds that running requests get at shutdown")
    return_request_id: bool = Field(default=True, description="answer with X-Request-Id")


KEY_NAME = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$"
KEY_HASH = r"^sha256:[0-9a-f]{64}$"


class KeyConfig(Section):
    """`[[keys]]`: one API key, who has it and what it may do. `llmd key new NAME` prints a new one."""

    name: str = Field(default="", pattern=KEY_NAME, description="who has it; seen in logs, metrics and receipts")
    key: str | None = Field(default=None, min_length=1, description="the key; 'hash' and 'file' are safer", repr=False)
    hash: str | None = Field(
        default=None, pattern=KEY_HASH, description="the key's digest, from `llmd key new` or `llmd key hash`"
    )
    file: str | None = Field(
        default=None, description="file that holds the key; 'credential:NAME': one that systemd handed over"
    )
    weight: float = Field(default=1.0, gt=0, le=1000, description="share of the device beside other keys")
    priority: int = Field(
        default=0, ge=-1000, le=1000, description="lower goes first, before any share; waiting makes up for it"
    )
    models: tuple[str, ...] = Field(default=(), description="served models it may use; none named: all")
    adapters: tuple[str, ...] = Field(default=(), description="adapters it may use; none named: all")
    requests_per_minute: int | None = Field(default=None, ge=1, le=10**9, description="requests a minute")
    tokens_per_minute: int | None = Field(default=None, ge=1, le=10**12, description="prompt and output tokens a minute")
    max_concurrent: int | None = Field(default=None, ge=1, le=10**6, description="requests at once")
    max_tokens: int | None = Field(default=None, ge=1, description="output tokens a sequence")
    max_context: int | None = Field(default=None, ge=1, description="prompt and output tokens a sequence")


class LimitsConfig(Section):
    """`[limits]`: bounds on what one request may ask."""

    max_n: int = Field(default=16, ge=1, le=128, description="continuations a request")
    max_prompts: int = Field(default=256, ge=1, description="prompts in one completions request")
    max_inputs: int = Field(default=2048, ge=1, description="texts in one embeddings, classify, score or rerank request")
    max_messages: int = Field(default=4096, ge=1, description="messages in one chat request")
    max_logprobs: int = Field(default=20, ge=0, le=100, description="top logprobs a token")
    max_output_tokens: int | None = Field(default=None, ge=1, description="output tokens a sequence; none: the context")
    max_template_bytes: int = Field(default=4 << 20, ge=1024, description="length of a rendered chat template")
    max_grammar_bytes: int = Field(default=256 << 10, ge=16, description="length of a schema, regex or grammar")
    grammar_timeout_s: float = Field(default=10.0, gt=0, description="seconds that compiling one may take")
    grammar_cache_size: int = Field(default=256, ge=1, description="compiled grammars kept for reuse")


class PluginsConfig(BaseModel):
    """`[plugins]`: which are loaded; `[plugins.<name>]` tables are the plugins' own settings."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, protected_namespaces=(), defer_build=True)

    autoload: bool = Field(default=True, description="load plugin wheels found at start-up")
    disable: tuple[str, ...] = Field(default=(), description="never load these")
    only: tuple[str, ...] = Field(default=(), description="load these wheels and no other (built-ins are always loaded)")
    require: tuple[str, ...] = Field(default=(), description="refuse to start without these")
    prefer: dict[str, str] = Field(
        default_factory=dict, description="'family.name' = distribution, where two wheels offer one name"
    )
    on_plugin_failure: Literal["fallback", "fail"] = Field(
        default="fallback",
        description="when a wheel's sampler or attention backend raises in a step: built-in ones take over, or it fails",
    )


class LogConfig(Section):
    """`[log]`: what is written to stderr."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severe level that is logged"
    )
    format: Literal["auto", "text", "json", "journald"] = Field(
        default="auto",
        description="'text' or 'json' lines on stderr, 'journald' (fields, by its own protocol); auto: journald under it",
    )
    access: bool = Field(default=True, description="one line for each ended request")
    recent_requests: int = Field(
        default=1000, ge=0, le=1_000_000, description="ended requests that `llmd explain` still finds in the daemon"
    )
    otlp_traces_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="OpenTelemetry collector that spans are sent to (OTLP over HTTP), as 'http://localhost:4318'",
    )
    prompts: bool = Field(default=False, description="log prompt and output text")
    stats_interval_s: float = Field(
        default=10.0, ge=0, description="a throughput line each so many seconds of work; 0: none"
    )


class HealthConfig(Section):
    """`[health]`: what counts as alive, and what is left behind when it is not."""

    hang_timeout_s: float = Field(
        default=8.0,
        ge=0.1,
        le=3600,
        description="no step ends, no layer is computed and an idle executor does not answer for so long: the process ends",
    )
    state_dir: str | None = Field(
        default=None, description="folder for flight records and the journal; default: systemd's STATE_DIRECTORY, else none"
    )
    flight_steps: int = Field(default=512, ge=0, le=65536, description="steps that the flight recorder keeps; 0: off")
    flight_tokens: bool = Field(
        default=False, description="flight records hold token ids, so that a replay can compare them"
    )
    max_flight_records: int = Field(default=8, ge=1, le=1000, description="flight records kept on disk")
    refuse_suspects_s: float = Field(
        default=3600.0,
        ge=0,
        description="a prompt that was running in two crashes in a row is refused for so long; 0: never",
    )


class Config(Section):
    """The whole configuration."""

    models: tuple[ModelConfig, ...] = Field(
        default_factory=lambda: (ModelConfig(),), min_length=1, description="the models to serve"
    )
    cache: CacheConfig = Field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    adapters: AdaptersConfig = Field(default_factory=AdaptersConfig)
    server: ServerConfig = Field(default_factory=ServerConfig)
    keys: tuple[KeyConfig, ...] = Field(default=(), description="API keys with names, shares and limits")
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    plugins: PluginsConfig = Field(default_factory=PluginsConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    health: HealthConfig = Field(default_factory=HealthConfig)

    _places: Mapping[Path, str] = PrivateAttr(default_factory=dict)  # key → "etc/llmd.toml:12", "LLMD_…" or "--port"

    def cache_of(self, model: ModelConfig) -> CacheConfig:
        """`[cache]` as one model has it: a share of a GPU that nobody set is divided among the models there."""
        num_models = sum(other.gpu == model.gpu for other in self.models)
        cache = self.cache
        if num_models < 2 or {"gpu_memory_utilization", "kv_cache_bytes"} & cache.model_fields_set:
            return cache
        share = int(100 * cache.gpu_memory_utilization / num_models) / 100
        return cache.model_copy(update={"gpu_memory_utilization": share})

    def place(self, path: Path) -> str:
        """Where a key was set ("etc/llmd.toml:12"), or the nearest table around it; "" if nowhere."""
        return place_of(self._places, path)

    def problem(self, path: Path, text: str) -> str:
        """One line about a key, led by the place where it was set, as far as that is known."""
        place = place_of(self._places, path)
        return f"{place}: {dotted(path)}: {text}" if place else f"{dotted(path)}: {text}"


def dotted(path: Path) -> str:
    """A key as it is spoken of: server.port, models[0].dtype."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def place_of(places: Mapping[Path, str], path: Path) -> str:
    """Where a key was set, or else the nearest table around it."""
    for length in range(len(path), 0, -1):
        if place := places.get(path[:length]):
            return place
    return ""
