"""The pages of the documentation, and the commands in them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
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
