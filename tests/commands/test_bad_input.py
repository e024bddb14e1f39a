"""What the commands answer to wrong input: one sentence, exit code 2, nothing written."""

import json
import pickle
import shutil
from pathlib import Path

import pytest

from data_tools import encode_latents
from data_tools.errors import ConfigError, exit_on_config_error
from data_tools.shards.manifest import MANIFEST_NAME
from data_tools.vae.autoencoder import DEMO_VAE
from tests.support.configs import FP32
from tests.support.launch import REPOSITORY, deepspeed, run
from training import evaluate, export, main, report, sample
from training.checkpoints.manifest import (
    CHECKPOINT_DIR,
    EMA_FILE,
    LATEST_FILE,
    MANIFEST_FILE,
    RAW_FILE,
    FileRecord,
    latest_checkpoint,
    read_manifest,
    verify_file,
)
from training.config.preset import load_preset
from training.monitoring.event_files import read_metrics
from training.ranks import process_group
from training.ranks.process_group import Ranks
from training.run.checkpoint_notes import CHECKPOINTS_FILE, read_notes
from training.run.directory import CONFIG_FILE
from training.run.lock import hold_run_directory

STEPS = 4
# One checkpoint of the demo on two ranks is 58 MiB, its largest file 17 MiB.
SMALLER_THAN_OPTIMIZER_KIB = 12 * 1024
TRAINING = [
    *("--global-batch-size", 8, "--max-steps", STEPS, "--log-every", 1, "--save-every", 2),
    *("--sample-every", 0, "--deepspeed", FP32),
]


@pytest.fixture
def refuse(tmp_path, monkeypatch, capsys):
    """Call an entry point as the main rank of `num_ranks`; return its sentence."""

    def call(entry_point, *argv, num_ranks=1):
        # Set first, so that what discover_ranks sets is undone after the test.
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "29500" if name == "MASTER_PORT" else "127.0.0.1")
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(num_ranks))
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        monkeypatch.chdir(REPOSITORY)
        before = contents(tmp_path)
        capsys.readouterr()

        with pytest.raises(SystemExit) as exit_info:
            entry_point([str(part) for part in argv])

        stderr = capsys.readouterr().err
        assert exit_info.value.code == 2
        assert stderr.startswith("error: ")
        assert stderr.count("\n") == 1, stderr
        assert contents(tmp_path) == before
        return stderr

    return call


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if not path.is_symlink()}


@pytest.fixture
def train(refuse, demo_latents, tmp_path):
    """Start training on the demo latents with flags that are wrong; return the sentence."""

    def call(*argv, num_ranks=1):
        common = ("--data", demo_latents, "--run-dir", tmp_path / "run", *TRAINING)
        return refuse(main.main, *common, *argv, num_ranks=num_ranks)

    return call


@pytest.fixture
def latents(demo_latents, tmp_path):
    """A copy of the demo latents to damage."""
    return Path(shutil.copytree(demo_latents, tmp_path / "latents"))


class TestData:
    """--data."""

    def test_missing(self, train, tmp_path):
        stderr = train("--data", tmp_path / "none")

        assert f"--data {tmp_path}/none: does not exist; make it: python data_tools/" in stderr

    def test_half_encoded(self, train, latents):
        (latents / MANIFEST_NAME).unlink()

        stderr = train("--data", latents)

        assert f"--data {latents}: no dataset.json, encoding did not finish; run" in stderr

    def test_a_shard_is_missing_or_short(self, train, latents):
        shard = latents / "00001.tar"
        size = shard.stat().st_size
        shard.write_bytes(shard.read_bytes()[:-512])
        short = train("--data", latents)
        shard.unlink()
        missing = train("--data", latents)

        assert f"{shard}: has {size - 512} bytes, dataset.json says {size} bytes; copy" in short
        assert f"{shard}: is missing, dataset.json says {size} bytes; copy" in missing

    def test_a_torn_manifest(self, train, latents):
        path = latents / MANIFEST_NAME
        path.write_bytes(path.read_bytes()[:300])

        assert f"{path}: is not JSON (" in train("--data", latents)

    @pytest.mark.parametrize(
        ("flags", "sentence"),
        [
            (("--latent-size", 32), "holds latents of 4x16x16 (channels x height x width) but"),
            (("--latent-channels", 16), "but the model takes 16x16x16; set --latent-channels"),
            (("--num-classes", 3), "has 10 classes but the model has --num-classes 3; use"),
        ],
    )
    def test_not_what_the_model_takes(self, train, demo_latents, flags, sentence):
        stderr = train(*flags)

        assert stderr.startswith(f"error: --data {demo_latents}")
        assert sentence in stderr


