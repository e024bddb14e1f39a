"""What a run says of where it comes from, against a repository made for the purpose."""

import subprocess
import sys

import pytest

from data_tools.files import append_line
from training.run import program as provenance
from training.run.program import (
    PROVENANCE_DIR,
    STARTS_FILE,
    commit,
    installed_packages,
    local_changes,
    read_starts,
    record_start,
    source_hash,
)

pytestmark = pytest.mark.processes


START = {
    "step": 4,
    "checkpoint": "step-0000004",
    "layout": "2 rank(s)",
    "hosts": {"a": 1, "b": 1},
    "data_hash": "0",
    "config_changes": ["max_steps (8 -> 16)"],
}


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def program(tmp_path):
    """A repository with one commit."""
    folder = tmp_path / "program"
    (folder / "models").mkdir(parents=True)
    (folder / "models/a.py").write_text("a = 1\n")
    (folder / "slurm.sh").write_text("")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "a")
    return folder


def test_a_clean_program_is_its_commit(program):
    assert commit(program) == git(program, "rev-parse", "HEAD").strip()
    assert local_changes(program) == b""


def test_applying_the_changes_to_the_commit_gives_the_program(program, tmp_path):
    (program / "models/a.py").write_text("a = 2\n")
    (program / "models/new.py").write_bytes(b"b = '\xc3\xa4'\n")
    (program / "models/table.bin").write_bytes(bytes(range(256)))
    (program / "slurm.sh").write_text("export TOKEN=secret\n")  # decides no result
    # Nothing that a user or the repository sets may change the patch.
    git(program, "config", "diff.noprefix", "true")
    git(program, "config", "diff.external", "false")
    git(program, "config", "color.ui", "always")

    patch = local_changes(program)

    assert b"secret" not in patch
    copy = tmp_path / "copy"
    git(tmp_path, "clone", "--quiet", program, copy)
    assert source_hash(copy) != source_hash(program)
    (tmp_path / "patch").write_bytes(patch)
    git(copy, "apply", tmp_path / "patch")
    for name in ("a.py", "new.py", "table.bin"):
        assert (copy / "models" / name).read_bytes() == (program / "models" / name).read_bytes()
    assert source_hash(copy) == source_hash(program)


def test_outside_of_a_repository_and_without_git_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit(tmp_path) == "unknown"

    monkeypatch.setenv("PATH", "")
    assert commit() == "unknown"
    assert local_changes() == b""


def test_changes_that_are_too_large_are_left_out(program, monkeypatch):
    monkeypatch.setattr(provenance, "MAX_CHANGES_BYTES", 1000)
    (program / "models/a.py").write_text("a = 2\n" * 1000)

    assert local_changes(program) == b"The changes have more than 1000 bytes.\n"


def test_every_start_is_a_line_and_equal_lists_are_kept_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("API_TOKEN", "a-secret")
    provenance._program.cache_clear()

    starts = [record_start(tmp_path, **START), record_start(tmp_path, **START | {"step": 8})]

    assert read_starts(tmp_path) == starts
    assert [(start.step, start.batch_job) for start in starts] == [(4, "17"), (8, "17")]
    folder = tmp_path / PROVENANCE_DIR
    kept = {name for name in (starts[0].changes, starts[0].packages) if name}
    assert {path.name for path in folder.iterdir()} == kept
    listed = (folder / starts[0].packages).read_text().splitlines()
    assert f"torch=={installed_packages()['torch']}" in listed
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not [text for text in written if b"a-secret" in text]


def test_a_line_that_was_cut_off_is_no_start_and_makes_way(tmp_path):
    assert read_starts(tmp_path) == []
    start = record_start(tmp_path, **START)
    path = tmp_path / STARTS_FILE
    path.write_text(path.read_text() + '{"time": "20')

    assert read_starts(tmp_path) == [start]
    record_start(tmp_path, **START)
    assert read_starts(tmp_path)[0] == start
    assert len(read_starts(tmp_path)) == 2


def test_lines_of_another_version_do_not_keep_a_run_from_starting(tmp_path):
    (tmp_path / STARTS_FILE).write_text('{"time": "then", "colour": 3}\n')

    start = record_start(tmp_path, **START)

    assert read_starts(tmp_path) == [start]


def test_a_line_that_does_not_fit_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "lines"
    append_line(path, "a")
    program = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from data_tools.files import append_line\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "append_line(Path(sys.argv[1]), 'b' * 200)\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    result = subprocess.run(command, cwd=provenance.REPOSITORY, capture_output=True, text=True)

    assert "No space left" in result.stderr
    assert path.read_text() == "a\n"
