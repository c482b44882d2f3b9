"""The `llmd` program. Nothing heavy is imported before a command needs it; plugins bring further commands."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from llmd._version import __version__
from llmd.errors import CannotListen, ConfigError, EngineFailure, ExitCode, LlmdError, ModelError

if TYPE_CHECKING:
    from llmd.config import Config
    from llmd.config_load import Setting
    from llmd.plugin.catalog import Catalog

_config_option = click.option("--config", "config_file", metavar="FILE", help="The configuration file (TOML).")


def _catalog_of(config_file: str | None) -> Catalog:
    """The plugins that a configuration file allows, for their commands and for listing; no key but [plugins] is checked."""
    from llmd.config import PluginsConfig
    from llmd.plugin.catalog import build_catalog

    if not config_file:
        return build_catalog(PluginsConfig())
    from llmd.config_load import load_config

    return build_catalog(load_config(config_file).plugins)


class LlmdGroup(click.Group):
    """The commands written here, then those of plugins, which are loaded only when one of them is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names: our own in the order of their use, plugins' by name."""
        return [*self.commands, *sorted(set(self._plugin_commands(ctx)) - set(self.commands))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command by name; a plugin's is built now."""
        if cmd_name in self.commands:
            return self.commands[cmd_name]
        spec = self._plugin_commands(ctx).get(cmd_name)
        return None if spec is None else spec.build()

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list for --help: plugins' commands by their summary, without importing them."""
        rows = [(name, command.get_short_help_str(limit=200)) for name, command in self.commands.items()]
        rows += sorted(
            (name, spec.summary) for name, spec in self._plugin_commands(ctx).items() if name not in self.commands
        )
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """An unknown command is told with the closest known one."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            from llmd.config_messages import did_you_mean

            known = self.list_commands(ctx)
            hint = did_you_mean(args[0], known) or f"; known: {', '.join(known)}"
            raise click.UsageError(f"there is no command {args[0]!r}{hint}", ctx) from None

    def _plugin_commands(self, ctx: click.Context) -> Any:
        found = ctx.meta.get("llmd.catalog")
        if found is None:
            found = ctx.meta["llmd.catalog"] = _catalog_of(ctx.params.get("config_file"))
        return found.commands


@click.group(cls=LlmdGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="llmd", message="%(prog)s %(version)s")
@_config_option
@click.pass_context
def main_command(ctx: click.Context, config_file: str | None) -> None:
    """Serve language models. `llmd --config FILE` serves what the file says."""
    if ctx.invoked_subcommand is not None:
        return
    if config_file is None:
        click.echo(ctx.get_help())
        return
    _serve(config_file, [])


class _ServeCommand(click.Command):
    """Reads its flags from the table in llmd.flags, so that all mistakes are told at once."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.params = {"arguments": tuple(args)}
        return []

    def get_usage(self, ctx: click.Context) -> str:
        return "Usage: llmd serve [MODEL] [--config FILE] [FLAGS]"


@main_command.command("serve", cls=_ServeCommand, short_help="Serve a model; flags have vLLM's names.")
@click.pass_context
def serve_command(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Serve MODEL: 'demo', a folder, or a hub name."""
    from llmd.flags import parse_flags

    parsed = parse_flags(arguments)
    if parsed.wants_help:
        from llmd.flags_help import render

        click.echo(render())
        return
    config_file = parsed.config_file or (ctx.parent.params.get("config_file") if ctx.parent else None)
    _serve(config_file, parsed.settings, parsed.notes, parsed.problems)


def _serve(
    config_file: str | None, settings: Sequence[Setting], notes: Sequence[str] = (), problems: Sequence[str] = ()
) -> None:
    from llmd.config_load import load_config
    from llmd.daemon import serve

    def read() -> Config:
        return load_config(config_file, settings=settings)

    try:
        config = read()
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(list(problems))
    for note in notes:
        click.echo(f"llmd: {note}", err=True)
    _end(serve(config, reload=read if config_file else None))


@main_command.command("check", short_help="Check a configuration file; touch no device.")
@_config_option
@click.option("--device", is_flag=True, help="Say which attention backend would be taken, and why not the others.")
@click.pass_context
def check_command(ctx: click.Context, config_file: str | None, device: bool) -> None:
    """Parse the configuration, load the plugins, look for the files it names. Exit 78 if anything is wrong."""
    from llmd.checks import check

    config_file = config_file or (ctx.parent.params.get("config_file") if ctx.parent else None)
    config, catalog, problems = check(config_file)
    if problems:
        raise ConfigError(problems)
    assert config is not None
    assert catalog is not None
    num_loaded = sum(row.state == "loaded" for row in catalog.plugins)
    click.echo(
        f"{config_file or 'the defaults'}: fine; {num_loaded} plugins, models: {', '.join(m.model for m in config.models)}"
    )
    if device:
        from llmd.devices import describe_devices

        for line in describe_devices(config, catalog):
            click.echo(line)


@main_command.command("plan", short_help="Reckon what the models will take and reach; load nothing.")
@_config_option
@click.option("--device-memory", metavar="SIZE", help="Plan for a GPU with so much memory (141GB, 80GiB), here or not.")
@click.option("--device-bandwidth", metavar="RATE", help="The GPU's memory bandwidth (4.3TB/s), for the roofline.")
@click.option(
    "--measure/--no-measure", default=None, help="Measure the memory bandwidth, for the roofline; default: on a CPU."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def plan_command(
    ctx: click.Context,
    config_file: str | None,
    device_memory: str | None,
    device_bandwidth: str | None,
    measure: bool | None,
    as_json: bool,
) -> None:
    """Weights, KV bytes a token, tokens and sequences that fit, for each model. Exit 78 if one does not, with what would."""
    import json

    from llmd.config_load import load_config
    from llmd.daemon import load_catalog
    from llmd.plan import check_fits, describe, parse_rate, parse_size, plain, reckon_models

    size = parse_size(device_memory) if device_memory else None
    rate = parse_rate(device_bandwidth) if device_bandwidth else None
    config = load_config(config_file or (ctx.parent.params.get("config_file") if ctx.parent else None))
    reckoned = reckon_models(config, load_catalog(config), device_bytes=size, bandwidth=rate, measure=measure)
    footprints = list(reckoned)
    if as_json:
        click.echo(json.dumps([plain(footprint) for footprint in footprints], indent=2))
    else:
        click.echo("\n".join(line for footprint in footprints for line in describe(footprint)))
    for footprint, model in zip(footprints, config.models, strict=True):
        check_fits(footprint, model)


@main_command.command("plugins", short_help="List the plugins: what was loaded, and what was not and why.")
@_config_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--timing", is_flag=True, help="The slowest to import first, with their sum.")
@click.option("--url", help="With --timing: what wheels cost in the steps of the daemon at http://HOST:PORT or unix:PATH.")
@click.option("--admin-key", envvar="LLMD_ADMIN_KEY", help="Admin key for --url.")
@click.pass_context
def plugins_command(
    ctx: click.Context, config_file: str | None, as_json: bool, timing: bool, url: str | None, admin_key: str | None
) -> None:
    """Every plugin with its distribution, version, state, reason, hooks, what it provides and its import time.

    A wheel that ships the verdict of `llmd plugin check` is listed with it. Logits processors, samplers and attention
    backends of wheels are timed in each step (on a GPU: until their work is queued): `--timing --url` shows them, and so do
    the daemon's metrics (llmd_plugin_seconds_total). Built-in ones are not timed and pay nothing.
    """
    from dataclasses import asdict

    from llmd.plugin.verdicts import shipped_verdict

    catalog = _catalog_of(config_file or (ctx.parent.params.get("config_file") if ctx.parent else None))
    verdicts = {row.name: None if row.builtin else shipped_verdict(row.distribution) for row in catalog.plugins}
    plugins = sorted(catalog.plugins, key=lambda row: -row.import_ms) if timing else catalog.plugins
    if as_json:
        import json

        told = {name: verdict._asdict() if verdict else None for name, verdict in verdicts.items()}
        click.echo(json.dumps([asdict(row) | {"verdict": told[row.name]} for row in plugins], indent=2))
        return
    rows = [
        (
            row.name,
            f"{row.distribution} {row.version}",
            row.state,
            f"{row.import_ms:.1f} ms",
            "; ".join(filter(None, (row.reason or ", ".join(row.provides or row.hooks), str(verdicts[row.name] or "")))),
        )
        for row in plugins
    ]
    for line in _columns([("NAME", "DISTRIBUTION", "STATE", "IMPORT", "PROVIDES OR REASON"), *rows]):
        click.echo(line)
    if timing:
        imports_ms = sum(row.import_ms for row in plugins)
        click.echo(f"{len(plugins)} plugins in {catalog.manager.load_ms:.1f} ms, {imports_ms:.1f} ms of imports")
    if timing and url:
        _echo_step_costs(url, admin_key)


def _echo_step_costs(url: str, admin_key: str | None) -> None:
    from llmd.plugin_costs import ask_daemon, step_table

    costs = list(step_table(ask_daemon(url, admin_key)))
    if not costs:
        click.echo("no wheel takes part in this daemon's steps")
    for line in _columns([("IN STEPS", "PLUGIN", "CALLS", "A CALL", "TOGETHER", ""), *costs]) if costs else ():
        click.echo(line.rstrip())


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return ["  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows]


@main_command.group(
    "config", invoke_without_command=True, short_help="Print the configuration as a commented TOML file, or compare it."
)
@_config_option
@click.pass_context
def config_command(ctx: click.Context, config_file: str | None) -> None:
    """Every key with its value (defaults, file and environment merged) and one line of comment; secrets are left out."""
    if ctx.invoked_subcommand is not None:
        return
    from llmd.config_load import load_config
    from llmd.config_text import render

    config_file = config_file or (ctx.parent.params.get("config_file") if ctx.parent else None)
    config = load_config(config_file)
    tables = config.plugins.model_extra
    sections = {name: spec.model for name, spec in _catalog_of(config_file).config_sections.items()} if tables else {}
    click.echo(render(config, sections), nl=False)


@config_command.command("diff", short_help="Tell what a reload would do.")
@_config_option
@click.option("--against", metavar="FILE", help="Compare with this file instead of the running daemon.")
@click.option("--socket", "socket_path", metavar="PATH", help="The daemon's admin socket.")
@click.pass_context
def config_diff_command(ctx: click.Context, config_file: str | None, against: str | None, socket_path: str | None) -> None:
    """Each key that differs: applied, needs a drain, or needs a restart.

    A running daemon is asked over its admin socket (--config FILE tells where that is) and compares what it runs with its
    own file as it is now. With --against, a reload of a daemon that runs FILE is told, once it has the file of --config.
    """
    for parent in (ctx.parent, ctx.parent and ctx.parent.parent):
        config_file = config_file or (parent.params.get("config_file") if parent else None)
    if against is None:
        reload_command = _catalog_of(config_file).commands["reload"].build()
        if config_file is not None and socket_path is None:
            socket_path = _admin_socket(config_file)
        arguments = ["--dry-run", *(("--socket", socket_path) if socket_path else ())]
        reload_command.main(arguments, standalone_mode=False)
        return
    from llmd.config_diff import Rules, changes
    from llmd.config_load import load_config

    new = load_config(config_file)
    rules = Rules({name: spec.live for name, spec in _catalog_of(config_file).config_sections.items()})
    found = changes(load_config(against), new, rules)
    for change in found:
        click.echo(change.text)
    if not found:
        click.echo("no key differs")


def _admin_socket(config_file: str) -> str | None:
    """Where the daemon of a configuration file listens for its operators."""
    from llmd.config_load import load_config
    from llmd.listeners import admin_socket_path

    path = admin_socket_path(load_config(config_file))
    return str(path) if path is not None else None


def _end(code: int) -> None:
    """Leave at once: a thread that still imports or loads must not hold the process, nor crash while it is torn down."""
    import contextlib
    import os

    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk is no reason for another exit code
            stream.flush()
    os._exit(code)


def run(arguments: Sequence[str] | None = None, *, fail: Callable[[int], Any] = sys.exit) -> None:
    """Run one command line; every error becomes lines on stderr and an exit code."""
    logging.basicConfig(format="llmd: %(message)s", level=logging.WARNING)  # `serve` sets its own form up
    try:
        result = main_command.main(args=arguments, prog_name="llmd", standalone_mode=False)
    except ConfigError as error:
        for problem in error.problems:
            click.echo(f"llmd: {problem}", err=True)
        fail(ExitCode.CONFIGURATION)
    except LlmdError as error:
        click.echo(f"llmd: {error}", err=True)
        fail(exit_code_of(error))
    except click.ClickException as error:
        error.show()
        fail(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        fail(130)
    except Exception:
        logging.getLogger("llmd").exception("this is a mistake in llmd or in a plugin")
        fail(ExitCode.INTERNAL)
    else:
        if isinstance(result, int) and result:
            fail(result)


def exit_code_of(error: LlmdError) -> ExitCode:
    """What the process tells its supervisor when this ended it."""
    if isinstance(error, ConfigError | ModelError):
        return ExitCode.CONFIGURATION
    if isinstance(error, CannotListen):
        return ExitCode.TRY_AGAIN
    return ExitCode.DEVICE_GONE if isinstance(error, EngineFailure) else ExitCode.INTERNAL


def main() -> None:
    """The entry point of the `llmd` script."""
    run()
