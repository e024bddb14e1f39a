"""A plain DiT as diffusers' own DiTPipeline, which needs no custom code.

Its network, DiTTransformer2DModel, is DiT but for one thing that no option changes: the frequencies
of the timestep features are 10000^(-k/127), those of DiT, and ours, 10000^(-k/128). The features
enter through a linear layer, so for a few timesteps there are weights of that layer that undo the
difference: as many equations as timesteps, with 257 unknowns. At the timesteps of one sampler with
one number of steps the export is exact, to the rounding of float32; at others it is wrong.

S timesteps of training, G timesteps of the export, D width.
"""

from pathlib import Path

import diffusers
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from data_tools.errors import ConfigError
from data_tools.files import as_json
from models.layers import NORM_EPS, NUM_FREQUENCIES, timestep_features
from training.config.network import network_options
from training.engine.objective import build_diffusion
from training.exports.job import ExportJob
from training.exports.pipeline_folder import INDEX_FILE, write_vae

PIPELINE_CLASSES = 1000  # DiTPipeline's "no label" is row 1000 of the table, whatever its length
MAX_FEATURE_ERROR = 1e-4  # of a timestep feature, which lies between -1 and 1
PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
_EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
_IN_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}


def check_dit(job: ExportJob) -> None:
    """Refuse what the classes of diffusers cannot compute exactly."""
    for reason in _obstacles(job):
        raise ConfigError(f"--format dit: {reason}; use --format diffusers.")
    error = _feature_error(_timesteps(job))
    if error > MAX_FEATURE_ERROR:
        raise ConfigError(
            f"--steps {job.settings.num_steps}: at that many timesteps the class of diffusers, "
            f"whose features have other frequencies, cannot be made exact (error {error:.2g} of a "
            "feature); use --steps 50 or fewer with --format dit."
        )


def _obstacles(job: ExportJob) -> list[str]:
    """Say what the classes of diffusers have no counterpart for."""
    model, diffusion, settings = job.config.model, job.config.diffusion, job.settings
    channels, height, width = model.latent_shape
    S, steps = diffusion.num_timesteps, settings.num_steps
    checks = {
        f"DiTTransformer2DModel has no routing, this run has --routing {model.routing}": (
            model.routing != "dense"
        ),
        "DiTTransformer2DModel does not normalise queries and keys, this run has --qk-norm": (
            model.qk_norm
        ),
        f"DiTTransformer2DModel is for square latents, these are {height} x {width}": (
            height != width
        ),
        f"DiTPipeline takes row {PIPELINE_CLASSES} for 'no label', this run has --num-classes "
        f"{model.num_classes}": model.num_classes > PIPELINE_CLASSES,
        "DiTPipeline cannot use a flow scheduler, this run has --objective flow": (
            diffusion.objective == "flow"
        ),
        "DiTPipeline ignores the VAE's shift factor, which is "
        f"{job.vae.shift_factor:g}": job.vae.shift_factor != 0,
        "DiTPipeline ignores the VAE's latents_mean and latents_std": bool(job.vae.latents_mean),
        f"its scheduler is DDIM, not --sampler {settings.method}": (
            diffusion.objective != "flow" and settings.method != "ddim"
        ),
        "DiTPipeline has no --guidance-interval": job.guidance_interval is not None,
        f"DiTPipeline guides all {channels} latent channels, not --cfg-channels three": (
            settings.guidance.num_channels is not None and channels > 3
        ),
        f"DDIMScheduler goes down by S // steps timesteps, and --steps {steps} does not divide "
        f"{S}": S % steps != 0,
    }
    return [reason for reason, is_one in checks.items() if is_one]


def _timesteps(job: ExportJob) -> Tensor:
    """Return those that DDIMScheduler visits with "trailing" spacing, (G,) int64, increasing."""
    S = job.config.diffusion.num_timesteps
    stride = S // job.settings.num_steps
    return torch.arange(stride - 1, S, stride)


def _their_features(t: Tensor) -> Tensor:
    """Return the class's features of timesteps and a one for the bias, (G, 257) float64."""
    features = get_timestep_embedding(
        t, 2 * NUM_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=1
    )
    return torch.cat((features, torch.ones(len(t), 1)), dim=1).double()


def _translation(t: Tensor) -> Tensor:
    """Solve their_features(t) @ M = our_features(t) with the smallest M, (257, 256) float64."""
    ours = timestep_features(t).double()
    return torch.linalg.lstsq(_their_features(t), ours, driver="gelsd").solution


def _feature_error(t: Tensor) -> float:
    """Return the largest error of a feature when weights and products are float32."""
    product = _their_features(t).float() @ _translation(t).float()
    return (product - timestep_features(t)).abs().max().item()


