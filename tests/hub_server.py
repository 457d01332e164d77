"""A ModelScope hub on loopback that serves a folder: what the real client asks of the real hub."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

from modelscope_hub import set_default_config


@dataclass
class Hub:
    """The running server: its address, and the files that were downloaded from it.

    Attributes:
        ranges: the `Range` of each of them that was asked for in part.
        sends: how many bytes of a file are sent before no more come; None for all.
        stalls: whether a list of files is begun and never ended.
        listed: what is answered in place of the list of files, where it is not None.
        extra: paths that are listed beside the files of the folder, and served as `b"x"`.
    """

    url: str = ""
    downloads: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    sends: int | None = None
    stalls: bool = False
    listed: object = None
    extra: list[str] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    def __init__(self, root: Path, hub: Hub, over: Event, *connection: Any) -> None:
        self.root, self.hub, self.over = root, hub, over
        super().__init__(*connection)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(url.query).items()}
        parts = url.path.strip("/").split("/")
        if parts[:3] != ["api", "v1", "models"] or not (self.root / "/".join(parts[3:5])).is_dir():
            self.reply(404, b'{"Code": 404, "Success": false, "Message": "no such model"}')
            return
        repository = self.root / parts[3] / parts[4]
        if parts[5:] == ["repo", "files"] and self.hub.stalls:
            self.stall()
        elif parts[5:] == ["repo", "files"]:
            answer = (
                listing(repository, self.hub.extra) if self.hub.listed is None else self.hub.listed
            )
            self.reply(200, json.dumps(answer).encode())
        elif parts[5:] == ["repo"]:
            path = query["FilePath"]
            self.hub.downloads.append(path)
            self.reply(
                200,
                b"x" if path in self.hub.extra else (repository / path).read_bytes(),
                self.hub.sends,
            )
        else:
            data = {"Code": 200, "Success": True, "Data": {"Revision": "master"}}
            self.reply(200, json.dumps(data).encode())

    def do_HEAD(self) -> None:
        self.do_GET()

    def stall(self) -> None:
        """A byte now and then, so that no read of the client's is idle for long."""
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        while not self.over.wait(0.2):
            self.wfile.write(b" ")
            self.wfile.flush()

    def reply(self, status: int, body: bytes, sends: int | None = None) -> None:
        span = self.headers.get("Range")
        if span and status == 200:
            self.hub.ranges.append(span)
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
            self.wfile.write(body[:sends])
            self.wfile.flush()
            if sends is not None:
                self.over.wait()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve_hub(root: Path) -> Iterator[Hub]:
    """Serve `root/<owner>/<name>/…` as repositories."""
    set_default_config(None)  # the client remembers the first hub of a process
    hub = Hub()
    over = Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, root, hub, over))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        over.set()
        server.shutdown()
        server.server_close()


def listing(repository: Path, extra: list[str]) -> dict[str, object]:
    contents = {
        path.relative_to(repository).as_posix(): path.read_bytes()
        for path in sorted(repository.rglob("*"))
        if path.is_file()
    }
    files = [
        {
            "Path": path,
            "Name": path.rpartition("/")[2],
            "Type": "blob",
            "Size": len(content),
            "Sha256": hashlib.sha256(content).hexdigest(),
            "Revision": "master",
        }
        for path, content in [*contents.items(), *((path, b"x") for path in extra)]
    ]
    return {"Code": 200, "Success": True, "Data": {"Files": files, "TotalCount": len(files)}}
