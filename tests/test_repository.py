"""The repository itself: entry points, import direction, names, documents, tracked files."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_BYTES = 3 * 2**20
MAX_LINES = 350  # 300 is the aim
# Each may import itself and those before it.
LAYERS = ("models", "data_tools", "training", "benchmarks")
# Rooms from the ground up: a room may import those on lower floors, not its neighbours. A room is a
# folder, or a file beside the entry points, which are on the roof.
FLOORS = {
    "data_tools": [
        "exit_codes permutations",
        "errors",
        "files",
        "formats",
        "user_files",
        "process",
        "storage sources",
        "shards",
        "vae",
        "stream",
        "encoding",
        "verification",
    ],
    "training": [
        "config ranks",
        "engine",
        "checkpoints cost",
        "run",
        "nodes sampling",
        "monitoring",
        "evaluation",
        "exports reports",
        "playground",
        "checked_job",
        "run_parts",
        "loop",
    ],
}
CODE = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
ENTRY_POINTS = [path for path in CODE if '\nif __name__ == "__main__":\n' in path.read_text()]
# Flags of other people's programs that our documents mention.
FOREIGN_FLAGS = {
    *("--logdir", "--port", "--num_gpus", "--nproc-per-node", "--hostfile", "--master_addr"),
    "--array",
    *("--nodes", "--partition", "--account", "--signal", "--requeue", "--fix", "--check"),
    *("--no_ssh", "--node_rank", "--include", "--launcher", "--version", "--time", "--bind_all"),
    *("--exclude", "--host", "--max-restarts"),
}


def relative(path):
    return str(path.relative_to(ROOT))


def tracked_files():
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).exists()]


def text_of(path):
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


@cache
def answers_to_help():
    """Exit status and output of `python PATH --help` by entry point, started from another folder.

    Each runs as a script in a process of its own; only torch and diffusers are imported once.
    """
    paths = [str(path) for path in ENTRY_POINTS]
    return json.loads(started_elsewhere(ROOT / "tests/support/answer_help.py", *paths))


def started_elsewhere(*command):
    result = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT.parent,
        env=os.environ | {"COLUMNS": "100", "DS_ACCELERATOR": "cpu", "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def help_of(path):
    status, text = answers_to_help()[str(path)]
    assert not status, f"{status}\n{text}"
    return text


def test_the_mandated_entry_points_are_there():
    names = {relative(path) for path in ENTRY_POINTS}

    assert {"data_tools/encode_latents.py", "training/main.py", "training/sample.py"} <= names


@pytest.mark.processes
@pytest.mark.parametrize("path", ENTRY_POINTS, ids=relative)
def test_entry_points_answer_help(path):
    text = help_of(path)

    assert text.startswith("usage: ")
    assert "--help" in text


@pytest.mark.parametrize("path", ENTRY_POINTS, ids=relative)
def test_entry_points_begin_by_the_function_that_protects_their_output(path):
    block = ast.parse(path.read_text()).body[-1]

    assert isinstance(block, ast.If)
    assert [ast.unparse(statement).split("(")[0] for statement in block.body] == ["enter"]


@pytest.mark.processes
def test_help_is_that_of_the_plain_command():
    """The premise of the test above, on an entry point that imports from another folder."""
    path = ROOT / "training" / "main.py"

    assert started_elsewhere(path, "--help") == help_of(path)


@cache
def imports_of(path):
    """The modules of this repository that a file imports, wherever in it, with line numbers."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno} imports relatively"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(name if module_file(name) else node.module, node.lineno) for name in inside]
    return [(name, line) for name, line in found if module_file(name)]


@cache
def module_file(name):
    """The file of a module of this repository, None for other names."""
    path = ROOT.joinpath(*name.split("."))
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def floor_and_room(path):
    """The number of a file's floor, and the room: a folder, or the file where it is in none."""
    package, *inside = path.relative_to(ROOT).with_suffix("").parts
    floors = FLOORS.get(package, [])
    room = inside[0] if package in FLOORS else ""
    height = next((i for i, rooms in enumerate(floors) if room in rooms.split()), len(floors))
    return (LAYERS.index(package), height), (package, room)


@pytest.mark.parametrize("path", CODE, ids=relative)
def test_imports_go_down(path):
    floor, room = floor_and_room(path)
    wrong = []
    for name, line in imports_of(path):
        other_floor, other_room = floor_and_room(module_file(name))
        if other_room != room and other_floor >= floor:
            wrong.append(f"{relative(path)}:{line} imports {name}, which is not on a lower floor")

    assert wrong == []


def test_the_table_of_floors_names_every_room():
    for package, floors in FLOORS.items():
        named = {room for rooms in floors for room in rooms.split()}
        folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
        modules = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
        entries = {path.stem for path in ENTRY_POINTS if path.parent == ROOT / package}

        assert named == folders | (modules - entries)


def test_imports_form_no_circle():
    known = {path: {module_file(name) for name, _ in imports_of(path)} for path in CODE}

    assert not circle(known), " -> ".join(relative(path) for path in circle(known))
    first, *_, last = CODE
    assert circle({first: {last}, last: {first}}) == [first, last, first]


def circle(graph):
    """Return a way from a file to itself, an empty list if there is none."""
    finished = set()

    def visit(path, way):
        if path in way:
            return [*way[way.index(path) :], path]
        if path in finished:
            return []
        for other in sorted(graph.get(path, ())):
            if other != path and (found := visit(other, [*way, path])):
                return found
        finished.add(path)
        return []

    return next((found for path in graph if (found := visit(path, []))), [])


