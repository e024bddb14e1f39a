"""Train one command to its end through many kill -9, at random moments and during saves.

Started as: killed_jobs.py --jobs FILE, where FILE is JSON: argv (of training/main.py),
num_ranks, kills and seed. Every attempt is a job of its own, forked from this process, which has
imported everything already: the tests pay for the imports once. Prints a line of JSON for every
kill: the newest checkpoint before and after, and whether one was being written.
"""

import json
import random
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.support.forked_jobs import fork_ranks, prepare_to_fork, wait_for

PROGRESS_SEC = 120


def newest(folder):
    pointer = folder / "latest"
    return pointer.read_text().strip() if pointer.exists() else ""


def is_writing(folder):
    return any(folder.glob(".staging-*/step-*"))


def wait_until(happens, ranks):
    deadline = time.monotonic() + PROGRESS_SEC
    while not happens():
        assert time.monotonic() < deadline, "no progress"
        assert all(rank.is_alive() for rank in ranks), "a rank ended by itself"
        time.sleep(0.002)


def main():
    prepare_to_fork()
    plan = json.loads(Path(sys.argv[sys.argv.index("--jobs") + 1]).read_text())
    argv, num_ranks, rng = plan["argv"], plan["num_ranks"], random.Random(plan["seed"])
    folder = Path(argv[argv.index("--run-dir") + 1]) / "checkpoints"
    for kill in range(plan["kills"]):
        before = newest(folder)
        ranks = fork_ranks(num_ranks, argv)
        if kill % 3 == 2:  # while it starts, loads, or trains its first steps
            time.sleep(rng.uniform(0.0, 2.0))
        else:
            wait_until(lambda before=before: newest(folder) != before, ranks)
            time.sleep(rng.uniform(0.0, 0.2))
            if kill % 3 == 1:  # a busy machine is rarely met while it writes
                wait_until(lambda: is_writing(folder), ranks)
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.join()
        print(json.dumps([before, newest(folder), is_writing(folder)]), flush=True)
    sys.exit(wait_for(fork_ranks(num_ranks, argv)))


if __name__ == "__main__":
    main()
