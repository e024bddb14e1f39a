"""Paths as people type them: ~, variables, broken links; moved runs, other folders, old flags."""

import shutil
from pathlib import Path

import pytest
import yaml

from data_tools import encode_latents
from data_tools.errors import ConfigError
from data_tools.user_files.paths import absence, expand, expand_data
from tests.support.configs import small
from tests.support.launch import REPOSITORY
from training import evaluate, retry, sample
from training.checkpoints.manifest import CHECKPOINT_DIR
from training.config.command_line import parse_command_line
from training.config.location import CONFIG_FILE, DEEPSPEED_FILE
from training.run.directory import check_run_directory
from training.run.init_from import check_warm_start

TILDE, VARIABLE = "~/runs/a", "$SCRATCH/runs/a"
PRESET = ("--preset", "tests/small.yaml")


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("SCRATCH", str(folder))
    return folder


def run_dir_of(*argv):
    return parse_command_line([str(word) for word in argv]).config.run.run_dir


@pytest.mark.parametrize("text", [TILDE, VARIABLE, "${SCRATCH}/runs/a"])
def test_home_and_variables_mean_the_same_in_a_flag_a_preset_and_the_job_scripts(
    home, tmp_path, text
):
    preset = tmp_path / "mine.yaml"
    values = yaml.safe_load((REPOSITORY / "tests/small.yaml").read_text())
    values["run"]["run_dir"], values["optim"]["lr"] = text, 0.001
    preset.write_text(yaml.safe_dump(values))

    meant = str(home / "runs/a")
    assert run_dir_of(*PRESET, f"--run-dir={text}") == meant
    assert run_dir_of("--preset", preset) == meant
    assert retry.run_dir_of(["--run-dir", text]) == Path(meant)
    assert retry.run_dir_of(["--preset", str(preset)]) == Path(meant)


def test_every_path_of_the_configuration_and_of_other_commands_is_expanded(home):
    flags = ("run-dir", "init-from", "data", "data-shards", "data-cache", "vae")
    given = [word for flag in flags for word in (f"--{flag}", "~/x")]
    command = parse_command_line([*PRESET, *given, "--deepspeed", "~/x"])
    run, data, x = command.config.run, command.config.data, str(home / "x")

    assert [run.run_dir, run.init_from, run.vae] == [x] * 3
    assert [data.data, data.data_shards, data.data_cache] == [x] * 3
    assert command.deepspeed == home / "x"
    drawn = sample.build_parser().parse_args(["~/x", "--output=$SCRATCH/x", "--vae=~/x"])
    assert (drawn.run_dir, drawn.output, drawn.vae) == (home / "x", home / "x", x)
    scored = evaluate.build_parser().parse_args(["~/x", "--reference=~/x", "--validation-data=~/x"])
    assert (scored.reference, scored.validation_data) == (home / "x", x)
    encoded = encode_latents.parse_arguments(["--input=~/x", "--output=~/x", "--class-names=~/x"])
    assert (encoded.input, encoded.output, encoded.class_names) == ([x], home / "x", home / "x")


def test_each_set_of_a_union_is_expanded_and_a_pipe_is_left_to_the_shell(home):
    assert expand_data("~/a,$SCRATCH/b", "--data") == f"{home}/a,{home}/b"
    assert expand_data("{~/a,~/b}", "--data") == f"{{{home}/a,{home}/b}}"
    assert expand_data("~/a=3,~/b=1", "--data") == f"{home}/a=3,{home}/b=1"
    assert expand_data("pipe:cat ~/a/{}", "--data") == "pipe:cat ~/a/{}"
    assert expand_data("http://host/~me/a", "--data") == "http://host/~me/a"


def test_a_path_that_is_there_as_it_is_written_stays(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("$SCRATCH", "100$", "a~b"):
        Path(name).mkdir()

        assert expand(name, "--data") == expand_data(name, "--data") == name


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("$NOWHERE/a", "--run-dir $NOWHERE/a: the variable NOWHERE is not set; set it, or write"),
        ("${NOWHERE}/a", "the variable NOWHERE is not set"),
        ("~nobody-of-this-name/a", "no user's home is ~nobody-of-this-name; write the path out"),
    ],
)
def test_what_nobody_can_expand_is_refused(home, monkeypatch, text, sentence):
    monkeypatch.delenv("NOWHERE", raising=False)

    with pytest.raises(ConfigError) as error:
        run_dir_of(*PRESET, "--run-dir", text)
    assert sentence in str(error.value)
    with pytest.raises(ConfigError, match=r"^--output: .*; see --help\.$"):
        sample.build_parser().parse_args(["run", "--output", text])


