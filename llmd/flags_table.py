"""What each flag of `llmd serve` means, with vLLM's names where the meaning is the same.

Every flag is one of three: it sets a key of the configuration; or llmd decides the matter by itself and only agrees with
what it does anyway; or it asks for something that is not built in, and then it is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from llmd.config import Config, Path
from llmd.config_keys import config_keys, field_of

Shape = Literal["switch", "value", "list", "json"]


class Flag(NamedTuple):
    """What one flag means."""

    name: str
    shape: Shape
    path: Path | None = None  # the key that it sets
    inverted: bool = False  # the flag says "disable" where the key says "enable"
    accepts: frozenset[str] | None = None  # without a path: the values that ask for what llmd does anyway; None: all
    why: str = ""  # without a path: what llmd decides, or what is not built in
    entry: str = ""  # of a JSON document only this entry sets the key; the others are not built in


# flag → key, where the key's table is not plain from the flag's name
_KEYS: dict[str, str] = {
    "model": "models.0.model",
    "tokenizer": "models.0.tokenizer",
    "revision": "models.0.revision",
    "download-dir": "models.0.download_dir",
    "hf-token": "models.0.hf_token",
    "trust-remote-code": "models.0.trust_remote_code",
    "load-format": "models.0.load_format",
    "device": "models.0.device",
    "cpu-threads": "models.0.cpu_threads",
    "cpu-affinity": "models.0.cpu_affinity",
    "dtype": "models.0.dtype",
    "quantization": "models.0.quantization",
    "max-model-len": "models.0.max_model_len",
    "seed": "models.0.seed",
    "generation-config": "models.0.generation_config",
    "override-generation-config": "models.0.override_generation_config",
    "hf-overrides": "models.0.hf_overrides",
    "chat-template": "models.0.chat_template",
    "attention-backend": "models.0.attention_backend",
    "guided-decoding-backend": "models.0.structured_outputs_backend",
    "tool-call-parser": "models.0.tool_call_parser",
    "reasoning-parser": "models.0.reasoning_parser",
    "model-impl": "models.0.model_impl",
    "executor": "models.0.executor",
    "enforce-eager": "models.0.enforce_eager",
    "served-model-name": "models.0.served_model_name",
    "block-size": "cache.block_size",
    "gpu-memory-utilization": "cache.gpu_memory_utilization",
    "kv-cache-memory-bytes": "cache.kv_cache_bytes",
    "kv-cache-bytes": "cache.kv_cache_bytes",
    "kv-cache-dtype": "cache.kv_cache_dtype",
    "enable-prefix-caching": "cache.enable_prefix_caching",
    "scheduling-policy": "scheduler.policy",
    "max-num-seqs": "scheduler.max_num_seqs",
    "max-num-batched-tokens": "scheduler.max_num_batched_tokens",
    "enable-chunked-prefill": "scheduler.enable_chunked_prefill",
    "watermark": "scheduler.watermark",
    "enable-lora": "adapters.enable_lora",
    "max-loras": "adapters.max_loras",
    "max-lora-rank": "adapters.max_lora_rank",
    "max-cpu-loras": "adapters.max_cpu_loras",
    "lora-modules": "adapters.lora_modules",
    "lora-target-modules": "adapters.lora_target_modules",
    "host": "server.host",
    "port": "server.port",
    "uds": "server.uds",
    "root-path": "server.root_path",
    "api-key": "server.api_keys",
    "allowed-origins": "server.cors_allowed_origins",
    "allowed-methods": "server.cors_allowed_methods",
    "allowed-headers": "server.cors_allowed_headers",
    "ssl-certfile": "server.ssl_certfile",
    "ssl-keyfile": "server.ssl_keyfile",
    "shutdown-timeout": "server.drain_timeout_s",
    "enable-request-id-headers": "server.return_request_id",
    "max-logprobs": "limits.max_logprobs",
    "enable-log-requests": "log.access",
    "otlp-traces-endpoint": "log.otlp_traces_endpoint",
    "uvicorn-log-level": "log.level",
}
_ENTRIES: dict[str, tuple[str, str]] = {
    "structured-outputs-config": ("models.0.structured_outputs_backend", "backend"),
}
_INVERTED: dict[str, str] = {"disable-log-requests": "log.access", "disable-uvicorn-access-log": "log.access"}
SHORT: dict[str, str] = {
    "-q": "quantization", "-tp": "tensor-parallel-size", "-pp": "pipeline-parallel-size", "-dp": "data-parallel-size",
    "-ep": "enable-expert-parallel", "-asc": "api-server-count", "-sc": "speculative-config", "-ac": "attention-config",
    "-cc": "compilation-config", "-n": "nnodes", "-r": "node-rank", "-dcp": "decode-context-parallel-size",
    "-pcp": "prefill-context-parallel-size", "-O": "optimization-level", "-dpn": "data-parallel-rank",
    "-dpr": "data-parallel-start-rank", "-dpl": "data-parallel-size-local", "-dpa": "data-parallel-address",
    "-dpp": "data-parallel-rpc-port", "-dpb": "data-parallel-backend", "-dph": "data-parallel-hybrid-lb",
    "-dpe": "data-parallel-external-lb",
}  # fmt: skip

# what llmd decides by itself; "name" is a switch, "name=" takes a value, "name=a|b" agrees with these values only
DECIDED: dict[str, str] = {
    "steps are always planned while the device runs": "async-scheduling disable-async-output-proc num-scheduler-steps= "
    "multi-step-stream-outputs max-num-scheduled-tokens=",
    "one process serves HTTP and drives the device": "api-server-count=1 disable-frontend-multiprocessing "
    "distributed-executor-backend=uni|mp worker-cls=auto nnodes=1 node-rank=0 renderer-num-workers=1 headless=false",
    "/tokenizer_info is always there, behind the key": "enable-tokenizer-info-endpoint",
    "progress bars are drawn where stderr is a terminal": "use-tqdm-on-load",
    "blocks are hashed with sha256": "prefix-caching-hash-algo=sha256|sha256_cbor",
    "preempted sequences are computed again": "preemption-mode=recompute swap-space= num-lookahead-slots=0",
    "CUDA graphs are captured for the sizes that occur": "max-seq-len-to-capture= max-cudagraph-capture-size= "
    "cudagraph-capture-sizes[] optimization-level= performance-mode=balanced",
    "the fastest usable kernels are taken": "disable-custom-all-reduce disable-cascade-attn linear-backend=auto "
    "moe-backend=auto enable-flashinfer-autotune use-v2-block-manager ir-op-priority=",
    "the tokenizer and config formats are told by the files": "tokenizer-mode=auto|hf config-format=auto|hf "
    "task=auto|generate runner=auto|generate convert=auto|none chat-template-content-format=auto "
    "safetensors-load-strategy=lazy max-parallel-loading-workers=1 safetensors-prefetch-num-threads= "
    "safetensors-prefetch-block-size= pt-load-map-location=cpu tokenizer-pool-size=0 tokenizer-pool-type=",
    "tool definitions and usage follow the OpenAI API": "response-role=assistant enable-prompt-tokens-details "
    "fingerprint-mode=full enable-log-deltas enable-flash-late-interaction",
    "tools and reasoning are read wherever the model has a parser": "enable-auto-tool-choice enable-reasoning",
    "a request may fill what is left of the step": "max-num-partial-prefills= max-long-partial-prefills= "
    "long-prefill-token-threshold= scheduler-delay-factor=0|0.0 scheduler-reserve-full-isl prefill-schedule-interval=1 "
    "stream-interval=1",
    "adapters are kept in the model's dtype, with their biases": "lora-dtype=auto enable-lora-bias specialize-active-lora",
    "there is no telemetry and no JIT to watch": "jit-monitor-mode= jit-monitor-verbose fail-on-environ-validation "
    "aggregate-engine-logging enable-logging-iteration-details disable-fastapi-docs log-error-stack=false "
    "enable-server-load-tracking",
    "headers have a bound of their own, server.max_header_bytes": "h11-max-incomplete-event-size= h11-max-header-count=",
}  # fmt: skip

# what is not built in; the values that may be given stand for "not wanted"
ABSENT: dict[str, str] = {
    "this setting of adapters": "fully-sharded-loras=false default-mm-loras{} "
    "enable-tower-connector-lora=false enable-mixed-moe-lora-format=false enable-moe-shared-loras=false "
    "lora-extra-vocab-size= long-lora-scaling-factors= qlora-adapter-name-or-path= enable-prompt-adapter=false "
    "max-prompt-adapters= max-prompt-adapter-token= prompt-adapters[]",
    "parsers in files that are no plugins": "tool-parser-plugin= reasoning-parser-plugin=",
    "tool servers and tools that a template is not shown": "tool-server= exclude-tools-when-tool-choice-none=false",
    "settings of reasoning beyond its parser": "reasoning-config{} cohere-is-reasoning-model cohere-format=",
    "settings of structured output beyond its backend": "guided-decoding-disable-fallback=false "
    "guided-decoding-disable-any-whitespace=false guided-decoding-disable-additional-properties=false",
    "speculative decoding": "speculative-config{} spec-method= spec-model= spec-tokens= speculative-model= "
    "num-speculative-tokens= speculative-model-quantization= speculative-draft-tensor-parallel-size= "
    "speculative-max-model-len= speculative-disable-by-batch-size= speculative-disable-mqa-scorer=false "
    "ngram-prompt-lookup-max= ngram-prompt-lookup-min= spec-decoding-acceptance-method= "
    "typical-acceptance-sampler-posterior-threshold= typical-acceptance-sampler-posterior-alpha= "
    "disable-logprobs-during-spec-decoding=false",
    "tensor parallelism": "tensor-parallel-size=1",
    "pipeline parallelism": "pipeline-parallel-size=1",
    "data parallelism": "data-parallel-size=1 data-parallel-rank=0 data-parallel-start-rank=0 data-parallel-size-local=1 "
    "data-parallel-address= data-parallel-rpc-port= data-parallel-backend= data-parallel-hybrid-lb=false "
    "data-parallel-external-lb=false data-parallel-multi-port-external-lb=false data-parallel-supervisor-port= "
    "dp-supervisor-probe-interval-s= dp-supervisor-probe-timeout-s= dp-supervisor-probe-failure-threshold= "
    "disable-nccl-for-dp-synchronization=false",
    "context parallelism": "prefill-context-parallel-size=1 decode-context-parallel-size=1 dcp-comm-backend= "
    "dcp-kv-cache-interleave-size=1 cp-kv-cache-interleave-size=1",
    "expert parallelism": "enable-expert-parallel=false enable-ep-weight-filter=false enable-eplb=false eplb-config{} "
    "num-redundant-experts=0 expert-placement-strategy=linear enable-elastic-ep=false all2all-backend= enable-dbo=false "
    "ubatch-size=0 dbo-decode-token-threshold= dbo-prefill-token-threshold= enable-return-routed-experts=false "
    "enable-bf16x3-router-gemm=false",
    "serving on several nodes": "master-addr= master-port= distributed-timeout-seconds= cpu-distributed-timeout-seconds= "
    "ray-workers-use-nsight=false",
    "binding to NUMA nodes": "numa-bind=false numa-bind-nodes[] numa-bind-cpus[]",
    "KV tiers and transfer": "kv-offloading-size= kv-offloading-backend= kv-transfer-config{} kv-events-config{} "
    "ec-transfer-config{} kv-sharing-fast-prefill=false calculate-kv-scales=false kv-cache-dtype-skip-layers[] "
    "prefix-match-unit= disable-hybrid-kv-cache-manager=false num-gpu-blocks-override= num-cpu-blocks-override=",
    "weights that stay in host memory": "cpu-offload-gb=0|0.0 cpu-offload-params[] offload-backend=auto "
    "offload-group-size=0 offload-num-in-group= offload-prefetch-step= offload-params[]",
    "sleep mode and weight transfer": "enable-sleep-mode=false enable-cumem-allocator=false weight-transfer-config{} "
    "worker-extension-cls= scheduler-cls=",
    "images, audio and video": "limit-mm-per-prompt= enable-mm-embeds=false interleave-mm-strings=false "
    "language-model-only=false media-io-kwargs{} mm-processor-kwargs{} mm-processor-cache-gb= mm-processor-cache-type= "
    "mm-shm-cache-max-object-size-mb= mm-encoder-only=false mm-encoder-tp-mode= mm-encoder-attn-backend= "
    "mm-encoder-attn-dtype= mm-encoder-fp8-scale-path= mm-encoder-fp8-scale-save-path= mm-encoder-fp8-scale-save-margin= "
    "mm-tensor-ipc= mm-ipc-gpu-memory-gb= skip-mm-profiling=false video-pruning-rate= allowed-local-media-path= "
    "allowed-media-domains[] disable-chunked-mm-input=false disable-mm-preprocessor-cache=false",
    "recurrent models": "mamba-block-size= mamba-cache-dtype=auto mamba-ssm-cache-dtype=auto mamba-cache-mode=none "
    "mamba-backend= enable-mamba-cache-stochastic-rounding=false mamba-cache-philox-rounds=0 gdn-prefill-backend=",
    "changes to the model's config": "rope-scaling{} rope-theta= hf-config-path= model-class-overrides{} "
    "override-attention-dtype= override-neuron-config{} disable-sliding-window=false allow-deprecated-quantization=false",
    "other revisions of code and tokenizer": "code-revision= tokenizer-revision=",
    "pooling settings": "pooler-config{} override-pooler-config{} io-processor-plugin=",
    "prompts as embeddings or without a tokenizer": "enable-prompt-embeds=false skip-tokenizer-init=false tokens-only=false",
    "loader settings": "model-loader-extra-config{} ignore-patterns[]",
    "logits processors named by flag (they are plugins)": "logits-processors[] logits-processor-pattern=",
    "another meaning of logprobs": "logprobs-mode=raw_logprobs use-fp64-gumbel=false return-tokens-as-token-ids=false",
    "profiling and finer traces": "collect-detailed-traces= profiler-config{} "
    "enable-layerwise-nvtx-tracing=false enable-mfu-metrics=false cudagraph-metrics=false kv-cache-metrics=false "
    "kv-cache-metrics-sample= show-hidden-metrics-for-version= enable-per-request-metrics=false",
    "compiler settings": "compilation-config{} kernel-config{} attention-config{} additional-config{} diffusion-config{} "
    "enable-cutedsl-warmup=false",
    "this setting of the HTTP server": "middleware[] allow-credentials=false ssl-ca-certs= ssl-cert-reqs=0 ssl-ciphers= "
    "enable-ssl-refresh=false enable-offline-docs=false grpc=false "
    "enable-force-include-usage=false fingerprint-value= disable-access-log-for-endpoints=",
    "this setting of chat templates": "default-chat-template-kwargs{} trust-request-chat-template=false "
    "intial-incremental-detokenization-offset=",
    "this setting of the log": "log-config-file= max-log-len= enable-log-outputs=false",
}  # fmt: skip

_ENTRY = re.compile(r"([a-z0-9-]+)(\[\]|\{\}|=(.*))?")


def _shape_of(path: Path) -> Shape:
    annotation = str(field_of(Config, path).annotation)
    if "bool" in annotation:
        return "switch"
    if "dict" in annotation:
        return "json"
    return "list" if "tuple" in annotation else "value"


def _parse_path(dotted: str) -> Path:
    return tuple(int(part) if part.isdecimal() else part for part in dotted.split("."))


def _entries(table: Mapping[str, str], *, decided: bool) -> Iterator[Flag]:
    for why, names in table.items():
        for entry in names.split():
            match = _ENTRY.fullmatch(entry)
            assert match is not None, entry
            name, kind, values = match.groups()
            words = frozenset(values.split("|")) if values else frozenset()
            if kind is None or words == {"false"}:
                accepts = frozenset({"true"}) if kind is None else words
                yield Flag(name, "switch", accepts=accepts, why=why)
            else:
                shape: Shape = {"[]": "list", "{}": "json"}.get(kind, "value")  # type: ignore[assignment]
                yield Flag(name, shape, accepts=None if decided and not words else words, why=why)


def _table() -> dict[str, Flag]:
    flags = {name: Flag(name, _shape_of(_parse_path(key)), _parse_path(key)) for name, key in _KEYS.items()}
    flags |= {name: Flag(name, "switch", _parse_path(key), inverted=True) for name, key in _INVERTED.items()}
    flags["disable-log-stats"] = Flag("disable-log-stats", "switch", ("log", "stats_interval_s"), inverted=True)
    flags |= {flag.name: flag for flag in _entries(DECIDED, decided=True)}
    flags |= {flag.name: flag for flag in _entries(ABSENT, decided=False)}
    for name, (key, entry) in _ENTRIES.items():
        flags[name] = Flag(name, "json", _parse_path(key), entry=entry)
    taken = {flag.path for flag in flags.values()}
    for path in config_keys(Config):
        if path not in taken:
            name = str(path[-1]).replace("_", "-")
            if name not in flags or flags[name].path is not None:  # not a name of vLLM's: by the whole key
                name = ".".join(str(part).replace("_", "-") for part in path if part != 0)
            flags[name] = Flag(name, _shape_of(path), path)
    return flags


FLAGS: dict[str, Flag] = _table()


def why_not_built_in(key: str) -> str | None:
    """What to say of a key of the configuration that has the name of a flag for something not built in."""
    flag = FLAGS.get(key.replace("_", "-"))
    if flag is None or flag.path is not None:
        return None
    return f"llmd decides this by itself: {flag.why}" if is_decided(flag) else f"not built in yet: {flag.why}"


def is_decided(flag: Flag) -> bool:
    """Whether llmd decides by itself what the flag is about."""
    return flag.why in DECIDED