PRESET = (REPOSITORY / "tests" / "small.yaml").read_text()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("--preset", "dmo"), "--preset: unknown preset 'dmo'; did you mean 'demo'?"),
        (("--max-step", 1), "--max-step: unknown flag; did you mean '--max-steps'?"),
        (("--lr", "fast"), "--lr must be a number, not 'fast'."),
        (
            ("--seed", 10**23),
            "--seed must be >=0 and <9223372036854775808, not 1000000000000000000",
        ),
        (("--keep-last", "1" + 400 * "0", "--seed", -1), "--seed must be >=0 and <9"),
        (("--lr",), "--lr: expected one argument; see --help."),
        (("--run-dir", ""), "--run-dir is empty; give a text."),
        (("--data-cache", __file__), f"--data-cache {__file__}: "),
        (("--micro-batch-size", 3), "--global-batch-size 8 is not divisible by 1 ranks x micro-ba"),
        (("--vae", "nil", "--sample-every", 1), "--vae nil: does not exist; give a diffusers"),
    ],
)
def test_wrong_flags_of_training(train, argv, sentence):
    assert sentence in train(*argv)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("  lr:", "  lrr:", "unknown key 'lrr' in section 'optim'; did you mean 'lr'?"),
        ("lr: 1e-3", "lr: fast", "optim.lr must be a number, not 'fast'."),
    ],
)
def test_a_wrong_preset(train, tmp_path, old, new, sentence):
    path = tmp_path / "own.yaml"
    path.write_text(PRESET.replace(old, new))

    assert f"error: {path}: {sentence}" in train("--preset", path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"zero_optimization": {"stage": 2},}', "line 1: trailing comma; the file must be strict"),
        ('{"train_batch_size": 32}', "sets train_batch_size=32 but --global-batch-size is 8; wri"),
        ('{"steps_per_print": "often"}', "'steps_per_print' must be a number, not 'often'."),
        ('{"dump_state": "no"}', "'dump_state' must be true or false, not 'no'."),
    ],
)
def test_a_wrong_deepspeed_file(train, tmp_path, text, sentence):
    path = tmp_path / "own.json"
    path.write_text(text)

    stderr = train("--deepspeed", path)

    assert str(path) in stderr
    assert sentence in stderr


@pytest.mark.parametrize(
    ("num_ranks", "argv", "sentence"),
    [
        (2, ("--expert-parallel-size", 2), "2 does not divide --num-experts 3; use a divisor"),
        (2, ("--expert-parallel-size", 3), "3 does not divide the 2 rank(s); start a multiple"),
        (3, (), "--global-batch-size 8 is not divisible by 3 ranks; use a multiple of 3"),
    ],
)
def test_layouts_that_do_not_divide(train, num_ranks, argv, sentence):
    assert sentence in train(*argv, num_ranks=num_ranks)


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_blocks_are_not_compiled_for_a_cpu_without_a_compiler(train, monkeypatch, flags):
    monkeypatch.setenv("CXX", "no-compiler")

    stderr = train("--compile-blocks", *flags)

    assert "--compile-blocks needs a C++ compiler on the CPU and there is no no-compi" in stderr


def test_a_dry_run_without_data_checks_the_run_directory_too(train, tmp_path):
    (tmp_path / "file").touch()
    flags = ("--data", tmp_path / "none", "--dry-run")

    assert "/file is not a folder; choose" in train(*flags, "--run-dir", tmp_path / "file")
    source = tmp_path / "run" / "checkpoints"
    assert f"--init-from {source} is --run-dir" in train(*flags, "--init-from", source)


