"""Version 1 of the plugin API: all that a plugin may import, each name loaded from its home when first used."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:  # what type checkers see; a test keeps it equal to _HOMES
    from llmd.config import AdaptersConfig as AdaptersConfig
    from llmd.config import CacheConfig as CacheConfig
    from llmd.config import Config as Config
    from llmd.config import KeyConfig as KeyConfig
    from llmd.config import LimitsConfig as LimitsConfig
    from llmd.config import LogConfig as LogConfig
    from llmd.config import ModelConfig as ModelConfig
    from llmd.config import SchedulerConfig as SchedulerConfig
    from llmd.config import Section as Section
    from llmd.config import ServerConfig as ServerConfig
    from llmd.credentials import secret_path as secret_path
    from llmd.engine.adapter_slots import AdapterInfo as AdapterInfo
    from llmd.engine.executor import AdapterFacts as AdapterFacts
    from llmd.engine.executor import Executor as Executor
    from llmd.engine.executor import ExecutorInfo as ExecutorInfo
    from llmd.engine.executor import KVGroup as KVGroup
    from llmd.engine.executor import LoadProgress as LoadProgress
    from llmd.engine.grammar import CompiledGrammar as CompiledGrammar
    from llmd.engine.grammar import GrammarMatcher as GrammarMatcher
    from llmd.engine.params import BeamSearchParams as BeamSearchParams
    from llmd.engine.params import PoolingParams as PoolingParams
    from llmd.engine.params import SamplingParams as SamplingParams
    from llmd.engine.params import StructuredOutputsParams as StructuredOutputsParams
    from llmd.engine.pulse import TellsMoves as TellsMoves
    from llmd.engine.queue import Load as Load
    from llmd.engine.queue import Share as Share
    from llmd.engine.queue import WaitingQueue as WaitingQueue
    from llmd.engine.request import Prompt as Prompt
    from llmd.engine.request import Request as Request
    from llmd.engine.request import Span as Span
    from llmd.engine.sequence import Sequence as Sequence
    from llmd.engine.step import AdapterLoad as AdapterLoad
    from llmd.engine.step import BlockCopy as BlockCopy
    from llmd.engine.step import BlockUpdate as BlockUpdate
    from llmd.engine.step import FinishReason as FinishReason
    from llmd.engine.step import RowAdmit as RowAdmit
    from llmd.engine.step import SequenceDelta as SequenceDelta
    from llmd.engine.step import StepPlan as StepPlan
    from llmd.engine.step import StepResult as StepResult
    from llmd.engine.step import TokenLogprobs as TokenLogprobs
    from llmd.errors import AdapterError as AdapterError
    from llmd.errors import AdapterNotFound as AdapterNotFound
    from llmd.errors import ConfigError as ConfigError
    from llmd.errors import EngineFailure as EngineFailure
    from llmd.errors import ExecutorHangs as ExecutorHangs
    from llmd.errors import InvalidParams as InvalidParams
    from llmd.errors import InvalidRequest as InvalidRequest
    from llmd.errors import LlmdError as LlmdError
    from llmd.errors import ModelError as ModelError
    from llmd.errors import ModelNotFound as ModelNotFound
    from llmd.errors import NotReady as NotReady
    from llmd.errors import Overloaded as Overloaded
    from llmd.errors import StepFailed as StepFailed
    from llmd.errors import StepOutOfMemory as StepOutOfMemory
    from llmd.folders import model_folder as model_folder
    from llmd.model.adapters import Adapter as Adapter
    from llmd.model.adapters import AdapterFormat as AdapterFormat
    from llmd.model.adapters import BaseModule as BaseModule
    from llmd.model.adapters import LowRank as LowRank
    from llmd.model.adapters import find_module as find_module
    from llmd.model.attention import AttentionBackend as AttentionBackend
    from llmd.model.attention import AttentionExtras as AttentionExtras
    from llmd.model.attention import AttentionLimits as AttentionLimits
    from llmd.model.attention import EncoderAttentionBackend as EncoderAttentionBackend
    from llmd.model.attention import HeadTurn as HeadTurn
    from llmd.model.attention import Merit as Merit
    from llmd.model.attention_library import AttentionLibrary as AttentionLibrary
    from llmd.model.attention_library import LibraryAttention as LibraryAttention
    from llmd.model.attention_library import LibraryStep as LibraryStep
    from llmd.model.attention_library import missing_release as missing_release
    from llmd.model.attention_library import stored_call as stored_call
    from llmd.model.batch import Batch as Batch
    from llmd.model.config import ArchitectureConfig as ArchitectureConfig
    from llmd.model.device_stream import TensorPlace as TensorPlace
    from llmd.model.executor import ThreadExecutor as ThreadExecutor
    from llmd.model.head_start import head_start as head_start
    from llmd.model.layers import Embedding as Embedding
    from llmd.model.layers import Layer as Layer
    from llmd.model.layers import Layers as Layers
    from llmd.model.layers import Linear as Linear
    from llmd.model.layers import LMHead as LMHead
    from llmd.model.layers import WeightSlot as WeightSlot
    from llmd.model.layers.experts import Experts as Experts
    from llmd.model.layers.experts import route as route
    from llmd.model.layers.recurrence import linear_recurrence as linear_recurrence
    from llmd.model.layers.recurrence import short_convolution as short_convolution
    from llmd.model.logits import LogitsContext as LogitsContext
    from llmd.model.logits import LogitsProcessor as LogitsProcessor
    from llmd.model.logits import Rows as Rows
    from llmd.model.parts import ModelParts as ModelParts
    from llmd.model.quantization import PartMethods as PartMethods
    from llmd.model.quantization import Quantization as Quantization
    from llmd.model.quantization import QuantMethod as QuantMethod
    from llmd.model.quantization import TableMethod as TableMethod
    from llmd.model.quantization import add_dense_weights as add_dense_weights
    from llmd.model.sampler import Sampler as Sampler
    from llmd.model.sampler import SamplerContext as SamplerContext
    from llmd.model.sampler import TorchSampler as TorchSampler
    from llmd.model.sampler_triton import TritonSampler as TritonSampler
    from llmd.model.staging import to_device as to_device
    from llmd.model.states import RowState as RowState
    from llmd.model.weight_memory import MappedFile as MappedFile
    from llmd.model.weight_names import TensorInfo as TensorInfo
    from llmd.model.weights import Checkpoint as Checkpoint
    from llmd.offline import LLM as LLM
    from llmd.plugin.specs import AdapterFormatSpec as AdapterFormatSpec
    from llmd.plugin.specs import ArchitectureSpec as ArchitectureSpec
    from llmd.plugin.specs import AttentionBackendSpec as AttentionBackendSpec
    from llmd.plugin.specs import AttentionNeeds as AttentionNeeds
    from llmd.plugin.specs import AuthenticatorSpec as AuthenticatorSpec
    from llmd.plugin.specs import CheckpointFormatSpec as CheckpointFormatSpec
    from llmd.plugin.specs import CommandSpec as CommandSpec
    from llmd.plugin.specs import ConfigSectionSpec as ConfigSectionSpec
    from llmd.plugin.specs import ExecutorSpec as ExecutorSpec
    from llmd.plugin.specs import GrammarSpec as GrammarSpec
    from llmd.plugin.specs import KVStoreSpec as KVStoreSpec
    from llmd.plugin.specs import LogitsProcessorSpec as LogitsProcessorSpec
    from llmd.plugin.specs import MetricsSpec as MetricsSpec
    from llmd.plugin.specs import MiddlewareSpec as MiddlewareSpec
    from llmd.plugin.specs import ModelSourceSpec as ModelSourceSpec
    from llmd.plugin.specs import ParserSpec as ParserSpec
    from llmd.plugin.specs import ProposerSpec as ProposerSpec
    from llmd.plugin.specs import QuantizationSpec as QuantizationSpec
    from llmd.plugin.specs import RequestSummary as RequestSummary
    from llmd.plugin.specs import RouteSpec as RouteSpec
    from llmd.plugin.specs import SamplerSpec as SamplerSpec
    from llmd.plugin.specs import SchedulingPolicySpec as SchedulingPolicySpec
    from llmd.plugin.specs import ServiceSpec as ServiceSpec
    from llmd.plugin.specs import Spec as Spec
    from llmd.precompile import Precompiled as Precompiled
    from llmd.precompile import precompile as precompile
    from llmd.replay import Replayed as Replayed
    from llmd.replay import read_flight as read_flight
    from llmd.replay import replay_flight as replay_flight
    from llmd.server.app import ServerContext as ServerContext
    from llmd.server.auth import Authenticator as Authenticator
    from llmd.server.auth import KeySet as KeySet
    from llmd.server.auth import Principal as Principal
    from llmd.server.auth import bearer_token as bearer_token
    from llmd.server.auth import key_digest as key_digest
    from llmd.server.beam import beam_chat as beam_chat
    from llmd.server.beam import beam_search as beam_search
    from llmd.server.beam import beam_text as beam_text
    from llmd.server.body import read_json_object as read_json_object
    from llmd.server.chat import ChatStream as ChatStream
    from llmd.server.chat import open_chat as open_chat
    from llmd.server.chat_plan import render_conversation as render_conversation
    from llmd.server.chat_types import ChatAnswer as ChatAnswer
    from llmd.server.chat_types import ChatCall as ChatCall
    from llmd.server.chat_types import ChatDelta as ChatDelta
    from llmd.server.chat_types import ToolCall as ToolCall
    from llmd.server.deadlines import limit_time as limit_time
    from llmd.server.deadlines import time_limit_s as time_limit_s
    from llmd.server.deadlines import timeout_message as timeout_message
    from llmd.server.errors import RequestRefused as RequestRefused
    from llmd.server.errors import WireError as WireError
    from llmd.server.errors import json_response as json_response
    from llmd.server.errors import refusal_of_end as refusal_of_end
    from llmd.server.errors import wire_error as wire_error
    from llmd.server.fields import RequestFields as RequestFields
    from llmd.server.fields import Whole as Whole
    from llmd.server.fields import check_field_names as check_field_names
    from llmd.server.fields import field_path as field_path
    from llmd.server.fields import list_at as list_at
    from llmd.server.fields import object_at as object_at
    from llmd.server.fields import parse_request as parse_request
    from llmd.server.fields import shown as shown
    from llmd.server.fields import string_at as string_at
    from llmd.server.fields import wrong_value as wrong_value
    from llmd.server.generate import ModelService as ModelService
    from llmd.server.local import LocalAnswer as LocalAnswer
    from llmd.server.local import LocalClient as LocalClient
    from llmd.server.middleware import Receipt as Receipt
    from llmd.server.middleware import receipt_of as receipt_of
    from llmd.server.openapi import error_responses as error_responses
    from llmd.server.openapi import json_operation as json_operation
    from llmd.server.sse import EventStream as EventStream
    from llmd.server.sse import sse_event as sse_event
    from llmd.text.json_schemas import STRING_FORMATS as STRING_FORMATS
    from llmd.text.json_schemas import JsonSchema as JsonSchema
    from llmd.text.json_schemas import change_schemas as change_schemas
    from llmd.text.json_schemas import close_objects as close_objects
    from llmd.text.json_schemas import read_json_schema as read_json_schema
    from llmd.text.json_schemas import schemas_within as schemas_within
    from llmd.text.output import TextDelta as TextDelta
    from llmd.text.parsers import BareJsonCallParser as BareJsonCallParser
    from llmd.text.parsers import CallForm as CallForm
    from llmd.text.parsers import Function as Function
    from llmd.text.parsers import GrammarWriter as GrammarWriter
    from llmd.text.parsers import HeadedCallParser as HeadedCallParser
    from llmd.text.parsers import JsonCallParser as JsonCallParser
    from llmd.text.parsers import JsonScanner as JsonScanner
    from llmd.text.parsers import MarkupCallParser as MarkupCallParser
    from llmd.text.parsers import MarkupStyle as MarkupStyle
    from llmd.text.parsers import NotACall as NotACall
    from llmd.text.parsers import ParsedDelta as ParsedDelta
    from llmd.text.parsers import Parser as Parser
    from llmd.text.parsers import ParserSteps as ParserSteps
    from llmd.text.parsers import PythonScanner as PythonScanner
    from llmd.text.parsers import ReplyParser as ReplyParser
    from llmd.text.parsers import ThinkingParser as ThinkingParser
    from llmd.text.parsers import ToolCallDelta as ToolCallDelta
    from llmd.text.parsers import ToolParser as ToolParser
    from llmd.text.parsers import Unforceable as Unforceable
    from llmd.text.parsers import forced_calls as forced_calls
    from llmd.text.parsers import json_call as json_call
    from llmd.text.parsers import keyword_call as keyword_call
    from llmd.text.parsers import markup_call as markup_call
    from llmd.text.parsers import new_call_id as new_call_id
    from llmd.text.parsers import new_short_call_id as new_short_call_id
    from llmd.text.parsers import plain_name as plain_name
    from llmd.text.parsers import without as without
    from llmd.text.stream import RequestStream as RequestStream
    from llmd.text.structured import Constraint as Constraint
    from llmd.text.structured import GrammarCompiler as GrammarCompiler
    from llmd.text.structured import GrammarContext as GrammarContext

hookimpl = pluggy.HookimplMarker("llmd")

# home → its names; torch and aiohttp are imported only by who asks for names that need them
_HOMES: dict[str, tuple[str, ...]] = {
    "llmd.plugin.specs": (
        "AdapterFormatSpec",
        "ArchitectureSpec",
        "AttentionBackendSpec",
        "AttentionNeeds",
        "AuthenticatorSpec",
        "CheckpointFormatSpec",
        "CommandSpec",
        "ConfigSectionSpec",
        "ExecutorSpec",
        "GrammarSpec",
        "KVStoreSpec",
        "LogitsProcessorSpec",
        "MetricsSpec",
        "MiddlewareSpec",
        "ModelSourceSpec",
        "ParserSpec",
        "ProposerSpec",
        "QuantizationSpec",
        "RequestSummary",
        "RouteSpec",
        "SamplerSpec",
        "SchedulingPolicySpec",
        "ServiceSpec",
        "Spec",
    ),
    "llmd.credentials": ("secret_path",),
    "llmd.errors": (
        "AdapterError",
        "AdapterNotFound",
        "ConfigError",
        "EngineFailure",
        "ExecutorHangs",
        "InvalidParams",
        "InvalidRequest",
        "LlmdError",
        "ModelError",
        "ModelNotFound",
        "NotReady",
        "Overloaded",
        "StepFailed",
        "StepOutOfMemory",
    ),
    "llmd.config": (
        "AdaptersConfig",
        "CacheConfig",
        "Config",
        "KeyConfig",
        "LimitsConfig",
        "LogConfig",
        "ModelConfig",
        "SchedulerConfig",
        "Section",
        "ServerConfig",
    ),
    "llmd.engine.params": (
        "BeamSearchParams",
        "PoolingParams",
        "SamplingParams",
        "StructuredOutputsParams",
    ),
    "llmd.engine.request": (
        "Prompt",
        "Request",
        "Span",
    ),
    "llmd.engine.step": (
        "AdapterLoad",
        "BlockCopy",
        "BlockUpdate",
        "FinishReason",
        "RowAdmit",
        "SequenceDelta",
        "StepPlan",
        "StepResult",
        "TokenLogprobs",
    ),
    "llmd.engine.adapter_slots": ("AdapterInfo",),
    "llmd.engine.executor": (
        "AdapterFacts",
        "Executor",
        "ExecutorInfo",
        "KVGroup",
        "LoadProgress",
    ),
    "llmd.engine.sequence": ("Sequence",),
    "llmd.engine.grammar": (
        "CompiledGrammar",
        "GrammarMatcher",
    ),
    "llmd.engine.pulse": ("TellsMoves",),
    "llmd.engine.queue": ("Load", "Share", "WaitingQueue"),
    "llmd.text.output": ("TextDelta",),
    "llmd.text.parsers": (
        "BareJsonCallParser",
        "HeadedCallParser",
        "CallForm",
        "Function",
        "GrammarWriter",
        "JsonCallParser",
        "JsonScanner",
        "MarkupCallParser",
        "MarkupStyle",
        "NotACall",
        "ParsedDelta",
        "Parser",
        "ParserSteps",
        "PythonScanner",
        "ReplyParser",
        "ThinkingParser",
        "ToolCallDelta",
        "ToolParser",
        "Unforceable",
        "forced_calls",
        "json_call",
        "keyword_call",
        "markup_call",
        "new_call_id",
        "new_short_call_id",
        "plain_name",
        "without",
    ),
    "llmd.text.json_schemas": (
        "JsonSchema",
        "STRING_FORMATS",
        "change_schemas",
        "close_objects",
        "read_json_schema",
        "schemas_within",
    ),
    "llmd.text.stream": ("RequestStream",),
    "llmd.model.adapters": (
        "Adapter",
        "AdapterFormat",
        "BaseModule",
        "LowRank",
        "find_module",
    ),
    "llmd.model.attention": (
        "AttentionBackend",
        "AttentionExtras",
        "AttentionLimits",
        "EncoderAttentionBackend",
        "HeadTurn",
        "Merit",
    ),
    "llmd.model.attention_library": (
        "AttentionLibrary",
        "LibraryAttention",
        "LibraryStep",
        "missing_release",
        "stored_call",
    ),
    "llmd.model.batch": ("Batch",),
    "llmd.model.config": ("ArchitectureConfig",),
    "llmd.model.device_stream": ("TensorPlace",),
    "llmd.model.executor": ("ThreadExecutor",),
    "llmd.model.head_start": ("head_start",),
    "llmd.model.weight_memory": ("MappedFile",),
    "llmd.model.layers": (
        "Embedding",
        "Layer",
        "Layers",
        "Linear",
        "LMHead",
        "WeightSlot",
    ),
    "llmd.model.layers.experts": (
        "Experts",
        "route",
    ),
    "llmd.model.layers.recurrence": (
        "linear_recurrence",
        "short_convolution",
    ),
    "llmd.model.parts": ("ModelParts",),
    "llmd.model.quantization": (
        "PartMethods",
        "QuantMethod",
        "Quantization",
        "TableMethod",
        "add_dense_weights",
    ),
    "llmd.model.logits": (
        "LogitsContext",
        "LogitsProcessor",
        "Rows",
    ),
    "llmd.model.sampler": (
        "Sampler",
        "SamplerContext",
        "TorchSampler",
    ),
    "llmd.model.sampler_triton": ("TritonSampler",),
    "llmd.model.staging": ("to_device",),
    "llmd.model.states": ("RowState",),
    "llmd.model.weight_names": ("TensorInfo",),
    "llmd.model.weights": ("Checkpoint",),
    "llmd.text.structured": (
        "Constraint",
        "GrammarCompiler",
        "GrammarContext",
    ),
    "llmd.folders": ("model_folder",),
    "llmd.offline": ("LLM",),
    "llmd.precompile": ("Precompiled", "precompile"),
    "llmd.replay": ("Replayed", "read_flight", "replay_flight"),
    "llmd.server.app": ("ServerContext",),
    "llmd.server.auth": (
        "Authenticator",
        "KeySet",
        "Principal",
        "bearer_token",
        "key_digest",
    ),
    "llmd.server.beam": (
        "beam_chat",
        "beam_search",
        "beam_text",
    ),
    "llmd.server.body": ("read_json_object",),
    "llmd.server.chat": (
        "ChatStream",
        "open_chat",
    ),
    "llmd.server.chat_plan": ("render_conversation",),
    "llmd.server.chat_types": (
        "ChatAnswer",
        "ChatCall",
        "ChatDelta",
        "ToolCall",
    ),
    "llmd.server.deadlines": ("limit_time", "time_limit_s", "timeout_message"),
    "llmd.server.errors": (
        "RequestRefused",
        "WireError",
        "json_response",
        "refusal_of_end",
        "wire_error",
    ),
    "llmd.server.fields": (
        "RequestFields",
        "Whole",
        "check_field_names",
        "field_path",
        "list_at",
        "object_at",
        "parse_request",
        "shown",
        "string_at",
        "wrong_value",
    ),
    "llmd.server.generate": ("ModelService",),
    "llmd.server.local": (
        "LocalAnswer",
        "LocalClient",
    ),
    "llmd.server.middleware": (
        "Receipt",
        "receipt_of",
    ),
    "llmd.server.openapi": (
        "error_responses",
        "json_operation",
    ),
    "llmd.server.sse": (
        "EventStream",
        "sse_event",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["hookimpl", *_HOME_OF]


def __getattr__(name: str) -> Any:
    """Load a name from its home; `from llmd.api.v1 import NAME` turns the AttributeError into an ImportError."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
