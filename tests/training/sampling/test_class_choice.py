"""Which class a name or a number means, on the command line and in Python."""

import re
import unicodedata

import numpy as np
import pytest
import torch

from data_tools.errors import ConfigError
from tests.support.evaluated_run import make_run
from training import sample
from training.run.directory import load_config, load_manifest
from training.sampling.checks import WrongValueError
from training.sampling.class_choice import ClassChoice

# As encoding sorts folders 0 to 11 by name.
FOLDERS = ["0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9"]


def choice(*names, num_classes=None):
    number = num_classes or len(names)
    return ClassChoice(number, dict(enumerate(names)), "--classes", "--class-numbers {}")


def refusal(use, *arguments):
    with pytest.raises(WrongValueError) as error:
        use(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_number_that_is_also_the_name_of_another_class_is_refused():
    """Folders called 0 to 11: drawing class 2 of them must not draw the one called 10."""
    folders = choice(*FOLDERS)

    assert refusal(folders.find_all, "2,10") == (
        "--classes: '2' is the name of class 4 and the number of another, '10'; give "
        "--class-numbers 4 for the one or --class-numbers 2 for the other."
    )
    assert folders.find_all("0,1") == [0, 1]  # both ways mean the same class
    assert folders.numbers_in("2, 10,4") == [2, 10, 4]
    assert folders.find(2) == 2  # a number that is no text


def test_a_name_comes_before_a_number_and_a_number_where_there_is_no_such_name():
    found = choice("cat", "1999", "dog")

    assert found.find_all("1999,0, dog ,2") == [1, 0, 2, 2]


def test_names_may_have_commas_blanks_and_characters_that_are_written_in_two_ways():
    decomposed = unicodedata.normalize("NFD", "\u00c4pfel")
    found = choice("tench, Tinca tinca", "a,b,c", decomposed, "fire truck", " dots. ")

    assert found.find_all("tench, Tinca tinca,a,b,c,fire truck") == [0, 1, 3]
    assert found.find_all("\u00c4pfel") == found.find_all(decomposed) == [2]
    assert found.find_all("dots.") == [4]
    assert refusal(found.find_all, "tench") == (
        "--classes: unknown class 'tench'; give a number of a class, from 0 to 4, or a name: "
        f"'tench, Tinca tinca', 'a,b,c', {decomposed!r}, 'fire truck', ' dots. '."
    )


def test_a_list_that_is_also_a_name_is_refused():
    found = choice("salt", "pepper", "salt,pepper")

    assert refusal(found.find_all, "salt,pepper") == (
        "--classes: 'salt,pepper' is the name of one class and a list of others; give "
        "--class-numbers 2 for the one."
    )
    assert found.find_all("pepper,salt") == [1, 0]


def test_two_classes_of_one_name_are_told_apart_by_number():
    """ImageNet has two cranes."""
    assert refusal(choice("crane", "dog", "crane").find_all, "crane") == (
        "--classes: 2 classes are called 'crane'; give --class-numbers 0 or --class-numbers 2."
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("DOG", "--classes: unknown class 'DOG'; did you mean 'dog'?"),
        ("dgo", "--classes: unknown class 'dgo'; did you mean 'dog'?"),
        ("", "--classes: unknown class ''; give a number of a class, from 0 to 99, or a name: "),
        ("cat,,dog", "--classes: unknown class ''; give a number"),
        ("100", "--classes: unknown class '100'; give a number of a class, from 0 to 99"),
        ("-1", "--classes: unknown class '-1'; give"),
        ("\u00b2", "--classes: unknown class '\u00b2'; give"),  # str.isdigit takes it for one
        ("9" * 5000, "--classes: unknown class '9999999999999999999999999999"),
        ("\udcff", "--classes: unknown class '\\udcff'; give"),  # a byte that is no UTF-8
    ],
)
def test_what_is_no_class_gets_a_sentence_with_what_is_near(text, sentence):
    told = refusal(choice("cat", "dog", num_classes=100).find_all, text)

    assert told.startswith(sentence) and len(told) < 300


def test_the_sentence_does_not_list_a_thousand_names():
    told = refusal(choice(*(f"name {i:03d}" for i in range(1000))).find, "zebra")

    assert told.endswith("'name 008', 'name 009' and 990 more.") and len(told) < 300


@pytest.mark.parametrize("number", [2, np.int64(2), np.uint8(2), torch.tensor(2), np.array(2)])
def test_a_number_of_any_library_is_a_number(number):
    assert choice(*FOLDERS).find(number) == 2


@pytest.mark.parametrize(
    "wrong", [True, np.True_, torch.tensor(True), 2.0, None, float("nan"), b"2", [2], 12, -1]
)
def test_what_is_neither_a_name_nor_a_number_of_a_class_is_refused(wrong):
    told = refusal(choice(*FOLDERS).find, wrong)

    assert re.match(r"--classes: (a class that is not given by its name must be a whole|-?1)", told)


def test_the_sample_command_takes_names_or_numbers_of_classes(tmp_path):
    make_run(tmp_path / "run", tmp_path / "data")
    config, manifest = load_config(tmp_path / "run"), load_manifest(tmp_path / "run")

    def planned(*flags):
        args = sample.build_parser().parse_args(["run", "--per-class", "1", *flags])
        return sample.plan_images(args, config, manifest).labels

    assert planned("--classes", "class 2,1") == planned("--class-numbers", "2,1") == [2, 1]
    assert planned() == [0, 1, 2]
    for flags, sentence in (
        (["--classes", "3"], "--classes: unknown class '3'; give a number of a class, from 0 to 2"),
        (["--class-numbers", "3"], "--class-numbers: '3' is not a number of a class, from 0 to 2."),
        (["--class-numbers", "class 1"], "--class-numbers: 'class 1' is not a number of a class"),
        (["--classes", "1", "--class-numbers", "1"], "--classes and --class-numbers both choose"),
    ):
        with pytest.raises(ConfigError, match="^" + re.escape(sentence)):
            planned(*flags)


def test_a_model_without_classes_says_so():
    none = ClassChoice(0, {}, "class_labels", "the number {}")

    for given in ("cat", "0", 0):
        assert refusal(none.find, given) == "class_labels: this model was trained without classes."