class TestRunDirectoryBeforeTheFirstRun:
    """--run-dir."""

    def test_a_file_is_in_its_way(self, train, tmp_path):
        (tmp_path / "file").touch()

        for run_dir in (tmp_path / "file", tmp_path / "file" / "below"):
            stderr = train("--run-dir", run_dir)
            assert f"--run-dir {run_dir}: {tmp_path}/file is not a folder; choose another" in stderr

    def test_it_is_where_the_photographs_lie(self, train, tmp_path):
        (tmp_path / "photos" / "cat").mkdir(parents=True)
        (tmp_path / "photos" / "cat" / "1.JPG").touch()

        sentence = "holds images (cat/1.JPG, ...) and no run; choose a folder for this run alone.\n"
        assert train("--run-dir", tmp_path / "photos").endswith(sentence)

    def test_its_name_is_too_long(self, train, tmp_path):
        stderr = train("--run-dir", tmp_path / ("x" * 300))
        assert stderr.endswith("bytes, its longest name 300); shorten it.\n")

    def test_nothing_can_be_written_there(self, train):
        """/proc refuses even root."""
        assert "error: --run-dir /proc/run: " in train("--run-dir", "/proc/run")

    def test_the_disk_is_too_full_for_one_checkpoint(self, train, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

        stderr = train()

        assert f"--run-dir {tmp_path}/run: 1 MiB are free and one checkpoint takes about" in stderr
        stderr = train("--ema-stds", "0.05,0.1", "--ema-snapshot-every", 1)
        assert "and one checkpoint and snapshots of averages take about" in stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory, demo_latents, train_forked):
    """A finished run of two ranks with two checkpoints."""
    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    train_forked("--data", demo_latents, "--run-dir", run_dir, *TRAINING)
    return run_dir


@pytest.fixture
def run_dir(trained, tmp_path):
    """A copy of the run to damage: all files are links to the original's until replaced."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder, copy_function=lambda old, new: Path(new).symlink_to(old))
    return folder


def rewrite(path, change):
    """Replace a linked file by a changed copy."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(change(data))


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


