#!/usr/bin/env bash
# Encode images to latent shards, once, for all training runs.
#
#   Command:   sbatch slurm/encode_latents.sh [FLAG OF data_tools/encode_latents.py ...]
#              sbatch --array=0-15 slurm/encode_latents.sh: 16 jobs that share the work, each as
#              soon as a GPU is free; or in one job, e.g. on two nodes of 8 GPUs:
#              sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 slurm/encode_latents.sh
#              bash slurm/encode_latents.sh --dry-run shows the srun command and runs nothing
#   Data:      datasets/imagenet256-images/<class>/*, e.g. ImageNet's training set; or tars:
#              --input 'tars/{000..146}.tar'
#   Hardware:  1 GPU of 24 GB or more per task
#   Hours:     about 6 on one A100, an estimate and not measured: 1.28 M images, each encoded twice
#              (as it is and mirrored), at an assumed 120 encodings per second
#   Result:    datasets/imagenet256/ with dataset.json, about 42 GB for ImageNet (fp16 moments,
#              mirrored ones too)
#
# Near the time limit the job queues itself again; running it again keeps the finished shards.
# Tasks divide the shards among themselves as they go, so any number may start, end or be killed at
# any time.
#SBATCH --job-name=encode-latents
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail
source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"

launch data_tools/encode_latents.py --input datasets/imagenet256-images \
  --output datasets/imagenet256 --size 256 --vae stabilityai/sd-vae-ft-ema "$@"
