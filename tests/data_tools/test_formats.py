"""Format numbers: a file lacks a field, is older, is newer, or holds what no version writes."""

import dataclasses
import json
import shutil
import typing
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from data_tools import formats
from data_tools.encoding.output import EncodingOutput, finished_sidecar
from data_tools.encoding.settings import SETTINGS, load_settings
from data_tools.errors import ConfigError
from data_tools.files import SINCE, MalformedError, append_line
from data_tools.formats import FORMAT_KEY, Format, NewerFormatError, stored_values
from data_tools.index_shards import _known
from data_tools.index_shards import main as index_tars
from data_tools.shards.foreign_index import NOTES
from data_tools.shards.manifest import (
    DATASET,
    MANIFEST_NAME,
    ClassEntry,
    DatasetManifest,
    VaeReference,
    content_hash,
)
from data_tools.shards.sidecar import SIDECAR
from data_tools.verification.verify import verify
from tests.support.stored_files import FOLDER, VERSIONS
from training.checkpoints.average_snapshots import SNAPSHOT, list_snapshots
from training.checkpoints.manifest import MANIFEST, read_manifest
from training.checkpoints.resume_point import newest_point
from training.config import preset
from training.config.tree import CONFIG, options
from training.evaluation.card import CARD, read_card
from training.evaluation.drawing import DRAW, check_folder
from training.evaluation.score_events import read_scores
from training.exports.job import EXPORT
from training.monitoring.event_files import METRICS, METRICS_FILE, Monitor, read_metrics
from training.run.checkpoint_notes import NOTE, CheckpointNote, append_note, read_notes
from training.run.directory import INIT, load_config, load_manifest
from training.run.program import START, read_starts
from training.run.starts import RESTARTS, Restarts, read_restarts

SCORE = "run/evaluation/step-0000002-ema-ddim2-14-seed0"


def _drawn(path):
    settings = DRAW.loads((FOLDER / "2026-11" / SCORE / "settings.json").read_bytes(), "")
    check_folder(path.parent, settings, is_forced=False)
    return settings


# By name: where it is stored, its format, and what reads it.
FILES = {
    "dataset.json": ("data", DATASET, lambda path: DatasetManifest.load(path.parent, False)),
    "a run's dataset.json": ("run/dataset.json", DATASET, lambda path: load_manifest(path.parent)),
    "sidecar": ("data/00000.json", SIDECAR, lambda path: finished_sidecar(path.parent, 0)),
    "encoding.json": ("data/encoding.json", SETTINGS, lambda path: load_settings(path.parent)),
    "index of a tar": ("tars/part-0.index.json", NOTES, _known),
    "manifest.json": (
        "run/checkpoints/step-0000002/manifest.json",
        MANIFEST,
        lambda path: read_manifest(path.parent, has_files=False),
    ),
    "config.yaml": ("run/config.yaml", CONFIG, lambda path: load_config(path.parent)),
    "restarts.json": ("run/restarts.json", RESTARTS, read_restarts),
    "settings.json": (f"{SCORE}/settings.json", DRAW, _drawn),
    "score card": (f"{SCORE}/score-*.json", CARD, read_card),
    "card of a loss": ("run/evaluation/validation-*.json", CARD, read_card),
    "card of images": ("card.json", CARD, read_card),
}
FILES["dataset.json"] = ("data/dataset.json", *FILES["dataset.json"][1:])
# What is not understood of these is passed over: it is made again, or counts afresh.
MADE_AGAIN = {"index of a tar": None, "restarts.json": Restarts(), "sidecar": None}
FORMATS = {
    **{name: form for name, (_, form, _) in FILES.items()},
    **{"starts.jsonl": START, "checkpoints.jsonl": NOTE, "metrics.jsonl": METRICS},
    **{"snapshot": SNAPSHOT, "init.json": INIT, "export.json": EXPORT},
}


