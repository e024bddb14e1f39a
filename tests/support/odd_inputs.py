"""Command lines and configuration files as no one means them, and a check that none does harm.

Whatever a command is given, it leaves with 0 or 2. With 2 it has said one sentence and has written
nothing; with 0 it has written nothing outside the folder that it was given.
"""

import contextlib
import io
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from data_tools.errors import ConfigError

# The same examples at every run, and as many as take seconds.
QUICK = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
}
WORDS = [
    *("", " ", "\t", "\n", "a\nb", "-", "--", "---", "=", "--=", "-1", "0", "1", "2", "3.5"),
    *("nan", "-nan", "inf", "-inf", "1e400", "-1e400", "1e-400", "0x10", "1_000", "1.0", "+1"),
    *("9" * 40, "9" * 5000, "-" + "9" * 25, "none", "null", "None", "true", "False", "on", "[]"),
    *("~", "~nobody/x", "$X", "${X}", "$HOME", "%s", "{0}", "{", "}", "{1..3}", "{3..1}"),
    *("[1,2]", "a,b", ",", ",,", "1,1", "a;b", "a|b", "*", "?", "[", "]", "[!a]", "'", '"', "\\"),
    *(
        "\u00e4",
        "a\u0308",
        "\u732b",
        "\u0661",
        "\u00b2",
        "\udcff",
        "a\udc80b",
        "\u202e",
        "\U0001f600",
    ),
    *(
        "\x1b[31m",
        "\x7f",
        "x" * 300,
        "x" * 10_000,
        "a/" * 2000,
        ".",
        "..",
        "../..",
        "./",
        "//",
        "none/",
    ),
    *(
        "con",
        "file",
        "folder",
        "file/x",
        "folder/file",
        "run",
        "run/checkpoints",
        "run:latest",
        "run:",
    ),
    *("picture.png", "config.yaml", "step-0000001", "latest", "0.999", "cpu", "cuda:99", "auto"),
    *("demo", "xl", "ddim", "euler", "all", "three", "switch", "dense", "json:x", "cls"),
]
WORD = st.sampled_from(WORDS)
NUMBERS = [0, -1, 1, 2, 10**30, -(10**400), 2**63, 0.5, -0.0, float("nan"), float("inf"), 1e308]
SCALAR = st.one_of(WORD, st.sampled_from([None, True, False, *NUMBERS]))
VALUE = st.recursive(
    SCALAR,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(WORD, SCALAR), inner, max_size=3)
    ),
    max_leaves=5,
)


# Each list holds the one before it nine times: 9^25 values in two thousand bytes.
BOMB = ["k0: &k0 [x]"] + [f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9)}]" for i in range(1, 26)]
IN_UTF_8 = [
    *("", "null", "3", "[]", "{}", "[" * 5000, "{" * 5000, "[" * 5000 + "]" * 5000, "a: " * 2000),
    *("\0", "\ufeffmodel: {}", "\ttab: 1", "- a\n b: c", "!!python/object:os.x {}"),
    *("%YAML 9.9\n---\n", "--- 1\n--- 2\n", "*a", "&a [*a]", "? [a]\n: b", "{a: 1, a: 2}"),
    *("model: &m {size: *m}", "\n".join(BOMB), "\n".join(BOMB) + "\nmodel: {size: *k25}"),
    "\n".join(["model:", *(f" {line}" for line in BOMB)]),
    *("model: 2024-01-01", "a: 2024-13-77", "model: {1: 2, 2024-01-01: 3, null: 4, [1]: 5}"),
    *('{"a": 1' + "0" * 5000 + "}", "a: 1" + "0" * 5000, '{"a": NaN}', '{"a": "\\ud800"}'),
    *('a: "\\ud800"', 'run: {run_dir: "\\0"}', 'run: {run_dir: "a\\nb\\e[31m"}'),
    *("model: {<<: *a}", "<<: 3", "a: .inf", "a: 0o7777777777777777777777777", "a: 1:2:3:4:5"),
    *("optim: {lr: .nan}", "run: {seed: 99999999999999999999}", "format_version: 9"),
    *("format_version: x", "3: 4", "null: {}"),
]
RAW = [text.encode() for text in IN_UTF_8] + [
    *("model: {}".encode("utf-16"), "model: {}".encode("utf-32"), b"\xff\xfe", b"run: \x9f"),
]


