"""Flags of other trainers, with dashes for underscores, and what to write instead of them."""

_RUN = "nothing: the same command continues a run; --run-dir RUN names it"
_PRECISION = "--deepspeed JSON: precision belongs to ds_configs/"
_ACCUMULATION = "--micro-batch-size N: accumulation follows from it and --global-batch-size"
_LATENTS = "--latent-size N: the image's side divided by the VAE's factor (32 for 256 pixels)"

# DiT, fast-DiT, Switch-DiT, DiT-MoE, DeepSpeed's examples, diffusers' and Hugging Face's trainers.
OF_TRAINING = {
    "--data-path": "--data: encoded latents, of data_tools/encode_latents.py",
    "--data-dir": "--data: encoded latents, of data_tools/encode_latents.py",
    "--feature-path": "--data: encoded latents, of data_tools/encode_latents.py",
    "--results-dir": "--run-dir",
    "--output-dir": "--run-dir",
    "--model": "--preset s, b, l or xl, or --size with --patch-size",
    "--image-size": _LATENTS,
    "--batch-size": "--global-batch-size: of all ranks together",
    "--train-batch-size": "--global-batch-size: of all ranks together",
    "--accum-iter": _ACCUMULATION,
    "--gradient-accumulation-steps": _ACCUMULATION,
    "--epochs": "--max-steps: in steps; --dry-run says how many an epoch has",
    "--num-epochs": "--max-steps: in steps; --dry-run says how many an epoch has",
    "--max-train-steps": "--max-steps",
    "--learning-rate": "--lr",
    "--global-seed": "--seed",
    "--ckpt": "--init-from for other weights; to continue a run, repeat its command",
    "--ckpt-every": "--save-every",
    "--checkpointing-steps": "--save-every",
    "--resume": _RUN,
    "--resume-from": _RUN,
    "--resume-from-checkpoint": _RUN,
    "--ema-decay": "--ema-decays",
    "--deepspeed-config": "--deepspeed JSON",
    "--config": "--preset NAME or a YAML file",
    "--mixed-precision": _PRECISION,
    "--fp16": _PRECISION,
    "--bf16": _PRECISION,
    "--routing-method": "--routing: switch, dtr or dense",
    "--num-workers": "nothing: tars are read by threads of each rank",
}
OF_DRAWING = {
    "--ckpt": "RUN, the first argument, with --checkpoint TAG, or --weights FILE",
    "--model": "nothing: the run knows its model",
    "--image-size": "nothing: the run knows its size",
    "--num-classes": "nothing: the run knows its classes",
    "--num-sampling-steps": "--steps",
    "--num-inference-steps": "--steps",
    "--guidance-scale": "--cfg-scale",
    "--num-fid-samples": "--num-images of training/evaluate.py",
    "--per-proc-batch-size": "--batch-size",
    "--sample-dir": "--output",
    "--global-seed": "--seed",
}
# What --format of training/export.py named once.
OLD_FORMATS = {
    "dit": "is no longer written: away from its number of steps, diffusers' DiTPipeline drew wrong "
    "images without any error; use --format diffusers",
}
