"""The autoencoder: the committed weights keep their promise, every source loads, training works."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from data_tools.errors import ConfigError
from data_tools.train_vae import (
    BLOCK_OUT_CHANNELS,
    held_out_psnr,
    latent_draws,
    learning_rate,
    make_vae,
    normalise_latents,
    parse_arguments,
    psnr,
    training_batch,
)
from data_tools.vae.autoencoder import (
    DEMO_VAE,
    decode_pixels,
    encode_moments,
    load_vae,
    resolve_device,
)
from data_tools.vae.vae_pictures import emoji_pictures, folder_pictures, is_held_out
from models.latents import final_latents
from tests.support.launch import run
from tests.support.small_vae import save_small_vae

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def vae():
    return load_vae(DEMO_VAE)


@pytest.fixture(scope="module")
def pictures():
    return emoji_pictures(64)


@pytest.fixture(scope="module")
def card():
    return (DEMO_VAE / "README.md").read_text()


def number_on_card(card, label):
    return float(re.search(rf"\| {label} \| ([0-9.]+)", card).group(1))


def copy_of_demo(folder):
    folder.mkdir()
    for path in DEMO_VAE.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.slow
def test_held_out_emoji_are_reconstructed_at_30_decibels_as_the_card_says(vae, pictures, card):
    assert len(pictures.held_out) >= 256
    decibels = held_out_psnr(vae.model, pictures.held_out, CPU)
    assert decibels >= 30
    assert abs(decibels - number_on_card(card, "held-out PSNR")) < 0.02


def test_pixels_survive_the_way_through_moments_and_final_latents(vae, pictures):
    pixels = pictures.held_out[:64]
    raw = encode_moments(vae, torch.from_numpy(pixels))
    assert raw.shape == (64, 8, 16, 16) and raw.dtype == torch.float16
    final = final_latents(raw, torch.randn(64, 4, 16, 16), vae.scaling_factor, vae.shift_factor)
    decoded = decode_pixels(vae, final)
    assert decoded.shape == pixels.shape and decoded.dtype == np.uint8
    error = decoded.astype(float) - pixels
    decibels = -10 * np.log10((error**2).mean(axis=(1, 2, 3)) / 255**2)
    assert decibels.mean() > 30  # with a posterior draw, which costs a little


def test_final_latents_of_the_demo_have_unit_variance_in_every_channel(vae, pictures, card):
    draws = latent_draws(vae.model, pictures.train, CPU) * vae.scaling_factor
    assert abs(draws.std().item() - 1) < 0.01
    assert draws.mean(dim=(0, 2, 3)).abs().max() < 0.02
    assert (draws.std(dim=(0, 2, 3)) - 1).abs().max() < 0.02
    assert number_on_card(card, "scaling factor") == vae.scaling_factor


def test_the_committed_files_are_small_and_say_where_they_come_from(card):
    assert sum(path.stat().st_size for path in DEMO_VAE.iterdir()) < 3_000_000
    assert all(tensor.dtype == torch.float16 for tensor in load_file(DEMO_VAE / WEIGHTS).values())
    assert "OpenMoji" in card and "CC BY-SA 4.0" in card
    assert "python data_tools/train_vae.py" in card
    config = json.loads((DEMO_VAE / "config.json").read_text())
    assert tuple(config["block_out_channels"]) == BLOCK_OUT_CHANNELS


def test_a_folder_and_a_single_file_are_the_same_vae(vae, tmp_path, monkeypatch):
    folder = copy_of_demo(tmp_path / "vae")
    for source in (folder, str(folder / WEIGHTS)):
        other = load_vae(source)
        assert other.sha256 == vae.sha256
        assert other.scaling_factor == vae.scaling_factor
        assert (other.latent_channels, other.downsample) == (4, 4)
        assert other.id == str(source)
    assert vae.id == "data_tools/demo_vae"
    monkeypatch.chdir(tmp_path)
    assert load_vae("data_tools/demo_vae").sha256 == vae.sha256  # found from the repository
    assert load_vae("vae").id == str(folder)


def test_a_vae_that_did_not_encode_the_data_is_refused(vae):
    assert load_vae(DEMO_VAE, expected_sha256=vae.sha256).sha256 == vae.sha256
    with pytest.raises(ConfigError, match=r"are not those that encoded the data \(00000000"):
        load_vae(DEMO_VAE, expected_sha256="0" * 64)


def test_a_whole_pipeline_folder_works_and_shift_factors_are_read(vae, tmp_path):
    (tmp_path / "pipeline").mkdir()
    folder = copy_of_demo(tmp_path / "pipeline" / "vae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"shift_factor": 0.25, "scaling_factor": 0.5})
    )
    other = load_vae(tmp_path / "pipeline")
    assert (other.shift_factor, other.scaling_factor) == (0.25, 0.5)
    assert other.sha256 == vae.sha256  # of the weights alone


def test_names_of_the_original_stable_diffusion_code_are_translated(tmp_path):
    """A single file as Stability publishes it, for the smallest network of that shape."""
    model = AutoencoderKL.from_pretrained(
        save_small_vae(tmp_path / "diffusers", scaling_factor=0.3), low_cpu_mem_usage=False
    )
    original = {to_original(name, 2): x for name, x in model.state_dict().items()}
    for name in [name for name in original if ".attn_1." in name and is_matrix(name)]:
        original[name] = original[name][:, :, None, None]  # 1x1 convolutions there
    (tmp_path / "original").mkdir()
    save_file(original, tmp_path / "original" / "vae.safetensors")
    config = (tmp_path / "diffusers" / "config.json").read_text()
    (tmp_path / "original" / "config.json").write_text(config)
    loaded = load_vae(tmp_path / "original" / "vae.safetensors")
    assert loaded.sha256 == load_vae(tmp_path / "diffusers").sha256
    assert loaded.scaling_factor == 0.3


def is_matrix(name):
    return name.endswith("weight") and ".norm." not in name


def to_original(name, levels):
    """The name of a parameter in the code of latent diffusion, whose decoder counts backwards."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    backwards = lambda found: f"up.{levels - 1 - int(found[1])}"  # noqa: E731
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda f: f"{backwards(f)}.block.{f[2]}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda f: f"{backwards(f)}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda f: f"mid.block_{int(f[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    for ours, theirs in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v")):
        name = name.replace(f"attn_1.{ours}", f"attn_1.{theirs}")
    return name.replace("attn_1.to_out.0", "attn_1.proj_out")


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text("{")