class Answer(NamedTuple):
    """What a command did."""

    code: int
    said: str  # on stderr
    printed: str
    written: list[str]  # paths outside of the working folder


class _Writes:
    """What is opened for writing, made or moved while it is on; an audit hook cannot be removed."""

    def __init__(self):
        self.paths = None
        sys.addaudithook(self._note)

    def _note(self, event, arguments):
        if self.paths is None:
            return
        if event == "open":
            path, mode, flags = arguments
            is_write = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if flags else False
            is_write |= bool(mode) and any(letter in mode for letter in "wax+")
            if is_write and not isinstance(path, int):
                self.paths.append(os.fsdecode(path))
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link"):
            self.paths += [os.fsdecode(part) for part in arguments[:2] if not isinstance(part, int)]


_WRITES = _Writes()
_HARMLESS = re.compile(r"/dev/|/proc/|.*/__pycache__(/|$)|.*\.pyc")


def answer(main, argv, folder, may_write):
    """Run a command in a folder and tell what it did; what it may write lies in another."""
    output, errors = io.StringIO(), io.StringIO()
    code, before = 0, os.getcwd()
    os.chdir(folder)
    _WRITES.paths = []
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            try:
                main(list(argv))
            except SystemExit as left:
                code = left.code or 0
            except ConfigError as err:  # data_tools.process.entry_point.enter says it
                errors.write(f"error: {err}\n")
                code = err.exit_code
    finally:
        paths, _WRITES.paths = _WRITES.paths, None
        os.chdir(before)
    full = [os.path.realpath(os.path.join(folder, path)) for path in paths]
    inside = os.path.realpath(may_write)
    outside = [p for p in full if not p.startswith(inside) and not _HARMLESS.match(p)]
    return Answer(code, errors.getvalue(), output.getvalue(), outside)


def tree(folder):
    """What is in a folder, by path; None for a folder."""
    paths = sorted(Path(folder).rglob("*"))
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def restore(folder, before):
    """Make a folder again what `tree` has seen."""
    for path in sorted(Path(folder).rglob("*"), reverse=True):
        if path not in before:
            path.rmdir() if path.is_dir() else path.unlink()
    for path, content in before.items():
        if content is not None:
            path.write_bytes(content)


def check(main, argv, folder, codes=(0, 2)):
    """Hold a command to what this module says of all commands.

    Args:
        main: of the command.
        argv: its words.
        folder: in which it runs; ".." and "../.." of it are ours, too.
        codes: with which it may leave.
    """
    ours = folder.parents[1]
    before = tree(ours)
    found = answer(main, argv, folder, ours)
    about = f"{argv!r}: {found}"[:3000]
    after = tree(ours)
    if after != before:
        restore(ours, before)
    assert found.code in codes, about
    assert found.written == [], about
    assert "Traceback" not in found.said, about
    if found.code == 2:
        lines = [line for line in found.said.splitlines() if not line.startswith("warning: ")]
        assert found.said.endswith("\n") and len(lines) == 1, about
        assert lines[0].startswith("error: ") and len(lines[0]) > 15, about
        assert lines[0].endswith((".", "?")), about
        assert len(lines[0]) < 2100, about
        assert after == before, about
    return found


def flags_of(main):
    """The flags that a command's --help names, and its positional arguments' number."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main(["--help"])
    return sorted(set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", output.getvalue())))


def command_lines(flags):
    """Words of which many are flags of a command: whole, shortened, doubled, with a value."""
    flag = st.sampled_from([text for text in flags if text not in ("-h", "--help")])
    shortened = st.builds(lambda text, n: text[: max(3, len(text) - n)], flag, st.integers(1, 6))
    joined = st.builds(lambda text, word: [f"{text}={word}"], flag, WORD)
    pair = st.builds(lambda text, word: [text, word], flag, WORD)
    one = st.one_of(flag, shortened, WORD).map(lambda word: [word])
    # Mostly one wrong value: what is wrong first hides what comes behind.
    parts = st.one_of(
        pair.map(lambda words: [words]), st.lists(st.one_of(pair, joined, one), max_size=3)
    )
    return parts.map(lambda lists: [word for words in lists for word in words])


def quick(max_examples):
    """The settings of a property that is tried on so many examples."""
    return settings(max_examples=max_examples, **QUICK)
