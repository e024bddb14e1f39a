#!/usr/bin/env bash
# Draw images from a trained run in numbers and score them.
#
#   Command:   sbatch slurm/evaluate.sh RUN_DIRECTORY --num-images 50000 --steps 250 \
#                --sampler ddpm --cfg-scale 1.5 --reference VIRTUAL_imagenet256_labeled.npz \
#                --inception WEIGHTS
#              bash slurm/evaluate.sh runs/XL-2 --dry-run shows the srun command and runs nothing
#   Hardware:  1 node of 8 GPUs of 24 GB or more, one task each; 20 GB of disk for 50,000 images of
#              256 pixels
#   Hours:     five on H100s, an estimate and not measured: 50,000 images of 250 guided steps with
#              XL/2 are 6,250 PFLOP in fp32, at 40 TFLOP/s a GPU
#   Result:    RUN_DIRECTORY/evaluation/*/samples.npz and score-*.json
#
# Near the time limit the job queues itself again and goes on; the images that are drawn stay.
#SBATCH --job-name=switch-dit-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail
source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"

launch training/evaluate.py "$@"
