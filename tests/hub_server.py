"""A ModelScope hub on loopback that serves a folder: what the real client asks of the real hub."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, urlsplit

from modelscope_hub import set_default_config


@dataclass
class Hub:
    """The running server: its address, and the files that were downloaded from it."""

    url: str = ""
    downloads: list[str] = field(default_factory=list)


@contextmanager
def serve_hub(root: Path) -> Iterator[Hub]:
    """Serve `root/<owner>/<name>/…` as repositories."""
    set_default_config(None)  # the client remembers the first hub of a process
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = {k: v[0] for k, v in parse_qs(url.query).items()}
            parts = url.path.strip("/").split("/")
            if parts[:3] != ["api", "v1", "models"] or not (root / "/".join(parts[3:5])).is_dir():
                self.reply(404, b'{"Code": 404, "Success": false, "Message": "no such model"}')
                return
            repository = root / parts[3] / parts[4]
            if parts[5:] == ["repo", "files"]:
                self.reply(200, json.dumps(listing(repository)).encode())
            elif parts[5:] == ["repo"]:
                hub.downloads.append(query["FilePath"])
                self.reply(200, (repository / query["FilePath"]).read_bytes())
            else:
                data = {"Code": 200, "Success": True, "Data": {"Revision": "master"}}
                self.reply(200, json.dumps(data).encode())

        def do_HEAD(self) -> None:
            self.do_GET()

        def reply(self, status: int, body: bytes) -> None:
            span = self.headers.get("Range")
            if span and status == 200:
                first, last = span.removeprefix("bytes=").split("-")
                total, start = len(body), int(first)
                end = int(last) + 1 if last else total
                body = body[start:end]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{total}")
            else:
                self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def listing(repository: Path) -> dict[str, object]:
    files = [
        {
            "Path": path.relative_to(repository).as_posix(),
            "Name": path.name,
            "Type": "blob",
            "Size": path.stat().st_size,
            "Sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "Revision": "master",
        }
        for path in sorted(repository.rglob("*"))
        if path.is_file()
    ]
    return {"Code": 200, "Success": True, "Data": {"Files": files, "TotalCount": len(files)}}