class Stored:
    """A stored file in a folder of its own, with its neighbours."""

    def __init__(self, name, version, folder):
        place, self.format, self.read = FILES[name]
        original = next((FOLDER / version).glob(place))
        shutil.copytree(original.parent, folder / "in", ignore=shutil.ignore_patterns(".*"))
        self.path = folder / "in" / original.name

    def content(self):
        text = self.path.read_text()
        return yaml.safe_load(text) if self.path.suffix == ".yaml" else json.loads(text)

    def change(self, edit):
        """Write a changed content, which then has no checksum of its own any more."""
        content = self.content()
        if self.path.name == "manifest.json":
            content.pop("sha256", None)
        edit(content)
        is_yaml = self.path.suffix == ".yaml"
        self.path.write_text(yaml.safe_dump(content) if is_yaml else json.dumps(content))

    def refusal(self):
        with pytest.raises(ConfigError) as error:
            self.read(self.path)
        sentence = str(error.value)
        assert sentence.count("\n") == 0 and sentence.endswith(".")
        return error.value


@pytest.fixture(params=[(name, version) for version in VERSIONS for name in FILES], ids=str)
def file(request, tmp_path):
    return Stored(*request.param, tmp_path)


def test_a_file_of_every_version_is_read(file):
    assert file.read(file.path) is not None


def test_a_newer_file_is_refused_in_one_sentence_and_nothing_is_called_damaged(file):
    newest = file.format.newest
    file.change(lambda content: content.update({file.format.key: newest + 1}))

    error = file.refusal()

    assert isinstance(error, NewerFormatError)
    assert str(file.path) in str(error)
    assert (
        f"was written by a newer program (format {newest + 1}, this one knows {newest}); use the "
        "program that wrote it, or a newer one."
    ) in str(error)


@pytest.mark.parametrize("number", [0, True, "2", None, 1.5])
def test_a_number_that_is_none_is_damage(file, number):
    file.change(lambda content: content.update({file.format.key: number}))
    name = next(n for n, (_, form, read) in FILES.items() if read is file.read)

    if name in MADE_AGAIN:
        assert file.read(file.path) == MADE_AGAIN[name]
    else:
        error = file.refusal()
        assert not isinstance(error, NewerFormatError)


def test_a_field_that_no_version_writes_is_damage_but_in_a_card(file):
    file.change(lambda content: content.update({"colour": 3}))
    name = next(n for n, (_, form, read) in FILES.items() if read is file.read)

    if name in MADE_AGAIN:
        assert file.read(file.path) == MADE_AGAIN[name]
    elif file.format is CARD:  # whatever a card holds beside what is read
        assert file.read(file.path)["colour"] == 3
    else:
        assert not isinstance(file.refusal(), NewerFormatError)


