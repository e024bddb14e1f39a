"""Read labels of samples in tars: the number in KEY.cls, or in a field of KEY.json."""

import re

from data_tools.files import parse_json

LABEL_SUFFIX = "cls"
LABEL_BYTES = 1 << 20  # read of a label's file; a JSON may hold a caption beside it
_JSON = "json"
_LABEL = re.compile(rb"[+-]?[0-9]+")
_BOM = b"\xef\xbb\xbf"
_MAX_DIGITS = 16  # more is no number of a class


class LabelError(Exception):
    """The content of a label that is no class number."""


def split_label(label: str) -> tuple[str, str]:
    """Split "json:FIELD" into the suffix json and the field; other labels have no field."""
    suffix, _, field = label.partition(":")
    return suffix, field


def is_label_text(label: str) -> bool:
    """Tell whether `label` can name labels: a SUFFIX, or json:FIELD."""
    suffix, field = split_label(label)
    return bool(suffix) and (":" not in label or (suffix == _JSON and bool(field)))


def parse_label(content: bytes, field: str = "") -> int:
    """Read a label.

    Args:
        content: of the file: a whole number, or JSON.
        field: of the JSON, that holds a whole number.

    Raises:
        LabelError: it is no whole number; what it is instead.
    """
    if not field:
        text = content.removeprefix(_BOM).strip()
        if not _LABEL.fullmatch(text) or len(text) > _MAX_DIGITS:
            raise LabelError(repr(content[:40])[1:])
        return int(text)
    try:
        value = parse_json(content)[field]
    except (ValueError, KeyError, TypeError) as err:
        raise LabelError(repr(content[:40])[1:]) from err
    if type(value) is not int:
        raise LabelError(f"{field} = {value!r}")
    return value
