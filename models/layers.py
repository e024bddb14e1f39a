"""The dense trunk of a diffusion transformer: embeddings, attention, MLP, block, final layer.

Peebles and Xie 2023 (DiT), with adaLN-Zero conditioning. Module names are DiT's, which makes its
checkpoints loadable by name.

N batch, C H W image, P patch size, T tokens, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import attend
from models.network_options import NetworkOptions

NORM_EPS = 1e-6
NUM_FREQUENCIES = 128  # sines and cosines each, of the timestep features
MAX_PERIOD = 10_000.0  # longest wavelength of timestep and position features, as in Vaswani et al.
EMBEDDING_STD = 0.02  # initial spread of the embedding weights, as in DiT


class LinearFloat32(nn.Linear):
    """A linear layer that computes in float32, whatever dtype its parameters are stored in.

    In bf16, neighbouring timesteps would get equal embeddings, and rounding would decide which
    experts are chosen.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D_in) to (..., D_out) float32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class PatchEmbed(nn.Module):
    """Cut an image into patches and embed each linearly."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(hidden_size, -1))
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Embed (N, C, H, W) to (N, T, D) in the dtype of the weights; tokens row by row."""
        x = self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)
        # All blocks keep the layout of the stream: transposed, every norm would copy it first.
        return x.contiguous()


class TimestepEmbedder(nn.Module):
    """Embed timesteps by sinusoidal features and an MLP, in float32."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            LinearFloat32(2 * NUM_FREQUENCIES, hidden_size),
            nn.SiLU(),
            LinearFloat32(hidden_size, hidden_size),
        )
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(layer.weight, std=EMBEDDING_STD)
            nn.init.zeros_(layer.bias)

    def forward(self, t: Tensor) -> Tensor:
        """Embed timesteps (S,) to (S, D) float32."""
        return self.mlp(timestep_features(t))


class LabelEmbedder(nn.Module):
    """A table of class embeddings whose last row is the null class (no label)."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)
        nn.init.normal_(self.embedding_table.weight, std=EMBEDDING_STD)

    def forward(self, y: Tensor) -> Tensor:
        """Embed labels (N,) to (N, D)."""
        return self.embedding_table(y)


class RMSNormFloat32(nn.RMSNorm):
    """Root-mean-square norm with a learnt scale that computes in float32, whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x; the result has the dtype of x."""
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens.

    With qk_norm, queries and keys are normalised per head before their product (Dehghani et al.
    2023; RMS norm as in Stable Diffusion 3), which bounds the logits.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, qk_norm: bool = False, kernel: str = "auto"
    ) -> None:
        super().__init__()
        assert hidden_size % num_heads == 0, "hidden_size must be a multiple of num_heads"
        self.num_heads, self.kernel = num_heads, kernel
        self.qkv = _linear(hidden_size, 3 * hidden_size)
        self.q_norm, self.k_norm = (
            RMSNormFloat32(hidden_size // num_heads, eps=NORM_EPS) if qk_norm else nn.Identity()
            for _ in range(2)
        )
        self.proj = _linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each sample of (N, T, D)."""
        N, T, D = x.shape
        qkv = self.qkv(x).view(N, T, 3, self.num_heads, D // self.num_heads)
        # Views of qkv: its gradient is then assembled in the layout that qkv has.
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (N, heads, T, D / heads)
        y = attend(self.q_norm(q), self.k_norm(k), v, self.kernel)
        return self.proj(y.transpose(1, 2).reshape(N, T, D))


class Mlp(nn.Module):
    """Two linear layers with the tanh approximation of GELU between them."""

    def __init__(self, hidden_size: int, mlp_hidden_size: int) -> None:
        super().__init__()
        self.fc1 = _linear(hidden_size, mlp_hidden_size)
        self.fc2 = _linear(mlp_hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, T, D) to (N, T, D), token by token."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """A transformer block with adaLN-Zero conditioning and an optional mask on its stream.

    A mask m (Switch-DiT's mixture, or a fixed channel mask) splits the stream: m * x passes
    through the block, (1 - m) * x passes by. Every kind of routing is one choice of m.
    """

    def __init__(self, options: NetworkOptions) -> None:
        super().__init__()
        D = options.hidden_size
        self.norm1 = _norm(D)
        self.attn = Attention(D, options.num_heads, options.qk_norm, options.attention_kernel)
        self.norm2 = _norm(D)
        self.mlp = Mlp(D, options.mlp_hidden_size)
        self.adaLN_modulation = _modulation(D, 6)

    def forward(self, x: Tensor, c: Tensor, mask_minus_one: Tensor | None = None) -> Tensor:
        """Run the block on (N, T, D), conditioned on c (N, D).

        Args:
            x: the stream.
            c: timestep plus label embedding.
            mask_minus_one: m - 1, broadcastable to x; None = no mask. A mixture computes m - 1,
                and with it splitting and rejoining the stream are one operation each.
        """
        if mask_minus_one is None:
            return self._dense(x, c)
        routed = self._dense(torch.addcmul(x, x, mask_minus_one), c)
        return torch.addcmul(routed, x, mask_minus_one, value=-1)

    def _dense(self, x: Tensor, c: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=2)  # 6 x (N, 1, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        x = torch.addcmul(x, gate_msa, self.attn(modulate(self.norm1(x), shift_msa, scale_msa)))
        return torch.addcmul(x, gate_mlp, self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp)))


class FinalLayer(nn.Module):
    """Map tokens to patches of the prediction; zero at initialisation."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = _norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = _modulation(hidden_size, 2)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map (N, T, D) and c (N, D) to (N, T, P * P * channels)."""
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=2)  # 2 x (N, 1, D)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x * (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


def timestep_features(t: Tensor) -> Tensor:
    """Return cosines, then sines, of t at geometrically spaced frequencies, (S, 256) float32."""
    exponent = torch.arange(NUM_FREQUENCIES, dtype=torch.float32, device=t.device) / NUM_FREQUENCIES
    angle = t.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponent)
    return torch.cat((torch.cos(angle), torch.sin(angle)), dim=1)


def sincos_positions(num_rows: int, num_columns: int, hidden_size: int) -> Tensor:
    """Return the fixed 2-D position features of a grid of patches, (T, D) float32.

    Tokens go row by row. The first half of D encodes the column, the second half the row, each as
    sines, then cosines.
    """
    assert hidden_size % 4 == 0, "hidden_size must be a multiple of 4"
    quarter = hidden_size // 4
    frequency = MAX_PERIOD ** -(torch.arange(quarter, dtype=torch.float64) / quarter)

    def features(count: int) -> Tensor:
        angle = torch.arange(count, dtype=torch.float64)[:, None] * frequency
        return torch.cat((torch.sin(angle), torch.cos(angle)), dim=1)  # (count, D / 2)

    columns = features(num_columns).expand(num_rows, -1, -1)
    rows = features(num_rows)[:, None].expand(-1, num_columns, -1)
    return torch.cat((columns, rows), dim=2).flatten(0, 1).float()


def _linear(in_features: int, out_features: int) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _norm(hidden_size: int) -> nn.LayerNorm:
    return nn.LayerNorm(hidden_size, eps=NORM_EPS, elementwise_affine=False)


def _modulation(hidden_size: int, num_chunks: int) -> nn.Sequential:
    """Build the adaLN-Zero map from conditioning to shifts, scales and gates."""
    linear = nn.Linear(hidden_size, num_chunks * hidden_size)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)
