"""What the sampling flags mean together with a run's configuration."""

import pytest

from data_tools.errors import ArgumentParser, ConfigError
from models.guidance import Guidance
from training.config.command_line import DEFAULT_DEEPSPEED, parse_command_line
from training.config.validation import validate
from training.monitoring.sample_grid import grid_settings
from training.run.directory import CONFIG_FILE, load_config
from training.sampling.flags import add_sampling_flags, sampler_settings
from training.sampling.latents import SamplerSettings

FLOW = ("--objective", "flow", "--timestep-shift", 3)
UNCONDITIONAL = ("--num-classes", 0)
NEVER_DROPPED = ("--class-dropout-prob", 0)
ALWAYS_DROPPED = ("--class-dropout-prob", 1)


def config_of(*training_flags):
    return parse_command_line([str(flag) for flag in training_flags]).config


def settings(*flags, training=()):
    parser = ArgumentParser()
    add_sampling_flags(parser)
    args = parser.parse_args([str(flag) for flag in flags])
    return sampler_settings(args, config_of(*training))


@pytest.mark.parametrize(
    ("flags", "training", "expected"),
    [
        ((), (), SamplerSettings("ddim", 50, 0, Guidance(2.0))),
        ((), FLOW, SamplerSettings("euler", 50, 0, Guidance(2.0), shift=3.0)),
        ((), UNCONDITIONAL, SamplerSettings("ddim", 50, 0, Guidance(1.0))),
        ((), NEVER_DROPPED, SamplerSettings("ddim", 50, 0, Guidance(1.0))),
        ((), ALWAYS_DROPPED, SamplerSettings("ddim", 50, 0, Guidance(1.0))),
        (("--shift", 1, "--cfg-scale", 1), FLOW, SamplerSettings("euler", 50, 0, Guidance(1.0))),
        (
            ("--sampler", "dpmpp-2m", "--steps", 9, "--seed", 7, "--cfg-channels", "three"),
            (),
            SamplerSettings("dpmpp-2m", 9, 7, Guidance(2.0, 3)),
        ),
        (
            ("--guidance-interval", 0.25, 0.5, "--cfg-scale", 4),
            (),
            SamplerSettings("ddim", 50, 0, Guidance(4.0, None, (250.0, 500.0))),
        ),
        (
            ("--autoguidance", "runs/weak", "--autoguidance-scale", 3),
            UNCONDITIONAL,
            SamplerSettings("ddim", 50, 0, Guidance(3.0)),
        ),
    ],
)
def test_flags_lie_over_the_defaults_of_the_run(flags, training, expected):
    assert settings(*flags, training=training) == expected


@pytest.mark.parametrize(
    ("flags", "training", "sentence"),
    [
        (("--steps", 0), (), "--steps must be at least 1, not 0."),
        (("--steps", 1001), (), "--steps 1001 exceeds the 1000 timesteps of the model; use fewer."),
        (
            ("--sampler", "ddim"),
            FLOW,
            "--sampler ddim does not fit objective flow; use euler or heun.",
        ),
        (
            ("--sampler", "heun"),
            ("--objective", "v"),
            "--sampler heun does not fit objective v; use ddim, ddpm or dpmpp-2m.",
        ),
        (("--shift", 2), (), "--shift 2.0 does not fit objective epsilon: only the times of flow"),
        (("--shift", 0), FLOW, "--shift must be a number above 0, not 0.0."),
        (("--cfg-scale", "nan"), (), "--cfg-scale must be a number of at least 0, not nan."),
        (
            ("--cfg-scale", 3),
            UNCONDITIONAL,
            "--cfg-scale 3.0 compares predictions with and without the label, but this run was "
            "trained without classes; use --cfg-scale 1.",
        ),
        (("--cfg-scale", 3), NEVER_DROPPED, "was trained with --class-dropout-prob 0; use --cfg"),
        (("--cfg-scale", 3), ALWAYS_DROPPED, "was trained with --class-dropout-prob 1; use --cfg"),
        (("--seed", -1), (), "--seed must be >=0 and <9223372036854775808, not -1."),
        (
            ("--cfg-scale", 3, "--autoguidance", "run"),
            (),
            "--cfg-scale 3.0 and --autoguidance exclude each other; set the latter's strength",
        ),
        (
            ("--autoguidance-scale", 3),
            (),
            "--autoguidance-scale 3.0 needs the run to guide by; add --autoguidance RUN.",
        ),
        (
            ("--autoguidance", "run", "--autoguidance-scale", -1),
            (),
            "--autoguidance-scale must be a number of at least 0, not -1.0.",
        ),
        (
            ("--guidance-interval", 0.5, 0.2),
            (),
            "--guidance-interval 0.5 0.2 is no interval within 0 and 1; give the lower end first.",
        ),
        (
            ("--guidance-interval", 0.2, 0.5, "--cfg-scale", 1),
            (),
            "--guidance-interval has no effect without guidance, whose scale is 1; choose another",
        ),
        (("--cfg-channels", "all"), UNCONDITIONAL, "--cfg-channels has no effect without guidance"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, training, sentence):
    with pytest.raises(ConfigError) as error:
        settings(*flags, training=training)

    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("training", "method", "scale", "shift"),
    [
        ((), "ddim", 2.0, 1.0),
        (("--sample-method", "dpmpp-2m"), "dpmpp-2m", 2.0, 1.0),
        (FLOW, "euler", 2.0, 3.0),
        (UNCONDITIONAL, "ddim", 1.0, 1.0),
        (NEVER_DROPPED, "ddim", 1.0, 1.0),
    ],
)
def test_the_grid_of_training_is_drawn_as_the_objective_and_the_labels_allow(
    training, method, scale, shift
):
    found = grid_settings(config_of(*training))

    assert (found.method, found.guidance.scale, found.shift) == (method, scale, shift)


def test_the_configuration_of_a_run_of_an_older_version_is_read(tmp_path):
    """It lacks the keys that came later, and knew one average only."""
    first_version = """
model: {size: demo, patch_size: 2, latent_channels: 4, latent_size: 16, num_classes: 10,
  num_experts: 3, top_k: 2, activation_checkpointing: false}
diffusion: {noise_schedule: linear, num_timesteps: 1000, prior_loss_weight: 1.0, prior_alpha: 4.0}
data: {data: datasets/demo, shuffle_window: 16, horizontal_flip: true, class_dropout_prob: 0.1}
optim: {lr: 0.002, beta1: 0.9, beta2: 0.999, weight_decay: 0.0, warmup_steps: 100,
  gradient_clipping: 1.0, ema_decay: 0.999, ema_warmup: true, global_batch_size: 32,
  micro_batch_size: null}
run: {run_dir: runs/demo, seed: 0, max_steps: 1500, expert_parallel_size: 1, log_every: 20,
  save_every: 500, keep_last: 2, sample_every: 500, sample_count: 40, sample_steps: 20,
  sample_cfg_scale: 2.0, vae: null}
"""
    (tmp_path / CONFIG_FILE).write_text(first_version)

    config = load_config(tmp_path)

    assert config.optim.ema_decays == (0.999,)
    assert (config.diffusion.objective, config.model.routing) == ("epsilon", "switch")
    assert grid_settings(config).method == "ddim"


def test_a_grid_that_does_not_fit_the_objective_is_refused_before_training():
    config = config_of(*FLOW, "--sample-method", "ddpm")

    with pytest.raises(ConfigError, match="--sample-method ddpm does not fit --objective flow; "):
        validate(config, DEFAULT_DEEPSPEED, world_size=1)
