"""The network's options, as a configuration states them."""

from dataclasses import fields

from models.diffusion import learns_variance
from models.network_options import NetworkOptions
from models.switch_dit import MODEL_SIZES
from training.config.tree import Config


def network_options(
    config: Config, *, expert_parallel_size: int = 1, shards_weights: bool = False
) -> NetworkOptions:
    """Return the options of a configuration's network; keys of section `model` keep their names.

    Args:
        expert_parallel_size: ranks that share the experts; 1 gives a network that needs no process
            group, whatever the configuration trains with.
        shards_weights: the network is for ZeRO 3.
    """
    model, diffusion = config.model, config.diffusion
    same = {f.name: vars(model)[f.name] for f in fields(NetworkOptions) if f.name in vars(model)}
    same["compile_blocks"] = bool(model.compile_blocks)  # training decides what is left open
    return NetworkOptions(
        **same,
        **MODEL_SIZES[model.size]._asdict(),
        input_size=model.latent_shape[1:],
        in_channels=model.latent_channels,
        num_timesteps=diffusion.num_timesteps,
        learned_variance=learns_variance(diffusion.objective, diffusion.learned_variance),
        has_loss_uncertainty=diffusion.loss_weight == "uncertainty",
        expert_parallel_size=expert_parallel_size,
        shards_weights=shards_weights,
    )
