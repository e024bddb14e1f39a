"""The documentation: how long it is, how it begins, and that what it names exists.

Every command in it is read by the real parser of its program, or stands in RUN_ELSEWHERE.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [
    *(README, ROOT / "CONTRIBUTING.md"),
    *sorted(ROOT.glob("docs/*.md")),
    *(
        ROOT / folder / "README.md"
        for folder in ("data_tools", "slurm", "ds_configs", "benchmarks")
    ),
]
DOCUMENTS = [*PAGES, ROOT / "CHANGELOG.md"]
MAX_LINES, MAX_WIDTH, MAX_WORDS = 200, 120, 25
MAX_PICTURE_BYTES = 200 * 1000
# Commands of other people's programs, by their first words, and what runs them.
RUN_ELSEWHERE = {
    "python3 -m venv": "the Makefile, which tests/test_repository.py runs",
    "source .venv/bin/activate": "a shell; without it the Makefile puts the folder on the path",
    "pip install": "the Makefile installs the same files",
    "tensorboard --logdir": "docs/make_pictures.py",
    "ssh -L": "nobody: it needs two machines",
    ".venv/bin/pytest": "the Makefile's test targets",
    "pytest": "the Makefile's test targets",
    ".venv/bin/ruff": "make lint",
    "PATH=$PWD/.venv/bin:$PATH tests/odd_machine.sh": "make test-odd",
    "benchmarks/bare_gpu.sh": "a machine with a GPU, and one with a network",
}
LAUNCHERS = ("python", "deepspeed", "torchrun", "mpirun")
JOB_SCRIPTS = {
    **{f"slurm/train_{size}.sh": "training/main.py" for size in ("s", "b", "l", "xl")},
    "slurm/encode_latents.sh": "data_tools/encode_latents.py",
    "slurm/sample.sh": "training/sample.py",
    "slurm/evaluate.sh": "training/evaluate.py",
}
# Code inside a line that is a command for a program of ours.
INLINE_COMMAND = re.compile(
    r"(\w+=\S+ )*(make \w|(python|deepspeed|torchrun|mpirun|sbatch|bash) .*"
    r"\b(training|data_tools|benchmarks|slurm)[/.]\w)"
)
CODE_BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def name_of(page):
    return str(page.relative_to(ROOT))


def prose(page):
    """A page without its blocks of code."""
    return CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))


def commands_of(page):
    """Lines of shell blocks, and code inside lines that begins like a command."""
    lines = []
    for _, kind, block in CODE_BLOCK.findall(page.read_text(encoding="utf-8")):
        if kind == "sh":
            lines += block.replace("\\\n", " ").splitlines()
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page)):
        command = " ".join(code.split())
        if INLINE_COMMAND.match(command):
            lines.append(command)
    commands = [part for line in lines for part in line.split(" && ") if part.strip()]
    return [" ".join(re.sub(r"\s#.*", "", command).split()) for command in commands]


def is_run_elsewhere(command):
    return command.startswith(tuple(RUN_ELSEWHERE))


def program_and_arguments(command):
    """What a command starts in the end: a Python file or -m and a module, and its arguments."""
    words = [word for word in shlex.split(command) if word != "..."]
    while re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    if words[0] in ("sbatch", "bash"):
        place = next(k for k, word in enumerate(words) if word.startswith("slurm/"))
        return [JOB_SCRIPTS[words[place]], *words[place + 1 :]]
    assert words[0] in LAUNCHERS, f"{command}: no test knows what this starts"
    place = next(k for k, word in enumerate(words) if word == "-m" or word.endswith(".py"))
    return words[place:]


COMMANDS = sorted({command for page in PAGES for command in commands_of(page)})
OURS = [
    command
    for command in COMMANDS
    if not command.startswith("make ") and not is_run_elsewhere(command)
]


def refusals(commands):
    """What the programs' parsers say against each command; empty = nothing."""
    result = subprocess.run(
        [sys.executable, "tests/support/parse_commands.py"],
        input=json.dumps(commands),
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_the_readme_is_read_in_five_minutes():
    lines = README.read_text(encoding="utf-8").splitlines()

    assert len(lines) <= MAX_LINES
    assert [line for line in lines if len(line) > MAX_WIDTH] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_begins_with_what_it_is_for(page):
    title, blank, first, *_ = page.read_text(encoding="utf-8").splitlines()

    assert title.startswith("# ")
    assert blank == ""
    assert re.match(r"[A-Z].{30}", first), "a sentence, before any list, table or command"


@pytest.mark.processes
def test_every_command_is_understood_by_its_program():
    said = refusals([program_and_arguments(command) for command in OURS])

    assert len(OURS) > 50
    assert {command: text for command, text in zip(OURS, said, strict=True) if text} == {}


@pytest.mark.processes
def test_a_wrong_command_would_be_noticed():
    """The premise of the test above."""
    wrong = [
        ["training/main.py", "--no-such-flag"],
        ["training/main.py", "--lr", "fast"],
        ["training/sample.py", "runs/demo", "--steps", "many"],
        ["-m", "training.count", "--no-such-flag"],
        ["data_tools/encode_latents.py", "photos", "more"],
    ]

    assert all(refusals(wrong))


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        word
        for command in COMMANDS
        if command.startswith("make ")
        for word in command.split()[1:]
        if not re.match(r"-|\d|.*=", word)
    }

    assert named <= targets


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        if not found.exists() or (anchor and anchor not in anchors_of(found)):
            broken.append(target)

    assert broken == []


def anchors_of(page):
    """What a heading may be addressed by, as GitHub makes it from the text."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page):
    ours = "models|data_tools|training|benchmarks|tests|ds_configs|slurm|docs"
    named = re.findall(
        rf"(?<![\w/.-])(?:{ours})/[\w./*-]*\w\.(?:py|md|sh|json|yaml|png|html)\b",
        page.read_text(encoding="utf-8"),
    )

    assert [name for name in named if not list(ROOT.glob(name))] == []


def test_the_glossary_is_short_and_defines_each_word_once():
    rows = re.findall(r"^\| ([^|]+) \| ", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)
    words = [row for row in rows if row not in ("word", "---")]

    assert 0 < len(words) <= MAX_WORDS
    assert len(set(words)) == len(words)


def test_the_readme_lists_every_page():
    text = README.read_text(encoding="utf-8")

    assert [name_of(page) for page in PAGES[1:] if f"({name_of(page)})" not in text] == []


def test_pictures_are_small_and_shown():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    pictures = sorted((ROOT / "docs/pictures").glob("*.png"))

    assert pictures
    assert [path.name for path in pictures if path.stat().st_size > MAX_PICTURE_BYTES] == []
    assert [path.name for path in pictures if f"pictures/{path.name})" not in text] == []
