"""The Inception network of FID: the TensorFlow graph of 2015-12-05, in torch.

Not torchvision's Inception v3: other weights, 1,008 classes, averages that do not count padding,
and a maximum instead of an average in the last block. Names of weights are those of the converted
file that the field shares (pytorch-fid, torch-fidelity); the graph's own names stand beside them.

N images, C channels, H W size in pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INPUT_SIZE = 299
NUM_CLASSES = 1008
POOL_WIDTH = 2048  # pool_3:0
SPATIAL_CHANNELS = 7  # of mixed_6/conv:0, as the official evaluation cuts them
SPATIAL_WIDTH = 17 * 17 * SPATIAL_CHANNELS
PIXEL_CENTRE = 128.0
PIXEL_SCALE = 0.0078125  # 1 / 128, which is the graph's "Mul"
NORM_EPSILON = 1e-3


class Conv(NamedTuple):
    """A convolution of a block: without bias, then batch norm and ReLU."""

    name: str
    width: int
    kernel: tuple[int, int]
    stride: int = 1  # with 2, nothing is padded


Step = tuple[Conv, ...]  # more than one: side by side, their outputs joined


class Block(NamedTuple):
    """A "mixed" block: branches side by side, the pooled one last."""

    branches: Sequence[Sequence[Step]]
    pooling: str  # "average" and "maximum" keep the size, "halve" is a maximum of stride 2
    pool_width: int = 0  # of the convolution after the pooling; 0 = none


def _branch(text: str) -> list[Step]:
    """Read a branch: NAME WIDTH HEIGHTxWIDTH [STRIDE], ..., with "|" between those side by side."""
    return [tuple(_conv(conv) for conv in step.split("|")) for step in text.split(",")]


def _conv(text: str) -> Conv:
    name, width, kernel, *stride = text.split()
    height, side = kernel.split("x")
    return Conv(name, int(width), (int(height), int(side)), *map(int, stride))


def _block(branches: str, pooling: str, pool_width: int = 0) -> Block:
    """Read a block, a line per branch."""
    return Block([_branch(line) for line in branches.strip().splitlines()], pooling, pool_width)


BLOCK_35 = """
    branch1x1 64 1x1
    branch5x5_1 48 1x1, branch5x5_2 64 5x5
    branch3x3dbl_1 64 1x1, branch3x3dbl_2 96 3x3, branch3x3dbl_3 96 3x3
"""
REDUCTION_35 = """
    branch3x3 384 3x3 2
    branch3x3dbl_1 64 1x1, branch3x3dbl_2 96 3x3, branch3x3dbl_3 96 3x3 2
"""
BLOCK_17 = """
    branch1x1 192 1x1
    branch7x7_1 {0} 1x1, branch7x7_2 {0} 1x7, branch7x7_3 192 7x1
    branch7x7dbl_1 {0} 1x1, branch7x7dbl_2 {0} 7x1, branch7x7dbl_3 {0} 1x7, \
    branch7x7dbl_4 {0} 7x1, branch7x7dbl_5 192 1x7
"""
REDUCTION_17 = """
    branch3x3_1 192 1x1, branch3x3_2 320 3x3 2
    branch7x7x3_1 192 1x1, branch7x7x3_2 192 1x7, branch7x7x3_3 192 7x1, branch7x7x3_4 192 3x3 2
"""
BLOCK_8 = """
    branch1x1 320 1x1
    branch3x3_1 384 1x1, branch3x3_2a 384 1x3 | branch3x3_2b 384 3x1
    branch3x3dbl_1 448 1x1, branch3x3dbl_2 384 3x3, \
    branch3x3dbl_3a 384 1x3 | branch3x3dbl_3b 384 3x1
