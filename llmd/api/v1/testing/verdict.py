"""One plugin, loaded alone and held to the contract of what it provides: a row for each check, good or bad."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llmd._version import __version__
from llmd.api.v1.testing.compare import require
from llmd.config import Config, ModelConfig, PluginsConfig
from llmd.errors import ConfigError, ModelError
from llmd.model.architectures import FALLBACK
from llmd.plugin.catalog import Catalog, build_catalog
from llmd.plugin.manager import OWN_DISTRIBUTION, Found, find_plugins

Result = Literal["passed", "failed", "skipped"]
Check = Callable[[], None]


class Skipped(Exception):
    """What is checked needs more than the plugin tells."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One check of one thing that the plugin provides."""

    what: str  # "family.name", or the plugin's own
    check: str
    result: Result
    detail: str = ""  # what is wrong, or why it was skipped


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found about one distribution's plugins."""

    distribution: str
    version: str
    llmd: str  # the version that it was checked with
    findings: tuple[Finding, ...]

    @property
    def is_good(self) -> bool:
        """Nothing failed."""
        return all(finding.result != "failed" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """As a wheel may ship it (llmd-verdict.json beside the plugin's module)."""
        return asdict(self) | {"is_good": self.is_good}


def check_plugin(name: str | None = None) -> Verdict:
    """Load the plugins of one distribution (or one plugin) without any other and run every check that fits.

    Without a name: the one distribution that is installed beside llmd. Raises ConfigError for one that is not there.
    """
    found = _named(name)
    distribution, version = found[0].distribution, found[0].version
    findings: list[Finding] = []
    try:
        catalog = build_catalog(PluginsConfig(require=tuple({plugin.entry_point.name for plugin in found})), found)
    except ConfigError as error:
        findings = [Finding(distribution, "loads", "failed", problem) for problem in error.problems]
        return Verdict(distribution, version, __version__, tuple(findings))
    for row in catalog.plugins:
        findings.append(Finding(row.name, "loads", "passed", f"{row.import_ms:.1f} ms"))
        findings += [_run(what, *check) for what in row.provides for check in _checks(catalog, what)]
    return Verdict(distribution, version, __version__, tuple(findings))


def _named(name: str | None) -> list[Found]:
    plugins = find_plugins()
    wheels = sorted({plugin.distribution for plugin in plugins if not plugin.builtin})
    if name is None and len(wheels) == 1:
        name = wheels[0]
    found = [plugin for plugin in plugins if name is not None and plugin.answers_to((name,))]
    if not found:
        told = "which?" if name is None else f"no plugin is named {name!r};"
        raise ConfigError(f"{told} installed: {', '.join([*wheels, OWN_DISTRIBUTION])}")
    return found


def _run(what: str, check: str, call: Check) -> Finding:
    try:
        call()
    except Skipped as why:
        return Finding(what, check, "skipped", str(why))
    except Exception as error:  # noqa: BLE001 - whatever a plugin raises is the finding
        told = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        return Finding(what, check, "failed", " ".join(told.split())[:500])
    return Finding(what, check, "passed")


def _checks(catalog: Catalog, what: str) -> Iterator[tuple[str, Check]]:
    family, _, name = what.partition(".")
    spec = catalog.registry(family)[name]
    yield "summary", lambda: require(bool(spec.summary) and "\n" not in spec.summary, "the summary must be one line")
    check = _FAMILIES.get(family)
    if check is not None:
        yield "contract", lambda: check(spec, catalog)
    elif hasattr(spec, "build"):
        yield "contract", lambda: require(callable(spec.build), "build cannot be called")


# --- families: each checks what can be known without a checkpoint, a key or a network


@contextlib.contextmanager
def _tiny_model(**config: Any) -> Iterator[Path]:
    from llmd.api.v1.testing.tiny_model import make_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        yield make_tiny_model(Path(folder), **config)


def _check_architecture(spec: Any, catalog: Catalog) -> None:
    from llmd.api.v1.testing.architectures import NoLogits, check_architecture

    if FALLBACK in spec.architectures:
        raise Skipped("it serves what no other one knows: its own tests compare it with what stands behind it")
    if spec.is_encoder:
        raise Skipped("encoders are compared with their reference by their own tests")
    with _tiny_model(architectures=[spec.architectures[0]]) as folder:
        given = replace(spec, build=_or_skipped(spec.build), spell=spec.spell and _or_skipped(spec.spell))
        try:
            check_architecture(folder, given, load_format="dummy")
        except NoLogits as error:
            raise Skipped(str(error)) from None


def _or_skipped(call: Callable[..., Any]) -> Callable[..., Any]:
    """What an architecture says about a config is no mistake of its own."""

    def called(*args: Any) -> Any:
        try:
            return call(*args)
        except ModelError as error:
            raise Skipped(f"it does not take a tiny Llama's config.json: {error}") from None

    return called


def _check_quantization(spec: Any, catalog: Catalog) -> None:
    from llmd.api.v1.testing.architectures import check_architecture

    if not spec.online:
        raise Skipped("it needs a quantized checkpoint")
    if spec.devices and "cpu" not in spec.devices:
        raise Skipped(f"it runs on {', '.join(spec.devices)}")
    with _tiny_model() as folder:
        check_architecture(folder, spec, load_format="dummy", quantization=spec.name)


def _check_attention(spec: Any, catalog: Catalog) -> None:
    from llmd.api.v1.testing.attention import check_attention_backend, cpu_reasons

    if spec.for_encoders:
        raise Skipped("encoders' backends are compared by their own tests")
    backend = spec.build()
    if reasons := cpu_reasons(backend):
        raise Skipped(f"not on a CPU: {', '.join(reasons)}")
    check_attention_backend(backend)


def _parser_texts(build: Any) -> list[str]:
    """Plain text, and calls and reasoning between the tags that the class names, whole and broken."""
    opens, closes = getattr(build, "OPENS", ()), getattr(build, "CLOSES", ())
    call = '{"name": "f", "arguments": {"a": [1, "x\\"y"]}}'
    texts = ["", "plain text", "  spaces  ", '{"a": 1}', "<b> & </b>", "Grüße 🌧 \n\n"]
    for tag in opens:
        texts += [f"{tag}", f"{tag}{call}", f"a {tag}\nnot a call\n"]
        texts += [f"a {tag}{call}{end} b" for end in closes]
    return texts


def _check_parser(spec: Any, catalog: Catalog) -> None:
    from llmd.api.v1.testing.parsers import check_parser

    check_parser(spec.build, _parser_texts(spec.build))


def _check_logits_processor(spec: Any, catalog: Catalog) -> None:
    import torch

    from llmd.api.v1 import LogitsContext, SamplingParams
    from llmd.api.v1.testing.logits import check_logits_processor

    context = LogitsContext(max_num_rows=8, max_model_len=32, vocab_size=64, device=torch.device("cpu"))
    processor = spec.build(context)
    asks: list[dict[str, Any]] = [
        {"bad_words": ("b",)}, {"frequency_penalty": 2}, {"presence_penalty": 2}, {"repetition_penalty": 1.5},
        {"min_p": 0.1}, {"top_k": 5}, {"top_p": 0.5}, {"logit_bias": {3: 5.0}}, {"min_tokens": 3}, {"temperature": 0.5},
    ]  # fmt: skip
    wanted = next((params for ask in asks if processor.wants(params := SamplingParams(**ask))), None)
    if wanted is None:
        raise Skipped("no single field of SamplingParams makes it wanted")
    check_logits_processor(spec.build, wanted)


_CONSTRAINTS: Mapping[str, tuple[str, list[str], list[str]]] = {
    "choice": ('["yes", "no"]', ["yes", "no"], ["maybe", "ye"]),
    "regex": ("[ab]{2}c", ["abc", "bbc"], ["c", "ab"]),
    "json": ('{"type": "array", "items": {"type": "integer"}}', ["[1,2]", "[]"], ['["a"]', "{"]),
    "json_object": ("", ["{}", '{"a":1}'], ["[]", "x"]),
}


def _check_grammar(spec: Any, catalog: Catalog) -> None:
    from llmd.api.v1.testing.grammars import check_grammar

    kinds = [kind for kind in spec.kinds if kind in _CONSTRAINTS]
    if not kinds:
        raise Skipped(f"there is no example for kinds {', '.join(spec.kinds) or 'none'}")
    for kind in kinds:
        source, accepts, rejects = _CONSTRAINTS[kind]
        try:
            check_grammar(spec.build, kind, source, accepts=accepts, rejects=rejects)
        except ImportError as error:
            raise Skipped(f"an optional library is missing: {error}") from None


def _check_authenticator(spec: Any, catalog: Catalog) -> None:
    from llmd.api.v1.testing.serving import check_authenticator

    authenticator = spec.build(Config())
    if authenticator is None:
        raise Skipped("with the default configuration there is nothing to check")
    check_authenticator(authenticator, known=())


def _check_route(spec: Any, catalog: Catalog) -> None:
    from llmd.api.v1 import ServerContext
    from llmd.api.v1.testing.serving import check_route

    if "{" in spec.path:
        raise Skipped("its path has parameters")
    sections = {name: section.model() for name, section in catalog.config_sections.items()}
    check_route(spec, [], context=ServerContext(config=Config(), sections=sections, state="ready"))


def _check_detects(spec: Any, catalog: Catalog) -> None:
    with tempfile.TemporaryDirectory() as folder:
        detect = spec.detect if hasattr(spec, "detect") else spec.build().detect
        require(detect(Path(folder)) is False, "an empty folder is taken for its own")


def _check_section(spec: Any, catalog: Catalog) -> None:
    section = spec.model()
    require(spec.live <= set(type(section).model_fields), "`live` names fields that the model does not have")


def _check_command(spec: Any, catalog: Catalog) -> None:
    import click

    require(isinstance(spec.build(), click.Command), "build() gives no click.Command")


def _check_source(spec: Any, catalog: Catalog) -> None:
    answer = spec.claims(ModelConfig(model="no-such/model"))
    require(isinstance(answer, bool), f"claims gave {answer!r}; expected: a bool")


_FAMILIES: Mapping[str, Callable[[Any, Catalog], None]] = {
    "adapter_formats": _check_detects,
    "architectures": _check_architecture,
    "attention_backends": _check_attention,
    "authenticators": _check_authenticator,
    "checkpoint_formats": _check_detects,
    "commands": _check_command,
    "config_sections": _check_section,
    "grammars": _check_grammar,
    "logits_processors": _check_logits_processor,
    "model_sources": _check_source,
    "quantizations": _check_quantization,
    "reasoning_parsers": _check_parser,
    "routes": _check_route,
    "tool_parsers": _check_parser,
}
