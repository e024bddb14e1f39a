"""The job scripts: what they would run, and what they do with Slurm's signals.

Here Slurm is replaced by programs of its commands' names that write down how they were called;
test_cluster_slurm.py has a real one.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.config.command_line import parse_command_line

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[2]
SHARED = ("common.sh", "site.sh")
JOBS = sorted(path.name for path in (ROOT / "slurm").glob("*.sh") if path.name not in SHARED)
TRAIN_JOBS = [name for name in JOBS if name.startswith("train_")]


def environment(**values):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return kept | values


def bash(*command, **values):
    return subprocess.run(
        ["bash", *command], cwd=ROOT, env=environment(**values), capture_output=True, text=True
    )


def test_every_job_script_is_there():
    training = [f"train_{size}.sh" for size in ("b", "l", "s", "xl")]

    assert ["encode_latents.sh", "evaluate.sh", "sample.sh", *training] == JOBS


@pytest.mark.parametrize("name", [*JOBS, *SHARED])
def test_scripts_parse(name):
    assert bash("-n", f"slurm/{name}").returncode == 0


@pytest.mark.parametrize("name", JOBS)
def test_scripts_open_with_command_hardware_hours_and_result(name):
    head = (ROOT / "slurm" / name).read_text().split("set -euo pipefail")[0]

    for word in ("Command:", "Hardware:", "Hours:", "an estimate and not measured", "Result:"):
        assert word in head
    assert f"slurm/{name}" in head


@pytest.mark.parametrize("name", JOBS)
def test_a_dry_run_prints_the_srun_command_without_slurm(name):
    result = bash(f"slurm/{name}", "--dry-run", "--some-flag", "two words")

    assert result.returncode == 0, result.stderr
    tasks = 1 if name in ("encode_latents.sh", "sample.sh") else 8
    assert result.stdout.startswith(f"srun --nodes=1 --ntasks-per-node={tasks} --cpus-per-task=")
    assert "--kill-on-bad-exit=1" in result.stdout
    assert result.stdout.strip().endswith(r"--some-flag two\ words")
    assert "--dry-run" not in result.stdout


@pytest.mark.parametrize("name", TRAIN_JOBS)
def test_training_jobs_start_one_task_per_gpu_with_their_preset(name):
    text = (ROOT / "slurm" / name).read_text()
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", text, re.MULTILINE))

    assert directives["ntasks-per-node"] == directives["gpus-per-node"]
    assert directives["signal"] == "B:USR1@300"
    assert "#SBATCH --requeue" in text
    printed = bash(f"slurm/{name}", "--dry-run").stdout
    look, train = printed.splitlines()
    argv = train.split("training/main.py ")[1].split()
    assert look == train.replace("main.py", "preflight.py")
    command = parse_command_line(argv)
    assert command.config.model.size == name.removeprefix("train_").removesuffix(".sh").upper()
    assert (ROOT / command.deepspeed).exists()


@pytest.mark.parametrize("name", JOBS)
def test_a_job_that_slurm_may_start_again_keeps_what_it_printed(name):
    text = (ROOT / "slurm" / name).read_text()

    assert ("#SBATCH --requeue\n" in text) == ("#SBATCH --open-mode=append\n" in text)


@pytest.mark.parametrize("name", ["encode_latents.sh", "evaluate.sh"])
def test_long_jobs_are_told_of_their_time_limit_and_queued_again(name):
    text = (ROOT / "slurm" / name).read_text()

    assert "\n#SBATCH --signal=B:USR1@120\n" in text
    assert "\n#SBATCH --requeue\n" in text


@pytest.mark.parametrize("path", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.name)
def test_what_a_person_reads_first_fits_a_window(path):
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]

    assert max(map(len, comments)) <= 100


def test_slurms_own_numbers_come_before_the_scripts():
    result = bash(
        "slurm/train_xl.sh",
        "--dry-run",
        SLURM_JOB_NUM_NODES="4",
        SLURM_NTASKS_PER_NODE="2",
        SLURM_CPUS_PER_TASK="3",
    )

    assert "--nodes=4 --ntasks-per-node=2 --cpus-per-task=3 " in result.stdout


def test_the_site_is_one_file(tmp_path):
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    site = tmp_path / "slurm/site.sh"
    text = site.read_text().replace("CONTAINER=()", "CONTAINER=(enter 'my image')")
    site.write_text(text.replace("SRUN_FLAGS=()", "SRUN_FLAGS=(--mpi=none)"))

    result = subprocess.run(
        ["bash", "slurm/sample.sh", "--dry-run", "runs/a"],
        cwd=tmp_path,
        env=environment(VENV="/opt/venv"),
        capture_output=True,
        text=True,
    )

    program = r"enter my\ image /opt/venv/bin/python -u training/sample.py runs/a"
    assert result.stdout.strip().endswith(f"--kill-on-bad-exit=1 --mpi=none {program}")


def test_outside_a_job_the_script_says_how_to_submit_it():
    result = bash("slurm/train_xl.sh")

    assert result.returncode == 2
    assert "not inside a Slurm job; submit it with: sbatch slurm/train_xl.sh" in result.stderr


def test_an_array_that_may_be_empty_is_no_unset_variable():
    # To a bash before 4.4, `set -u` and "${EMPTY[@]}" are an error.
    arrays = re.findall(r"^([A-Z_]+)=\(", (ROOT / "slurm/site.sh").read_text(), re.MULTILINE)
    assert {"MODULES", "CONTAINER", "SRUN_FLAGS"} <= set(arrays)

    for path in (ROOT / "slurm").glob("*.sh"):
        for name in arrays:
            used, guarded = f'"${{{name}[@]}}"', f'${{{name}[@]+"${{{name}[@]}}"}}'
            text = path.read_text().replace(guarded, "").replace(f"module load {used}", "")
            assert used not in text, f"{path.name} expands {name} without a guard"


@pytest.fixture
def job(tmp_path):
    """Start a job script whose srun runs BODY; return the process and the log of calls."""
    log = tmp_path / "calls"
    log.touch()

    def program(name, body):
        path = tmp_path / name
        path.write_text(f'#!/bin/bash\necho {name} "$@" >>{log}\n{body}\n')
        path.chmod(0o755)

    # A controller that does not answer the first REFUSALS calls of a kind.
    answer = f'if (($(grep -c "^$(basename $0) $1" {log}) <= ${{REFUSALS:-0}})); then exit 1; fi'
    job = 'echo "   Requeue=1 Restarts=${RESTARTS:-0} BatchFlag=1"'
    show = f'case $2 in hostnames) printf "node7\\nnode8\\n";; job) {job};; esac'
    program("scontrol", f"if [[ $1 == requeue ]]; then {answer}; fi; {show}")
    program("scancel", f"{answer}; kill -TERM $(cat {tmp_path}/srun.pid)")

    def start(body, script="train_s.sh", **values):
        program("srun", f"echo $MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS >>{log}\n{body}")
        env = environment(
            PATH=f"{tmp_path}:{os.environ['PATH']}",
            VENV=sys.prefix,
            SLURM_JOB_ID="41234",
            SLURM_JOB_NODELIST="node[7-8]",
            **{"CHECK_NODES": "no", "RETRY_SEC": "0.1"} | values,
        )
        command = ["bash", f"slurm/{script}", "--run-dir", tmp_path / "run"]
        process = subprocess.Popen(command, cwd=ROOT, env=env)
        return process, log

    return start


# A task that saves on SIGTERM, as training does, and exits as the test says.
WAITING_TASK = """
echo $$ >{folder}/srun.pid
trap 'echo saved >>{folder}/calls; exit {status}' TERM
for ((i = 0; i < 600; i++)); do sleep 0.1; done
"""


def wait_for(path):
    for _ in range(600):
        if path.exists() and path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


def test_a_job_gives_its_ranks_a_place_to_meet(job):
    process, log = job("exit 0")

    assert process.wait(timeout=60) == 0
    calls = log.read_text().splitlines()
    assert calls[0] == "scontrol show hostnames node[7-8]"
    assert calls[1].startswith("srun --nodes=1 --ntasks-per-node=8 ")
    assert " --preset s --deepspeed ds_configs/zero2.json --run-dir " in calls[1]
    assert calls[2] == f"node7 {10000 + 41234 % 20000} 8"
    assert len(calls) == 3


def test_training_starts_only_on_nodes_that_pass(job):
    process, log = job("[[ $* != *preflight.py* ]] || exit 2", CHECK_NODES="yes")

    assert process.wait(timeout=60) == 2
    calls = log.read_text()
    assert "training/preflight.py" in calls
    assert "training/main.py" not in calls
    assert "requeue" not in calls


def test_a_mistake_of_the_users_is_not_tried_again(job):
    process, log = job("exit 2")

    assert process.wait(timeout=60) == 2
    assert "requeue" not in log.read_text()


def test_a_crash_is_tried_again_a_bounded_number_of_times(job, tmp_path):
    for restart in range(3):
        process, log = job("exit 7", MAX_RESTARTS="2")
        assert process.wait(timeout=60) == 7
        assert log.read_text().count("scontrol requeue 41234") == min(restart + 1, 2)

    assert (tmp_path / "run" / "restarts.json").exists()


def test_near_the_time_limit_the_ranks_save_and_the_job_is_queued_again(job, tmp_path):
    process, log = job(WAITING_TASK.format(folder=tmp_path, status=75))
    wait_for(tmp_path / "srun.pid")

    process.send_signal(signal.SIGUSR1)

    assert process.wait(timeout=60) == 75
    calls = log.read_text().splitlines()
    assert calls[-4:] == [
        "scancel --signal=TERM 41234",
        "saved",
        "scontrol show job 41234",
        "scontrol requeue 41234",
    ]


def test_a_job_of_an_array_speaks_for_itself_only(job, tmp_path):
    task = WAITING_TASK.format(folder=tmp_path, status=143)
    array = {"SLURM_ARRAY_JOB_ID": "41234", "SLURM_ARRAY_TASK_ID": "7"}
    process, log = job(task, script="encode_latents.sh", **array)
    wait_for(tmp_path / "srun.pid")

    process.send_signal(signal.SIGUSR1)

    assert process.wait(timeout=60) == 75
    calls = log.read_text().splitlines()
    assert "scancel --signal=TERM 41234_7" in calls
    assert calls[-1] == "scontrol requeue 41234_7"


def test_an_evaluation_near_its_time_limit_goes_on_in_the_next_start(job, tmp_path):
    # It saves as it goes, so SIGTERM just ends it.
    process, log = job(f"echo $$ >{tmp_path}/srun.pid; exec sleep 60", script="evaluate.sh")
    wait_for(tmp_path / "srun.pid")

    process.send_signal(signal.SIGUSR1)

    assert process.wait(timeout=60) == 75
    calls = log.read_text().splitlines()
    assert calls[-3:] == [
        "scancel --signal=TERM 41234",
        "scontrol show job 41234",
        "scontrol requeue 41234",
    ]


def test_a_script_that_outlived_its_job_leaves_the_next_start_alone(job):
    process, log = job("exit 1", SLURM_RESTART_COUNT="2", RESTARTS="3")

    assert process.wait(timeout=60) == 1
    assert "scontrol requeue" not in log.read_text()


@pytest.mark.parametrize(("refusals", "tries"), [(2, 3), (9, 6)])
def test_a_controller_that_restarts_is_asked_again(job, refusals, tries, capfd):
    process, log = job("exit 75", REFUSALS=str(refusals))

    assert process.wait(timeout=60) == 75
    calls = log.read_text().splitlines()
    assert calls[-2:] == ["scontrol show job 41234", "scontrol requeue 41234"]
    assert calls.count("scontrol requeue 41234") == tries
    has_failed = "error: Slurm did not queue job 41234 again" in capfd.readouterr().err
    assert has_failed == (refusals > tries)


def test_the_ranks_hear_of_the_time_limit_from_a_controller_that_restarts(job, tmp_path):
    task = WAITING_TASK.format(folder=tmp_path, status=75)
    process, log = job(task, REFUSALS="3")
    wait_for(tmp_path / "srun.pid")

    process.send_signal(signal.SIGUSR1)

    assert process.wait(timeout=60) == 75
    calls = log.read_text().splitlines()
    assert calls.count("scancel --signal=TERM 41234") == 4
    assert "saved" in calls


def test_ranks_that_ended_by_themselves_are_told_nothing_more(job, tmp_path):
    task = f"echo $$ >{tmp_path}/srun.pid; sleep 1; exit 0"
    process, log = job(task, REFUSALS="99", RETRY_SEC="2")
    wait_for(tmp_path / "srun.pid")

    process.send_signal(signal.SIGUSR1)

    assert process.wait(timeout=60) == 0
    assert log.read_text().count("scancel") == 2


def test_the_site_may_choose_the_port(job):
    process, log = job("exit 0", SITE_PORT="4711")

    assert process.wait(timeout=60) == 0
    assert log.read_text().splitlines()[2] == "node7 4711 8"


@pytest.mark.parametrize("script", ["train_s.sh", "sample.sh"])
def test_modules_that_do_not_load_end_the_job_in_one_sentence(job, tmp_path, script, capfd):
    shutil.copytree(ROOT / "slurm", tmp_path / "site/slurm")
    site = tmp_path / "site/slurm/site.sh"
    text = site.read_text().replace("MODULES=()", "MODULES=(cuda/99 gcc)")
    site.write_text(text + "module() { return 1; }\n")

    process, log = job("exit 0", script=script, SLURM_SUBMIT_DIR=str(tmp_path / "site"))

    assert process.wait(timeout=60) == 2
    assert "srun" not in log.read_text()
    assert "requeue" not in log.read_text()
    error = "error: module load cuda/99 gcc failed; correct MODULES in slurm/site.sh\n"
    assert capfd.readouterr().err == error


def test_a_job_that_is_done_at_the_time_limit_is_not_queued_again(job, tmp_path):
    process, log = job(WAITING_TASK.format(folder=tmp_path, status=0))
    wait_for(tmp_path / "srun.pid")

    process.send_signal(signal.SIGUSR1)

    assert process.wait(timeout=60) == 0
    assert "requeue" not in log.read_text()


def test_the_time_limit_during_the_look_at_the_nodes_queues_again_at_once(job, tmp_path):
    task = WAITING_TASK.format(folder=tmp_path, status=143)
    process, log = job(task, CHECK_NODES="yes")
    wait_for(tmp_path / "srun.pid")

    process.send_signal(signal.SIGUSR1)

    assert process.wait(timeout=60) == 75
    assert log.read_text().splitlines()[-1] == "scontrol requeue 41234"
    assert "training/main.py" not in log.read_text()


def test_a_terminated_job_waits_for_its_ranks_to_save_and_leaves_the_rest_to_slurm(job, tmp_path):
    process, log = job(WAITING_TASK.format(folder=tmp_path, status=75))
    wait_for(tmp_path / "srun.pid")

    process.send_signal(signal.SIGTERM)
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGTERM)

    assert process.wait(timeout=60) == 75
    assert log.read_text().splitlines()[-1] == "saved"