def test_an_optional_field_that_is_missing_takes_its_default(file):
    whole, content = file.read(file.path), file.content()
    if file.path.suffix == ".yaml":
        optional = [
            (leaf.section, leaf.name, leaf.field.default)
            for leaf in options()
            if leaf.field.default is not dataclasses.MISSING
        ]
        assert len(optional) > 40
        for section, name, default in optional:
            file.path.write_text(yaml.safe_dump(content))
            file.change(lambda content, s=section, n=name: content[s].pop(n, None))
            assert getattr(getattr(file.read(file.path), section), name) == default
    elif file.format is SETTINGS:
        assert whole.sizes
        file.change(lambda content: content.pop("sizes"))
        assert file.read(file.path) == dataclasses.replace(whole, sizes=[])
    elif file.format.kind is not None:
        for name in content.keys() - {file.format.key, "sha256"}:
            file.path.write_text(json.dumps(content))
            file.change(lambda content, n=name: content.pop(n))
            # None of the first version's fields is optional.
            with pytest.raises(MalformedError):
                file.format.loads(file.path.read_text(), "")


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.kind])
def test_the_next_version_reads_todays_files_and_todays_reads_its_unless_they_say_more(name):
    """A field is added to each kind of file, as a later version would."""
    today, version = FORMATS[name], VERSIONS[-1]
    if name in FILES:
        text = next((FOLDER / version).glob(FILES[name][0])).read_text()
    else:
        text = (FOLDER / version / "run" / name).read_text().splitlines()[0]
    content = json.loads(text)
    if today is MANIFEST:
        content.pop("sha256")  # the file's own checksum, no part of what it says
    added = dataclasses.field(default="", metadata={SINCE: today.newest + 1})
    kind = dataclasses.make_dataclass(
        "Next", [("added", str, added)], bases=(today.kind,), frozen=True, kw_only=True
    )
    later = dataclasses.replace(today, newest=today.newest + 1, kind=kind)

    found = later.parse(content, "")
    unsaid, saying = later.dumps(found), later.dumps(dataclasses.replace(found, added="new"))

    assert found.added == ""
    assert stored_values(today.loads(unsaid, "")) == stored_values(found)
    assert json.loads(saying)[today.key] == today.newest + 1
    assert later.loads(saying, "") == dataclasses.replace(found, added="new")
    with pytest.raises(NewerFormatError, match=rf"^here was written .* knows {today.newest}\)"):
        today.loads(saying, "here")


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_says_its_format(name):
    form = FORMATS[name]
    if form.kind is None:
        written = json.loads(form.dumps({"a": 1}))
        assert written == {form.key: form.base, "a": 1}
    for kind in _kinds(form.kind):
        for field, (_, since) in formats._added(kind).items():
            # Else a file with it would have an old number, and old programs call it damaged.
            first = form.base if since is None else since - 1
            assert first < form.newest, f"{kind.__name__}.{field} is new: raise the format"


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.kind])
def test_every_field_with_a_default_says_since_which_format_there_is_one(name):
    """Without it, a field would become newer with every format that is added."""
    for kind in _kinds(FORMATS[name].kind):
        for field in dataclasses.fields(kind):
            has_default = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
            assert not has_default or SINCE in field.metadata, f"{kind.__name__}.{field.name}"


def _kinds(kind):
    """A dataclass and those in it."""
    if dataclasses.is_dataclass(kind):
        yield kind
        for field in dataclasses.fields(kind):
            yield from _kinds(field.type)
    for part in typing.get_args(kind):
        yield from _kinds(part)


def test_a_description_that_uses_nothing_new_is_the_file_that_older_programs_read():
    for folder in ("data", "tars"):
        text = (FOLDER / "2026-11" / folder / MANIFEST_NAME).read_text()

        assert DATASET.dumps(DATASET.loads(text, "")) + "\n" == text


def test_an_added_field_that_says_nothing_changes_no_hash():
    manifest = DATASET.loads((FOLDER / "2026-11/data" / MANIFEST_NAME).read_text(), "")
    added = [("scales", list[float], dataclasses.field(default_factory=list))]
    reference, entry = (
        dataclasses.make_dataclass(kind.__name__, added, bases=(kind,), frozen=True)
        for kind in (VaeReference, ClassEntry)
    )
    later = dataclasses.replace(
        manifest,
        vae=reference(**vars(manifest.vae)),
        classes=[entry(**vars(one)) for one in manifest.classes],
    )

    scaled = dataclasses.replace(later, vae=dataclasses.replace(later.vae, scales=[1.0]))

    assert content_hash(later) == content_hash(manifest)
    assert content_hash(scaled) != content_hash(manifest)
    assert json.loads(DATASET.dumps(later))[FORMAT_KEY] == DATASET.base
    assert json.loads(DATASET.dumps(scaled))[FORMAT_KEY] == DATASET.newest


NEWER_LINES = {
    "starts.jsonl": '{"format_version": 2, "step": 9, "colour": 3}',
    "checkpoints.jsonl": '{"format_version": 2, "step": 9, "outcome": "saved", "reason": ""}',
    "metrics.jsonl": '{"format_version": 2, "step": 1, "loss/total": {"mean": 3.0}}',
}