class TestResuming:
    """The same --run-dir again."""

    def test_with_another_configuration(self, train, run_dir):
        stderr = train("--num-experts", 4, num_ranks=2)

        assert (
            "was started with another configuration: num_experts (3 -> 4); repeat the old values, "
            f"or use a new --run-dir, and --init-from {run_dir} to begin with this run's weights.\n"
        ) in stderr

    def test_in_another_precision(self, train, run_dir, tmp_path):
        path = tmp_path / "bf16.json"
        path.write_text('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}')

        stderr = train("--deepspeed", path, num_ranks=2)

        assert "was saved with precision fp32, this command has bf16;" in stderr
        assert "change the precision of the --deepspeed file back to fp32, or" in stderr

    def test_on_another_data_set(self, train, run_dir, latents):
        path = latents / MANIFEST_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | {"order_seed": 9}))

        stderr = train("--data", latents, num_ranks=2)

        assert "error: --data: checkpoint step-0000004 of the --run-dir was trained on" in stderr

    def test_without_its_configuration(self, train, run_dir):
        (run_dir / "config.yaml").unlink()

        assert f"--run-dir {run_dir} holds checkpoints but no config.yaml" in train(num_ranks=2)

    @pytest.mark.parametrize("size", [0, 200, 300])
    def test_with_a_torn_configuration(self, train, run_dir, size):
        rewrite(run_dir / "config.yaml", lambda data: data[:size])

        assert f"--run-dir {run_dir}: its config.yaml is damaged (" in train(num_ranks=2)

    @pytest.mark.parametrize("text", [b"step-0000009\n", b"..\n", b"\xff\xfe", b"/tmp\n"])
    def test_where_latest_names_no_checkpoint(self, train, run_dir, text):
        pointer = run_dir / CHECKPOINT_DIR / LATEST_FILE
        rewrite(pointer, lambda _: text)

        stderr = train(num_ranks=2)

        assert f"error: {pointer} names " in stderr
        assert "no checkpoint there; the newest whole checkpoint in that folder is step-" in stderr

    @pytest.mark.parametrize("state", ["missing", "empty"])
    def test_where_latest_was_lost_beside_checkpoints(
        self, train, refuse, run_dir, demo_latents, tmp_path, state
    ):
        pointer = run_dir / CHECKPOINT_DIR / LATEST_FILE
        rewrite(pointer, lambda _: b"")
        if state == "missing":
            pointer.unlink()
        (run_dir / CHECKPOINT_DIR / "step-0000006").mkdir()  # and nothing in it
        sentence = (
            f"{pointer} is {state}; the newest whole checkpoint in that folder is step-0000004; to "
            f"continue from it: echo step-0000004 > {pointer} (to start afresh, choose another run "
            "directory).\n"
        )

        for argv in ((), ("--dry-run",), ("--max-steps", 8), ("--init-from", run_dir)):
            if "--init-from" in argv:
                argv += ("--run-dir", tmp_path / "other")
            assert train(*argv, num_ranks=2).endswith(sentence)
        out = ("--output", tmp_path / "out")
        held_out = ("--validation-data", demo_latents)
        for entry_point, argv in [
            (sample.main, (run_dir, *out)),
            (export.main, (run_dir, "--format", "safetensors", *out)),
            (report.main, (run_dir, *out)),
            (evaluate.main, (run_dir, *held_out, *out)),
        ]:
            assert refuse(entry_point, *argv) == f"error: {sentence}"

    def test_where_no_checkpoint_is_whole_and_latest_is_missing(self, train, run_dir):
        pointer = run_dir / CHECKPOINT_DIR / LATEST_FILE
        pointer.unlink()
        for manifest in pointer.parent.glob(f"*/{MANIFEST_FILE}"):
            manifest.unlink()

        stderr = train(num_ranks=2)

        assert f"{pointer} is missing, and no checkpoint in that folder is whole" in stderr

    def test_where_all_checkpoints_are_gone(self, train, refuse, run_dir):
        shutil.rmtree(run_dir / CHECKPOINT_DIR)
        gone = (
            f"{run_dir}: its checkpoint of step 4 was saved, and now there is none; copy the "
            "folder checkpoints back"
        )

        assert train(num_ranks=2) == f"error: --run-dir {gone}, or choose another.\n"
        assert refuse(sample.main, run_dir) == f"error: {gone}.\n"

    @pytest.mark.parametrize("left", ["metrics.jsonl", "starts.jsonl"])
    def test_where_only_the_records_of_a_run_are_left(self, train, run_dir, left):
        for path in run_dir.iterdir():
            if path.name != left:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

        assert f"--run-dir {run_dir} holds {left} but no config.yaml" in train(num_ranks=2)

    @pytest.mark.parametrize("text", [b"", b"[]", b"\xff\xfe", b'{"tag": 1}'])
    def test_with_a_damaged_manifest_and_no_older_checkpoint(self, train, run_dir, text):
        path = latest_checkpoint(run_dir) / MANIFEST_FILE
        rewrite(path, lambda _: text)
        shutil.rmtree(path.parents[1] / "step-0000002")

        stderr = train(num_ranks=2)

        assert f"error: {path} is not a checkpoint manifest (" in stderr
        assert f"write the name of an older checkpoint into {run_dir}/checkpoints/latest." in stderr


