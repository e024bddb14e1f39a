"""What the text of --data and --input names."""

import pytest

from data_tools.errors import ConfigError
from data_tools.user_files.place_names import places_of, split_list, split_weight


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_braces_and_wildcards_are_expanded_as_a_shell_does(here):
    for name in ("b2", "b10", "a1", ".hidden"):
        (here / name).mkdir()

    assert places_of("x/{a,b}{0..1}", "--data") == ["x/a0", "x/a1", "x/b0", "x/b1"]
    assert places_of("x", "--data") == ["x"]
    assert places_of("pipe:cat {a,b} {} *", "--data") == ["pipe:cat {a,b} {} *"]
    assert places_of("*", "--data") == ["a1", "b10", "b2"]
    assert places_of("{c,b?}", "--data") == ["c", "b2"]
    assert places_of("[a-b]1*", "--data") == ["a1", "b10"]
    assert places_of("http://h/a?x=*", "--data") == ["http://h/a?x=*"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x/{a,b", "is not there, and its braces are wrong (Unbalanced braces: "),
        ("x/{0..999999999}", "stands for more than 10000 names; name fewer."),
        ("{0..99}{0..999}", "stands for more than 10000 names; name fewer."),
        ("none*", "nothing is called so, and nothing matches; correct it."),
        ("none[v1]", "nothing is called so, and nothing matches; correct it."),
        ("s3://bucket/*.tar", "a server cannot be asked what matches *; write braces, such as"),
    ],
)
def test_names_of_nothing_are_refused(text, sentence):
    with pytest.raises(ConfigError) as caught:
        places_of(text, "--data")
    assert str(caught.value).startswith(f"--data {text}: {sentence}")


ODD_NAMES = ("lr=0.1,bs=2", "photos, 2024", "a{b", "{a,b}", "[v1]", "x*?", "split=train", "a=3")


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("end", ["", "/", "/deeper,one"])
def test_what_exists_is_meant_by_its_name(here, name, end):
    (here / name / "deeper,one").mkdir(parents=True)
    text = f"{name}{end}"

    assert places_of(text, "--data") == [text]
    assert split_list(text, "--data") == [text]
    assert split_weight(text) is None
    assert split_list(f"{text},other,pipe:cat {{}},x", "--data") == [
        *(text, "other", "pipe:cat {},x")
    ]
    assert split_list(f"other,{text}=2,{text}", "--data") == ["other", f"{text}=2", text]
    assert split_weight(f"{text}=2") == (text, "2")


def test_a_folder_called_like_an_address_does_not_stand_for_it(here):
    (here / "s3:/bucket/{a,b}").mkdir(parents=True)

    assert places_of("s3://bucket/{a,b}", "--data") == ["s3://bucket/a", "s3://bucket/b"]


def test_the_longer_existing_name_is_meant(here):
    for name in ("photos", "photos, 2024", "b"):
        (here / name).mkdir()

    assert split_list("photos, 2024,b", "--data") == ["photos, 2024", "b"]
    assert split_list("photos,b=2", "--data") == ["photos", "b=2"]
    assert split_list("photos=1,b=2", "--data") == ["photos=1", "b=2"]
