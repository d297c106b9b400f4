"""The part of the Hub's API that pushing a model asks, on loopback; what is committed lies in a folder."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

__all__ = ["HubServer"]

Reply = tuple[int, Any]


class HubServer:
    """Repositories of the owner `me`, for whoever shows the token; large files go by Git LFS."""

    def __init__(self, folder: Path, token: str = "hf_" + "a" * 34):
        self.folder, self.token = folder, token
        self.foreign: set[str] = set()
        """Repositories that this token may read and not write."""
        self.refuses: dict[str, Reply] = {}
        """Replies to requests whose path holds the key."""
        self.requests: list[str] = []
        self.private: dict[str, Any] = {}
        self._large: dict[str, bytes] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None: ...

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                outer.requests.append(f"{self.command} {self.path}")
                shown = self.headers.get("authorization")
                status, content = outer.reply(self.command, self.path, shown, body, self.headers["host"])
                data = b"" if content is None else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_PUT = do_POST

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def reply(self, verb: str, path: str, shown: str | None, body: bytes, host: str) -> Reply:
        for part, reply in self.refuses.items():
            if part in path:
                return reply
        if verb == "PUT":  # an address that was signed for the upload: no token
            self._large[path.rpartition("/")[2]] = body
            return 200, None
        if shown != f"Bearer {self.token}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body), host)
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, self._batch(json.loads(body), host)
        owner, name, *rest = path.removeprefix("/api/models/").split("/")
        repo = f"{owner}/{name}"
        if not self._exists(repo):
            return 404, {"error": "Repository not found"}
        if not rest:
            private = self.private.get(repo)
            return 200, {"id": repo, "modelId": repo, "sha": "0" * 40, "siblings": [], "private": private}
        if repo in self.foreign:
            return 403, {"error": f"You don't have the rights to write to {repo}"}
        return {"auth-check": self._allow, "preupload": self._modes, "commit": self._commit}[rest[0]](
            repo, body, host
        )

    def _exists(self, repo: str) -> bool:
        return repo in self.private or repo in self.foreign

    def _create(self, asked: dict[str, Any], host: str) -> Reply:
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = f"http://{host}/{repo}"
        if repo in self.private:
            return 409, {"error": "You already created this model repo", "url": url}
        if not repo.startswith("me/"):
            return 403, {"error": f"You don't have the rights to create a model under {repo.split('/')[0]}"}
        self.private[repo] = asked.get("visibility", "public") == "private" or asked.get("private", False)
        return 200, {"url": url, "name": repo}

    def _allow(self, repo: str, body: bytes, host: str) -> Reply:
        return 200, {}

    def _modes(self, repo: str, body: bytes, host: str) -> Reply:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".model")) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        return 200, {"files": files}

    def _batch(self, asked: dict[str, Any], host: str) -> dict[str, Any]:
        objects = [
            {**item, "actions": {"upload": {"href": f"http://{host}/upload/{item['oid']}"}}}
            for item in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def _commit(self, repo: str, body: bytes, host: str) -> Reply:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                continue
            target = self.folder / repo / value["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "lfsFile":
                data = self._large[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
            else:
                data = base64.b64decode(value["content"])
            target.write_bytes(data)
        oid = hashlib.sha1(body).hexdigest()
        return 200, {"commitUrl": f"http://{host}/{repo}/commit/{oid}", "commitOid": oid}