def other_model(folder):
    (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}')


def cut_weights(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])


def no_weights(folder):
    (folder / WEIGHTS).unlink()


@pytest.mark.parametrize(
    ("damage", "source", "sentence"),
    [
        (no_config, "vae", "no config.json; give a folder that diffusers saved."),
        (broken_config, "vae", "config.json: is not JSON ("),
        (other_model, "vae", "describes UNet2DModel, not an AutoencoderKL; give the VAE's own"),
        (cut_weights, "vae", "diffusers cannot load its weights ("),
        (no_weights, "vae", f"has no weights ({WEIGHTS}); fetch the folder again."),
        (no_config, f"vae/{WEIGHTS}", "no config.json beside it, and weights tell no scaling fa"),
        (cut_weights, f"vae/{WEIGHTS}", "these are not the weights that "),
        (no_weights, f"vae/{WEIGHTS}", f"{WEIGHTS}: does not exist; give a diffusers folder, "),
    ],
)
def test_a_damaged_vae_is_refused_in_one_sentence(tmp_path, damage, source, sentence):
    damage(copy_of_demo(tmp_path / "vae"))
    with pytest.raises(ConfigError) as error:
        load_vae(tmp_path / source)
    message = str(error.value)
    assert message.startswith(f"--vae {tmp_path}") and sentence in message
    assert "\n" not in message


@pytest.mark.processes
def test_a_hub_vae_without_a_network_says_what_to_download(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    flags = ("--input", tmp_path / "images", "--output", tmp_path / "set")
    output = run(
        *("python", "data_tools/encode_latents.py", *flags),
        expect=2,
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path / "hf"),
    )
    error = output.splitlines()[-1]
    assert error.startswith("error: --vae stabilityai/sd-vae-ft-ema: neither in the Hugging Face")
    assert "run 'hf download stabilityai/sd-vae-ft-ema --local-dir FOLDER'" in error
    assert error.endswith("and pass --vae FOLDER.") and "Traceback" not in output


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("abacus", "--device abacus: no such device; use cpu, cuda or cuda:N."),
        ("cuda:99", "--device cuda:99: this machine has "),
        ("meta", "--device meta: only cpu and cuda are supported; use one of them."),
    ],
)
def test_an_unknown_device_is_refused(name, sentence):
    with pytest.raises(ConfigError) as error:
        resolve_device(name)
    assert str(error.value).startswith(sentence)
    assert resolve_device("cpu") == CPU
    assert resolve_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_psnr_is_what_the_textbook_says():
    x = torch.full((2, 3, 8, 8), -1.0)
    reconstruction = x.clone()
    reconstruction[0] += 2 / 255  # one grey level
    reconstruction[1] += 20 / 255
    expected = torch.tensor([20 * np.log10(255), 20 * np.log10(25.5)])
    assert torch.allclose(psnr(x, reconstruction).double(), expected, atol=1e-3)
    assert torch.equal(psnr(x, x - 5), torch.full((2,), 100.0))  # clipped, as pictures are


