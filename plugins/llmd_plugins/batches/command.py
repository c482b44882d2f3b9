"""`llmd run-batch`: a daemon of its own on a private socket answers a file of requests, then ends."""

from __future__ import annotations

import asyncio
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import aiohttp
import click
import orjson

from llmd_plugins.batches.lines import LineError, parse_line, read_lines, result_line

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_LOOK_S = 0.1
_RETRY_S = 0.5
_STOP_S = 30.0


@click.command(
    "run-batch",
    context_settings={"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]},
    help="Answer the requests of FILE, one JSON object a line as OpenAI's batch API has them. All flags of `llmd serve` "
    "(dtype, max-model-len …) are taken too.",
)
@click.option("-i", "--input-file", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output-file", required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--model", required=True, help="The model that answers.")
@click.option(
    "--output-tmp-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the answers are written until all are there; by default beside the output file.",
)
@click.option(
    "--max-concurrent", type=click.IntRange(1, 65536), default=256, show_default=True, help="Requests in flight at once."
)
@click.option("--enable-metrics", is_flag=True, help="Show /metrics at --host and --port meanwhile.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address for --enable-metrics.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port for --enable-metrics.")
@click.argument("serve_flags", nargs=-1, type=click.UNPROCESSED)
def run_batch(
    input_file: Path,
    output_file: Path,
    model: str,
    output_tmp_dir: Path | None,
    max_concurrent: int,
    enable_metrics: bool,
    host: str,
    port: int,
    serve_flags: tuple[str, ...],
) -> None:
    """The command."""
    if not output_file.absolute().parent.is_dir():
        raise click.BadParameter(f"{str(output_file)!r} is in a folder that does not exist", param_hint="--output-file")
    folder = output_tmp_dir or output_file.absolute().parent
    draft = folder / f".{output_file.name}.{secrets.token_hex(4)}"
    try:
        with input_file.open("rb") as source, draft.open("wb") as output:
            daemon = _daemon(["--model", model, *serve_flags], (host, port) if enable_metrics else None)
            counts = asyncio.run(_run(source, output, daemon, max_concurrent))
        _move(draft, output_file)
    finally:
        draft.unlink(missing_ok=True)
    click.echo(f"{counts[0]} answered, {counts[1]} failed: {output_file}", err=True)


def _move(draft: Path, target: Path) -> None:
    """Into place as a whole, from another file system too."""
    try:
        draft.replace(target)
    except OSError:
        beside = target.with_name(draft.name)
        try:
            beside.write_bytes(draft.read_bytes())
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)


async def _run(
    source: BinaryIO, output: BinaryIO, daemon: AbstractAsyncContextManager[aiohttp.ClientSession], max_concurrent: int
) -> list[int]:
    counts = [0, 0]
    async with daemon as session:
        lines = (data for _, data in read_lines(source))
        async with asyncio.TaskGroup() as group:
            for _ in range(max_concurrent):
                group.create_task(_worker(session, lines, output, counts))
    return counts


@asynccontextmanager
async def _daemon(flags: list[str], address: tuple[str, int] | None) -> AsyncIterator[aiohttp.ClientSession]:
    """A daemon that is ready, on a private socket unless an address is given, and a session; ended with the context."""
    with tempfile.TemporaryDirectory(prefix="llmd-") as folder:
        socket = str(Path(folder) / "socket")
        place = ["--uds", socket] if address is None else ["--host", address[0], "--port", str(address[1])]
        command = [sys.executable, "-m", "llmd", "serve", *flags, *place]
        process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL)
        try:
            url = "http://localhost" if address is None else f"http://{address[0]}:{address[1]}"
            connector = aiohttp.UnixConnector(socket, limit=0) if address is None else aiohttp.TCPConnector(limit=0)
            no_limit = aiohttp.ClientTimeout(total=None)
            async with aiohttp.ClientSession(url, connector=connector, timeout=no_limit) as session:
                await _ready(session, process)
                yield session
        finally:
            await _end(process)


async def _ready(session: aiohttp.ClientSession, process: asyncio.subprocess.Process) -> None:
    while process.returncode is None:
        with suppress(aiohttp.ClientError):  # it does not listen yet
            async with session.get("/ready") as answer:
                if answer.status == 200:
                    return
        await asyncio.sleep(_LOOK_S)
    raise click.exceptions.Exit(process.returncode or 1)  # it has said why


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), _STOP_S)
        except TimeoutError:
            process.kill()
            await process.wait()


async def _worker(session: aiohttp.ClientSession, lines: Iterator[bytes], output: BinaryIO, counts: list[int]) -> None:
    for data in lines:
        request_id = f"batch-{secrets.token_hex(12)}"
        status, custom_id, body = await _answer(session, data, request_id)
        output.write(result_line(custom_id, request_id, status, body))
        counts[status >= 400] += 1


async def _answer(session: aiohttp.ClientSession, data: bytes, request_id: str) -> tuple[int, str, bytes]:
    try:
        line = parse_line(data)
    except LineError as error:
        told = {"message": error.message, "type": "invalid_request_error", "param": error.param, "code": error.code}
        return 400, _custom_id(data), orjson.dumps({"error": told})
    headers = {"X-Request-Id": request_id}
    while True:
        async with session.post(line.url, json=line.body, headers=headers) as answer:
            if answer.status not in (429, 503):
                return answer.status, line.custom_id, await answer.read()
        await asyncio.sleep(_RETRY_S)


def _custom_id(data: bytes) -> str:
    try:
        value: Any = orjson.loads(data)
    except orjson.JSONDecodeError:
        return ""
    found = value.get("custom_id") if isinstance(value, dict) else None
    return found if isinstance(found, str) else ""
