"""A small OpenAI-compatible server that answers as its `model` field says: well, slowly, or badly."""

import asyncio
import queue
import threading
from contextlib import contextmanager

import orjson
from aiohttp import web


def event(body) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


class FakeOpenAI:
    """What it was asked stands in `bodies` and `headers`."""

    def __init__(self) -> None:
        self.bodies, self.headers, self.num_busy = [], [], 0
        self.running = self.most_running = self.num_lists_without_model = 0

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.answer)
        app.router.add_post("/v1/chat/completions", self.answer)
        return app

    async def models(self, request):
        if self.num_lists_without_model:
            self.num_lists_without_model -= 1
            return web.json_response({"data": []})
        return web.json_response({"data": [{"id": "good"}]})

    async def answer(self, request):
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self.play(request, body)
        finally:
            self.running -= 1

    async def play(self, request, body):
        kind = body["model"]
        if kind == "refuses":
            return web.json_response({"error": {"message": "no such thing", "type": "invalid"}}, status=400)
        if kind == "breaks":
            return web.Response(text="<html>oops</html>", status=500)
        if kind == "busy" or (kind == "busy-once" and self.num_busy == 0):
            self.num_busy += 1
            return web.json_response({"error": {"message": "full"}}, status=429, headers={"Retry-After": "0.05"})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await self.stream(response, kind, body, is_chat=request.path.endswith("chat/completions"))
        return response

    async def stream(self, response, kind, body, *, is_chat):
        num = body["max_completion_tokens"] if is_chat else body["max_tokens"]
        if is_chat:
            await response.write(event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}))
        if kind == "slow":
            await asyncio.sleep(0.15)
        if kind == "silent":
            await response.write(b": nothing\n\ndata: [DONE]\n\n")
            return
        for i in range(num):
            last = "length" if i == num - 1 and kind != "truncates" else None
            if kind == "errs" and i == 1:
                await response.write(event({"error": {"message": "device gone"}}))
                return
            if kind == "garbles" and i == 1:
                await response.write(b"data: {nope\n\n")
                return
            if kind == "cuts" and i == 1:
                response._req.transport.abort()
                return
            piece = {"delta": {"content": "x"}} if is_chat else {"text": "x" if kind != "textless" else ""}
            data = event({"choices": [{"index": 0, "finish_reason": last, **piece}]})
            if kind == "pieces":  # an event in the middle of a network packet, and another in two of them
                await response.write(data[:9])
                await asyncio.sleep(0.002)
                data = data[9:]
            await response.write(data)
            await asyncio.sleep(0.01 if kind in ("slow", "good") else 0)
        if kind == "truncates":
            return
        if kind != "countless":
            usage = {"prompt_tokens": 11, "completion_tokens": 2 * num}  # not the number of chunks
            await response.write(event({"choices": [], "usage": usage}))
        await response.write(b"data: [DONE]\n\n")


@contextmanager
def serving(fake: FakeOpenAI):
    """The server in a thread of its own; its base URL."""
    started = queue.SimpleQueue()

    async def serve():
        runner, stop = web.AppRunner(fake.app(), shutdown_timeout=1), asyncio.Event()
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        started.put((asyncio.get_running_loop(), stop, runner.addresses[0][1]))
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    loop, stop, port = started.get(timeout=30)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        assert not thread.is_alive()
