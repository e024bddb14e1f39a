"""Flags of the routing: what is refused, and that every one of them reaches the model."""

import pytest
import torch

from data_tools.errors import ConfigError
from models.experts import AffineExperts, MlpExperts
from tests.support.launch import REPOSITORY
from training.config.command_line import parse_command_line
from training.config.validation import validate
from training.engine.build import build_model

ZERO_2 = REPOSITORY / "ds_configs" / "zero2.json"


def configure(*flags):
    preset = ("--preset", str(REPOSITORY / "tests" / "small.yaml"))
    return parse_command_line([*preset, "--deepspeed", str(ZERO_2), *flags]).config


def build(*flags):
    with torch.device("meta"):
        return build_model(configure(*flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--expert-kind=mlp", "--expert-dispatch=merged"),
            "--expert-dispatch merged needs --expert-kind affine, since MLPs do not merge; use "
            "--expert-dispatch auto.",
        ),
        (
            ("--routing=dtr", "--dtr-beta=0.001"),
            "--dtr-beta 0.001 opens none of the 128 channels of --size demo; use at least 0.0078.",
        ),
        (
            ("--routing=dense", "--expert-parallel-size=2"),
            "--expert-parallel-size 2 needs --routing switch, since dense has no experts to share "
            "out; use --expert-parallel-size 1.",
        ),
    ],
)
def test_routing_that_cannot_be_built_is_refused(flags, message):
    with pytest.raises(ConfigError) as error:
        validate(configure(*flags), ZERO_2, 2)

    assert str(error.value) == message


def test_flags_of_experts_reach_the_model():
    model = build("--num-experts=5", "--top-k=3", "--expert-kind=mlp", "--expert-hidden-ratio=0.5")
    experts = model.blocks[0].mixture.deepspeed_moe.experts
    assert isinstance(experts, MlpExperts)
    assert experts.fc1_weight.shape == (5, 128, 64) and model.top_k == 3

    model = build("--expert-dispatch=dispatched", "--renormalize-gates", "--qk-norm")
    experts = model.blocks[0].mixture.deepspeed_moe.experts
    assert isinstance(experts, AffineExperts) and experts.dispatch == "dispatched"
    assert model.gate.renormalize and model.blocks[0].attn.q_norm.weight.shape == (32,)


def test_flags_of_masks_and_shapes_reach_the_model():
    flags = ("--routing=dtr", "--dtr-alpha=1", "--dtr-beta=0.25", "--latent-width=24")
    model = build_model(configure(*flags))
    masks = model.gate.mask_minus_one + 1
    assert masks.sum(1).unique().tolist() == [32.0]
    assert masks[500].argmax() == round(500 / 999 * 96)  # alpha 1: halfway in the middle
    assert model.options.input_size[1] == 24

    assert build("--routing=dense").num_experts == 0
    assert build("--objective=v").options.out_channels == 4
    assert build("--objective=v", "--learned-variance").options.out_channels == 8
    assert build("--loss-weight=uncertainty").uncertainty is not None
