"""Training jobs on local_slurm.py, submitted as a user does, and what is done to them."""

import json
import re
import sys
import time
from pathlib import Path

from tests.support.launch import REPOSITORY
from tests.support.local_slurm import wait_for
from training.checkpoints.manifest import latest_checkpoint, read_manifest

LATENT_SIZE = 8
STEPS, SAVE_EVERY = 120, 10
WAIT_SEC = 900  # for whatever a loaded machine may need minutes for
VENV = Path(sys.prefix)
ON_CPU = {"DS_ACCELERATOR": "cpu", "VENV": str(VENV)}
OVER = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
RESUMED = re.compile(r"^resuming \S+ at step (\d+) ", re.MULTILINE)
STOPPED = re.compile(r"^stopped by a signal after step (\d+);", re.MULTILINE)


class Job:
    """A job that a user submitted from the repository: a template, and flags after it."""

    def __init__(self, cluster, folder, sbatch, template, *flags, **env):
        self.cluster, self.folder = cluster, folder
        self._output = folder / "output"
        command = ["sbatch", "--parsable", f"--output={self._output}", "--time=60", *sbatch]
        command += [f"slurm/{template}", *flags]
        self.number = cluster.run(*command, env=ON_CPU | env, cwd=REPOSITORY).strip()

    def output(self):
        """What the job has printed, over all its starts."""
        return self._output.read_text() if self._output.exists() else ""

    def field(self, name):
        """What Slurm says of the job now."""
        text = self.cluster.run("scontrol", "show", "job", self.number)
        return re.search(rf"\b{name}=(\S*)", text)[1]

    def nodes(self):
        """The nodes it runs on; the job script is on the first."""
        return self.cluster.run("scontrol", "show", "hostnames", self.field("NodeList")).split()

    def restarts(self):
        return int(self.field("Restarts"))

    def wait(self, condition, what):
        wait_for(condition, WAIT_SEC, lambda: f"waited for {what}\n{self.explain()}")

    def end(self):
        """Wait until the job has ended for good; return its state."""
        self.wait(lambda: self.field("JobState") in OVER, "the end")
        return self.field("JobState")

    def explain(self):
        show = self.cluster.run("scontrol", "show", "job", self.number, check=False)
        return f"{show}\n{self.output()[-5000:]}\n{self.cluster.logs()}"


class TrainingJob(Job):
    """Training on two nodes with two ranks each, with small numbers after the template."""

    def __init__(self, cluster, folder, latents, *flags, check_nodes="no", **env):
        self.run_dir = folder / "run"
        sbatch = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]
        train = ["--preset", "tests/small.yaml", "--data", latents, "--run-dir", self.run_dir]
        train += ["--latent-size", LATENT_SIZE, "--num-experts", 4, "--expert-parallel-size", 2]
        train += ["--global-batch-size", 8, "--max-steps", STEPS, "--log-every", 1]
        train += ["--save-every", SAVE_EVERY, "--sample-every", 0, *flags]
        env = {"CHECK_NODES": check_nodes} | env
        super().__init__(cluster, folder, sbatch, "train_xl.sh", *train, **env)

    def step(self):
        """The newest checkpoint's step."""
        folder = latest_checkpoint(self.run_dir)
        return 0 if folder is None else read_manifest(folder).state.step

    def losses(self):
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return {line["step"]: line["loss/total"] for line in map(json.loads, lines)}

    def wait_for_first_step(self):
        """Wait until a job that was just submitted trains; tell how long, to compare with."""
        began = time.monotonic()
        self.wait(lambda: re.search(r"^step \d+/", self.output(), re.M), "the first step")
        print(f"sbatch: {time.monotonic() - began:.0f} s until the first step")

    def wait_for_progress(self, steps=SAVE_EVERY):
        """Wait until the job has trained on by some steps; it has not ended by then."""
        target = self.step() + steps
        self.wait(lambda: self.step() >= target, f"step {target}")
        assert self.field("JobState") == "RUNNING", self.explain()

    def strike(self, what, action):
        """Do something after which Slurm starts the job again; wait until it has trained a step.

        Returns:
            The steps that were trained when it happened, and the one that training went on from.
        """
        self.wait_for_progress()
        self.wait(lambda: max(self.losses()) % SAVE_EVERY > 4, "steps after a checkpoint")
        restarts, starts = self.restarts(), len(RESUMED.findall(self.output()))
        reached, began = max(self.losses()), time.monotonic()
        action()

        def trains():
            resumed = list(RESUMED.finditer(self.output()))[starts:]
            return resumed and re.search(r"^step \d+/", self.output()[resumed[0].end() :], re.M)

        self.wait(trains, f"a step after {what}")
        seconds = time.monotonic() - began
        assert self.restarts() > restarts
        resumed_at = int(RESUMED.findall(self.output())[starts])
        again = max(0, reached - resumed_at)
        print(f"{what}: {seconds:.0f} s until the next step, {again} steps trained again")
        return reached, resumed_at
