"""The live report: a page that is built again as runs go on, served on this machine only."""

from __future__ import annotations

import http.server
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

__all__ = ["Watcher", "make_server"]

_WATCHED = ("metrics.jsonl", "summary.json", "experiment.json", "evals.json", "tuned.json", "manifest.json")


class Watcher:
    """The newest page of some folders; built again when a file in them has changed.

    Args:
        folders: experiments or run folders.
        build: makes the page.
    """

    def __init__(self, folders: list[Path], build: Callable[[], str]):
        self._folders, self._build = folders, build
        self._seen: dict[str, float] = {}
        self._page = ""
        self.version = 0

    def refresh(self) -> str:
        """The page as it is now."""
        found = {
            str(p): p.stat().st_mtime
            for folder in self._folders
            for name in _WATCHED
            for p in folder.rglob(name)
            if p.exists()
        }
        if found != self._seen or not self._page:
            self._page, self._seen = self._build(), found
            self.version += 1
        return self._page


def make_server(watcher: Watcher, port: int) -> http.server.HTTPServer:
    """A server on 127.0.0.1 that answers / and /version; port 0 takes a free one (`server_port`)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the name that http.server calls
            # A page of another site must not read this one through a name that it points at this machine.
            if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in ("127.0.0.1", "localhost"):
                self.send_error(403)
            elif self.path == "/":
                self._answer(watcher.refresh(), "text/html; charset=utf-8")
            elif self.path == "/version":
                watcher.refresh()
                self._answer(str(watcher.version), "text/plain")
            else:
                self.send_error(404)

        def _answer(self, text: str, kind: str) -> None:
            content = text.encode("utf-8")
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: the terminal shows the address."""

    # One request at a time, so that a page is never built twice at once.
    return http.server.HTTPServer(("127.0.0.1", port), Handler)
