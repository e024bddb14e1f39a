"""No sentence of the program tells a person to delete what may be good."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path for folder in ("models", "data_tools", "training") for path in (ROOT / folder).rglob("*")
)
DELETING = re.compile(
    r"\b(delet|remov|eras|discard|wip|unlink|overwrit|throw)\w*|\brm\b|\bget rid\b", re.IGNORECASE
)
# What may say so, by a pattern of the sentence, and why.
ALLOWED = {
    r": remove [\w.'{}]+[;.]|; remove (it|the key)\.$": "a key of a DeepSpeed file, which is kept",
    r"is a link to a folder above it; remove the link": "a link holds nothing",
    r"names nothing beside a comma; remove the comma": "a comma of the command line",
    r"remove_columns": "the name of a method; the data set on the disk stays",
    r"removed or changed meanwhile": "tells what somebody else did",
    r"^\.?removed-|^rm$|^\.removed": "a name of a folder, an anchor of a text",
}


def texts_of(path):
    """The strings of a module, but for docstrings, with {} for what is filled in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    left_out = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            left_out.add(node.value)
        if isinstance(node, ast.JoinedStr):
            left_out.update(node.values)
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                getattr(part, "value", "{}") if isinstance(part, ast.Constant) else "{}"
                for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.suffix == ".py"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_no_message_tells_to_delete_what_may_be_good(path):
    found = [text for text in texts_of(path) if DELETING.search(text)]

    assert [t for t in found if not any(re.search(pattern, t) for pattern in ALLOWED)] == []


def test_no_script_and_no_page_does_either():
    """Nothing that a job script prints, and no line of a report or a page of the demo."""
    paths = [*(ROOT / "slurm").glob("*.sh"), *(p for p in SOURCES if p.suffix == ".html")]
    assert paths
    for path in paths:
        said = [
            line
            for line in path.read_text(encoding="utf-8").splitlines()
            if re.search(r"\b(echo|printf|<p)\b|<p", line) and DELETING.search(line)
        ]
        assert said == [], path


def test_what_is_allowed_is_said_somewhere():
    """Else the list grows for ever."""
    texts = [text for p in SOURCES if p.suffix == ".py" for text in texts_of(p)]

    for pattern in ALLOWED:
        assert any(re.search(pattern, text) and DELETING.search(text) for text in texts), pattern


@pytest.mark.parametrize(
    "advice",
    [
        "{}; delete {} and write the name of an older checkpoint into {}.",
        "{}: {}; delete the folder, or give a new --output.",
        "{} is damaged; remove it, it is drawn again.",
    ],
)
def test_advice_of_this_kind_would_be_found(advice):
    """The premise of the tests above."""
    assert DELETING.search(advice)
    assert not any(re.search(pattern, advice) for pattern in ALLOWED)
