"""A Hugging Face hub of a few small repositories, as far as snapshot_download asks for."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SHA = "a" * 40
FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b"{}",
    "model.safetensors": b"\0" * 300_000,
    "pytorch_model.bin": b"not wanted",
    "original/consolidated.safetensors": b"not wanted",
    "other/model.safetensors": b"not wanted",
    "2_Dense/model.safetensors": b"a module's weights",
    "README.md": b"not wanted",
}


class Hub:
    """Serves `good/model`; `gated/model` wants a token, `down/model` breaks, every other name is unknown."""

    def __init__(self) -> None:
        hub = self
        self.requests: list[str] = []
        self.tokens: set[str] = set()

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                hub.answer(self)

            def do_GET(self):
                hub.answer(self)

            def log_message(self, template, *args):
                hub.requests.append(template % args)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request) -> None:
        """One request."""
        self.tokens.add(request.headers.get("Authorization", ""))
        parts = urlsplit(request.path).path.strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if name == "down/model":
            self._send(request, 500, b"broken")
        elif name == "gated/model" and "hf_good" not in request.headers.get("Authorization", ""):
            self._send(request, 401, b"", {"X-Error-Code": "GatedRepo"})
        elif name not in ("good/model", "gated/model", "empty/model"):
            self._send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
        elif parts[0] == "api":
            self._api(request, name, parts[4:])
        else:
            self._file(request, "/".join(parts[4:]))

    def _api(self, request, name, rest) -> None:
        files = {"README.md": b""} if name == "empty/model" else FILES
        if rest[:1] == ["revision"] and rest[1] not in ("main", SHA):
            self._send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif rest[:1] == ["tree"]:
            rows = [{"type": "file", "path": path, "size": len(data), "oid": "b" * 40} for path, data in files.items()]
            self._send(request, 200, json.dumps(rows).encode())
        else:
            siblings = [{"rfilename": path} for path in files]
            self._send(request, 200, json.dumps({"id": name, "sha": SHA, "siblings": siblings}).encode())

    def _file(self, request, path) -> None:
        data = FILES.get(path)
        if data is None:
            self._send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        etag = hashlib.sha1(data).hexdigest()
        self._send(request, 200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"})

    @staticmethod
    def _send(request, status, body, headers=None) -> None:
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)