@pytest.mark.parametrize("version", VERSIONS)
def test_lines_that_are_not_understood_stay_when_others_are_added_or_cut(version, tmp_path):
    strange = ('{"format_version": 2, "step": 9, "colour": 3}', '{"step": 1', "\x00\x00", "[]")
    for name in NEWER_LINES:
        shutil.copy(FOLDER / version / "run" / name, tmp_path / name)
        for line in (NEWER_LINES[name], *strange):
            append_line(tmp_path / name, line)
    readers = (read_starts, read_notes, read_metrics)
    counts = [len(read(tmp_path)) for read in readers]

    START.append(tmp_path / "starts.jsonl", read_starts(tmp_path)[0])
    append_note(tmp_path, CheckpointNote(3, "saved"))
    monitor = Monitor(tmp_path, resume_step=1)
    monitor.scalars(2, {"loss/total": 1.0})
    monitor.close()

    assert counts == [2, 1, 2]
    assert [len(read(tmp_path)) for read in readers] == [3, 2, 2]
    for name, line in NEWER_LINES.items():
        lines = (tmp_path / name).read_text().splitlines()
        assert [one for one in lines if one in (line, *strange)] == [line, *strange]
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    assert METRICS_FILE in NEWER_LINES


def test_a_last_line_without_its_end_is_kept_if_it_is_whole(tmp_path):
    path = tmp_path / "lines"
    path.write_text('{"a": 1}\n{"b": 2}')
    append_line(path, '{"c": 3}')
    path.write_text(path.read_text() + '{"d": ')
    append_line(path, '{"e": 5}')

    assert path.read_text() == '{"a": 1}\n{"b": 2}\n{"c": 3}\n{"e": 5}\n'


def test_an_option_that_is_no_more_is_left_out_with_a_sentence(tmp_path, capsys, monkeypatch):
    why = "averages are always kept in fp32"
    monkeypatch.setitem(preset._REMOVED, ("optim", "ema_dtype"), why)
    content = yaml.safe_load((FOLDER / "2026-11/run/config.yaml").read_text())
    content["optim"]["ema_dtype"] = "fp32"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))

    configs = [load_config(tmp_path), load_config(tmp_path)]

    assert configs == [load_config(FOLDER / "2026-11/run")] * 2
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/config.yaml: optim.ema_dtype (fp32) is left out: {why}.\n"
    )


def test_a_newer_snapshot_is_refused(tmp_path):
    weights = {"a": torch.zeros(1)}
    metadata = {"step": "1", "num_updates": "1", "std": "0.05", "gamma": "6.9"}
    path = tmp_path / "ema_snapshots" / "std0.050-step-0000001.safetensors"
    path.parent.mkdir()

    save_file(weights, path, metadata)
    assert list_snapshots(tmp_path)[0].step == 1
    save_file(weights, path, metadata | {FORMAT_KEY: "2"})

    assert load_file(path)
    with pytest.raises(NewerFormatError, match=r"safetensors was written by a newer program \("):
        list_snapshots(tmp_path)


def raise_number(path, form):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {form.key: form.newest + 1}))


def test_nothing_replaces_a_newer_dataset_json(tmp_path):
    """Not indexing, not encoding, not a repair."""
    stored = FOLDER / "2026-11"
    for name in ("data", "tars"):
        shutil.copytree(stored / name, tmp_path / name)
        raise_number(tmp_path / name / MANIFEST_NAME, DATASET)
    settings = load_settings(tmp_path / "data")
    before = (tmp_path / "data" / MANIFEST_NAME).read_bytes()

    tars = ("--input", str(tmp_path / "tars/part-{0,1}.tar"), "--array", "latent.npy")
    with pytest.raises(NewerFormatError):
        index_tars([*tars, "--vae", "data_tools/demo_vae"])
    with pytest.raises(NewerFormatError):
        verify(tmp_path / "data", is_quick=True, num_workers=1)
    from data_tools.encode_latents import main as encode

    flags = ("--vae", "data_tools/demo_vae", "--size", "16", "--shard-size", "4")
    flags += ("--batch-size", "2", "--device", "cpu")
    with pytest.raises(NewerFormatError):
        encode(["--input", str(stored / "images"), "--output", str(tmp_path / "data"), *flags])

    assert settings is not None and not EncodingOutput(tmp_path / "data", settings).missing
    assert (tmp_path / "data" / MANIFEST_NAME).read_bytes() == before


