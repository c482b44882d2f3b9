"""The commands as they are typed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import click

from llmd_plugins.commands.operate import logfile, view
from llmd_plugins.commands.operate.client import Admin, Refused, Unreachable, configured_socket, find_target

_SETTINGS = {"help_option_names": ["-h", "--help"]}
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # the other screen, without a cursor
_CONFIGURATION = 78  # the exit code for a configuration that cannot be used
_HOME, _LINE_END, _REST = "\x1b[H", "\x1b[K", "\x1b[J"


def _where(function: Callable[..., None]) -> Callable[..., None]:
    """The options that say which daemon is meant; the command gets `admin`."""

    def call(socket_path: str | None, url: str | None, admin_key: str | None, **options: Any) -> None:
        config_file = click.get_current_context().find_root().params.get("config_file")
        function(Admin(find_target(socket_path or configured_socket(config_file), url, admin_key)), **options)

    call.__doc__, call.__name__ = function.__doc__, function.__name__
    call.__click_params__ = list(getattr(function, "__click_params__", []))  # type: ignore[attr-defined]
    for option in (
        click.option("--admin-key", envvar="LLMD_ADMIN_KEY", help="Admin key for --url."),
        click.option("--url", help="Talk to this URL instead, as http://127.0.0.1:8000."),
        click.option("--socket", "socket_path", metavar="PATH", help="The daemon's admin socket."),
    ):
        call = option(call)
    return call


def _echo(lines: list[str]) -> None:
    click.echo("\n".join(lines))


@click.command("status", context_settings=_SETTINGS)
@_where
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(admin: Admin, as_json: bool) -> None:
    """Tell how a running daemon is: its models, their load, and what each key has used."""
    found = admin.get("/admin/status")
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _echo(view.status_lines(found))


@click.command("top", context_settings=_SETTINGS)
@_where
@click.option(
    "--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, help="Seconds between pictures."
)
@click.option("--once", is_flag=True, help="Print one picture and end.")
def top(admin: Admin, interval: float, once: bool) -> None:
    """Watch a running daemon. Ctrl-C ends it; where the output is no terminal, plain blocks follow each other."""
    before, asked_s = admin.get("/admin/status"), time.monotonic()
    if once:
        time.sleep(min(interval, 1.0))
        _echo(view.top_lines(admin.get("/admin/status"), before, time.monotonic() - asked_s))
        return
    is_terminal = sys.stdout.isatty()
    if is_terminal:
        click.echo(_ENTER, nl=False)
    try:
        _watch(admin, before, asked_s, interval, is_terminal)
    except KeyboardInterrupt:
        return
    finally:
        if is_terminal:
            click.echo(_LEAVE, nl=False)


def _watch(admin: Admin, before: Any, asked_s: float, interval_s: float, is_terminal: bool) -> None:
    while True:
        time.sleep(interval_s)
        now, now_s = admin.get("/admin/status"), time.monotonic()
        lines = view.top_lines(now, before, now_s - asked_s)
        before, asked_s = now, now_s
        click.echo(screen(lines) if is_terminal else "\n".join([*lines, ""]), nl=not is_terminal)


def screen(lines: list[str]) -> str:
    """The lines over the picture before, as far as the terminal has room for them."""
    import shutil

    columns, rows = shutil.get_terminal_size()
    return _HOME + "\n".join(line[:columns] + _LINE_END for line in lines[: rows - 1]) + "\n" + _REST


@click.command("explain", context_settings=_SETTINGS)
@click.argument("request_id")
@_where
@click.option("--log", "log_file", type=click.File(errors="replace"), help="Search this file of JSON log lines instead.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(admin: Admin, request_id: str, log_file: Any, as_json: bool) -> None:
    """Tell what became of a request: REQUEST_ID is the X-Request-Id of its answer, or the id in its body.

    The daemon remembers the last ones (log.recent_requests). In the journal: journalctl LLMD_REQUEST_ID=...
    """
    lines: list[dict[str, Any]] = []
    if log_file is not None:
        receipt, lines = logfile.search(log_file, request_id)
        if receipt is None and not lines:
            raise click.ClickException(f"request {request_id!r} is not in that file")
    else:
        receipt = admin.get(f"/admin/requests/{quote(request_id, safe='')}")
    if as_json:
        click.echo(json.dumps({"receipt": receipt, "lines": lines} if log_file is not None else receipt, indent=2))
        return
    _echo(view.receipt_lines(_shown(receipt)) if receipt is not None else ["no receipt: it has not ended"])
    for entry in lines:
        click.echo(f"  {entry.get('level')} {entry.get('logger')}: {entry.get('message')}")


def _shown(receipt: dict[str, Any]) -> dict[str, Any]:
    """Without what a log line has beside the receipt."""
    return {name: value for name, value in receipt.items() if name not in ("message", "level", "logger", "time")}


@click.command("abort", context_settings=_SETTINGS)
@click.argument("request_id")
@_where
def abort(admin: Admin, request_id: str) -> None:
    """End a running request; its client gets an error that says so."""
    answer = admin.post("/admin/abort", {"request_id": request_id})
    click.echo(f"{answer['request_id']}: {answer['aborted']} sequences ended")


@click.command("drain", context_settings=_SETTINGS)
@_where
@click.option("--wait", is_flag=True, help="Return when the daemon has ended.")
def drain(admin: Admin, wait: bool) -> None:
    """Let a running daemon take no new requests, finish the running ones (server.drain_timeout_s) and end."""
    admin.post("/admin/drain", {})
    click.echo("draining")
    while wait:
        time.sleep(0.2)
        try:
            admin.get("/admin/status")
        except Unreachable:
            click.echo("ended")
            return
        except Refused as error:
            if error.status != 503:
                raise


@click.command("reload", context_settings=_SETTINGS)
@_where
@click.option("--dry-run", is_flag=True, help="Change nothing, only tell what would happen.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def reload(admin: Admin, dry_run: bool, as_json: bool) -> None:
    """Let a running daemon read its configuration again; a file with a mistake changes nothing. Exit 78 if it was refused.

    Without an admin socket: systemctl reload llmd, or SIGHUP to the process; the log tells what became of it.
    """
    report = admin.post(f"/admin/reload?dry_run={str(dry_run).lower()}", {}, refusal=422)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _echo(view.reload_lines(report, is_dry=dry_run))
    if report["refused"]:
        sys.exit(_CONFIGURATION)


COMMANDS: dict[str, click.Command] = {
    command.name or "": command for command in (status, top, explain, abort, reload, drain)
}
