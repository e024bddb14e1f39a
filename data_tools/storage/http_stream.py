"""Read files from web servers, with the standard library."""

import base64
import email.message
import http.client
import ssl
import urllib.error
import urllib.request
from contextlib import suppress
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from data_tools.storage.byte_stream import (
    CHUNK_BYTES,
    NoSuchPartError,
    Patience,
    RefusalError,
    TransferError,
)
from data_tools.storage.server_answers import HEAD_BYTES, error_message

_AS_TYPED = "%!$&'()*+,;=:@/?~"  # in a URL; all but these, letters and digits is escaped
# Other values, such as "aws-chunked", "utf-8" or none, are what stores keep of an upload; whatever
# they mean, sizes and checksums are compared.
_COMPRESSIONS = {"gzip", "x-gzip", "deflate", "br", "zstd", "compress", "x-compress"}
_RETRIED_REFUSALS = (408, 425, 429)  # request timeout, too early, too many requests


def open_http(url: str, start: int, validator: str, patience: Patience) -> "HttpStream":
    """Open a file from byte `start` on, or from the beginning if only that is to be had.

    `validator` is of the version whose first bytes are here; "" if unknown.
    """
    with suppress(NoSuchPartError):
        return HttpStream(url, start, validator, patience)
    return HttpStream(url, 0, "", patience)


class HttpStream:
    """The body of a GET request."""

    def __init__(self, url: str, start: int, validator: str, patience: Patience) -> None:
        """Send the request and read the answer's headers."""
        self._stall_sec, self._url = patience.stall_sec, url
        try:
            self._response = _opener(patience).open(
                _request(url, start, validator), timeout=patience.connect_sec
            )
        except urllib.error.HTTPError as err:
            with err:
                raise _refusal(err) from err
        except urllib.error.URLError as err:  # before the request was sent
            if isinstance(err.reason, ssl.SSLCertVerificationError):
                cause = err.reason.verify_message
                raise RefusalError(f"the server's certificate is not trusted ({cause})") from err
            is_late = isinstance(err.reason, TimeoutError)
            late = f"no connection within {patience.connect_sec:g} s"
            raise TransferError(late if is_late else str(err.reason)) from err
        except (OSError, http.client.HTTPException) as err:
            raise self._error(err) from err
        try:
            self._check_headers(start, validator)
        except TransferError:
            self.close()
            raise

    def read(self) -> bytes:
        """Return what has arrived, without waiting for more."""
        try:
            return self._response.read1(CHUNK_BYTES)
        except (OSError, http.client.HTTPException) as err:
            raise self._error(err) from err

    def close(self) -> None:
        """Close the connection."""
        self._response.close()

    def _check_headers(self, start: int, validator: str) -> None:
        headers = self._response.headers
        encodings = ",".join(headers.get_all("Content-Encoding", [])).lower().split(",")
        if found := _COMPRESSIONS.intersection(map(str.strip, encodings)):
            raise RefusalError(f"the server sends it compressed ({found.pop()})")
        self.origin = _origin(self._response, self._url)
        etag = headers.get("ETag", "")
        # A weak ETag does not promise equal bytes, and If-Range takes strong ones only.
        is_strong = etag and not etag.startswith("W/")
        self.validator = etag if is_strong else headers.get("Last-Modified", "")
        self.start, self.length = _range_of(headers, self._response.status)
        if self.start == 0:
            return
        # The server must not send a part of another version, or another part; some do.
        if self.start != start or (validator and self.validator not in ("", validator)):
            raise NoSuchPartError("the server sends another part than the one asked for")

    def _error(self, err: Exception) -> TransferError:
        if isinstance(err, TimeoutError):
            return TransferError(f"the server sent nothing for {self._stall_sec:g} s")
        return TransferError(str(err) or type(err).__name__)


class _Connection(http.client.HTTPConnection):
    """Waits less long for the connection than for data."""

    def __init__(self, host: str, *, stall_sec: float, **options: Any) -> None:
        super().__init__(host, **options)
        self._stall_sec = stall_sec

    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(self._stall_sec)


class _SecureConnection(_Connection, http.client.HTTPSConnection):
    """The same over TLS."""


class _Handler(urllib.request.AbstractHTTPHandler):
    """Opens http and https."""

    def __init__(self, stall_sec: float) -> None:
        super().__init__()
        self._stall_sec = stall_sec

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_Connection, request, stall_sec=self._stall_sec)

    def https_open(self, request: urllib.request.Request) -> Any:
        context = ssl.create_default_context()
        return self.do_open(_SecureConnection, request, stall_sec=self._stall_sec, context=context)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


def _opener(patience: Patience) -> urllib.request.OpenerDirector:
    """Make an opener without the handlers of file: and ftp:, where a redirect could lead."""
    opener = urllib.request.OpenerDirector()
    opener.add_handler(_Handler(patience.stall_sec))
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def _request(url: str, start: int, validator: str) -> urllib.request.Request:
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    path, query = quote(parts.path, _AS_TYPED), quote(parts.query, _AS_TYPED)
    host = host if host.isascii() else host.encode("idna").decode()
    address = urlunsplit(parts._replace(netloc=host, path=path, query=query))
    request = urllib.request.Request(address)
    request.add_header("Accept-Encoding", "identity")
    if user:
        secret = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {secret}")
    if start:
        request.add_header("Range", f"bytes={start}-")
        if validator:
            request.add_header("If-Range", validator)
    return request


def _range_of(headers: email.message.Message, status: int) -> tuple[int, int | None]:
    """Return where the body starts in the file, and the length of the file."""
    if status != http.HTTPStatus.PARTIAL_CONTENT:
        length = headers.get("Content-Length", "")
        return 0, int(length) if length.isdecimal() else None
    unit, _, content_range = headers.get("Content-Range", "").partition(" ")
    span, _, total = content_range.partition("/")
    first = span.partition("-")[0]
    start = int(first) if unit == "bytes" and first.isdecimal() else -1  # not what was asked for
    return start, int(total) if total.isdecimal() else None


def _origin(response: http.client.HTTPResponse, url: str) -> str:
    """Say what type of content comes, and from where if that is another host or path."""
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip()
    asked, found = urlsplit(url), urlsplit(response.url)
    asked_host = asked.netloc.rpartition("@")[2]
    is_same = (asked_host, quote(asked.path, _AS_TYPED)) == (found.netloc, found.path)
    place = "" if is_same else f"from {found.scheme}://{found.netloc}{found.path}"
    return ", ".join(filter(None, (kind, place)))


def _refusal(err: urllib.error.HTTPError) -> TransferError:
    reason = "".join(filter(str.isprintable, " ".join(str(err.reason).split())))
    said = ""
    with suppress(OSError, http.client.HTTPException):
        said = error_message(err.read(HEAD_BYTES))
    cause = f"the server answered {err.code} {reason}{said and f' ({said})'}"
    if err.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return NoSuchPartError(cause)
    is_final = 300 <= err.code < 500 and err.code not in _RETRIED_REFUSALS
    error = RefusalError(cause) if is_final else TransferError(cause)
    error.is_missing = err.code in (http.HTTPStatus.NOT_FOUND, http.HTTPStatus.GONE)
    after = err.headers.get("Retry-After", "")
    error.retry_after_sec = float(after) if after.isdecimal() else 0.0
    return error
