"""A Hugging Face Hub on this machine: models from folders, for the hub library's own client."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What is on it, and what was asked of it."""

    models: dict[str, Path] = field(default_factory=dict)
    """owner/name -> folder of its files."""
    gated: set[str] = field(default_factory=set)
    served: list[str] = field(default_factory=list)
    """Names of the files whose content was handed out."""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a GET."""
        parts = path.partition("?")[0].strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        name, rest = "/".join(parts[2:4] if is_api else parts[:2]), parts[4:] if is_api else parts[2:]
        if name in self.gated and rest[:1] != ["revision"] and rest:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if name not in self.models and name not in self.gated:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if name in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", "v1", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        return self._of_model(self.models[name], name, rest)

    def _of_model(self, folder: Path, name: str, rest: list[str]) -> tuple[int, dict[str, str], bytes]:
        files = sorted(f for f in folder.rglob("*") if f.is_file())
        if rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": _oid(f)}
                for f in files
            ]
            return 200, {}, json.dumps(entries).encode()
        if rest[:1] == ["resolve"]:
            file = folder.joinpath(*rest[2:])
            if not file.is_file():
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
            return 200, {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": COMMIT}, file.read_bytes()
        return 200, {}, json.dumps({"id": name, "modelId": name, "sha": COMMIT, "siblings": []}).encode()


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def serve(hub: Hub, cache: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The hub library of this process asks ``hub``, and keeps what it fetches in ``cache``."""
    from huggingface_hub import constants

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(with_body=True)

        def do_HEAD(self) -> None:
            self._reply(with_body=False)

        def _reply(self, *, with_body: bool) -> None:
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)
                if "/resolve/" in self.path and status == 200:
                    hub.served.append(self.path.rpartition("/")[2])

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    patch.setattr(constants, "ENDPOINT", endpoint)
    patch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
