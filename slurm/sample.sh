#!/usr/bin/env bash
# Draw images from a trained run: a labelled grid and one PNG per image.
#
#   Command:   sbatch slurm/sample.sh RUN_DIRECTORY [FLAG OF training/sample.py ...]
#              bash slurm/sample.sh runs/XL-2 --dry-run shows the srun command and runs nothing
#   Hardware:  1 GPU of 24 GB or more (XL/2 weights in fp32 take 3 GiB)
#   Hours:     minutes, an estimate and not measured: 80 images of 50 guided steps with XL/2 are
#              2 PFLOP
#   Result:    RUN_DIRECTORY/samples/CHECKPOINT/grid.png
#SBATCH --job-name=switch-dit-sample
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail
source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"

launch training/sample.py "$@"