class TestSampling:
    """training/sample.py."""

    @pytest.fixture
    def draw(self, refuse, tmp_path):
        def call(*argv):
            return refuse(sample.main, *argv, "--output", tmp_path / "out")

        return call

    @pytest.mark.parametrize(
        ("argv", "sentence"),
        [
            (("--stepz", 3), "unrecognized arguments: --stepz 3; see --help."),
            (("--steps", "many"), "--steps: invalid int value: 'many'; see --help."),
            (("--sampler", "plms"), "--sampler: invalid choice: 'plms'"),
            (("--sampler", "euler"), "euler does not fit objective epsilon; use ddim, ddpm or dpm"),
            (("--steps", 0), "--steps must be at least 1, not 0."),
            (("--steps", 1001), "--steps 1001 exceeds the 1000 timesteps of the model; use fewer."),
            (("--cfg-scale", "nan"), "--cfg-scale must be a number of at least 0, not nan."),
            (
                ("--classes", "dog"),
                "--classes: unknown class 'dog'; give a number of a class, from 0 to 9",
            ),
            (
                ("--classes", "10"),
                "--classes: unknown class '10'; give a number of a class, from 0 to 9",
            ),
            (("--checkpoint", "step-4"), "--checkpoint: no 'step-4'; "),
            (
                ("--checkpoint", ""),
                "--checkpoint: no ''; choose one of: step-0000002, step-0000004.",
            ),
            (("--checkpoint", ".."), "--checkpoint: no '..'; choose one of: step-0000002, step-"),
            (("--vae", "none"), "--vae none: does not exist; give a diffusers folder"),
        ],
    )
    def test_wrong_flags(self, draw, trained, argv, sentence):
        assert sentence in draw(trained, *argv)

    @pytest.mark.parametrize(
        ("tag", "sentence"),
        [
            ("", "its num_timesteps is 500 and that of the run to guide is 1000; use a run that"),
            (":step-9", " is no run directory"),
        ],
    )
    def test_a_weaker_run_that_does_not_fit(self, draw, trained, run_dir, tag, sentence):
        rewrite(
            run_dir / CONFIG_FILE,
            lambda data: data.replace(b"num_timesteps: 1000", b"num_timesteps: 500"),
        )

        stderr = draw(trained, "--autoguidance", f"{run_dir if not tag else run_dir / 'x'}{tag}")

        assert stderr.startswith(f"error: --autoguidance {run_dir}")
        assert sentence in stderr

    def test_a_checkpoint_that_the_weaker_run_does_not_have(self, draw, trained):
        stderr = draw(trained, "--autoguidance", f"{trained}:step-9")

        assert f"error: --autoguidance {trained}:step-9: no 'step-9'; " in stderr

    def test_a_weaker_run_that_is_the_run_itself(self, draw, trained, tmp_path):
        latest = latest_checkpoint(trained)
        itself = f"{trained}:{latest.name}"
        copy = shutil.copytree(trained, tmp_path / "copy")

        for text in (trained, itself, copy):
            stderr = draw(trained, "--autoguidance", text)
            assert f"error: --autoguidance {text} has the very weights that are to be" in stderr
        assert "the very weights" in draw(
            trained, "--autoguidance", itself, "--weights", latest / EMA_FILE
        )

    def test_a_weaker_run_on_other_classes(self, draw, trained, run_dir):
        manifest = json.loads((run_dir / MANIFEST_NAME).read_text())
        ours = manifest["classes"][3]["name"]
        manifest["classes"][3]["name"] = manifest["classes"][4]["name"] = "boat"
        rewrite(run_dir / MANIFEST_NAME, lambda _: json.dumps(manifest).encode())

        stderr = draw(trained, "--autoguidance", run_dir)

        assert f"its class 3 is boat and that of the run to guide is {ours}; use a run" in stderr

    def test_a_folder_that_is_no_run(self, draw, tmp_path):
        sentence = f"{tmp_path} is no run directory: it has no config.yaml; give the folder of a"
        assert sentence in draw(tmp_path)

    @pytest.mark.parametrize("argv", [(), ("--checkpoint", "step-0000002")])
    def test_a_run_without_a_checkpoint(self, draw, run_dir, argv):
        shutil.rmtree(run_dir / CHECKPOINT_DIR)
        (run_dir / CHECKPOINTS_FILE).unlink()

        assert f"{run_dir} has no checkpoint yet; train first." in draw(run_dir, *argv)

    def test_a_run_without_its_data_description(self, draw, run_dir):
        (run_dir / MANIFEST_NAME).unlink()

        assert f"{run_dir}/dataset.json is missing or damaged; copy" in draw(run_dir)

    def test_weights_cut_off_or_with_one_bit_flipped(self, draw, run_dir):
        path = latest_checkpoint(run_dir) / EMA_FILE
        size = path.stat().st_size
        rewrite(path, lambda data: data[:-8] + bytes([data[-8] ^ 1]) + data[-7:])
        flipped = draw(run_dir)
        rewrite(path, lambda data: data[:-8])
        short = draw(run_dir)

        assert f"error: {path} does not match the checksum in its manifest.json; " in flipped
        assert f"error: {path} has {size - 8} bytes, its manifest.json says {size} bytes" in short

    def test_an_output_that_is_a_file(self, refuse, trained, tmp_path):
        (tmp_path / "file").touch()

        stderr = refuse(sample.main, trained, "--output", tmp_path / "file")

        assert f"--output {tmp_path}/file: File exists; choose another." in stderr


