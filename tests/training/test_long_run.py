"""A run of 20,000 steps needs no more of anything at its end than near its beginning."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.launch import REPOSITORY, environment
from tests.support.synthetic import make_dataset, random_moments
from training.checkpoints.manifest import CHECKPOINT_DIR
from training.monitoring.event_files import METRICS_FILE, TENSORBOARD_DIR, read_metrics
from training.run.console_log import LOG_FILE

STEPS = 20_000
LOG_EVERY, SAVE_EVERY, SAMPLE_EVERY = 20, 500, 2_000
WARM_STEPS = STEPS // 5  # by then every cache and thread pool has been used
MAX_GROWTH_MIB = 16.0
SHAPE = (8, 4, 4)
FLAGS = (
    *("--preset", "tests/small.yaml", "--latent-size", 4, "--patch-size", 4, "--num-classes", 3),
    *("--num-experts", 2, "--top-k", 1, "--global-batch-size", 1, "--max-steps", STEPS),
    *("--log-every", LOG_EVERY, "--save-every", SAVE_EVERY, "--sample-every", SAMPLE_EVERY),
    *("--sample-count", 1, "--sample-steps", 1, "--vae", "data_tools/demo_vae"),
)


def usage(pid):
    """What a process holds: resident MiB, file descriptors and threads."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "MiB": int(fields["VmRSS"].split()[0]) / 1024,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(fields["Threads"]),
    }


def last_step(run_dir):
    """The last step in the records, without reading all of them."""
    path = run_dir / METRICS_FILE
    if not path.exists() or path.stat().st_size == 0:
        return 0
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, 20_000), os.SEEK_END)
        lines = file.read().split(b"\n")
    return int(lines[-2].split(b'"step": ')[1].split(b",")[0])


@pytest.mark.long
def test_twenty_thousand_steps_hold_no_more_at_their_end(tmp_path):
    make_dataset(tmp_path / "data", [64, 64], shape=SHAPE, moments=random_moments(SHAPE))
    run_dir, shared = tmp_path / "run", set(os.listdir("/dev/shm"))
    command = [sys.executable, "training/main.py", "--data", tmp_path / "data", *FLAGS]
    process = subprocess.Popen(
        [str(part) for part in (*command, "--run-dir", run_dir)],
        cwd=REPOSITORY,
        env=environment(DS_ACCELERATOR="cpu"),
        stdout=subprocess.DEVNULL,  # the log has it
    )
    held = {}
    try:
        while process.poll() is None:
            step = last_step(run_dir)
            # Between saves and grids, whose copies come and go.
            if step % SAVE_EVERY > SAVE_EVERY // 2:
                held[step] = usage(process.pid)
            time.sleep(0.5)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0

    print(
        "\n".join(f"step {step}: {what}" for step, what in list(held.items())[:: len(held) // 10])
    )
    early = [what for step, what in held.items() if WARM_STEPS < step < 2 * WARM_STEPS]
    late = [what for step, what in held.items() if step > STEPS - WARM_STEPS]
    for name, allowed in (("MiB", MAX_GROWTH_MIB), ("descriptors", 0), ("threads", 0)):
        before, after = max(what[name] for what in early), max(what[name] for what in late)
        assert after <= before + allowed, (name, held)
    assert [record["step"] for record in read_metrics(run_dir)] == list(
        range(LOG_EVERY, STEPS + 1, LOG_EVERY)
    )
    # What stays is what the README says: a bounded number of checkpoints, no temporary file.
    checkpoints = sorted(path.name for path in (run_dir / CHECKPOINT_DIR).iterdir())
    assert checkpoints == ["latest", f"step-{STEPS - SAVE_EVERY:07d}", f"step-{STEPS:07d}"]
    assert not [path for path in run_dir.rglob("*") if "tmp" in path.name]
    events = sum(path.stat().st_size for path in (run_dir / TENSORBOARD_DIR).iterdir())
    print(f"TensorBoard {events / STEPS * LOG_EVERY:.0f} bytes per record, log", end=" ")
    print(f"{(run_dir / LOG_FILE).stat().st_size} bytes")
    assert set(os.listdir("/dev/shm")) <= shared
