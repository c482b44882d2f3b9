"""Our own plugin loader: one by one, each ends in a status row, a broken one leaves nothing behind.

    entry points ─► blocked? ─► import ─► check hooks ─► register ─► collect its specs ─► PluginStatus
                       │           │           │             │              │
                    disabled   incompatible    └── failed: unregistered, one WARNING line

pluggy's own loader stops at the first broken wheel, and a plugin that it refuses stays half registered in 1.6.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import util
from importlib.metadata import Distribution, EntryPoint, distributions
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Literal, get_args, get_type_hints

import pluggy

from llmd.config import PluginsConfig
from llmd.errors import ConfigError
from llmd.plugin import hookspecs
from llmd.plugin.registry import Owner
from llmd.plugin.specs import Spec

log = logging.getLogger(__name__)

GROUP = "llmd.plugins"
OWN_DISTRIBUTION = "llmd"
SAFE_MODE_VARIABLE = "LLMD_PLUGINS"
_REGISTER = "llmd_register_"

State = Literal["loaded", "disabled", "incompatible", "failed"]


def spec_types() -> dict[str, type[Spec]]:
    """Family → the spec that its register hook returns, in the order of hookspecs.py."""
    hooks = {name: hook for name, hook in vars(hookspecs).items() if name.startswith(_REGISTER)}
    return {name.removeprefix(_REGISTER): get_args(get_type_hints(hook)["return"])[0] for name, hook in hooks.items()}


SPEC_TYPES = spec_types()


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginStatus:
    """What became of one entry point; `provides` lists "family.name"."""

    name: str
    distribution: str
    version: str
    state: State
    reason: str = ""
    hooks: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()
    import_ms: float = 0.0
    builtin: bool = False

    @property
    def owner(self) -> Owner:
        """Whose specs these are."""
        return Owner(plugin=self.name, distribution=self.distribution, builtin=self.builtin)


@dataclass(frozen=True, slots=True)
class Found:
    """An entry point and the distribution it comes from."""

    entry_point: EntryPoint
    distribution: str
    version: str

    @property
    def builtin(self) -> bool:
        """Whether it is one of llmd's own."""
        return self.distribution == OWN_DISTRIBUTION

    @property
    def sort_key(self) -> tuple[bool, str, str]:
        """Built-ins first, then wheels, each by name."""
        return (not self.builtin, self.distribution, self.entry_point.name)

    def answers_to(self, names: Sequence[str]) -> bool:
        """Whether the config names this plugin or its distribution."""
        return self.entry_point.name in names or self.distribution in names


@dataclass(frozen=True, slots=True)
class Impl:
    """One implementation of one hook."""

    plugin: str
    hook: str
    function: Callable[..., Any]
    argnames: tuple[str, ...]

    def call(self, arguments: Mapping[str, Any]) -> Any:
        """Call it with those of the arguments that it names."""
        return self.function(*[arguments[name] for name in self.argnames])


class Refused(Exception):
    """A plugin breaks the contract of hooks."""


def _distribution_name(distribution: Distribution) -> str:
    return re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()


def find_plugins() -> list[Found]:
    """Every entry point of the group, built-ins first; of a distribution found twice on the path the first counts."""
    found: dict[str, list[Found]] = {}
    for distribution in distributions():
        entry_points = [point for point in distribution.entry_points if point.group == GROUP]
        if entry_points and (name := _distribution_name(distribution)) not in found:
            version = distribution.version  # each time it is asked for, the whole metadata is parsed
            found[name] = [Found(point, name, version) for point in entry_points]
    return sorted((plugin for plugins in found.values() for plugin in plugins), key=lambda plugin: plugin.sort_key)


def is_safe_mode() -> bool:
    """LLMD_PLUGINS=none: only built-ins."""
    value = os.environ.get(SAFE_MODE_VARIABLE, "")
    if value not in ("", "none"):
        raise ConfigError(f"{SAFE_MODE_VARIABLE}: {value!r} is not known; allowed: 'none' (only built-ins), or unset")
    return value == "none"