def test_no_test_imports_another_test_file():
    files = [*(ROOT / "tests").rglob("*.py")]
    wrong = [
        f"{relative(path)}:{line} imports {name}"
        for path in files
        for name, line in imports_of(path)
        if module_file(name).name.startswith("test_")
    ]

    assert len(files) > 100
    assert wrong == []


@pytest.mark.parametrize(("folder", "limit"), [("training", 16), ("data_tools", 12)])
def test_what_lies_beside_the_entry_points_is_little(folder, limit):
    assert len(list((ROOT / folder).glob("*.py"))) <= limit


def test_no_module_hides_one_of_the_standard_library_or_of_a_requirement():
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    files = [*CODE, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]

    hiding = [relative(path) for path in files if path.stem in taken - {"__init__", "conftest"}]

    assert hiding == []


@pytest.mark.parametrize("path", CODE, ids=relative)
def test_files_are_short_enough_to_hold_in_the_head(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_deepspeed_files_are_strict_json():
    for path in (ROOT / "ds_configs").glob("*.json"):
        assert json.loads(path.read_text())["train_batch_size"] == "auto"


@pytest.mark.processes
def test_every_flag_that_a_document_names_exists():
    known = FOREIGN_FLAGS.copy()
    for path in ENTRY_POINTS:
        known |= set(re.findall(r"(?<![\w-])--[a-z][\w-]*", help_of(path)))
    documents = [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/*.md")]
    assert documents

    for document in documents:
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", document.read_text()))
        assert named <= known, f"{document.name} names {sorted(named - known)}"


@pytest.mark.processes
def test_no_tracked_file_is_large():
    large = [relative(p) for p in tracked_files() if p.stat().st_size > MAX_FILE_BYTES]

    assert large == []


@pytest.mark.processes
def test_no_tracked_file_holds_a_path_of_one_machine():
    # Written in pieces, so that this file does not find itself.
    homes = re.compile(
        "(?<![a-z.])/(?:" + "|".join(["ho" + "me", "ro" + "ot", "Us" + "ers"]) + ")/"
    )
    checkout = str(ROOT.parent) + "/"

    found = [
        relative(path)
        for path in tracked_files()
        if homes.search(text_of(path)) or (len(ROOT.parts) > 2 and checkout in text_of(path))
    ]

    assert found == []


@pytest.mark.parametrize("path", CODE, ids=relative)
def test_text_files_are_utf_8_whatever_the_locale(path):
    wrong = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            given = node.args[1 if node.func.attr == "write_text" else 0 :]
            is_named = given or any(keyword.arg == "encoding" for keyword in node.keywords)
            if node.func.attr in ("read_text", "write_text") and not is_named:
                wrong.append(node.lineno)

    assert wrong == []


@pytest.mark.processes
def test_shell_scripts_parse_and_those_that_are_run_are_executable():
    scripts = [ROOT / ".ci/run", *ROOT.glob("tests/*.sh"), *ROOT.glob("slurm/*.sh")]

    for script in scripts:
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
        assert os.access(script, os.X_OK) or script.name in ("common.sh", "site.sh")


@pytest.mark.processes
def test_make_demo_runs_the_three_commands_that_a_user_types():
    steps = subprocess.run(
        ["make", "--dry-run", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()

    first = steps.index("python data_tools/encode_latents.py")
    assert steps[first + 1 : first + 3] == [
        "deepspeed training/main.py --deepspeed ds_configs/zero2.json",
        "python training/sample.py runs/demo",
    ]


def fresh_checkout(folder):
    """What make needs to install nothing."""
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("requirements.txt", "requirements-dev.txt"):
        (folder / name).touch()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("exit 1", "is missing or older than Python 3.11; try: make PYTHON="),
        ('[[ $2 != *ensurepip* ]] || exit 1; exec python3 "$@"', "apt-get install python3-venv"),
    ],
)
def test_make_says_what_is_missing_before_it_installs(body, message, tmp_path):
    fresh_checkout(tmp_path)
    (tmp_path / "python").write_text(f"#!/bin/bash\n{body}\n")
    (tmp_path / "python").chmod(0o755)

    result = subprocess.run(
        ["make", "lint", "PYTHON=./python"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / ".venv").exists()


LAUNCHER_VARIABLE = re.compile(
    r"(LOCAL_|GROUP_|CROSS_)?(RANK|WORLD_SIZE|SIZE)|MASTER_(ADDR|PORT)"
    r"|(SLURMD?|OMPI|PMI|PMIX|MPI|MV2|PALS|JSM|FLUX|TORCHELASTIC)_[A-Z_]+"
)


def test_one_module_reads_launchers_variables():
    readers = {
        relative(path)
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and LAUNCHER_VARIABLE.fullmatch(node.value)
    }

    assert readers == {"data_tools/process/launcher.py"}


@pytest.mark.processes
def test_a_command_that_a_package_brings_as_a_file_works_in_a_path_with_blanks(tmp_path):
    checkout = tmp_path / "ein Pfad mit Ümläuten"
    commands = checkout / ".venv/bin"
    commands.mkdir(parents=True)
    fresh_checkout(checkout)
    python, command = commands / "python", commands / "deepspeed"
    python.write_text('#!/bin/sh\n[ "$2" = pip ] || exec python3 "$@"\n')
    command.write_text(f"#!{python.resolve()}\n\nimport sys\n\nprint(sys.argv[1:])\n")
    for path in (python, command):
        path.chmod(0o755)

    (checkout / "python3").symlink_to(sys.executable)
    install = ["make", ".venv/installed.stamp", f"PYTHON={checkout}/python3"]
    subprocess.run(install, cwd=checkout, capture_output=True, check=True)
    ran = subprocess.run([command, "a b"], capture_output=True, text=True, check=True)

    assert ran.stdout == "['a b']\n"
