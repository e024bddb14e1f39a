"""A web server that misbehaves on purpose, one request at a time."""

import socket
import ssl
import struct
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple, Self
from urllib.parse import unquote, urlsplit

FAULTS = {
    "404": "is not there",
    "404-xml": "is not there, as an object store says it",
    "denied": "is refused, as an object store says it",
    "quota": "is refused, as a web service says it",
    "login": "sends a login page with the status of a success",
    "login-chunked": "the same without a length",
    "login-elsewhere": "redirects to a login page",
    "json": "sends a message with the status of a success",
    "other-json": "sends other JSON",
    "no-json": "sends something else",
    "lfs": "sends a Git LFS pointer",
    "500": "fails",
    "503-later": "asks to come back at once (Retry-After: 0)",
    "silent": "accepts the request and says nothing",
    "stall": "sends half of the body and then nothing",
    "trickle": "sends a byte now and then",
    "reset": "resets the connection in mid-body",
    "short": "closes the connection in mid-body",
    "longer": "sends and announces one byte more",
    "endless": "announces no length and sends one byte more",
    "other-length": "announces and sends half of the file",
    "flip": "inverts one byte in the middle",
    "no-range": "ignores that only a part was asked for",
    "other-part": "answers with another part than asked for",
    "unasked-etag": "answers a request for a part from another version",
    "compressed": "says that the body is compressed",
    "to-file": "redirects to a file of its choice",
    "moved": "redirects to the same file under another path",
}

_PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>Please.</body></html>\n"
_XML = b'<?xml version="1.0"?>\n<Error><Code>%b</Code><Message>%b</Message></Error>'
# status, type and body of what comes in a file's place
_ANSWERS = {
    "404-xml": (404, "application/xml", _XML % (b"NoSuchKey", b"The key does not exist.")),
    "denied": (
        *(403, "application/xml"),
        _XML % (b"AccessDenied", b"Access Denied to\n reader@example.org."),
    ),
    "quota": (402, "application/json", b'{"error": {"code": 7, "message": "quota used up"}}'),
    "login": (200, "text/html; charset=utf-8", _PAGE),
    "login-chunked": (200, "text/html", _PAGE),
    "json": (200, "application/json", b'{"message": "token expired"}'),
    "other-json": (200, "application/json", b'{"shards": 3}'),
    "no-json": (200, "text/plain", b"moved"),
    "lfs": (200, "text/plain", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
}


class Request(NamedTuple):
    """What a client asked for."""

    name: str
    range: str | None
    if_range: str | None
    authorization: str | None
    query: str


class HttpServer:
    """Serves a folder with ETags and ranges; each fault in `faults[name]` spoils one request.

    Attributes:
        url: of the folder; https if an SSLContext is given.
        requests: all of them, in order.
        etags: of files, where not "1".
        headers: that every file is sent with.
    """

    def __init__(self, folder: Path, context: ssl.SSLContext | None = None) -> None:
        self.folder, self.requests = folder, []
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.etags: dict[str, str] = {}
        self.headers: dict[str, str] = {}
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        scheme = "http" if context is None else "https"
        if context is not None:
            # The handshake waits for the first read, which happens in the request's own thread.
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.url = f"{scheme}://127.0.0.1:{self._server.server_port}/data"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def spoil(self, name: str, *faults: str) -> None:
        """Let the next requests for a file fail like this, one after the other."""
        assert set(faults) <= set(FAULTS)
        self.faults[name] += faults

    def ranges(self, name: str) -> list[str | None]:
        """Return which part was asked for in each request for a file."""
        return [request.range for request in self.requests if request.name == name]


class _Handler(BaseHTTPRequestHandler):
    owner: HttpServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:  # noqa: N802 -- http.server calls it so
        parts = urlsplit(self.path)
        name = unquote(parts.path.rpartition("/")[2])
        headers = [self.headers.get(key) for key in ("Range", "If-Range", "Authorization")]
        self.owner.requests.append(Request(name, *headers, parts.query))
        faults = self.owner.faults[name]
        fault = faults.pop(0) if faults else ""
        path = self.owner.folder / (name if name != "login" else "a.tar")
        self.close_connection = True
        if fault in ("404", "500") or not path.is_file():
            self.send_error(int(fault or 404))
        elif fault == "503-later":
            self.send_response(503)
            self._end_headers({"Retry-After": "0", "Content-Length": "0"})
        elif fault in _ANSWERS:
            status, kind, body = _ANSWERS[fault]
            self.send_response(status)
            length = {} if fault == "login-chunked" else {"Content-Length": str(len(body))}
            self._end_headers({"Content-Type": kind} | length)
            self.wfile.write(body)
        elif fault == "login-elsewhere":
            self.owner.spoil("login", "login")
            self.send_response(302)
            self._end_headers({"Location": "/login?back=secret", "Content-Length": "0"})
        elif fault in ("to-file", "moved"):
            self.send_response(302)
            target = path.as_uri() if fault == "to-file" else f"/elsewhere/{name}"
            self._end_headers({"Location": target, "Content-Length": "0"})
        elif fault == "silent":
            self.owner.closing.wait()
        else:
            self._send_file(path.read_bytes(), self.owner.etags.get(name, '"1"'), fault)

    def _send_file(self, content: bytes, etag: str, fault: str) -> None:
        if fault == "flip":
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        elif fault in ("longer", "endless"):
            content += b"x"
        elif fault == "other-length":
            content = content[: len(content) // 2]
        headers, start = {"ETag": etag} | self.owner.headers, 0
        wanted, if_range = self.headers.get("Range"), self.headers.get("If-Range")
        is_same = fault == "unasked-etag" or if_range in (None, etag)
        if wanted and fault != "no-range" and is_same:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_error(416)
                return
            start += 10 if fault == "other-part" else 0
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if fault == "unasked-etag":
                headers["ETag"] = '"another"'
        body = content[start:]
        if fault != "endless":
            headers["Content-Length"] = str(len(body))
        if fault == "compressed":
            headers["Content-Encoding"] = "gzip"
        self.send_response(206 if "Content-Range" in headers else 200)
        self._end_headers(headers)
        self._send_body(body, fault)

    def _end_headers(self, headers: dict[str, str]) -> None:
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Connection", "close")
        self.end_headers()

    def _send_body(self, body: bytes, fault: str) -> None:
        try:
            if fault == "trickle":
                for i in range(len(body)):
                    self.wfile.write(body[i : i + 1])
                    if self.owner.closing.wait(0.02):
                        return
            if fault not in ("stall", "reset", "short"):
                self.wfile.write(body)
                return
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.owner.closing.wait()
            elif fault == "reset":
                # With a linger time of zero, closing sends a reset.
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.rfile.close()  # it shares the socket
                self.connection.close()
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client gave up, as it should

    def log_message(self, *_: object) -> None:
        """Say nothing."""
