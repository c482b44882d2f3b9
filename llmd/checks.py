"""`llmd check`: what the configuration says against what is there. No device is touched, nothing is downloaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ValidationError

from llmd.checks_adapters import check_adapters
from llmd.config import Config, ModelConfig, Path, place_of
from llmd.config_load import load_config, prepare, sorted_problems
from llmd.config_messages import describe_errors, did_you_mean
from llmd.credentials import secret_path
from llmd.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from llmd.plugin.catalog import Catalog
    from llmd.plugin.registry import Registry
    from llmd.plugin.specs import ModelSourceSpec


# keys of a model that name a spec: the family, and what they may hold besides
_NAMING_KEYS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("executor", "executors", ()),
    ("load_format", "checkpoint_formats", ("auto",)),
    ("attention_backend", "attention_backends", ("auto",)),
    ("quantization", "quantizations", ()),
    ("structured_outputs_backend", "grammars", ("auto",)),
    ("tool_call_parser", "tool_parsers", ("auto", "none")),
    ("reasoning_parser", "reasoning_parsers", ("auto", "none")),
)


class Checked(NamedTuple):
    """What was read, as far as it could be, and all that is wrong with it."""

    config: Config | None
    catalog: Catalog | None
    problems: list[str]


def check(config_file: str | None) -> Checked:
    """Parse, load the plugins, compare with the files; imports neither torch nor aiohttp."""
    from llmd.plugin.catalog import build_catalog

    config = None
    try:
        config = load_config(config_file)
        catalog = build_catalog(config.plugins)
    except ConfigError as error:
        return Checked(config, None, error.problems)
    problems: list[str] = []
    parse_sections(config, catalog, problems)
    problems += check_names(config, catalog) + check_files(config, catalog)
    return Checked(config, catalog, sorted_problems(problems))


def parse_sections(config: Config, catalog: Catalog, problems: list[str]) -> dict[str, BaseModel]:
    """Every plugin's settings: its `[plugins.<name>]` table, or the defaults. Mistakes are added to `problems`."""
    tables = config.plugins.model_extra or {}
    given = {_section_name(name, catalog.config_sections): name for name in tables}
    settings = {}
    for name, spec in catalog.config_sections.items():
        path: Path = ("plugins", given.pop(name, name))
        try:
            settings[name] = spec.model.model_validate(prepare(spec.model, tables.get(str(path[1]), {})), strict=True)
        except ValidationError as error:
            problems += describe_errors(error, spec.model, config._places, path)
    for name in given.values():
        problems.append(_unknown_section(config, catalog, name))
    return settings


def _section_name(written: str, sections: Mapping[str, Any]) -> str:
    """The section that is meant: a variable LLMD_PLUGINS__ACME_ZETA__… cannot spell acme.zeta."""
    spelled = {re.sub(r"[^a-z0-9]", "_", name.lower()): name for name in sections}
    return written if written in sections else spelled.get(written, written)


def _unknown_section(config: Config, catalog: Catalog, name: str) -> str:
    known = [*catalog.config_sections, *type(config.plugins).model_fields]
    hint = did_you_mean(name, known) or f"; allowed: {', '.join(known)}"
    place = place_of(config._places, ("plugins", name))
    is_table = isinstance((config.plugins.model_extra or {})[name], dict)
    return (f"{place}: " if place else "") + f"unknown key plugins.{name}{hint}" + (_broken(catalog) if is_table else "")


def _broken(catalog: Catalog) -> str:
    """The end of a line about something missing: plugins that did not load may be the ones that provide it."""
    names = ", ".join(row.name for row in catalog.broken)
    return f"; these plugins did not load, `llmd plugins` tells why: {names}" if names else ""


def check_names(config: Config, catalog: Catalog) -> list[str]:
    """Keys that name what no plugin provides."""
    problems = list(_unknown(config, catalog, ("scheduler", "policy"), config.scheduler.policy, catalog.scheduling_policies))
    for index, model in enumerate(config.models):
        for key, family, others in _NAMING_KEYS:
            name = getattr(model, key, None)
            if name is not None and name not in others:
                problems += _unknown(config, catalog, ("models", index, key), name, catalog.registry(family), others)
        if find_source(catalog, model) is None:
            text = f"{model.model!r} is claimed by no model source; known: {', '.join(catalog.model_sources)}"
            problems.append(config.problem(("models", index, "model"), text) + _broken(catalog))
    server = config.server
    given = ("server", "api_keys" if server.api_keys else "api_key_file") if not config.keys else ("keys", 0, "name")
    if (config.keys or server.api_keys or server.api_key_file) and not catalog.authenticators:
        text = "no authenticator is loaded that could ask for keys"
        problems.append(config.problem(given, text) + _broken(catalog))
    return problems