def diffusers_weights(job: ExportJob) -> dict[str, Tensor]:
    """Return the weights under the names of DiTTransformer2DModel."""
    ours = job.load_weights()
    M = _translation(_timesteps(job))
    first = ours["t_embedder.mlp.0.weight"].double()  # (D, 256)
    # first @ f = first @ M.T @ (f', 1)
    translated = first @ M.T  # (D, 257)
    ours["t_embedder.mlp.0.weight"] = translated[:, :-1].float().contiguous()
    bias = ours["t_embedder.mlp.0.bias"].double() + translated[:, -1]
    ours["t_embedder.mlp.0.bias"] = bias.float()
    table = ours["y_embedder.embedding_table.weight"]
    # Every row that is no class is "no label".
    filled = table[-1].repeat(PIPELINE_CLASSES + 1, 1)
    filled[: len(table) - 1] = table[:-1]
    ours["y_embedder.embedding_table.weight"] = filled
    depth = 1 + max(int(name.split(".")[1]) for name in ours if name.startswith("blocks."))
    theirs = {}
    for kind in ("weight", "bias"):
        for name, their_name in _OUTSIDE.items():
            theirs[f"{their_name}.{kind}"] = ours[f"{name}.{kind}"]
        for i in range(depth):
            block, their_block = f"blocks.{i}", f"transformer_blocks.{i}"
            for name, their_name in _IN_BLOCK.items():
                theirs[f"{their_block}.{their_name}.{kind}"] = ours[f"{block}.{name}.{kind}"]
            parts = ours[f"{block}.attn.qkv.{kind}"].chunk(3)
            for letter, part in zip("qkv", parts, strict=True):
                theirs[f"{their_block}.attn1.to_{letter}.{kind}"] = part.contiguous()
            for name, their_name in _EMBEDDERS.items():  # every block has a copy
                if f"{name}.{kind}" in ours:
                    theirs[f"{their_block}.norm1.emb.{their_name}.{kind}"] = ours[f"{name}.{kind}"]
    return theirs


def write_dit(job: ExportJob, folder: Path) -> str:
    """Write a pipeline folder that diffusers loads without custom code."""
    build_transformer(job).save_pretrained(folder / "transformer")
    write_vae(job, folder)
    _build_scheduler(job).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": diffusers.__version__,
        "id2label": job.id2label,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / INDEX_FILE).write_text(as_json(index), encoding="utf-8")
    steps, scale = job.settings.num_steps, job.settings.guidance.scale
    fewer = [n for n in range(1, steps) if steps % n == 0]
    others = f" (or {', '.join(map(str, fewer))})" if fewer else ""
    return f"""\
    from diffusers import DiTPipeline

    pipeline = DiTPipeline.from_pretrained("FOLDER")
    arguments = {{"num_inference_steps": {steps}, "guidance_scale": {scale:g}}}
    pipeline(class_labels=[0], **arguments).images[0].save("image.png")

**Call it with `num_inference_steps={steps}`{others} and its own scheduler.** The network of
diffusers has other frequencies of the timestep than DiT and no option for them. Its first layer was
solved for so that it computes the same at the timesteps that these steps visit; at any other
timestep its predictions are wrong, without any error.

The scheduler, DDIM with trailing timesteps, visits other timesteps than this program's `ddim`, and
the noise comes from torch's generators: images differ from those of `training/sample.py`, while
the network's predictions are the same to the rounding of float32.
"""


def build_transformer(job: ExportJob) -> DiTTransformer2DModel:
    """Build the network of diffusers with the run's weights."""
    ours = network_options(job.config)
    transformer = DiTTransformer2DModel(
        num_attention_heads=ours.num_heads,
        attention_head_dim=ours.hidden_size // ours.num_heads,
        in_channels=ours.in_channels,
        out_channels=ours.out_channels,
        num_layers=ours.depth,
        sample_size=ours.input_size[0],
        patch_size=ours.patch_size,
        num_embeds_ada_norm=PIPELINE_CLASSES,
        norm_eps=NORM_EPS,
    )
    transformer.load_state_dict(diffusers_weights(job))  # its positions are fixed, as ours are
    return transformer.eval()


def _build_scheduler(job: ExportJob) -> DDIMScheduler:
    """Build DDIM on the run's noise schedule, from the last timestep to no noise."""
    diffusion = build_diffusion(job.config)
    power = diffusion.alphas_cumprod
    previous = torch.cat((torch.ones(1, dtype=power.dtype), power[:-1]))
    return DDIMScheduler(
        num_train_timesteps=diffusion.num_timesteps,
        trained_betas=(1.0 - power / previous).tolist(),
        prediction_type=PREDICTION_TYPES[diffusion.objective],
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
