"""The command line of `llmd serve`: all its mistakes are told at once, nothing is ignored in silence."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from llmd.config_load import Setting
from llmd.config_messages import Text
from llmd.errors import ConfigError
from llmd.flags_table import FLAGS, SHORT, Flag, is_decided

_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][-+]?\d+)?")


@dataclass(slots=True)
class Parsed:
    """What a command line says: keys to set, what llmd decides by itself, and what is wrong."""

    settings: list[Setting] = field(default_factory=list)
    config_file: str | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    wants_help: bool = False

    def take(self, flag: Flag, value: Any, shown: str) -> None:
        """One flag with its value: True or False for a switch, a text, a list of texts, or what JSON said."""
        if flag.path is None:
            self._judge(flag, value, shown)
            return
        if flag.entry:
            self._take_entry(flag, value, shown)
            return
        if flag.inverted:
            value = (0.0 if value else 10.0) if flag.path[-1] == "stats_interval_s" else not value
        self.settings.append(Setting(flag.path, _as_vllm_means(flag.name, value), shown))

    def _take_entry(self, flag: Flag, document: Any, shown: str) -> None:
        """A JSON document of which one entry is a key of ours."""
        assert flag.path is not None
        if not isinstance(document, dict):
            self.problems.append(f"{shown}: {document!r} is not valid; allowed: a JSON object")
            return
        for key, value in document.items():
            if key == flag.entry:
                meant = _as_vllm_means(flag.name, value)
                self.settings.append(Setting(flag.path, meant, f"{shown}.{key}"))
            elif value:
                self.problems.append(f"{shown}.{key}: not built in yet; allowed: {flag.entry}")

    def _judge(self, flag: Flag, value: Any, shown: str) -> None:
        text = {True: "true", False: "false"}.get(value, value) if isinstance(value, bool) else value
        agrees = flag.accepts is None or (isinstance(text, str) and text in flag.accepts)
        if is_decided(flag):
            if agrees:
                self.notes.append(f"{shown}: llmd decides this by itself: {flag.why}")
            else:
                allowed = " or ".join(sorted(flag.accepts or ()))
                self.problems.append(f"{shown}: {text} cannot be had: {flag.why}; allowed: {allowed}")
        elif not agrees:
            hint = f"; allowed: {' or '.join(sorted(flag.accepts))}" if flag.accepts and flag.shape != "switch" else ""
            self.problems.append(f"{shown}: not built in yet: {flag.why}{hint}")


def _as_vllm_means(name: str, value: Any) -> Any:
    """Values that vLLM spells in another way."""
    if not isinstance(value, str):
        return value
    if value == "None" or (name == "max-model-len" and value in ("auto", "-1")):
        return Text("")
    if name == "max-logprobs" and value == "-1":
        return Text("100")
    spelled = {
        ("generation-config", "vllm"): "llmd",
        ("model-impl", "vllm"): "llmd",
        ("uvicorn-log-level", "critical"): "error",
        ("uvicorn-log-level", "trace"): "debug",
        ("guided-decoding-backend", "guidance"): "llguidance",
        ("structured-outputs-config", "guidance"): "llguidance",
    }
    return Text(spelled.get((name, value), value))


def parse_flags(arguments: Sequence[str]) -> Parsed:
    """Read the command line of `llmd serve`; what is wrong with it is in `problems`, all of it."""
    return _Parser(arguments).parse()


class _Parser:
    def __init__(self, arguments: Sequence[str]) -> None:
        self._rest = list(arguments)
        self._parsed = Parsed()
        self._documents: dict[str, dict[str, Any]] = {}  # JSON flags given key by key
        self._model: str | None = None

    def parse(self) -> Parsed:
        while self._rest:
            token = self._rest.pop(0)
            if token in ("-h", "--help"):
                self._parsed.wants_help = True
            elif token.startswith("--") and len(token) > 2:
                self._long(token)
            elif token.startswith("-") and not _NUMBER.fullmatch(token) and len(token) > 1:
                self._short(token)
            elif token != "--":
                self._positional(token)
        for name, document in self._documents.items():
            self._parsed.take(FLAGS[name], document, f"--{name}")
        return self._parsed

    def _positional(self, token: str) -> None:
        if self._model is not None:
            self._parsed.problems.append(f"{token!r} is one argument too many: the model is {self._model!r} already")
            return
        self._model = token
        self._parsed.settings.append(Setting(("models", 0, "model"), token, "MODEL"))

    def _short(self, token: str) -> None:
        name, has_value, value = token.partition("=")
        if name not in SHORT and (match := re.fullmatch(r"-O=?(\w+)", token)):
            name, has_value, value = "-O", "=", match[1]
        if name not in SHORT:
            self._unknown(token, [*SHORT, "-h"])
            return
        self._flag(FLAGS[SHORT[name]], name, value if has_value else None)

    def _long(self, token: str) -> None:
        written, has_value, value = token[2:].partition("=")
        name = written.replace("_", "-")
        given = value if has_value else None
        if name == "config":
            self._parsed.config_file = self._one("--config", given)
        elif (flag := FLAGS.get(name)) is not None:
            self._flag(flag, f"--{written}", given)
        elif name.startswith("no-") and (flag := FLAGS.get(name[3:])) is not None and flag.shape == "switch":
            self._parsed.take(flag, False, f"--{written}")
        elif (flag := FLAGS.get(name.partition(".")[0])) is not None and flag.shape == "json":
            self._json_part(flag, written.partition(".")[2], given)
        else:
            self._unknown(f"--{written}", [f"--{known}" for known in (*FLAGS, "config")])

    def _unknown(self, written: str, known: Iterable[str]) -> None:
        closest = get_close_matches(written.replace("_", "-"), list(known), n=1)
        hint = f"; did you mean {closest[0]}?" if closest else "; see llmd serve --help"
        self._parsed.problems.append(f"unknown flag {written}{hint}")
        while self._model is not None and self._is_value():
            self._rest.pop(0)  # its values, most likely: no mistakes of their own

    def _flag(self, flag: Flag, shown: str, given: str | None) -> None:
        if flag.shape == "switch":
            self._switch(flag, shown, given)
        elif flag.shape == "list":
            self._parsed.take(flag, self._many(shown, given), shown)
        elif (value := self._one(shown, given)) is None:
            return
        elif flag.shape == "json":
            self._json(flag, shown, value)
        else:
            self._parsed.take(flag, value, shown)

    def _switch(self, flag: Flag, shown: str, given: str | None) -> None:
        words = {"true": True, "1": True, "false": False, "0": False}
        if given is not None and given.lower() not in words:
            self._parsed.problems.append(f"{shown}: {given!r} is not valid; allowed: true or false, or nothing")
            return
        self._parsed.take(flag, True if given is None else words[given.lower()], shown)

    def _is_value(self) -> bool:
        return bool(self._rest) and (not self._rest[0].startswith("-") or bool(_NUMBER.fullmatch(self._rest[0])))

    def _one(self, shown: str, given: str | None) -> str | None:
        if given is not None:
            return given
        if self._is_value():
            return self._rest.pop(0)
        self._parsed.problems.append(f"{shown}: a value is missing")
        return None

    def _many(self, shown: str, given: str | None) -> Any:
        """All the values that follow; one alone may be a JSON list or hold commas."""
        values = [given] if given is not None else []
        while given is None and self._is_value():
            values.append(self._rest.pop(0))
        if not values:
            self._parsed.problems.append(f"{shown}: a value is missing")
        return Text(values[0]) if len(values) == 1 else values

    def _json(self, flag: Flag, shown: str, text: str) -> None:
        try:
            self._parsed.take(flag, json.loads(text), shown)
        except ValueError as error:
            self._parsed.problems.append(f"{shown}: {text!r} is not JSON: {error}")

    def _json_part(self, flag: Flag, key: str, given: str | None) -> None:
        """--flag.key value: one entry of a JSON document; --flag.key+ value appends to a list."""
        text = self._one(f"--{flag.name}.{key}", given)
        if text is None:
            return
        *parents, last = key.split(".")
        node = self._documents.setdefault(flag.name, {})
        for parent in parents:
            node = node.setdefault(parent, {})
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if last.endswith("+"):
            node.setdefault(last[:-1], []).append(value)
        else:
            node[last] = value


def settings_of(arguments: Mapping[str, Any]) -> list[Setting]:
    """Keywords named like the flags, as `llmd.serve(model=…, port=…)` takes them; raises ConfigError."""
    parsed = Parsed()
    for written, value in arguments.items():
        flag = FLAGS.get(written.replace("_", "-"))
        if flag is None:
            closest = get_close_matches(written, [name.replace("-", "_") for name in FLAGS], n=1)
            parsed.problems.append(f"unknown setting {written}" + (f"; did you mean {closest[0]}?" if closest else ""))
        elif value is not None:
            parsed.take(flag, _plain(flag, value), written)
    if parsed.problems:
        raise ConfigError(parsed.problems)
    return parsed.settings


def _plain(flag: Flag, value: Any) -> Any:
    if flag.shape == "list" and flag.path is not None:
        return [value] if isinstance(value, str) else list(value)
    return str(value) if flag.path is None and isinstance(value, int | float) and not isinstance(value, bool) else value
