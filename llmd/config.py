"""Configuration: defaults < TOML file < LLMD_* environment < flags, into frozen pydantic models, all errors at once."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

DType = Literal["auto", "half", "float16", "bfloat16", "float", "float32"]


class Section(BaseModel):
    """A table of the file: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelConfig(Section):
    """`[[models]]`: one served model. The first is the default for requests that name none."""

    model: str = Field("demo", description="'demo', a local folder, or a hub name such as 'Qwen/Qwen2.5-0.5B-Instruct'")
    served_model_name: tuple[str, ...] = Field((), description="names clients may use; empty: the model's own name")
    tokenizer: str | None = Field(None, description="folder or hub name of the tokenizer, where it is not the model's")
    revision: str | None = Field(None, description="branch, tag or commit at the hub")
    download_dir: str | None = Field(None, description="where hub downloads are kept; default: the hub's own cache")
    hf_token: str | None = Field(None, description="hub token; default: the hub's own login", repr=False)
    trust_remote_code: bool = Field(False, description="allow code from the model's folder to run; there is no finer gate")
    load_format: str = Field("auto", description="'auto', 'safetensors', 'dummy' (random weights), or a plugin's format")
    device: str = Field("auto", description="'auto', 'cpu', 'cuda', 'cuda:1' …")
    dtype: DType = Field(
        "auto", description="weights and activations; auto: the checkpoint's (on a CPU float16 becomes bfloat16)"
    )
    quantization: str | None = Field(None, description="quantization method; default: what the checkpoint says")
    max_model_len: int | None = Field(
        None, ge=1, le=1 << 24, description="context length; default: the model's own, as far as the KV pool allows"
    )
    seed: int = Field(0, description="base of the random seeds of requests that bring none")
    generation_config: str = Field("auto", description="sampling defaults: 'auto' (the model's), 'llmd' (none), or a folder")
    override_generation_config: dict[str, Any] = Field(default_factory=dict, description="sampling defaults set here")
    chat_template: str | None = Field(None, description="a template or the path of one; default: the tokenizer's")
    attention_backend: str = Field("auto", description="'auto' or a backend's name")
    executor: str = Field("thread", description="what drives the device")
    enforce_eager: bool = Field(False, description="no CUDA graphs")


class CacheConfig(Section):
    """`[cache]`: the KV block pool."""

    block_size: int = Field(16, ge=1, le=1024, description="tokens a KV block")
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="share of the device's memory to use, weights included"
    )
    kv_cache_bytes: int | None = Field(
        None,
        ge=1,
        description="size of the KV pool; default: from gpu_memory_utilization, on a CPU a quarter of free memory, at most 4 GiB",
    )
    kv_cache_dtype: str = Field("auto", description="'auto': the model's dtype")
    enable_prefix_caching: bool = Field(True, description="reuse KV blocks of equal prefixes")
    isolate_keys: bool = Field(False, description="each API key has its own prefix cache")


class SchedulerConfig(Section):
    """`[scheduler]`: what a step may hold and who waits."""

    policy: str = Field("fcfs", description="'fcfs', 'priority', or a plugin's")
    max_num_seqs: int = Field(256, ge=1, le=65536, description="sequences running at once")
    max_num_batched_tokens: int = Field(2048, ge=1, le=1 << 20, description="token budget of a step")
    enable_chunked_prefill: bool = Field(True, description="long prompts are computed in pieces beside decoding rows")
    max_waiting_requests: int = Field(4096, ge=1, description="requests waiting before new ones get 429")
    max_waiting_tokens: int = Field(4_000_000, ge=1, description="prompt tokens waiting before new requests get 429")
    watermark: float = Field(0.01, ge=0, lt=1, description="share of KV blocks kept free when a request is admitted")
    priority_aging_s: float = Field(
        30.0, gt=0, description="a waiting request gains one level of priority each so many seconds"
    )


class ServerConfig(Section):
    """`[server]`: the HTTP listener."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free one")
    uds: str | None = Field(None, description="UNIX socket to listen on instead")
    root_path: str = Field("", description="prefix of every path behind a proxy")
    api_keys: tuple[str, ...] = Field((), description="keys that clients may send; none: no key is asked for", repr=False)
    api_key_file: str | None = Field(None, description="file with one key a line")
    admin_keys: tuple[str, ...] = Field((), description="keys for admin routes; none: admin routes are refused", repr=False)
    open_routes: tuple[str, ...] = Field(("/health", "/ready", "/version"), description="paths served without a key")
    cors_allowed_origins: tuple[str, ...] = Field((), description="origins that browsers may call from; ['*']: any")
    cors_allowed_methods: tuple[str, ...] = Field(("GET", "POST", "OPTIONS"), description="methods that browsers may use")
    cors_allowed_headers: tuple[str, ...] = Field(("*",), description="headers that browsers may send")
    ssl_certfile: str | None = Field(None, description="TLS certificate (PEM)")
    ssl_keyfile: str | None = Field(None, description="TLS key (PEM)")
    max_body_bytes: int = Field(32 << 20, ge=1024, description="largest request body")
    max_header_bytes: int = Field(16384, ge=1024, description="largest header field")
    max_stream_buffer_bytes: int = Field(4 << 20, ge=1024, description="unread output of a slow client before it is cut off")
    request_timeout_s: float | None = Field(None, gt=0, description="deadline of a request; none: no deadline")
    drain_timeout_s: float = Field(30.0, ge=0, description="seconds that running requests get at shutdown")
    return_request_id: bool = Field(True, description="answer with X-Request-Id")


class LimitsConfig(Section):
    """`[limits]`: bounds on what one request may ask."""

    max_n: int = Field(16, ge=1, le=128, description="continuations a request")
    max_prompts: int = Field(256, ge=1, description="prompts in one completions request")
    max_messages: int = Field(4096, ge=1, description="messages in one chat request")
    max_logprobs: int = Field(20, ge=0, le=100, description="top logprobs a token")
    max_output_tokens: int | None = Field(None, ge=1, description="output tokens a sequence; none: the context")
    max_template_bytes: int = Field(4 << 20, ge=1024, description="length of a rendered chat template")


class PluginsConfig(BaseModel):
    """`[plugins]`: which are loaded; `[plugins.<name>]` tables are the plugins' own settings."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    autoload: bool = Field(True, description="load plugin wheels found at start-up")
    disable: tuple[str, ...] = Field((), description="never load these")
    only: tuple[str, ...] = Field((), description="load these wheels and no other (built-ins are always loaded)")
    require: tuple[str, ...] = Field((), description="refuse to start without these")
    prefer: dict[str, str] = Field(
        default_factory=dict, description="'family.name' = distribution, where two wheels offer one name"
    )


class LogConfig(Section):
    """`[log]`."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe level that is logged")
    format: Literal["text", "json"] = Field("text", description="'text' or 'json' lines on stderr")
    access: bool = Field(True, description="one line for each ended request")
    prompts: bool = Field(False, description="log prompt and output text")
    stats_interval_s: float = Field(10.0, ge=0, description="a throughput line each so many seconds of work; 0: none")


class Config(Section):
    """The whole configuration."""

    models: tuple[ModelConfig, ...] = Field((ModelConfig(),), min_length=1)
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    server: ServerConfig = ServerConfig()
    limits: LimitsConfig = LimitsConfig()
    plugins: PluginsConfig = PluginsConfig()
    log: LogConfig = LogConfig()
