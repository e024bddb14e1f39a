"""The sections of the configuration: every key with its type, help, allowed values and default.

Each key is written in a YAML preset and, under the same name, given as a flag. Memory and precision
belong to ds_configs/*.json, machines to slurm/*.sh.
"""

from dataclasses import dataclass

from data_tools.stream.shard_store import CHECKS
from data_tools.user_files.paths import expand, expand_data, expand_name
from models.attention import KERNELS
from models.dealing import DEALINGS
from models.diffusion import OBJECTIVES
from models.loss_weights import LOSS_WEIGHTS
from models.placement import PLACEMENTS
from models.sampler import SAMPLING_METHODS
from models.schedule import NOISE_SCHEDULES
from models.switch_dit import MODEL_NAMES, MODEL_SIZES
from models.timestep_sampling import DENSITIES
from training.config.option import option

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "linear", "cosine", "wsd", "inverse-sqrt")  # learning_rate.py


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    size: str = option("depth and width, as in the paper", choices=tuple(MODEL_SIZES))
    patch_size: int = option("side of a patch, in latent pixels", bounds=">=1")
    latent_channels: int = option("channels of the VAE's latents", bounds=">=1")
    latent_size: int = option("height of the latents, in latent pixels", bounds=">=1")
    latent_width: int | None = option(
        "width of the latents, in latent pixels; null = as the height", None, bounds=">=1"
    )
    num_classes: int = option("number of classes; 0 = unconditional", bounds=">=0")
    routing: str = option(
        "switch = experts gated by the timestep; dtr = fixed channel masks; dense = plain DiT",
        "switch",
        choices=tuple(MODEL_NAMES),
    )
    num_experts: int = option("experts per block (E)", 3, bounds=">=1")
    top_k: int = option("experts that serve one timestep (k)", 2, bounds=">=1")
    renormalize_gates: bool = option("divide the k gate values by their sum", False)
    expert_kind: str = option(
        "affine = one linear map, as in the paper; mlp = two layers",
        "affine",
        choices=("affine", "mlp"),
    )
    expert_hidden_ratio: float = option(
        "hidden width of an mlp expert, relative to the model's", 1.0, bounds=">0"
    )
    expert_dispatch: str = option(
        "affine experts: merged = one matrix per sample; dispatched = samples sorted by expert; "
        "auto = the cheaper one",
        "auto",
        choices=("auto", "merged", "dispatched"),
        may_change=True,
    )
    dtr_alpha: float = option(
        "dtr: exponent of the mask's position over timesteps", 4.0, bounds=">0"
    )
    dtr_beta: float = option("dtr: fraction of channels open at a timestep", 0.8, bounds=">0 <=1")
    qk_norm: bool = option("normalise queries and keys, against growing attention logits", False)
    attention_kernel: str = option(
        "fused = torch's; batched = in bf16 on a CPU, batched products; auto = batched on CPUs "
        "that multiply bf16, where it is faster",
        "auto",
        choices=KERNELS,
        may_change=True,
    )
    activation_checkpointing: bool = option(
        "recompute block activations in backward: less memory, about a third more time",
        False,
        may_change=True,
    )
    compile_blocks: bool | None = option(
        "compile every block (torch.compile): slower start, faster steps; auto (null): training on "
        "a GPU does, where Triton can; on a CPU this needs a C++ compiler",
        None,
        may_change=True,
    )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """C, H, W of the latents."""
        width = self.latent_size if self.latent_width is None else self.latent_width
        return self.latent_channels, self.latent_size, width


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The diffusion process, its loss, and the prior on routing."""

    objective: str = option(
        "what is predicted: epsilon (noise), v, x0 (latents), or flow (rectified flow's velocity)",
        "epsilon",
        choices=OBJECTIVES,
    )
    learned_variance: bool | None = option(
        "also learn the variance of a reverse step; null = with objective epsilon only", None
    )
    noise_schedule: str = option("noise schedule", "cosine", choices=NOISE_SCHEDULES)
    num_timesteps: int = option("diffusion timesteps", 1000, bounds=">=2")
    timestep_sampling: str = option(
        "density of the training timesteps", "uniform", choices=DENSITIES
    )
    timestep_stratified: bool = option(
        "spread the timesteps of a global batch evenly over the density", False
    )
    timestep_mean: float = option("logit-normal: mean, above 0 = more noise", 0.0)
    timestep_std: float = option("logit-normal: standard deviation", 1.0, bounds=">0")
    mode_scale: float = option("mode: scale, -1 to 1.75; 0 = uniform", 1.29)
    timestep_shift: float = option("shift towards noise; 1 = none", 1.0, bounds=">0")
    loss_weight: str = option("weight of a timestep in the loss", "constant", choices=LOSS_WEIGHTS)
    min_snr_gamma: float = option("min_snr: largest signal-to-noise ratio", 5.0, bounds=">0")
    p2_gamma: float = option("p2: exponent", 1.0, bounds=">=0")
    prior_loss_weight: float = option("weight of the diffusion prior's loss", 1.0, bounds=">=0")
    prior_alpha: float = option("exponent of the prior's window over timesteps", 4.0, bounds=">0")
    timestep_dealing: str = option(
        "with shared-out experts: position = a sample trains the timestep it draws; affine = ranks "
        "of a group exchange timesteps so that fewer samples travel",
        "position",
        choices=DEALINGS,
    )
    prior_matching_every: int = option(
        "steps between two matchings of experts to the prior", 1, bounds=">=1"
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The encoded images and what is drawn at random from them."""

    data: str = option(
        "encoded latents: a folder, http(s), s3 or gs address with a dataset.json; a,b or {a,b} = "
        "a union; a=3,b=1 = a mixture by weight; pipe:COMMAND {} takes the rest",
        may_change=True,
        expands=expand_data,
    )
    data_shards: str | None = option(
        "where the tars lie, one place for each of --data; null = beside its dataset.json",
        None,
        may_change=True,
        expands=expand_data,
    )
    data_cache: str | None = option(
        "folder of this node for shards that are fetched; null = $SWITCH_DIT_CACHE, or one in the "
        "system's temporary folder",
        None,
        may_change=True,
        expands=expand,
    )
    data_cache_gib: float | None = option(
        "largest size of that folder; null = no limit", None, bounds=">0", may_change=True
    )
    check_shards: str = option(
        "of local shards, once per node before they are used; what is fetched is always checked in "
        "full",
        "sha256",
        choices=CHECKS,
        may_change=True,
    )
    data_streams: int = option(
        "equal parts of the data, one for each chunk of the global batch: a node needs only those "
        "of its ranks; 1 = all ranks read everything",
        1,
        bounds=">=1",
    )
    shuffle_window: int = option("shards that samples are shuffled across", 16, bounds=">=1")
    horizontal_flip: bool = option("mirror half of the samples", True)
    class_dropout_prob: float = option(
        "chance that a label becomes the null class, for guidance", 0.1, bounds=">=0 <=1"
    )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW or Muon, the averages of the weights, and the batch."""

    optimizer: str = option(
        "adamw; or muon for the matrices of blocks and experts, with adamw for all else",
        "adamw",
        choices=OPTIMIZERS,
    )
    muon_lr: float | None = option(
        "Muon's learning rate, at its peak; null = lr", None, bounds=">0"
    )
    muon_momentum: float = option("Muon's decay of its momentum", 0.95, bounds=">=0 <1")
    muon_wire: str = option(
        "numbers in which parts of Muon's updates travel between ranks",
        "fp32",
        choices=("fp32", "bf16"),
        may_change=True,
    )
    lr: float = option("learning rate", bounds=">0")
    beta1: float = option("Adam's decay of the first moment", 0.9, bounds=">=0 <1")
    beta2: float = option("Adam's decay of the second moment", 0.999, bounds=">=0 <1")
    weight_decay: float = option("AdamW's weight decay", 0.0, bounds=">=0")
    warmup_steps: int = option("steps over which the learning rate rises", bounds=">=0")
    lr_schedule: str = option(
        "learning rate after that: constant; linear or cosine, falling to lr_floor; wsd, constant "
        "and falling in the end; inverse-sqrt",
        "constant",
        choices=SCHEDULES,
        may_change=True,
    )
    lr_length: int | None = option(
        "last step of linear and cosine, null = max_steps; steps that wsd falls, null = a fifth of "
        "max_steps; step from which inverse-sqrt falls",
        None,
        bounds=">=1",
        may_change=True,
    )
    lr_floor: float = option(
        "part of lr that linear, cosine and wsd fall to", 0.0, bounds=">=0 <1", may_change=True
    )
    gradient_clipping: float = option("largest global gradient norm; 0 = off", bounds=">=0")
    max_skipped_steps: int = option(
        "steps in a row that may be skipped for a loss or gradient that is not finite",
        10,
        bounds=">=0",
        may_change=True,
    )
    spike_threshold: float = option(
        "report a loss this many standard deviations above its recent mean; 0 = off",
        6.0,
        bounds=">=0",
        may_change=True,
    )
    ema_decays: tuple[float, ...] = option(
        "decays per step of the weights' averages; the first average is sampled from",
        (0.9999,),
        bounds=">=0 <1",
    )
    ema_warmup: bool = option("limit these decays to (1 + step) / (10 + step) in early steps")
    ema_stds: tuple[float, ...] = option(
        "relative widths of power-function averages (EDM2), e.g. 0.05,0.1", (), bounds=">0 <0.289"
    )
    ema_snapshot_every: int = option(
        "steps between stored snapshots of the power-function averages; 0 = off",
        0,
        bounds=">=0",
        may_change=True,
    )
    global_batch_size: int = option("samples per step, over all ranks", bounds=">=1")
    micro_batch_size: int | None = option(
        "samples per rank and forward pass; null = no accumulation",
        None,
        bounds=">=1",
        may_change=True,
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run directory and what is written to it when."""

    run_dir: str = option(
        "folder of the run; starting again continues it", may_change=True, expands=expand
    )
    seed: int = option("seed of everything random that has none of its own", bounds=f">=0 <{2**63}")
    seed_init: int | None = option(
        "seed of the network's first weights; null = seed", None, bounds=f">=0 <{2**63}"
    )
    seed_data: int | None = option(
        "seed of the order of samples and of mirroring; null = seed", None, bounds=f">=0 <{2**63}"
    )
    seed_noise: int | None = option(
        "seed of noise, timesteps and dropped labels; null = seed", None, bounds=f">=0 <{2**63}"
    )
    deterministic: bool = option(
        "use only operators that repeat bit for bit, which on a GPU are slower; a CPU's do anyway",
        False,
        may_change=True,
    )
    init_from: str | None = option(
        "weights to start from: a run, a .safetensors file, or a DiT, DTR or Switch-DiT checkpoint",
        None,
        expands=expand_name,
    )
    max_steps: int = option("steps to train", bounds=">=1", may_change=True)
    expert_parallel_size: int = option(
        "ranks that share one set of experts", 1, bounds=">=1", may_change=True
    )
    placement: str = option(
        "which of these ranks holds which experts: contiguous, strided (neighbours apart), or "
        "balanced by the gates (least load on the worst rank, then least traffic)",
        "contiguous",
        choices=PLACEMENTS,
        may_change=True,
    )
    rebalance_every: int = option(
        "steps between two balanced placements, a multiple of save_every; 0 = at the start only",
        0,
        bounds=">=0",
        may_change=True,
    )
    log_every: int = option("steps between log lines", bounds=">=1", may_change=True)
    save_every: int = option("steps between checkpoints", bounds=">=1", may_change=True)
    save_every_minutes: float = option(
        "minutes after a checkpoint at which the next is due in any case; 0 = off",
        0.0,
        bounds=">=0",
        may_change=True,
    )
    keep_last: int = option("newest checkpoints kept", bounds=">=1", may_change=True)
    keep_every: int = option(
        "keep the checkpoints of multiples of this many steps for good; 0 = none",
        0,
        bounds=">=0",
        may_change=True,
    )
    sample_every: int = option("steps between sample grids; 0 = off", bounds=">=0", may_change=True)
    sample_count: int = option("images in a sample grid", bounds=">=1", may_change=True)
    sample_method: str | None = option(
        "sampler of the grid; null = ddim, or euler for flow",
        None,
        choices=SAMPLING_METHODS,
        may_change=True,
    )
    sample_steps: int = option("sampling steps of the grid", bounds=">=1", may_change=True)
    sample_cfg_scale: float = option(
        "classifier-free guidance of the grid; 1 = none", bounds=">=0", may_change=True
    )
    vae: str | None = option(
        "VAE that decodes the grid: folder, file or hub id; null = the one that encoded the data",
        None,
        may_change=True,
        expands=expand,
    )

    def seed_of(self, what: str) -> int:
        """Return the seed of "init", "data" or "noise"."""
        own = getattr(self, f"seed_{what}")
        return self.seed if own is None else own