class TestEncoding:
    """data_tools/encode_latents.py; what it meets while encoding is in test_encode_latents.py."""

    @pytest.fixture
    def encode(self, refuse, tmp_path):
        def entry_point(argv):
            with exit_on_config_error():
                encode_latents.main(argv)

        def call(*argv):
            common = ("--output", tmp_path / "out", "--size", 64, "--vae", DEMO_VAE)
            return refuse(entry_point, *common, *argv)

        return call

    def test_wrong_flags(self, encode, tmp_path):
        assert "unrecognized arguments: --stepz; see --help." in encode("--stepz")
        assert "--size: invalid int value: 'big'; see --help." in encode("--size", "big")
        assert f"--input {tmp_path}/none: does not exist; give a folder that" in encode(
            "--input", tmp_path / "none"
        )


def test_a_mistake_of_one_rank_alone_is_told_after_the_launcher_had_time(monkeypatch, capsys):
    monkeypatch.setattr(process_group, "FOLLOWER_WAIT_SEC", 0.0)

    with pytest.raises(SystemExit) as exit_info, process_group.one_sentence(Ranks(3, 4, 1)):
        raise ConfigError("--data x: does not exist; make it.")

    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "error: [rank 3] --data x: does not exist; make it.\n"


def test_a_manifest_lists_size_and_checksum_of_every_file(trained):
    folder = latest_checkpoint(trained)

    files = read_manifest(folder).files

    assert files.keys() == {path.name for path in folder.iterdir()} - {MANIFEST_FILE}
    assert {EMA_FILE, RAW_FILE} <= files.keys()
    assert all(isinstance(record, FileRecord) for record in files.values())


@pytest.mark.processes
class TestThroughTheLauncher:
    """With two ranks, as a user starts them."""

    def test_a_wrong_layout_is_told_once(self, demo_latents, tmp_path):
        flags = ("--data", demo_latents, "--run-dir", tmp_path / "run", *TRAINING)
        output = run(
            *deepspeed(2, "training/main.py", *flags, "--expert-parallel-size", 3), expect=2
        )

        assert output.count("error: --expert-parallel-size 3 does not divide the 2 rank(s)") == 1
        assert "Traceback" not in output
        assert not (tmp_path / "run").exists()


