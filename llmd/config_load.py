"""Reading the configuration: default < file < LLMD_* < flags, merged with the place of every key, all errors at once."""

from __future__ import annotations

import json
import os
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from llmd.config import Config, Path, dotted
from llmd.config_keys import config_keys, type_options
from llmd.config_messages import Text, describe_errors, did_you_mean
from llmd.config_toml import key_lines
from llmd.errors import ConfigError

ENV_PREFIX = "LLMD_"
# variables that are not keys of the configuration
OTHER_VARIABLES = frozenset({"LLMD_PLUGINS", "LLMD_USE_MODELSCOPE", "LLMD_CACHE_DIR", "LLMD_KERNEL_FLAGS"})
# what Kubernetes sets in each pod when a Service is called "llmd"
_KUBERNETES = re.compile(r"LLMD_(SERVICE_(HOST|PORT\w*)|PORT|PORT_\d+_(TCP|UDP)\w*)")
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_MULTIPLES = {"k": 1000, "K": 1 << 10, "m": 10**6, "M": 1 << 20, "g": 10**9, "G": 1 << 30, "t": 10**12, "T": 1 << 40}


class Setting(NamedTuple):
    """One key set by a flag."""

    path: Path
    value: Any
    place: str


@dataclass(slots=True)
class Layers:
    """The merged tables, and where each key was set last."""

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[Path, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def set(self, setting: Setting) -> None:
        """Lay one value over what is there; a list grows when its next element is set."""
        node: Any = self.data
        *parents, last = setting.path
        for part, child in zip(parents, setting.path[1:], strict=True):
            node = _descend(node, part, {} if isinstance(child, str) else [])
        if isinstance(last, int) and isinstance(node, list):
            _descend(node, last, setting.value)
        if isinstance(node, dict) or (isinstance(node, list) and isinstance(last, int)):
            node[last] = setting.value  # type: ignore[index]
        else:
            self.problems.append(f"{setting.place}: {dotted(setting.path[:-1])} is not a table")
            return
        for path in [path for path in self.places if path[: len(setting.path)] == setting.path]:
            del self.places[path]
        self.places[setting.path] = setting.place


def _descend(node: Any, part: str | int, empty: Any) -> Any:
    if isinstance(node, dict):
        return node.setdefault(part, empty)
    if isinstance(node, list) and isinstance(part, int) and part <= len(node):
        if part == len(node):
            node.append(empty)
        return node[part]
    return None


def load_config(
    file: str | os.PathLike[str] | None = None,
    *,
    env: Mapping[str, str] | None = None,
    settings: Sequence[Setting] = (),
) -> Config:
    """The configuration of a file, the environment and flags; raises ConfigError with all that is wrong."""
    layers = Layers()
    if file is not None:
        _read_file(layers, FilePath(file))
    _read_environment(layers, os.environ if env is None else env)
    for setting in settings:
        layers.set(setting)
    return build_config(layers)


def build_config(layers: Layers) -> Config:
    """Validate merged layers; raises ConfigError with all that is wrong."""
    try:
        config = Config.model_validate(prepare(Config, layers.data), strict=True)
    except ValidationError as error:
        raise ConfigError(sorted_problems(layers.problems + describe_errors(error, Config, layers.places))) from None
    config._places = layers.places
    if problems := layers.problems + list(cross_check(config)):
        raise ConfigError(sorted_problems(problems))
    return config


def sorted_problems(problems: list[str]) -> list[str]:
    """Without repetition, in the order of the file's lines."""

    def line(problem: str) -> tuple[str, int]:
        match = re.match(r"(.*?):(\d+): ", problem)
        return (match[1], int(match[2])) if match else ("", 0)

    return sorted(dict.fromkeys(problems), key=line)


def _read_file(layers: Layers, file: FilePath) -> None:
    try:
        text = file.read_bytes().decode("utf-8")
        data = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{file}: the configuration file cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: the configuration file is not UTF-8: byte {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_syntax_problem(file, text, str(error))) from None
    layers.data = data
    layers.places = {path: f"{file}:{line}" for path, line in key_lines(text.replace("\r\n", "\n")).items()}


def _syntax_problem(file: FilePath, text: str, message: str) -> str:
    where = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
    line = int(where[1]) if where and where[1] else text.count("\n") + 1
    return f"{file}:{line}: {message[: where.start()] if where else message}"


def _read_environment(layers: Layers, env: Mapping[str, str]) -> None:
    known = None
    for name in sorted(env):
        if not name.startswith(ENV_PREFIX) or name in OTHER_VARIABLES or _KUBERNETES.fullmatch(name):
            continue
        known = known or {variable_name(path): path for path in config_keys(Config)}
        path = known.get(name) or _indexed(name, known)
        if path is None:
            layers.problems.append(f"unknown variable {name}{did_you_mean(name, known)}")
        else:
            layers.set(Setting(path, Text(env[name]), name))


def variable_name(path: Path) -> str:
    """LLMD_SERVER__PORT for server.port."""
    return ENV_PREFIX + "__".join(str(part).upper() for part in path)


def _indexed(name: str, known: Mapping[str, Path]) -> Path | None:
    """The key behind LLMD_MODELS__1__DTYPE, LLMD_PLUGINS__<SECTION>__<KEY> or an entry of a map; None if there is none."""
    parts: Path = tuple(int(part) if part.isdecimal() else part.lower() for part in name[len(ENV_PREFIX) :].split("__"))
    if len(parts) == 3 and parts[0] == "plugins":
        return parts
    if len(parts) >= 3 and parts[0] in ("models", "keys") and isinstance(parts[1], int) and parts[1] < 64:
        first = known.get(variable_name((parts[0], 0, *parts[2:])))
        return (parts[0], parts[1], *first[2:]) if first else None
    return None


def prepare(annotation: Any, value: Any) -> Any:
    """A raw value in the types that strict validation wants: lists as tuples, texts of the environment read by their key."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and isinstance(value, dict):
        known = annotation.model_fields
        return {key: prepare(known[key].annotation, item) if key in known else item for key, item in value.items()}
    options = type_options(annotation)
    if isinstance(value, Text):
        return _read_text(options, value)
    for option in options:
        if typing.get_origin(option) is tuple and isinstance(value, list):
            return tuple(prepare(typing.get_args(option)[0], item) for item in value)
    return value


def _read_text(options: tuple[Any, ...], text: Text) -> Any:
    if not text and type(None) in options:
        return None
    for option in options:
        value = _read_as(option, str(text))
        if value is not None:
            return value
    return str(text)


def _read_as(option: Any, text: str) -> Any:
    """The text as a value of a type, or None if it is none."""
    origin = typing.get_origin(option) or option
    try:
        if origin is bool:
            return {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}.get(text.lower())
        if origin is int:
            return read_int(text)
        if origin is float:
            return float(text)
        if origin is tuple:
            return _read_list(option, text)
        if origin is dict:
            return json.loads(text)
    except ValueError:
        return None
    return text if origin in (str, typing.Literal) else None


def _read_list(option: Any, text: str) -> Any:
    if text.lstrip().startswith("{"):  # an object is one entry, its commas are its own
        return (text,)
    if not text.lstrip().startswith("["):
        return tuple(item.strip() for item in text.split(",") if item.strip())
    return prepare(option, json.loads(text))


def read_int(text: str) -> int:
    """An integer; 4k is 4000 and 4K is 4096, as vLLM reads them. Raises ValueError."""
    match = re.fullmatch(r"([\d.]+)([kKmMgGtT])", text)
    return round(float(match[1]) * _MULTIPLES[match[2]]) if match else int(text)


def _check_keys(config: Config) -> Iterator[str]:
    """`[[keys]]`: one name and one secret each, and models that are served."""
    served = [name for model in config.models for name in model.served_model_name or (model.model,)]
    names: list[str] = []
    for index, key in enumerate(config.keys):
        if not key.name:
            yield config.problem(("keys", index, "name"), "is not set; allowed: the name of who has the key")
        elif key.name in names:
            first = names.index(key.name)
            text = f"{key.name!r} is not valid; allowed: a name that keys[{first}] does not have"
            yield config.problem(("keys", index, "name"), text)
        names.append(key.name)
        given = [name for name in ("key", "hash", "file") if getattr(key, name) is not None]
        if len(given) != 1:
            told = f"{' and '.join(given)} are set" if given else "has no key"
            yield config.problem(("keys", index, *given[1:2]), f"{told}; allowed: one of key, hash and file")
        for model in key.models:
            if model not in served:
                hint = did_you_mean(model, served) or f"; allowed: {', '.join(map(repr, served))}"
                yield config.problem(("keys", index, "models"), f"{model!r} is not served{hint}")


def _check_adapters(config: Config) -> Iterator[str]:
    """`[adapters]`: they are switched on where there are some, and have names of their own."""
    adapters = config.adapters
    for key in ("lora_modules", "lora_dir"):
        if getattr(adapters, key) and not adapters.enable_lora:
            yield config.problem(("adapters", key), "is set while adapters.enable_lora is false; allowed: both, or neither")
    for name in adapters.modules():
        if any(name in (model.served_model_name or (model.model,)) for model in config.models):
            text = f"{name!r} is not valid; allowed: a name that no served model has"
            yield config.problem(("adapters", "lora_modules"), text)


def cross_check(config: Config) -> Iterator[str]:
    """What is wrong with keys together, though each alone is right."""
    yield from _check_keys(config)
    yield from _check_adapters(config)
    server = config.server
    if bool(server.ssl_certfile) != bool(server.ssl_keyfile):
        key = "ssl_certfile" if server.ssl_certfile else "ssl_keyfile"
        yield config.problem(("server", key), "is set alone; allowed: ssl_certfile and ssl_keyfile together, or neither")
    if server.root_path and not re.fullmatch(r"(/[^/\s]+)+", server.root_path):
        yield config.problem(
            ("server", "root_path"), f"{server.root_path!r} is not valid; allowed: a path such as '/llm', or nothing"
        )
    seen: dict[str, int] = {}
    for index, model in enumerate(config.models):
        for name in model.served_model_name or (model.model,):
            if name in seen:
                yield config.problem(
                    ("models", index, "served_model_name"),
                    f"{name!r} is not valid; allowed: a name that models[{seen[name]}] does not have",
                )
            seen.setdefault(name, index)
    if not config.scheduler.enable_chunked_prefill:
        budget = config.scheduler.max_num_batched_tokens
        for index, model in enumerate(config.models):
            if model.max_model_len and model.max_model_len > budget:
                yield config.problem(
                    ("models", index, "max_model_len"),
                    f"{model.max_model_len} is not valid; allowed: at most scheduler.max_num_batched_tokens ({budget}) "
                    "while scheduler.enable_chunked_prefill is off",
                )