@pytest.mark.parametrize("number", ["3", None, True, [9]])
def test_a_dataset_json_with_a_number_that_is_none_is_not_taken_for_newer(tmp_path, number):
    path = tmp_path / MANIFEST_NAME

    path.write_text(json.dumps({FORMAT_KEY: number}))
    DATASET.refuse_newer(path)
    path.write_text("[" * 100_000)
    DATASET.refuse_newer(path)

    with pytest.raises(ConfigError, match=r"is not JSON \(it is nested too deep\); copy it again"):
        DatasetManifest.load(tmp_path)


def test_a_newer_sidecar_is_not_written_anew(tmp_path):
    shutil.copytree(FOLDER / "2026-11/data", tmp_path / "data")
    raise_number(tmp_path / "data/00001.json", SIDECAR)

    for is_quick in (True, False):
        with pytest.raises(NewerFormatError, match=r"00001\.json was written by a newer program"):
            verify(tmp_path / "data", is_quick=is_quick, num_workers=1)


def test_a_run_does_not_fall_back_from_a_checkpoint_of_a_newer_program(tmp_path):
    """To train on from the one before would overwrite and prune what is good."""
    folder = tmp_path / "checkpoints"
    stored = FOLDER / "2026-11/run/checkpoints/step-0000002"
    for tag in ("step-0000002", "step-0000004"):
        shutil.copytree(stored, folder / tag)
    (folder / "latest").write_text("step-0000004\n")
    assert newest_point(tmp_path).folder.name == "step-0000004"

    raise_number(folder / "step-0000004/manifest.json", MANIFEST)

    with pytest.raises(NewerFormatError, match=r"step-0000004/manifest\.json was written by"):
        newest_point(tmp_path)


def test_the_report_leaves_out_a_newer_card_and_says_so(tmp_path, capsys):
    shutil.copytree(FOLDER / "2026-11/run/evaluation", tmp_path / "evaluation")
    path = next((tmp_path / "evaluation").glob("validation-*.json"))
    assert len(read_scores(tmp_path / "evaluation")) == 3

    raise_number(path, CARD)

    assert len(read_scores(tmp_path / "evaluation")) == 2
    assert f"warning: {path} was written by a newer program (format 2" in capsys.readouterr().err


def test_the_documentation_lists_every_format():
    text = Path(preset.__file__).resolve().parents[2].joinpath("docs/checkpoints.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    stated = {row[0]: row[1] for row in rows if len(row) == 3}
    names = {
        **{"`dataset.json`": DATASET, "`encoding.json`": SETTINGS, "`00012.json`": SIDECAR},
        **{"`NAME.index.json`": NOTES, "`config.yaml`": CONFIG, "`manifest.json`": MANIFEST},
        **{"`starts.jsonl`": START, "`checkpoints.jsonl`": NOTE, "`metrics.jsonl`": METRICS},
        **{"`restarts.json`": RESTARTS, "snapshots in": SNAPSHOT, "`settings.json`": DRAW},
        **{"cards of": CARD, "`init.json`": INIT, "`export.json`": EXPORT},
    }

    assert {id(form) for form in names.values()} == {id(form) for form in FORMATS.values()}
    for name, form in names.items():
        numbers = [value for key, value in stated.items() if name in key]
        spread = [str(n) for n in sorted({form.oldest, form.newest})]
        assert " to ".join(spread) in numbers, name


def test_an_older_format_that_is_read_no_more_is_said_to_be_that():
    with pytest.raises(ConfigError, match=r"^here is of format 1, and this program reads 2 to 3;"):
        Format(newest=3, oldest=2).check({FORMAT_KEY: 1}, "here")
