"""Every exit code of every command; launchers, slurm/common.sh and training/retry.py act on them.

srun and others report the highest code of all ranks, and the order below is the order of what a
job script must learn: a mistake hides a crash, a saved run hides both.
"""

CRASH_EXIT_CODE = 1  # or an outage, or a signal before a checkpoint: worth another start
CONFIG_ERROR_EXIT_CODE = 2  # a person must correct something first
SAVED_EXIT_CODE = 75  # EX_TEMPFAIL: stopped by a signal, saved, and to be started again
SIGNAL_EXIT_CODE = 128  # plus the signal's number, as shells have it: what is done is kept