@pytest.mark.processes
@pytest.mark.precision
class TestWithTwoRanks:
    """The same without the launcher."""

    def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
        self, train_forked, demo_latents, run_dir
    ):
        before = read_metrics(run_dir)
        path = next(latest_checkpoint(run_dir).glob("zero_pp_rank_1*"))
        rewrite(path, lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])

        # Nothing is left to train in the newest; from the one before it is.
        output = train_forked("--data", demo_latents, "--run-dir", run_dir, *TRAINING)

        reason = f"{path} does not match the checksum in its manifest.json"
        event = f"warning: {reason}; continuing from step-0000002 instead\n"
        assert output.count(event) == 1
        assert "Traceback" not in output
        assert latest_checkpoint(run_dir).name == "step-0000004"
        verify_file(read_manifest(path.parent), path)
        after = read_metrics(run_dir)
        assert [r["loss/total"] for r in after] == [r["loss/total"] for r in before]
        notes = [(note.step, note.outcome, note.reason) for note in read_notes(run_dir)]
        assert notes[-2:] == [(2, "damaged", reason), (4, "saved", "")]

    def test_a_job_killed_while_it_published_its_first_checkpoint_is_continued(
        self, train_forked, demo_latents, run_dir
    ):
        folder = run_dir / CHECKPOINT_DIR
        (folder / LATEST_FILE).unlink()
        shutil.rmtree(folder / "step-0000004")

        output = train_forked("--data", demo_latents, "--run-dir", run_dir, *TRAINING)

        assert f"resuming {folder / 'step-0000002'} at step 2 of {STEPS}" in output
        assert latest_checkpoint(run_dir) == folder / "step-0000004"

    def test_a_file_that_no_manifest_lists_is_not_unpickled(
        self, train_forked, demo_latents, run_dir, tmp_path
    ):
        folder = latest_checkpoint(run_dir)
        planted = folder / "mp_rank_00_model_states.pt"
        rewrite(planted, lambda _: pickle.dumps(Planted(str(tmp_path / "executed"))))
        listed = json.loads((folder / MANIFEST_FILE).read_text())
        del listed["files"][planted.name], listed["sha256"]
        rewrite(folder / MANIFEST_FILE, lambda _: json.dumps(listed).encode())

        flags = ("--data", demo_latents, "--run-dir", run_dir, *TRAINING)
        output = train_forked(*flags, expect=2)

        assert output.count(f"error: {planted} is not a file of its checkpoint's manifest") == 1
        assert not (tmp_path / "executed").exists()

    def test_a_job_on_a_run_directory_in_use_is_refused_on_all_ranks(
        self, train_forked, demo_latents, tmp_path
    ):
        flags = ("--data", demo_latents, "--run-dir", tmp_path / "run", *TRAINING)
        with hold_run_directory(tmp_path / "run"):
            output = train_forked(*flags, expect=2)

        assert output.count(f"error: --run-dir {tmp_path / 'run'} is in use by another job (") == 1
        assert "Traceback" not in output
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
            CHECKPOINT_DIR,
            "lock",
        ]

    def test_damaged_data_stops_all_ranks_after_saving(self, train_forked, latents, tmp_path):
        # The size is right, so only the checksum tells. Shards are shuffled: damage the middle one.
        shard, run_dir = latents / "00002.tar", tmp_path / "run"
        shard.write_bytes(b"\0" * shard.stat().st_size)

        flags = ("--data", latents, "--run-dir", run_dir, *TRAINING, "--max-steps", 20)
        output = train_forked(*flags, "--shuffle-window", 1, expect=2)

        assert output.count(f"error: {shard}: its sha256 is not that of dataset.json") == 1
        assert "Traceback" not in output
        records = read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
        folder = latest_checkpoint(run_dir)
        assert (read_manifest(folder).state.step if folder else 0) == len(records)

    def test_a_disk_that_refuses_a_checkpoint_keeps_the_one_before(
        self, train_forked, demo_latents, run_dir
    ):
        flags = ("--data", demo_latents, "--run-dir", run_dir, *TRAINING, "--max-steps", 7)

        output = train_forked(*flags, expect=1, file_kib=SMALLER_THAN_OPTIMIZER_KIB)

        assert "warning: checkpoint of step 6 could not be written: File too large; " in output
        assert output.count("error: checkpoint of step 7 could not be written: File too") == 1
        assert "Traceback" not in output
        kept = sorted(path.name for path in (run_dir / CHECKPOINT_DIR).iterdir())
        assert kept == [LATEST_FILE, "step-0000002", "step-0000004"]
        assert read_manifest(latest_checkpoint(run_dir)).state.step == STEPS
        assert [record["step"] for record in read_metrics(run_dir)] == list(range(1, 8))
        failed = [note for note in read_notes(run_dir) if note.outcome == "failed"]
        assert [note.step for note in failed] == [6, 7]
        assert failed[0].reason.startswith("File too large")


def test_the_demo_preset_is_what_these_tests_assume():
    model = load_preset("demo").model
    assert (model.num_classes, model.num_experts, model.latent_size) == (10, 3, 16)
