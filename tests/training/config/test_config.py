"""Presets, strict keys and types, flags, differences, and everything validation refuses."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from data_tools.errors import ConfigError
from tests.support.configs import changed
from training.config.command_line import parse_command_line
from training.config.deepspeed_config import plan_batch
from training.config.options_table import TABLE
from training.config.preset import load_preset
from training.config.tree import config_from_dict, differences, options
from training.config.validation import check_data, validate

ROOT = Path(__file__).resolve().parents[3]
PRESETS = sorted(path.stem for path in (ROOT / "training/presets").glob("*.yaml"))
ZERO = {stage: ROOT / f"ds_configs/zero{stage}.json" for stage in range(4)}


@pytest.fixture(scope="module")
def demo():
    return load_preset(str(ROOT / "tests/small.yaml"))


def manifest(**values):
    defaults = {
        "folder": "datasets/demo",
        "num_samples": 1000,
        "num_classes": 10,
        "latent_channels": 4,
        "latent_height": 16,
        "latent_width": 16,
        "has_flip": True,
    }
    return SimpleNamespace(**defaults | values)


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_the_presets_are_demo_and_the_papers_four_sizes():
    assert PRESETS == ["b", "demo", "l", "s", "xl"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_being_written_and_read(name, tmp_path):
    config = load_preset(name)

    assert load_preset(write(tmp_path, config.to_yaml())) == config
    assert config_from_dict(config.to_dict(), "dict") == config


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_valid_with_every_deepspeed_file(name):
    for path in sorted((ROOT / "ds_configs").glob("*.json")):
        validate(load_preset(name), path, world_size=8)


@pytest.mark.parametrize("name", ["s", "b", "l", "xl"])
def test_paper_presets_hold_the_papers_numbers(name):
    config = load_preset(name)

    assert config.model.size == name.upper()
    optim, model = config.optim, config.model
    assert (optim.lr, optim.weight_decay, optim.ema_decays) == (1e-4, 0.0, (0.9999,))
    assert (optim.global_batch_size, optim.warmup_steps, optim.gradient_clipping) == (256, 0, 0)
    assert (model.patch_size, model.num_experts, model.top_k) == (2, 3, 2)
    assert (model.latent_size, model.latent_channels, model.num_classes) == (32, 4, 1000)
    assert (config.run.max_steps, config.data.class_dropout_prob) == (400_000, 0.1)
    assert config.data.horizontal_flip
    diffusion = config.diffusion
    assert (diffusion.noise_schedule, diffusion.prior_loss_weight) == ("cosine", 1.0)


def test_paper_presets_differ_only_in_size_and_run_directory():
    small = load_preset("s")
    for name in ("b", "l", "xl"):
        large = load_preset(name)
        same = changed(large, size="S", run_dir=small.run.run_dir)
        assert same == small


def test_leaf_names_are_unique_so_each_is_one_flag():
    names = [leaf.name for leaf in options()]

    assert len(names) == len(set(names))
    assert all(leaf.field.metadata["help"] for leaf in options())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("top_k: 2", "topk: 2", "unknown key 'topk' in section 'model'; did you mean 'top_k'?"),
        ("model:", "modle:", "unknown section 'modle'; did you mean 'model'?"),
        (
            "top_k: 2",
            "lr: 2",
            "unknown key 'lr' in section 'model'; it belongs in section 'optim'.",
        ),
        ("  lr: 1e-3\n", "", "optim.lr is missing: learning rate."),
        ("lr: 1e-3", "lr: fast", "optim.lr must be a number, not 'fast'."),
        ("lr: 1e-3", "lr: 0", "optim.lr must be >0, not 0.0."),
        ("lr: 1e-3", "lr: .nan", "optim.lr must be >0, not nan."),
        ("lr: 1e-3", "lr: .inf", "optim.lr must be >0, not inf."),
        ("top_k: 2", "top_k: '2'", "model.top_k must be a whole number, not '2'."),
        ("top_k: 2", "top_k: 2.0", "model.top_k must be a whole number, not 2.0."),
        ("top_k: 2", "top_k: true", "model.top_k must be a whole number, not True."),
        ("seed: 0", "seed: null", "run.seed must be a whole number, not None."),
        ("seed: 0", "seed: 0\n  vae: 3", "run.vae must be a text or null, not 3."),
        ("ema_warmup: true", "ema_warmup: 1", "optim.ema_warmup must be true or false, not 1."),
        ("size: demo", "size: XXL", "model.size: unknown value 'XXL'; did you mean 'XL'?"),
        ("cosine", "cosin", "noise_schedule: unknown value 'cosin'; did you mean 'cosine'?"),
        ("cosine", "edm", "unknown value 'edm'; choose one of: cosine, linear."),
        ("top_k: 2", "top_k: 2\n  top_k: 1", "key 'top_k' is given twice"),
        ("model:\n", "model: [\n", "is not valid YAML"),
    ],
)
def test_a_wrong_preset_is_refused(old, new, message, tmp_path):
    text = (ROOT / "tests/small.yaml").read_text()
    assert old in text

    with pytest.raises(ConfigError) as error:
        load_preset(write(tmp_path, text.replace(old, new, 1)))

    assert message in str(error.value)
    assert "mine.yaml" in str(error.value)


@pytest.mark.parametrize("text", ["", "3", "- model", "model: 3"])
def test_a_preset_that_holds_no_sections_is_refused(text, tmp_path):
    with pytest.raises(ConfigError, match="must hold"):
        load_preset(write(tmp_path, text))


def test_unknown_presets_and_missing_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--preset: unknown preset 'dmo'; did you mean 'demo'\?"):
        load_preset("dmo")
    with pytest.raises(ConfigError, match="No such file"):
        load_preset(str(tmp_path / "none.yaml"))


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    text = (ROOT / "tests/small.yaml").read_text()
    for spelling in ("1e-4", "1E-4", "1.0e-4", "1.e-4", "0.0001"):
        path = write(tmp_path, text.replace("lr: 1e-3", f"lr: {spelling}"))
        assert load_preset(path).optim.lr == 1e-4


def test_the_bare_command_line_is_the_demo_with_zero_2():
    command = parse_command_line([])

    assert command.config == load_preset("demo")
    assert command.deepspeed == Path("ds_configs/zero2.json")
    assert not command.dry_run


def test_flags_lie_over_the_preset():
    line = (
        "--local_rank=1 --preset xl --deepspeed mine.json --dry-run --lr 2e-4 --num-experts=6 "
        "--no-horizontal-flip --activation-checkpointing --micro-batch-size 8 --vae here"
    )

    command = parse_command_line(line.split())

    assert command.config == changed(
        load_preset("xl"),
        lr=2e-4,
        num_experts=6,
        horizontal_flip=False,
        activation_checkpointing=True,
        micro_batch_size=8,
        vae="here",
    )
    assert command.dry_run
    assert command.deepspeed == Path("mine.json")


def test_every_leaf_can_be_given_as_a_flag():
    demo = load_preset("demo")
    values = demo.to_dict()
    for leaf in options():
        value = values[leaf.section][leaf.name]
        if leaf.kind is bool and value is None:
            argv = []  # stays null unless it is switched
        elif leaf.kind is bool:
            argv = [leaf.flag if value else leaf.flag.replace("--", "--no-", 1)]
        else:
            texts = value if leaf.is_list else [value]
            argv = [leaf.flag, "none" if value in (None, []) else ",".join(map(str, texts))]
        assert parse_command_line(argv).config == demo


def test_a_list_is_given_with_commas_or_as_none():
    optim = parse_command_line(["--ema-decays", "0.9, 0.99", "--ema-stds", "none"]).config.optim

    assert (optim.ema_decays, optim.ema_stds) == ((0.9, 0.99), ())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--lr fast", "--lr must be a number, not 'fast'."),
        ("--top-k 1.5", "--top-k must be a whole number, not '1.5'."),
        ("--ema-decays 0.9,x", "--ema-decays must be a number, not 'x'."),
        ("--ema-decays 0.9,1", "--ema-decays must be >=0 and <1, not 1.0."),
        ("--ema-stds 0.1,0.1", "--ema-stds names a value twice: [0.1, 0.1]."),
        ("--top-k 0", "--top-k must be >=1, not 0."),
        ("--beta1 1", "--beta1 must be >=0 and <1, not 1.0."),
        ("--class-dropout-prob 1.1", "--class-dropout-prob must be >=0 and <=1, not 1.1."),
        ("--global-batch-size 0", "--global-batch-size must be >=1, not 0."),
        ("--size xll", "--size: unknown value 'xll'; did you mean 'XL'?"),
        ("--topk 1", "--topk: unknown flag; did you mean '--top-k'?"),
        ("--learning_rate=1", "--learning_rate: is no flag of training/main.py; here it is --lr."),
        ("--log_evry=1", "--log_evry: unknown flag; did you mean '--log-every'?"),
        ("--preset huge", "--preset: unknown preset 'huge'; choose one of: b, demo, l, s, xl."),
        ("--lr", "--lr: expected one argument; see --help."),
        ("--max-step 5", "--max-step: unknown flag; did you mean '--max-steps'?"),
    ],
)
def test_a_wrong_flag_is_refused(argv, message):
    with pytest.raises(ConfigError) as error:
        parse_command_line(argv.split())

    assert message in str(error.value)


def test_help_shows_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_command_line(["--help"])

    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(leaf.flag in text for leaf in options())


def test_the_documents_table_of_options_is_the_configurations():
    page = TABLE.text()

    assert TABLE.current_text() == page, "run python -m training.config.options_table --write"
    assert all(f"| `{leaf.flag}` |" in page for leaf in options())


def test_differences_name_what_makes_another_run(demo):
    other = changed(demo, lr=2e-3, top_k=1, max_steps=9, micro_batch_size=2, run_dir="x", vae="y")

    assert differences(demo, demo) == []
    assert differences(demo, other) == ["top_k (2 -> 1)", "lr (0.001 -> 0.002)"]


def test_what_may_change_in_a_run_is_a_closed_list():
    assert {leaf.name for leaf in options() if leaf.field.metadata["may_change"]} == {
        *("activation_checkpointing", "data", "micro_batch_size", "run_dir", "max_steps"),
        *("expert_parallel_size", "log_every", "save_every", "save_every_minutes"),
        *("keep_last", "keep_every", "vae"),
        *("sample_every", "sample_count", "sample_steps", "sample_cfg_scale", "sample_method"),
        *("compile_blocks", "deterministic", "expert_dispatch", "ema_snapshot_every"),
        *("max_skipped_steps", "spike_threshold", "placement", "rebalance_every"),
        *("data_shards", "data_cache", "data_cache_gib", "check_shards"),
    }


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("micro", [None, 1, 2, 8])
def test_micro_batches_of_all_ranks_make_up_the_global_batch(demo, world_size, micro):
    plan = plan_batch(changed(demo, micro_batch_size=micro), world_size)

    assert plan.micro_batch_size * plan.gradient_accumulation_steps * world_size == 64
    assert plan.micro_batch_size == (micro or 64 // world_size)


@pytest.mark.parametrize(
    ("values", "stage", "world_size", "message"),
    [
        (
            {"global_batch_size": 250, "micro_batch_size": 32},
            2,
            2,
            "--global-batch-size 250 is not divisible by 2 ranks x micro-batch 32 = 64; use a "
            "multiple of 64 or another --micro-batch-size.",
        ),
        (
            {},
            2,
            3,
            "--global-batch-size 64 is not divisible by 3 ranks; use a multiple of 3 such as 63.",
        ),
        ({"top_k": 4}, 2, 1, "--top-k 4 is more than --num-experts 3; use 1 to 3."),
        (
            {"expert_parallel_size": 2},
            2,
            2,
            "--expert-parallel-size 2 does not divide --num-experts 3;",
        ),
        (
            {"expert_parallel_size": 3},
            2,
            4,
            "--expert-parallel-size 3 does not divide the 4 rank(s);",
        ),
        (
            {"expert_parallel_size": 2, "num_experts": 4},
            0,
            2,
            "--gradient-clipping 1.0 with --expert-parallel-size 2 at ZeRO stage 0 (",
        ),
        (
            {"rebalance_every": 500},
            2,
            1,
            "--rebalance-every 500 needs --placement balanced, since contiguous does not follow",
        ),
        (
            {"rebalance_every": 600, "placement": "balanced"},
            2,
            1,
            "--rebalance-every 600 is no multiple of --save-every 500, but experts move only right "
            "before a checkpoint; use 1000.",
        ),
        ({"patch_size": 3}, 2, 1, "--patch-size 3 does not divide --latent-size 16;"),
        ({"sample_steps": 2000}, 2, 1, "--sample-steps 2000 is more than --num-timesteps 1000;"),
        (
            {"compile_blocks": True},
            3,
            1,
            "--compile-blocks: blocks do not compile at ZeRO stage 3 of --deepspeed ",
        ),
        ({"ema_decays": ()}, 2, 1, "--ema-decays and --ema-stds are both empty, but samples"),
        (
            {"ema_snapshot_every": 100},
            2,
            1,
            "--ema-snapshot-every 100 stores power-function averages, but --ema-stds names none;",
        ),
    ],
)
def test_a_configuration_that_cannot_run_is_refused(demo, values, stage, world_size, message):
    with pytest.raises(ConfigError) as error:
        validate(changed(demo, **values), ZERO[stage], world_size)

    assert message in str(error.value)


def test_expert_parallelism_without_clipping_is_allowed_at_stage_0(demo):
    config = changed(demo, expert_parallel_size=2, num_experts=4, gradient_clipping=0.0)

    validate(config, ZERO[0], 4)


def test_clipping_at_stage_0_is_allowed_without_expert_parallelism(demo):
    validate(demo, ZERO[0], 4)


@pytest.mark.parametrize(
    ("data", "values", "message"),
    [
        (
            {"latent_height": 32, "latent_width": 32},
            {},
            "--data datasets/demo holds latents of 4x32x32 (channels x height x width) but the "
            "model takes 4x16x16;",
        ),
        ({"latent_channels": 16}, {}, "holds latents of 16x16x16"),
        ({"latent_width": 8}, {}, "holds latents of 4x16x8"),
        (
            {"num_classes": 12},
            {},
            "has 12 classes but the model has --num-classes 10; use --num-classes 12.",
        ),
        ({"num_classes": 0}, {}, "has no classes but the model has --num-classes 10;"),
        ({"has_flip": False}, {}, "was encoded without mirrored images; use --no-horizontal-flip"),
    ],
)
def test_data_that_does_not_fit_the_model_is_refused(demo, data, values, message):
    with pytest.raises(ConfigError) as error:
        check_data(changed(demo, **values), manifest(**data))

    assert message in str(error.value)


def test_data_that_fits_is_accepted(demo):
    check_data(demo, manifest())
    check_data(demo, manifest(num_classes=7))
    check_data(changed(demo, num_classes=0), manifest(num_classes=7))
    check_data(changed(demo, num_classes=0), manifest(num_classes=0))
    check_data(changed(demo, horizontal_flip=False), manifest(has_flip=False))