def test_a_run_in_a_folder_called_tilde_is_not_begun_anew_elsewhere(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~/runs/a").mkdir(parents=True)

    with pytest.raises(ConfigError) as error:
        expand(TILDE, "--run-dir")

    assert f"write ./{TILDE} for what is in it, or {home}/runs/a." in str(error.value)
    assert expand(f"./{TILDE}", "--run-dir") == f"./{TILDE}"
    (home / "runs/a").mkdir(parents=True)
    assert expand(TILDE, "--run-dir") == f"{home}/runs/a"


def test_a_link_whose_target_was_purged_is_called_that(tmp_path):
    purged, run = tmp_path / "scratch/gone", tmp_path / "run"
    run.symlink_to(purged)
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / CHECKPOINT_DIR).symlink_to(purged)

    said = f"is a link to {purged}, which does not exist"
    assert absence(run) == said
    assert absence(run / "below") == f"{run} {said}"
    assert absence(tmp_path / "nothing") == "does not exist"
    for text in (run, run / "below"):
        with pytest.raises(ConfigError, match=r"gone, which does not exist; restore what it stood"):
            expand(str(text), "--output")
    for run_dir, what in ((run, said), (whole, f"{whole}/{CHECKPOINT_DIR} {said}")):
        with pytest.raises(ConfigError) as error:
            check_run_directory(run_dir, small())
        assert str(error.value).startswith(f"--run-dir {run_dir}: {what}; restore what it stood")
    assert not purged.exists()


def test_a_run_whose_first_weights_were_purged_can_still_be_named_so(tmp_path):
    """Going on does not read them; a new run says that they are gone."""
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    config = parse_command_line([*PRESET, "--init-from", str(tmp_path / "link")]).config

    assert config.run.init_from == str(tmp_path / "link")
    with pytest.raises(ConfigError, match="link: is a link to .*gone, which does not exist; give"):
        check_warm_start(config)


def test_a_link_to_a_folder_is_that_folder(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "there")

    check_run_directory(tmp_path / "run", small())


@pytest.fixture
def run(tmp_path):
    """A run directory by its files, which says that it lies in another folder."""
    folder = tmp_path / "new/run"
    folder.mkdir(parents=True)
    config = parse_command_line([*PRESET, "--run-dir", str(tmp_path / "old/run")]).config
    (folder / CONFIG_FILE).write_text(config.to_yaml())
    (folder / DEEPSPEED_FILE).write_text("{}")
    return folder


def test_a_moved_runs_own_config_continues_it_where_it_lies(run, tmp_path):
    for preset in (run / CONFIG_FILE, run):
        command = parse_command_line(["--preset", str(preset)])

        assert command.config.run.run_dir == str(run)
        (note,) = command.notes
        assert note == (
            f"--preset {preset}: says run_dir {tmp_path}/old/run, and lies in the run directory "
            f"{run}, which is continued; give --run-dir for another."
        )
        assert retry.run_dir_of(["--preset", str(preset)]) == run
    assert run_dir_of("--preset", run, "--run-dir", tmp_path / "third") == str(tmp_path / "third")


def test_a_runs_own_config_is_a_preset_like_others_when_it_is_copied_away(run, tmp_path):
    shutil.copy(run / CONFIG_FILE, tmp_path / CONFIG_FILE)

    assert run_dir_of("--preset", tmp_path / CONFIG_FILE) == str(tmp_path / "old/run")


def test_a_run_that_is_called_like_a_preset_does_not_stand_in_for_it(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    shutil.copytree(run, "demo")

    assert run_dir_of("--preset", "demo") == run_dir_of() == "runs/demo"
    assert retry.run_dir_of([]) == Path("runs/demo")
    assert run_dir_of("--preset", "./demo") == "demo"


def test_a_file_without_a_flag_is_told_the_flag(run):
    with pytest.raises(ConfigError, match=f"^{run}: is no flag; write --preset {run} to train by"):
        run_dir_of(run)


def test_commands_that_are_typed_elsewhere_find_the_repositorys_own_files(tmp_path, monkeypatch):
    here = parse_command_line([])
    monkeypatch.chdir(tmp_path)
    there = parse_command_line([])

    assert here.deepspeed == Path("ds_configs/zero2.json")
    assert there.deepspeed == REPOSITORY / "ds_configs/zero2.json"
    assert there.config.data.data == str(REPOSITORY / "datasets/demo")
    (tmp_path / "ds_configs").mkdir()
    shutil.copy(REPOSITORY / "ds_configs/zero1.json", tmp_path / "ds_configs/zero2.json")
    assert parse_command_line([]).deepspeed == Path("ds_configs/zero2.json")


OLD_FLAGS = {
    "--data-path": "here it is --data: encoded latents, of data_tools/encode_latents.py.",
    "--results-dir": "here it is --run-dir.",
    "--deepspeed_config": "here it is --deepspeed JSON.",
    "--resume": "here it is nothing: the same command continues a run",
    "--ema-decay": "here it is --ema-decays.",
}


@pytest.mark.parametrize("flag", OLD_FLAGS)
def test_flags_of_other_trainers_name_ours(flag):
    with pytest.raises(ConfigError) as error:
        parse_command_line(["--deepspeed", flag, "x"])

    assert str(error.value).startswith(f"{flag}: is no flag of training/main.py; ")
    assert OLD_FLAGS[flag] in str(error.value)


def test_drawing_knows_the_flags_of_dits_scripts():
    for command in (sample, evaluate):
        with pytest.raises(ConfigError, match=r"^--ckpt: is no flag of .*; here it is RUN, the"):
            command.build_parser().parse_args(["--ckpt", "DiT-XL-2.pt", "--image-size", "256"])


def test_local_rank_is_understood_in_both_spellings():
    for flag in ("--local_rank=1", "--local-rank=1"):
        assert parse_command_line([flag]) == parse_command_line([])
