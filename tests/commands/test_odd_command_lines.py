"""Every command, on command lines and configuration files that nobody means: see odd_inputs.py."""

import json
import shutil

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from data_tools import (
    encode_latents,
    index_shards,
    inspect_dataset,
    make_demo_images,
    train_vae,
    verify_shards,
)
from data_tools.sources.inputs import read_class_names
from data_tools.sources.source import ImageClass
from tests.support.evaluated_run import make_run
from tests.support.launch import REPOSITORY
from tests.support.odd_inputs import RAW, VALUE, WORD, check, command_lines, flags_of, quick
from training import (
    count,
    demo,
    evaluate,
    export,
    main,
    preflight,
    reconstruct_ema,
    reference_statistics,
    report,
    retry,
    sample,
    score_images,
)
from training.config.deepspeed_config import KNOWN_KEYS

RUN = st.sampled_from(["run"] * 6 + ["none", "file", "folder", "run/checkpoints", "~/run"])
DATA = st.sampled_from(["run/data"] * 3 + ["none", "file", "folder"])
# Its argument; words behind the random ones, such that the command has nothing to do, or little:
# main would train, and encode_latents without --input draw the demo set into this repository; and
# the number of examples.
COMMANDS = {
    "main": (main.main, None, ["--dry-run"], 25),
    "count": (count.main, None, [], 15),
    "preflight": (preflight.main, None, ["--not-a-flag"], 20),
    "sample": (sample.main, RUN, ["--steps", "0"], 25),
    "evaluate": (evaluate.main, RUN, ["--steps", "0"], 25),
    "export": (export.main, RUN, ["--steps", "0"], 25),
    "report": (report.main, RUN, ["none"], 20),
    "demo": (demo.main, st.just("none"), ["--port", "0"], 20),
    "reconstruct_ema": (reconstruct_ema.main, RUN, [], 20),
    "reference_statistics": (reference_statistics.main, None, ["--input", "none"], 20),
    "score_images": (score_images.main, DATA, ["--reference", "none"], 20),
    "encode_latents": (encode_latents.main, None, ["--input", "none"], 25),
    "verify_shards": (verify_shards.main, None, ["--data", "none"], 25),
    "inspect_dataset": (inspect_dataset.main, DATA, [], 20),
    "index_shards": (index_shards.main, None, ["--input", "none"], 20),
    "make_demo_images": (make_demo_images.main, None, ["--size", "1"], 20),
    "train_vae": (train_vae.main, None, ["--images", "none"], 20),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a run, a file and a folder; it is also the home."""
    parent = tmp_path_factory.mktemp("odd")
    made = parent / "some" / "where" / "work"
    (made / "folder").mkdir(parents=True)
    (made / "folder" / "file").write_text("text")
    (made / "file").write_text("text")
    make_run(made / "run", made / "run" / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(made))
        patch.delenv("X", raising=False)
        yield made
    shutil.rmtree(parent)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_line_is_obeyed_or_refused_in_one_sentence(name, folder):
    command, argument, behind, number = COMMANDS[name]
    arguments = st.just([]) if argument is None else argument.map(lambda word: [word])

    @quick(number)
    @given(first=arguments, words=command_lines(flags_of(command)))
    def try_one(first, words):
        check(command, [*first, *words, *behind], folder)

    try_one()


def test_what_a_job_script_asks_retry_is_answered(folder):
    codes = st.one_of(st.sampled_from(["0", "1", "2", "75"]), WORD)

    @quick(40)
    @given(code=codes, words=command_lines(["--run-dir", "--preset"]))
    def try_one(code, words):
        check(retry.main, [code, *words], folder, codes=(0, 1, 2))

    try_one()


def given_with(preset):
    """A demo preset with some values replaced, added or left out."""
    sections = st.sampled_from(sorted(preset))
    keys = st.sampled_from(sorted({key for keys in preset.values() for key in keys}))
    change = st.tuples(sections, st.one_of(keys, keys, keys, WORD), VALUE)

    def changed(changes):
        values = {section: dict(keys) for section, keys in preset.items()}
        for section, key, value in changes:
            home = next((name for name, keys in preset.items() if key in keys), section)
            values[home][key] = value
        return values

    return st.lists(change, min_size=1, max_size=2).map(changed)


def written(folder, name, content):
    (folder / name).write_bytes(content)
    return name


def test_a_preset_is_read_or_refused_in_one_sentence(folder):
    preset = yaml.safe_load((REPOSITORY / "training/presets/demo.yaml").read_text())
    texts = given_with(preset).map(lambda values: yaml.dump(values).encode("utf-8", "replace"))

    @quick(40)
    @given(content=st.one_of(texts, texts, texts, st.sampled_from(RAW)))
    def try_one(content):
        check(main.main, ["--preset", written(folder, "p.yaml", content), "--dry-run"], folder)

    for content in RAW:
        check(main.main, ["--preset", written(folder, "p.yaml", content), "--dry-run"], folder)
    try_one()
    (folder / "p.yaml").unlink()


def test_a_deepspeed_file_is_read_or_refused_in_one_sentence(folder):
    zero = json.loads((REPOSITORY / "ds_configs/zero2.json").read_text())
    blocks = {name: value for name, value in zero.items() if isinstance(value, dict)}
    inner = sorted({key for block in blocks.values() for key in block} | {"enabled", "stage"})
    known = st.sampled_from([*sorted(KNOWN_KEYS), "optimizer", "x"])
    block = st.dictionaries(st.sampled_from(inner), VALUE, max_size=3)
    values = st.dictionaries(known, st.one_of(VALUE, block), max_size=3)
    texts = values.map(lambda keys: json.dumps(zero | keys).encode())

    @quick(40)
    @given(content=texts)
    def try_one(content):
        check(main.main, ["--deepspeed", written(folder, "d.json", content), "--dry-run"], folder)

    for content in RAW:
        check(main.main, ["--deepspeed", written(folder, "d.json", content), "--dry-run"], folder)
    try_one()
    (folder / "d.json").unlink()


def test_class_names_are_read_or_refused_in_one_sentence(folder):
    classes = (ImageClass("0", "0", 1), ImageClass("a", "a", 2))
    texts = st.dictionaries(st.one_of(WORD, st.sampled_from(["0", "a"])), VALUE, max_size=3).map(
        lambda values: json.dumps(values).encode()
    )

    @quick(40)
    @given(content=st.one_of(texts, st.sampled_from(RAW)))
    def try_one(content):
        def read(_argv):
            read_class_names(folder / written(folder, "names.json", content), classes)

        (folder / "names.json").write_bytes(content)
        check(read, [], folder)

    try_one()
    (folder / "names.json").unlink()