"""
STEM = tuple(  # conv, conv_1, conv_2, pool, conv_3, conv_4, pool_1 in the graph
    conv
    for (conv,) in _branch(
        "Conv2d_1a_3x3 32 3x3 2, Conv2d_2a_3x3 32 3x3, Conv2d_2b_3x3 64 3x3, "
        "Conv2d_3b_1x1 80 1x1, Conv2d_4a_3x3 192 3x3"
    )
)
UNPADDED = ("Conv2d_2a_3x3", "Conv2d_4a_3x3")
POOL_AFTER = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")
BLOCKS = {  # mixed, mixed_1, ... mixed_10 in the graph
    "Mixed_5b": _block(BLOCK_35, "average", 32),
    "Mixed_5c": _block(BLOCK_35, "average", 64),
    "Mixed_5d": _block(BLOCK_35, "average", 64),
    "Mixed_6a": _block(REDUCTION_35, "halve"),
    "Mixed_6b": _block(BLOCK_17.format(128), "average", 192),
    "Mixed_6c": _block(BLOCK_17.format(160), "average", 192),
    "Mixed_6d": _block(BLOCK_17.format(160), "average", 192),
    "Mixed_6e": _block(BLOCK_17.format(192), "average", 192),
    "Mixed_7a": _block(REDUCTION_17, "halve"),
    "Mixed_7b": _block(BLOCK_8, "average", 192),
    "Mixed_7c": _block(BLOCK_8, "maximum", 192),
}
SPATIAL_BLOCK = "Mixed_6d"  # mixed_6; its first branch is mixed_6/conv


class InceptionFeatures(NamedTuple):
    """What the metrics look at, float32."""

    pool: Tensor  # (N, 2048) pool_3:0
    spatial: Tensor  # (N, 2023) mixed_6/conv:0[..., :7], flattened height, width, channel


class ConvUnit(nn.Module):
    """Convolution, batch norm with stored statistics, ReLU."""

    def __init__(self, in_width: int, conv: Conv, is_padded: bool) -> None:
        super().__init__()
        height, width = conv.kernel
        padding = (height // 2, width // 2) if is_padded else 0
        self.conv = nn.Conv2d(
            in_width, conv.width, conv.kernel, conv.stride, padding=padding, bias=False
        )
        self.bn = nn.BatchNorm2d(conv.width, eps=NORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, width, H', W')."""
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """A block of BLOCKS."""

    def __init__(self, in_width: int, block: Block) -> None:
        super().__init__()
        self.block, self.out_width = block, 0
        for branch in block.branches:
            width = in_width
            for step in branch:
                for conv in step:
                    self.add_module(conv.name, ConvUnit(width, conv, conv.stride == 1))
                width = sum(conv.width for conv in step)
            self.out_width += width
        if block.pool_width:
            conv = Conv("branch_pool", block.pool_width, (1, 1))
            self.add_module(conv.name, ConvUnit(in_width, conv, True))
        self.out_width += block.pool_width or in_width

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, out_width, H', W')."""
        outputs = []
        for branch in self.block.branches:
            y = x
            for step in branch:
                y = torch.cat([self.get_submodule(conv.name)(y) for conv in step], dim=1)
            outputs.append(y)
        pooled = self._pool(x)
        outputs.append(self.branch_pool(pooled) if self.block.pool_width else pooled)
        return torch.cat(outputs, dim=1)

    def _pool(self, x: Tensor) -> Tensor:
        if self.block.pooling == "average":  # TensorFlow's: of the pixels that are there
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        if self.block.pooling == "maximum":
            return F.max_pool2d(x, 3, stride=1, padding=1)
        return F.max_pool2d(x, 3, stride=2)


class Inception(nn.Module):
    """The network, from pixels to the features that FID and its relatives are made of."""

    def __init__(self) -> None:
        super().__init__()
        width = 3
        for conv in STEM:
            is_padded = conv.stride == 1 and conv.name not in UNPADDED
            self.add_module(conv.name, ConvUnit(width, conv, is_padded))
            width = conv.width
        for name, block in BLOCKS.items():
            mixed = Mixed(width, block)
            self.add_module(name, mixed)
            width = mixed.out_width
        self.fc = nn.Linear(width, NUM_CLASSES)

    def forward(self, pixels: Tensor) -> InceptionFeatures:
        """Look at pixels, uint8 (N, H, W, 3)."""
        x = resize_like_tensorflow(pixels.permute(0, 3, 1, 2).float(), INPUT_SIZE)
        x = (x - PIXEL_CENTRE) * PIXEL_SCALE
        for conv in STEM:
            x = self.get_submodule(conv.name)(x)
            if conv.name in POOL_AFTER:
                x = F.max_pool2d(x, 3, stride=2)
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
            if name == SPATIAL_BLOCK:  # the first branch's channels come first
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return InceptionFeatures(x.mean(dim=(2, 3)), spatial)

    def logits(self, pool: Tensor) -> Tensor:
        """Return (N, 1008) from pooled features, without the bias, as Inception Scores are."""
        return pool @ self.fc.weight.T


def resize_like_tensorflow(x: Tensor, size: int) -> Tensor:
    """Scale to (N, C, size, size) as TensorFlow 1's ResizeBilinear without align_corners does.

    Output pixel i looks at input place i * in / out: no half-pixel shift, and no smoothing when it
    shrinks. torch's own interpolation is another one.

    Args:
        x: (N, C, H, W) float32.
        size: of either side afterwards.
    """
    top, bottom, down = _neighbours(x.shape[2], size, x.device)
    left, right, across = _neighbours(x.shape[3], size, x.device)
    down = down[:, None]
    upper, lower = x[:, :, top], x[:, :, bottom]
    upper = upper[..., left] + (upper[..., right] - upper[..., left]) * across
    lower = lower[..., left] + (lower[..., right] - lower[..., left]) * across
    return upper + (lower - upper) * down


def _neighbours(in_size: int, out_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two input pixels of every output pixel, and how far it is from the first."""
    scale = torch.tensor(in_size, dtype=torch.float32) / out_size
    place = torch.arange(out_size, dtype=torch.float32) * scale
    first = place.long()
    second = (first + 1).clamp(max=in_size - 1)
    return first.to(device), second.to(device), (place - first).to(device)