def _missing_from_api(error: BaseException | None) -> str | None:
    """What the plugin wanted of llmd.api and did not find, if that is why its import failed."""
    while error is not None:
        if isinstance(error, ImportError) and (error.name or "").split(".")[:2] == ["llmd", "api"]:
            wanted = re.search(r"cannot import name '([^']+)' from '([^']+)'", str(error))
            return f"{wanted[2]} has no {wanted[1]}" if wanted else f"there is no {error.name}"
        if isinstance(error, AttributeError):
            module = str(getattr(error.obj, "__name__", ""))
            if module.startswith("llmd.api"):
                return f"{module} has no {error.name}"
        error = error.__cause__ or error.__context__
    return None


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _Hooks(pluggy.PluginManager):
    """Looks at a module's functions only: pluggy's own way costs a quarter of the start."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        if not isinstance(plugin, ModuleType):
            return super().parse_hookimpl_opts(plugin, name)
        value = vars(plugin).get(name)
        return getattr(value, f"{self.project_name}_impl", None) if isinstance(value, FunctionType) else None


class PluginManager:
    """Loads plugins into a pluggy manager that belongs to this object; nothing is global."""

    def __init__(self, config: PluginsConfig) -> None:
        self._config = config
        self._pm = _Hooks("llmd")
        self._pm.add_hookspecs(hookspecs)
        self._arguments = {
            name: frozenset(caller.spec.argnames)
            for name, caller in vars(self._pm.hook).items()
            if not name.startswith("_") and caller.spec is not None
        }
        self.statuses: dict[str, PluginStatus] = {}
        self.specs: dict[str, dict[str, list[Spec]]] = {}  # plugin → family → specs
        self._impls: dict[str, list[Impl]] = {}  # hook → in the order of registration
        self._suspects: set[str] = set()  # plugins that did not load and may be authenticators
        self.load_ms = 0.0  # finding, importing and asking all of them

    def load(self, found: Iterable[Found] | None = None) -> None:
        """Load what may be loaded; raises ConfigError where the configuration forbids to go on without one."""
        start_s = time.perf_counter()
        plugins = find_plugins() if found is None else list(found)
        safe_mode = is_safe_mode()
        self._warn_unknown_names(plugins)
        for plugin in plugins:
            self._load_one(plugin, self._why_blocked(plugin, safe_mode))
        self._index_impls()
        self.load_ms = (time.perf_counter() - start_s) * 1e3
        if problems := self._fatal(plugins):
            raise ConfigError(problems)

    def _why_blocked(self, plugin: Found, safe_mode: bool) -> str:
        name, config = plugin.entry_point.name, self._config
        if name in self.statuses:
            return f"the name {name!r} is already taken by {self.statuses[name].distribution}"
        if plugin.answers_to(config.disable):
            return "named in plugins.disable"
        if plugin.builtin:
            return ""
        if safe_mode:
            return f"safe mode ({SAFE_MODE_VARIABLE}=none)"
        if config.only and not plugin.answers_to(config.only):
            return "not named in plugins.only"
        wanted = plugin.answers_to((*config.only, *config.require))
        return "" if config.autoload or wanted else "plugins.autoload is off"

    def _load_one(self, plugin: Found, why_blocked: str) -> None:
        name = plugin.entry_point.name
        key = name if name not in self.statuses else f"{name} ({plugin.distribution})"
        status = PluginStatus(
            name=key, distribution=plugin.distribution, version=plugin.version, builtin=plugin.builtin, state="loaded"
        )
        if why_blocked:
            self._pm.set_blocked(key)
            self.statuses[key] = replace(status, state="disabled", reason=why_blocked)
            return
        start_s = time.perf_counter()
        try:
            module = plugin.entry_point.load()
            status = replace(status, import_ms=round((time.perf_counter() - start_s) * 1e3, 2))
            hooks = self._check_hooks(module)
            self._pm.register(module, name=key)
            self.specs[key] = self._collect_specs(key)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a plugin raises must not reach the others
            self._forget(key)
            self.statuses[key] = self._failed(plugin, status, error)
        else:
            provides = [f"{family}.{spec.name}" for family, specs in self.specs[key].items() for spec in specs]
            self.statuses[key] = replace(status, hooks=hooks, provides=tuple(provides))

    def _check_hooks(self, module: Any) -> tuple[str, ...]:
        """The names of the hooks that a plugin implements; raises Refused for what the contract does not allow."""
        hooks = []
        for name in dir(module):
            options = self._pm.parse_hookimpl_opts(module, name)
            if options is None:
                continue
            hook = options.get("specname") or name
            if hook not in self._arguments:
                if options.get("optionalhook"):
                    continue
                raise Refused(self._unknown_hook(hook))
            if options.get("wrapper") or options.get("hookwrapper"):
                raise Refused(f"{hook} is a wrapper; allowed: a plain implementation that returns its result")
            self._check_arguments(hook, pluggy.HookImpl(module, name, getattr(module, name), options).argnames)
            hooks.append(hook)
        return tuple(hooks)

    def _unknown_hook(self, hook: str) -> str:
        closest = get_close_matches(hook, self._arguments, n=1)
        return f"there is no hook {hook}" + (f"; did you mean {closest[0]}?" if closest else "")

    def _check_arguments(self, hook: str, argnames: Sequence[str]) -> None:
        if wrong := [name for name in argnames if name not in self._arguments[hook]]:
            allowed = ", ".join(sorted(self._arguments[hook])) or "none"
            raise Refused(f"{hook} has no argument {wrong[0]}; allowed: {allowed}")

    def _impls_of(self, plugin: str) -> list[Impl]:
        return [
            Impl(impl.plugin_name, name, impl.function, tuple(impl.argnames))
            for name in self._arguments
            for impl in getattr(self._pm.hook, name).get_hookimpls()
            if impl.plugin_name == plugin
        ]

    def _collect_specs(self, plugin: str) -> dict[str, list[Spec]]:
        """All specs of one plugin by family; raises Refused for a wrong type or a name given twice."""
        collected: dict[str, list[Spec]] = {}
        for impl in self._impls_of(plugin):
            if impl.hook.startswith(_REGISTER):
                family = impl.hook.removeprefix(_REGISTER)
                specs = collected.setdefault(family, [])
                specs.extend(_check_specs(impl.hook, SPEC_TYPES[family], impl.call({})))
        for family, specs in collected.items():
            names = [spec.name for spec in specs]
            if twice := [name for name in names if names.count(name) > 1]:
                raise Refused(f"llmd_register_{family} gives the name {twice[0]!r} twice")
        return collected

    def _failed(self, plugin: Found, status: PluginStatus, error: BaseException) -> PluginStatus:
        state: State = "failed"
        reason = str(error) if isinstance(error, Refused) else _describe(error)
        if missing := _missing_from_api(error):
            state, reason = "incompatible", f"{missing} in llmd {_own_version()}: the plugin needs another version of llmd"
        if _may_authenticate(plugin):
            self._suspects.add(status.name)
        log.warning("plugin %s (%s %s) is %s: %s", status.name, plugin.distribution, plugin.version, state, reason)
        log.debug("plugin %s", status.name, exc_info=error)
        return replace(status, state=state, reason=reason)

    def _forget(self, plugin: str) -> None:
        """Take back every trace of a registration, whole or half."""
        if self._pm.has_plugin(plugin):
            self._pm.unregister(name=plugin)
        self.specs.pop(plugin, None)

    def _index_impls(self) -> None:
        for name in self._arguments:
            impls = getattr(self._pm.hook, name).get_hookimpls()
            self._impls[name] = [Impl(impl.plugin_name, name, impl.function, tuple(impl.argnames)) for impl in impls]

    def note(self, plugin: str, reason: str) -> None:
        """Write into a loaded plugin's row what went wrong later."""
        self.statuses[plugin] = replace(self.statuses[plugin], reason=reason)

    @property
    def falls_back(self) -> bool:
        """Whether built-in objects take over from a wheel's that raise in a step."""
        return self._config.on_plugin_failure == "fallback"

    def impls(self, hook: str) -> list[Impl]:
        """Implementations of a hook as pluggy keeps them: the last is asked first."""
        return self._impls[hook]

    def _warn_unknown_names(self, plugins: list[Found]) -> None:
        known = {name for plugin in plugins for name in (plugin.entry_point.name, plugin.distribution)}
        for key, names in (("disable", self._config.disable), ("only", self._config.only)):
            for name in names:
                if name not in known:
                    log.warning("plugins.%s: no plugin is named %r%s", key, name, _did_you_mean(name, known))

    def _fatal(self, plugins: list[Found]) -> list[str]:
        """Why the daemon must not start: a required plugin or an authenticator did not load."""
        problems = []
        for name in self._config.require:
            rows = [row for row in self.statuses.values() if name in (row.name, row.distribution)]
            if not rows:
                known = {known for plugin in plugins for known in (plugin.entry_point.name, plugin.distribution)}
                problems.append(f"plugins.require: no plugin is named {name!r}{_did_you_mean(name, known)}")
            problems += [
                f"plugins.require: {row.name} is {row.state}: {row.reason}" for row in rows if row.state != "loaded"
            ]
        for name in sorted(self._suspects):
            row = self.statuses[name]
            problems.append(
                f"plugin {name} is {row.state} and may be an authenticator: {row.reason}; "
                f'mend it, or start without it: [plugins] disable = ["{name}"]'
            )
        return problems


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    closest = get_close_matches(name, list(known), n=1)
    return f"; did you mean {closest[0]!r}?" if closest else ""


