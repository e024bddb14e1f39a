"""Which files of weights a VAE is loaded from: variants, parts, pickles, pipelines, the hub."""

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from data_tools.errors import ConfigError
from data_tools.vae.autoencoder import load_vae
from tests.support.launch import run
from tests.support.small_vae import save_small_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a small VAE whose weights fp16 holds exactly."""
    return save_small_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def make(saved, tmp_path):
    """Write a folder with the configuration and weights under some names."""

    def folder(name, *files, half=False):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_bytes((saved / "config.json").read_bytes())
        weights = load_file(saved / WEIGHTS)
        if half:
            weights = {key: value.half() for key, value in weights.items()}
        for file in files:
            save_file(weights, tmp_path / name / file)
        return tmp_path / name

    return folder


def refusal(source):
    with pytest.raises(ConfigError) as error:
        load_vae(source)
    message = str(error.value)
    assert message.startswith("--vae ") and "\n" not in message
    return message


def test_weights_of_less_precision_are_taken_where_there_are_no_others(saved, make):
    wanted = load_vae(saved).sha256
    fp16, bf16 = (f"diffusion_pytorch_model.{name}.safetensors" for name in ("fp16", "bf16"))
    assert load_vae(make("fp16", fp16, half=True)).sha256 == wanted
    assert load_vae(make("two", fp16, bf16)).sha256 == wanted
    both = make("both", WEIGHTS, fp16)
    (both / fp16).write_bytes(b"not looked at")
    assert load_vae(both).sha256 == wanted
    assert load_vae(make("other", "diffusion_pytorch_model.ema.safetensors")).sha256 == wanted
    assert load_vae(make("own name", "my_vae.safetensors")).sha256 == wanted
    assert load_vae(both / WEIGHTS).sha256 == wanted


def test_weights_in_several_files_are_read(saved, tmp_path):
    model = AutoencoderKL.from_pretrained(saved, low_cpu_mem_usage=False)
    for name, variant in (("parts", None), ("parts16", "fp16")):
        model.save_pretrained(tmp_path / name, max_shard_size="20KB", variant=variant)
        assert len(list((tmp_path / name).glob("*-of-*.safetensors"))) > 1
        assert load_vae(tmp_path / name).sha256 == load_vae(saved).sha256
    gone = min((tmp_path / "parts").glob("*-of-*.safetensors"))
    gone.unlink()
    assert "diffusers cannot load its weights (" in refusal(tmp_path / "parts")


def test_a_folder_that_is_nearly_called_so_is_named_and_no_server_asked():
    sentence = "--vae data_tools/demovae: does not exist; did you mean data_tools/demo_vae?"
    assert refusal("data_tools/demovae") == sentence


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_configuration_is_read_whatever_editor_saved_it(saved, make, encoding):
    folder = make("edited", WEIGHTS)
    text = (saved / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("}", "\n}"), encoding)
    assert load_vae(folder).sha256 == load_vae(saved).sha256
    assert load_vae(folder / WEIGHTS).sha256 == load_vae(saved).sha256


def test_what_is_wrong_with_the_weights_is_one_sentence(saved, make, capfd):
    pickled = make("bin")
    torch.save(load_file(saved / WEIGHTS), pickled / "diffusion_pytorch_model.bin")
    message = refusal(pickled)
    assert "has pickled weights only (diffusion_pytorch_model.bin), which may run code; con" in (
        message
    )
    code = message.partition("with diffusers.")[2].partition(", and give")[0]
    eval(code.replace("FOLDER", repr(str(pickled / "new"))), {"AutoencoderKL": AutoencoderKL})  # noqa: S307
    assert load_vae(pickled / "new").sha256 == load_vae(saved).sha256
    assert "is a pickled file" in refusal(pickled / "diffusion_pytorch_model.bin")
    several = make("several", "diffusion_pytorch_model.a.safetensors", "b.safetensors")
    assert refusal(several).endswith(
        "has several files of weights (b.safetensors, diffusion_pytorch_model.a.safetensors); "
        f"name one of them: --vae {several}/b.safetensors."
    )
    assert f"has no weights ({WEIGHTS}); fetch the folder again." in refusal(make("none"))
    capfd.readouterr()
    less = make("less")
    weights = load_file(saved / WEIGHTS)
    del weights["decoder.conv_out.bias"]
    save_file(weights, less / f"diffusion_pytorch_model.fp16{WEIGHTS[-12:]}")
    assert "its weights lack 1 tensor that config.json describes (decoder.conv_out.bias)" in (
        refusal(less)
    )
    cut = make("cut")
    (cut / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:1000])
    assert "diffusers cannot load its weights (" in refusal(cut)
    assert capfd.readouterr() == ("", ""), "diffusers says nothing beside"


def test_a_pipeline_with_a_configuration_of_its_own_has_its_vae_found(saved, make):
    folder = make("pipeline/vae", WEIGHTS).parent
    (folder / "config.json").write_text('{"_class_name": "Transformer2DModel"}')
    assert load_vae(folder).sha256 == load_vae(saved).sha256


HUB = """
import sys
from data_tools.errors import ConfigError
from data_tools.vae.autoencoder import load_vae
for name in sys.argv[1:]:
    try:
        vae = load_vae(name)
        print("loaded", vae.id, vae.sha256)
    except ConfigError as err:
        print("error:", err)
"""


@pytest.mark.processes
def test_a_vae_in_the_cache_of_the_hub_is_found_wherever_its_repository_has_it(
    saved, make, tmp_path
):
    def repository(name, place, *files):
        base = f"hub/models--{name.replace('/', '--')}"
        folder = make(f"{base}/snapshots/{'a' * 40}/{place}", *files)
        (tmp_path / base / "refs").mkdir()
        (tmp_path / base / "refs" / "main").write_text("a" * 40)
        return folder

    repository("some/vae", "", WEIGHTS)
    repository("some/pipeline", "vae", "diffusion_pytorch_model.fp16.safetensors")
    repository("some/bare", "vae")
    pickled = repository("some/pickled", "")
    torch.save(load_file(saved / WEIGHTS), pickled / "diffusion_pytorch_model.bin")
    (repository("some/unet", "") / "config.json").write_text('{"_class_name": "UNet"}')
    names = ["some/vae", "some/pipeline", "some/bare", "some/pickled", "some/unet", "some/thing"]

    output = run("python", "-c", HUB, *names, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")

    wanted = load_vae(saved).sha256
    lines = output.splitlines()
    assert lines[:2] == [f"loaded some/vae {wanted}", f"loaded some/pipeline {wanted}"]
    assert lines[2].startswith("error: --vae some/bare: has no weights as .safetensors in the Hug")
    assert lines[3].startswith("error: --vae some/pickled: has pickled weights only (")
    assert lines[4].startswith("error: --vae some/unet: neither in the Hugging Face cache nor rea")
    assert lines[5].startswith("error: --vae some/thing: neither in the Hugging Face cache nor re")
    assert len(lines) == 6, "one line each"
