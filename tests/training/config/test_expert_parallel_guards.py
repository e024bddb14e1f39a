"""What expert parallelism cannot do is one sentence before any process starts."""

import json

import pytest
import torch

from data_tools.errors import ConfigError
from models.expert_parallel import ShardedExpertParallelMixture
from tests.support.configs import small
from tests.support.tiny_models import tiny_options
from training.config.validation import expert_values, validate
from training.cost.closed_forms import count_parameters

STAGES = (0, 1, 2, 3)


def configuration(**values):
    """Four experts on two ranks each, with some leaves replaced."""
    return small(**{"num_experts": 4, "expert_parallel_size": 2} | values)


@pytest.fixture
def refuse(tmp_path):
    """Validate a run on some ranks with a DeepSpeed file; return the one sentence."""

    def call(stage, world_size, zero=None, top=None, **values):
        path = tmp_path / "ds.json"
        path.write_text(
            json.dumps({"zero_optimization": {"stage": stage, **(zero or {})}, **(top or {})})
        )
        with pytest.raises(ConfigError) as error:
            validate(configuration(**values), path, world_size)
        sentence = str(error.value)
        assert sentence.startswith(("--", str(path))) and sentence.count("\n") == 0
        return sentence.replace(str(path), "FILE")

    return call


@pytest.mark.parametrize("stage", STAGES)
def test_it_works_at_every_stage(stage, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))

    validate(configuration(gradient_clipping=1.0 if stage else 0.0), path, 4)


@pytest.mark.parametrize(
    ("world_size", "values", "sentence"),
    [
        (2, {"num_experts": 3}, "--expert-parallel-size 2 does not divide --num-experts 3; use a"),
        (3, {"global_batch_size": 6}, "--expert-parallel-size 2 does not divide the 3 rank(s);"),
        (2, {"routing": "dense"}, "--expert-parallel-size 2 needs --routing switch, since dense"),
        (2, {"routing": "dtr"}, "--expert-parallel-size 2 needs --routing switch, since dtr has"),
        # A smaller batch on one rank would weigh its samples more.
        (4, {"global_batch_size": 10}, "--global-batch-size 10 is not divisible by 4 ranks; use"),
        (
            4,
            {"global_batch_size": 12, "micro_batch_size": 2},
            "--global-batch-size 12 is not divisible by 4 ranks x micro-batch 2 = 8; use",
        ),
        (
            8192,
            {"expert_kind": "mlp", "expert_hidden_ratio": 0.001, "global_batch_size": 8192},
            "--expert-parallel-size 2 leaves 4620 values of experts to 4096 ranks that would share",
        ),
    ],
)
@pytest.mark.parametrize("stage", STAGES)
def test_sizes_that_do_not_fit_are_refused(refuse, stage, world_size, values, sentence):
    found = refuse(stage, world_size, **({"gradient_clipping": 0.0} | values))

    assert found.startswith(sentence)


def test_clipping_by_a_wrong_norm_is_refused(refuse):
    assert refuse(0, 2, gradient_clipping=0.5) == (
        "--gradient-clipping 0.5 with --expert-parallel-size 2 at ZeRO stage 0 (FILE) would clip "
        "by a wrong norm (DeepSpeed #8475); use ds_configs/zero1.json or --gradient-clipping 0."
    )


@pytest.mark.parametrize("stage", (1, 2, 3))
@pytest.mark.parametrize("key", ["contiguous_gradients", "reduce_scatter"])
def test_other_ways_to_reduce_gradients_are_refused(refuse, stage, key):
    found = refuse(stage, 2, {key: False})

    assert found == (
        f"FILE: zero_optimization.{key} must be true with --expert-parallel-size 2; remove the key."
    )


# These are wrong, or untested, without expert parallelism too.
@pytest.mark.parametrize(
    "zero",
    [
        {"zero_hpz_partition_size": 2},
        {"zero_quantized_gradients": True},
        {"zero_quantized_weights": True},
        {"mics_shard_size": 2},
        {"stage3_module_granularity_threshold": 1000},
        {"elastic_checkpoint": True},
        {"offload_param": {"device": "nvme"}},
    ],
    ids=lambda zero: next(iter(zero)),
)
def test_what_would_shard_experts_otherwise_is_refused(refuse, zero):
    assert f"zero_optimization.{next(iter(zero))}" in refuse(3, 2, zero)


@pytest.mark.parametrize(
    "top",
    [
        {"use_data_before_expert_parallelism": True},
        {"gradient_predivide_factor": 2.0},
        {"prescale_gradients": True},
        {"gradient_allreduce_op": "sum"},
        {"compile": {"deepcompile": True}},
        {"expert_parallel": {"enabled": True}},
        {"sequence_parallel_size": 2},
        {"checkpoint": {"load_universal": True}},
    ],
    ids=lambda top: next(iter(top)),
)
def test_keys_that_change_what_is_trained_are_refused(refuse, top):
    sentence = refuse(2, 2, top=top)

    assert sentence.startswith("FILE: remove ") and next(iter(top)) in sentence


def test_a_parameter_that_is_sharded_already_is_not_accepted(single_process_group):
    mixture = ShardedExpertParallelMixture(tiny_options())
    next(mixture.parameters()).ds_id = 0  # as if built inside of zero.Init

    with pytest.raises(AssertionError, match="build the model outside of zero.Init"):
        mixture.set_deepspeed_parallelism()


@pytest.mark.parametrize("kind", ["affine", "mlp"])
def test_the_values_of_experts_are_counted_as_they_are_built(kind):
    config = configuration(expert_kind=kind, expert_hidden_ratio=0.3)

    with torch.device("meta"):
        assert expert_values(config) == count_parameters(config).experts