def _unknown(
    config: Config, catalog: Catalog, path: Path, name: str, registry: Registry[Any], others: tuple[str, ...] = ()
) -> Iterator[str]:
    if name not in registry:
        known = [*others, *registry]
        hint = did_you_mean(name, known) or f"; allowed: {', '.join(map(repr, known)) or 'none is loaded'}"
        yield config.problem(path, f"{name!r} is not known{hint}") + _broken(catalog)


def find_source(catalog: Catalog, model: ModelConfig) -> ModelSourceSpec | None:
    """The model source that claims a model."""
    specs = sorted(catalog.model_sources.values(), key=lambda spec: spec.order)
    return next((spec for spec in specs if spec.claims(model)), None)


def check_files(config: Config, catalog: Catalog) -> list[str]:
    """Files that the configuration names and that are not there, or are no model."""
    problems = []
    for key in ("api_key_file", "ssl_certfile", "ssl_keyfile"):
        if name := getattr(config.server, key):
            problems += [config.problem(("server", key), text) for text in _file_problems(name)]
    for index, given in enumerate(config.keys):
        if given.file is not None:
            problems += [config.problem(("keys", index, "file"), text) for text in _file_problems(given.file)]
    if config.server.uds and not FilePath(config.server.uds).absolute().parent.is_dir():
        problems.append(config.problem(("server", "uds"), f"{config.server.uds!r} is in a folder that does not exist"))
    for index, model in enumerate(config.models):
        problems += [config.problem(("models", index, key), text) for key, text in _model_problems(model, catalog)]
    if not problems:
        problems += check_adapters(config, catalog, _folder(config.models[0], catalog))
    return problems


def _folder(model: ModelConfig, catalog: Catalog) -> FilePath | None:
    """Where a model's files are, as far as they are here."""
    source = find_source(catalog, model)
    if source is None or source.check is None:
        return None
    return source.resolve(model, lambda progress: None)


def _model_problems(model: ModelConfig, catalog: Catalog) -> Iterator[tuple[str, str]]:
    template = model.chat_template
    if template and "{" not in template and "\n" not in template and (why := _unreadable(template)):
        yield "chat_template", f"{template!r} {why}"
    if model.generation_config not in ("auto", "llmd") and not FilePath(model.generation_config).is_dir():
        yield (
            "generation_config",
            f"{model.generation_config!r} is not valid; allowed: 'auto', 'llmd', or a folder that exists",
        )
    source = find_source(catalog, model)
    if source is None or source.check is None:
        return
    if why_not := source.check(model):
        yield "model", why_not
        return
    try:
        folder = source.resolve(model, lambda progress: None)
        check_architecture(folder, catalog, model)
        check_quantization(folder, catalog, model)
    except ModelError as error:
        yield "model", f"{model.model!r} cannot be served: {error}"


def check_architecture(folder: FilePath, catalog: Catalog, model: ModelConfig) -> None:
    """Read config.json; raises ModelError when no plugin knows the model's architecture and no fallback can serve it."""
    from llmd.model.architectures import select_architecture
    from llmd.model.config import read_config, read_raw_config

    known = {name: spec for spec in catalog.architectures.values() for name in spec.architectures}
    raw = read_raw_config(folder, model.hf_overrides)
    try:
        choice = select_architecture(raw, known, model.model_impl)
    except ModelError as error:
        raise ModelError(f"{error}{_broken(catalog)}") from None
    if not choice.is_fallback:  # whose config.json is in words of its own
        read_config(folder, model.hf_overrides)


def check_quantization(folder: FilePath, catalog: Catalog, model: ModelConfig) -> None:
    """Read quantization_config; raises ModelError for what no plugin reads, or not what `quantization` names."""
    from llmd.model.config import read_raw_config
    from llmd.model.quantization_choice import candidates

    settings = read_raw_config(folder, model.hf_overrides).get("quantization_config")
    if settings is not None and not isinstance(settings, dict):
        raise ModelError(f"config.json: quantization_config must be an object, not {type(settings).__name__}")
    if model.quantization is None or model.quantization in catalog.quantizations:  # else it has been told by its key
        candidates(model.quantization, settings, catalog.quantizations)


def _file_problems(name: str) -> Iterator[str]:
    """What keeps a file, or a credential, from being used."""
    try:
        path = secret_path(name)
    except ConfigError as error:
        yield str(error)
        return
    if why := _unreadable(str(path)):
        yield f"{name!r} {why}"


def _unreadable(name: str) -> str:
    if not FilePath(name).is_file():
        return "is not a file"
    return "" if os.access(name, os.R_OK) else "may not be read by this user"
