"""Read files in s3:// and gs:// buckets, through a Python package or the store's own program."""

import importlib.util
import re
import shutil
import sys

from data_tools.errors import ConfigError
from data_tools.storage.byte_stream import (
    AbsentError,
    Patience,
    ProcessStream,
    RefusalError,
    TransferError,
)

# Prints the file argv[2] of the store argv[1] from byte argv[3] on. A process of its own, because a
# file system of fsspec may stall or raise anything. Its open() takes a name as it is;
# fsspec.open() would expand the *, ?, [..] and :: in it.
_FSSPEC_PROGRAM = """
import shutil, sys, fsspec
scheme, url, start = sys.argv[1:]
def copy(**options):
    with fsspec.filesystem(scheme, **options).open(url, "rb") as file:
        file.seek(int(start))
        shutil.copyfileobj(file, sys.stdout.buffer, 1 << 20)
if scheme != "s3":
    copy()
else:
    from botocore.exceptions import NoCredentialsError
    try:
        copy()
    except NoCredentialsError:
        copy(anon=True)  # a bucket may be open to everybody
"""
_AWS_PROGRAM = """
{ said=$(aws s3 cp --only-show-errors "$0" - 2>&1 >&3); } 3>&1
code=$?
case "$said" in
*"locate credentials"*) exec aws s3 cp --only-show-errors --no-sign-request "$0" - ;;
esac
[ -z "$said" ] || echo "$said" >&2
exit $code
"""
# The Python package that reads a store, and the programs that print a URL of it.
_STORES = {
    "s3": ("s3fs", {"aws": ["/bin/sh", "-c", _AWS_PROGRAM]}),
    "gs": ("gcsfs", {"gcloud": ["gcloud", "storage", "cat"], "gsutil": ["gsutil", "-q", "cat"]}),
}
# Of what these say last, in their own words and those of the stores.
_ABSENT = re.compile(
    r"FileNotFoundError|NoSuchKey|NoSuchBucket|BucketNotFound|\(404\)|\b404\b.*not found"
    r"|matched no objects|No URLs matched",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"PermissionError|AccessDenied|Access Denied|Forbidden|\((401|403)\)|InvalidAccessKeyId"
    r"|SignatureDoesNotMatch|ExpiredToken|InvalidToken|locate credentials|PartialCredentials"
    r"|config profile .* could not be found|Anonymous caller|active account",
    re.IGNORECASE,
)
_URL = re.compile(r"\w+://\S+")


class _DeniedError(RefusalError):
    """The store knows who asks, or that nobody does, and refuses; it will do so again."""

    max_times = 1

    def __str__(self) -> str:
        return f"{super().__str__()}, as some stores also say where there is no such file"


def open_object(url: str, start: int, patience: Patience) -> ProcessStream:
    """Open an object from byte `start` on, or from its beginning.

    Args:
        url: s3://BUCKET/KEY or gs://BUCKET/KEY; the key as it is, nothing in it is escaped.

    Raises:
        ConfigError: no such program is installed.
    """
    scheme, _, place = url.partition("://")
    key = place.partition("/")[2]

    def failure(said: str) -> type[TransferError]:
        said = _URL.sub("", said.replace(key, ""))  # a key may be called "Forbidden"
        if _ABSENT.search(said):
            return AbsentError
        return _DeniedError if _DENIED.search(said) else TransferError

    package, commands = _STORES[scheme]
    if importlib.util.find_spec(package):
        program = [sys.executable, "-c", _FSSPEC_PROGRAM, scheme, url, str(start)]
        return ProcessStream(program, start, patience, failure)
    for name, command in commands.items():
        if shutil.which(name):
            return ProcessStream([*command, url], 0, patience, failure)
    raise ConfigError(
        f"{url}: needs {' or '.join(commands)} on PATH or the Python package {package}; install "
        "one of them, or name the data by https: or pipe:."
    )
