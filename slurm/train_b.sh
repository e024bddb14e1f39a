#!/usr/bin/env bash
# Train Switch-DiT-B/2 on ImageNet 256x256 with the paper's numbers: 400k steps of 256 images.
#
#   Command:   sbatch slurm/train_b.sh [FLAG OF training/main.py ...]
#              bash slurm/train_b.sh --dry-run shows the srun command and runs nothing
#   Data:      datasets/imagenet256, from slurm/encode_latents.sh
#   Hardware:  1 node with 8 GPUs of 80 GB; more nodes: sbatch --nodes=2 slurm/train_b.sh
#   Hours:     about 2 on 8 H100, an estimate and not measured: 149 GFLOP per image (three times the
#              forward pass) x 102.4 M images at an assumed 25 % of 8 x 989 TFLOP/s in bf16
#   Result:    FID-50K 16.21 at guidance 1.5 (published; the paper's table)
#
# The same command continues a run; near the time limit the job saves and queues itself again.
#SBATCH --job-name=switch-dit-b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail
source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"

train --preset b --deepspeed ds_configs/zero2.json "$@"