def test_normalising_latents_changes_no_reconstruction():
    torch.manual_seed(1)
    vae = make_vae().eval()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        vae.quant_conv.bias[:4] += torch.tensor([3.0, -2.0, 0.5, 0.0])
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        before = vae.encode(x).latent_dist
        picture = vae.decode(before.mean).sample
        normalise_latents(vae, latent_draws(vae, pixels, CPU))
        after = vae.encode(x).latent_dist
        draws = latent_draws(vae, pixels, CPU)
        assert torch.allclose(vae.decode(after.mean).sample, picture, atol=1e-4)
    assert torch.allclose(draws.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(draws.std((0, 2, 3)), torch.ones(4), atol=1e-4)
    ratio = before.std / after.std  # the posterior is rescaled with its mean
    assert torch.allclose(ratio, ratio.mean((0, 2, 3), keepdim=True).expand_as(ratio), rtol=1e-3)


def test_skin_tones_of_an_emoji_are_on_one_side_of_the_split(pictures):
    assert len(pictures.train) + len(pictures.held_out) == 4495
    share = len(pictures.held_out) / 4495
    assert 0.05 < share < 0.15
    assert abs(pictures.train_weight.sum() - 1) < 1e-9
    assert is_held_out("a") == is_held_out("a")


def test_training_batches_are_windows_of_training_pictures(pictures):
    rng = np.random.default_rng(0)
    batch = training_batch(pictures, rng, batch_size=6, crop=32)
    assert batch.shape == (6, 32, 32, 3) and batch.dtype == np.uint8
    whole = training_batch(pictures, rng, batch_size=3, crop=64)
    known = {view.tobytes() for p in pictures.train for view in (p, p[:, ::-1])}
    assert all(picture.tobytes() in known for picture in whole)


def test_the_learning_rate_rises_then_falls():
    rates = [learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] == 0.02 and max(rates) > 0.99 and rates[-1] == 0.02
    assert rates[49:] == sorted(rates[49:], reverse=True)


@pytest.mark.processes
def test_the_tool_trains_on_a_folder_reproducibly(demo_images, tmp_path):
    outputs = []
    for name in ("a", "b"):
        flags = ("--size", 16, "--steps", 4, "--save-every", 2, "--seed", 3, "--batch-size", 4)
        output = run(
            *("python", "data_tools/train_vae.py", "--images", demo_images),
            *("--output", tmp_path / name, *flags),
        )
        assert "step 4/4: held-out PSNR " in output
        outputs.append((tmp_path / name / WEIGHTS).read_bytes())
    assert outputs[0] == outputs[1]
    vae = load_vae(tmp_path / "a")
    assert vae.scaling_factor == pytest.approx(1, abs=0.05)
    text = (tmp_path / "a" / "README.md").read_text()
    assert f"--images {demo_images}" in text and "OpenMoji" not in text
    pixels = folder_pictures([demo_images], 16).held_out
    decibels = held_out_psnr(vae.model, pixels, CPU)
    assert abs(decibels - number_on_card(text, "held-out PSNR")) < 0.02


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--steps", "0"], "--steps must be at least 1, not 0."),
        (["--size", "20"], "--size 20: is not a positive multiple of 8, so crops of half of it "),
        (["--lr", "-1"], "--lr -1.0: must be positive."),
        (["--device", "abacus"], "--device abacus: no such device; "),
        (["--output", __file__], f"--output {__file__}: is a file; give a folder."),
        (["--output", str(DEMO_VAE)], f"--output {DEMO_VAE}: holds a model already; give another"),
    ],
)
def test_wrong_flags_of_train_vae_are_named(argv, sentence):
    with pytest.raises(ConfigError) as error:
        parse_arguments(["--output", "somewhere", *argv])
    assert str(error.value).startswith(sentence)


def test_too_few_or_damaged_pictures_are_refused(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"^--images: 1 image gives 1 for training and 0 held ou"):
        folder_pictures([tmp_path], 16)
    (tmp_path / "b.png").touch()
    with pytest.raises(
        ConfigError, match=r"^--images .*b\.png: .*; repair the file or move it away\.$"
    ):
        folder_pictures([tmp_path], 16)