def _own_version() -> str:
    from llmd._version import __version__

    return __version__


def _check_specs(hook: str, spec_type: type[Spec], result: Any) -> list[Spec]:
    if not isinstance(result, list | tuple):
        raise Refused(f"{hook} returned {type(result).__name__}; allowed: a list of {spec_type.__name__}")
    for spec in result:
        if not isinstance(spec, spec_type):
            raise Refused(f"{hook} returned a {type(spec).__name__}; allowed: a list of {spec_type.__name__}")
        if not isinstance(spec.name, str) or not spec.name:
            raise Refused(f"{hook} returned a spec named {spec.name!r}; allowed: a string that is not empty")
    return list(result)


def _sources(module: str) -> list[Path]:
    """The files of a module or package, found without importing anything of it."""
    first, *rest = module.split(".")
    spec = util.find_spec(first)
    if spec is None:
        return []
    if spec.submodule_search_locations is None:
        return [Path(spec.origin)] if spec.origin else []
    files: list[Path] = []
    for location in spec.submodule_search_locations:
        base = Path(location, *rest)
        files += [base.with_suffix(".py")] if rest and not base.is_dir() else base.rglob("*.py")
    return [file for file in files if file.is_file()]


def _may_authenticate(plugin: Found) -> bool:
    """Whether a plugin that could not be loaded speaks of the authenticators' hook: then serving without it is not safe."""
    try:
        files = _sources(plugin.entry_point.module)
        if not files:  # what is not there can only be judged by its name
            return "auth" in plugin.entry_point.name
        return any(b"llmd_register_authenticators" in file.read_bytes() for file in files)
    except (OSError, ValueError, ImportError):
        return True  # who cannot be read cannot be cleared
