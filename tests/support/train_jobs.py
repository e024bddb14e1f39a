"""Run several training commands in one process group, so that tests pay its start once.

Started by the real launcher: deepspeed --num_gpus N train_jobs.py --jobs FILE, where FILE is
a JSON list of argument lists of training/main.py. Each job is checked and trained as main does.
"""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from training.checked_job import check
from training.config.command_line import parse_command_line
from training.main import train_job
from training.ranks import process_group


def main():
    ranks = process_group.discover_ranks()
    device = process_group.select_accelerator(ranks)
    jobs = json.loads(Path(sys.argv[sys.argv.index("--jobs") + 1]).read_text())
    process_group.start_process_group(ranks, device)
    for argv in jobs:
        train_job(check(parse_command_line(argv), ranks), ranks, device)
    process_group.stop_process_group()


if __name__ == "__main__":
    main()
