"""Versions of Python and torch that nobody has tried are remarked upon, others are not."""

import re
from pathlib import Path

import pytest

from data_tools.process.versions import untried

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("python", "torch", "words"),
    [
        ((3, 11), "2.11.0", ""),
        ((3, 13), "2.13.0+cpu", ""),
        ((3, 12), "2.12.1.dev20260101+cu130", ""),
        ((3, 10), "2.13.0", "Python 3.10 is untried: this program was tested on 3.11 to 3.13;"),
        ((3, 14), "2.13.0", "Python 3.14 is untried"),
        ((3, 11), "2.9.1", "torch 2.9 is untried: this program was tested on 2.11 to 2.13;"),
        ((3, 11), "2.14.0", "torch 2.14 is untried"),
    ],
)
def test_only_untried_versions_are_remarked_upon(python, torch, words):
    said = untried(python, torch)

    assert said.startswith(words) if words else said == ""


def test_the_pinned_torch_is_among_those_tried():
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)

    assert untried(torch=pinned[1]) == ""
