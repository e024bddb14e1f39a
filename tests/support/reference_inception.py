"""The graph inception-2015-12-05, written down operation by operation with its own names.

Scopes and their order, kernels (height, width, in, out), strides and paddings are those of the
published graph (classify_image_graph_def.pb); how scopes map to the names of the converted weights
is that of torch-fidelity's converter. Weights are looked up by scope, so a wrong name or shape
fails; the arithmetic is in float64.
"""

import torch
from torch.nn import functional as F

BLOCKS = {
    **{"mixed": "Mixed_5b", "mixed_1": "Mixed_5c", "mixed_2": "Mixed_5d", "mixed_3": "Mixed_6a"},
    **{"mixed_4": "Mixed_6b", "mixed_5": "Mixed_6c", "mixed_6": "Mixed_6d", "mixed_7": "Mixed_6e"},
    **{"mixed_8": "Mixed_7a", "mixed_9": "Mixed_7b", "mixed_10": "Mixed_7c"},
}
STEM = {
    "conv": "Conv2d_1a_3x3",
    "conv_1": "Conv2d_2a_3x3",
    "conv_2": "Conv2d_2b_3x3",
    "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
}
_35 = {
    "conv": "branch1x1",
    "tower/conv": "branch5x5_1",
    "tower/conv_1": "branch5x5_2",
    "tower_1/conv": "branch3x3dbl_1",
    "tower_1/conv_1": "branch3x3dbl_2",
    "tower_1/conv_2": "branch3x3dbl_3",
    "tower_2/conv": "branch_pool",
}
_17 = {
    "conv": "branch1x1",
    "tower/conv": "branch7x7_1",
    "tower/conv_1": "branch7x7_2",
    "tower/conv_2": "branch7x7_3",
    "tower_1/conv": "branch7x7dbl_1",
    "tower_1/conv_1": "branch7x7dbl_2",
    "tower_1/conv_2": "branch7x7dbl_3",
    "tower_1/conv_3": "branch7x7dbl_4",
    "tower_1/conv_4": "branch7x7dbl_5",
    "tower_2/conv": "branch_pool",
}
_8 = {
    "conv": "branch1x1",
    "tower/conv": "branch3x3_1",
    "tower/mixed/conv": "branch3x3_2a",
    "tower/mixed/conv_1": "branch3x3_2b",
    "tower_1/conv": "branch3x3dbl_1",
    "tower_1/conv_1": "branch3x3dbl_2",
    "tower_1/mixed/conv": "branch3x3dbl_3a",
    "tower_1/mixed/conv_1": "branch3x3dbl_3b",
    "tower_2/conv": "branch_pool",
}
BRANCHES = {
    **dict.fromkeys(("mixed", "mixed_1", "mixed_2"), _35),
    "mixed_3": {
        "conv": "branch3x3",
        "tower/conv": "branch3x3dbl_1",
        "tower/conv_1": "branch3x3dbl_2",
        "tower/conv_2": "branch3x3dbl_3",
    },
    **dict.fromkeys(("mixed_4", "mixed_5", "mixed_6", "mixed_7"), _17),
    "mixed_8": {
        "tower/conv": "branch3x3_1",
        "tower/conv_1": "branch3x3_2",
        "tower_1/conv": "branch7x7x3_1",
        "tower_1/conv_1": "branch7x7x3_2",
        "tower_1/conv_2": "branch7x7x3_3",
        "tower_1/conv_3": "branch7x7x3_4",
    },
    **dict.fromkeys(("mixed_9", "mixed_10"), _8),
}


def torch_name(scope):
    """The name of a convolution's weights in the converted file."""
    if scope in STEM:
        return STEM[scope]
    block, branch = scope.split("/", 1)
    return f"{BLOCKS[block]}.{BRANCHES[block][branch]}"


class Graph:
    """Runs the graph on a state dict and remembers every tensor by name, NHWC shapes."""

    def __init__(self, weights):
        self.weights = {name: value.double() for name, value in weights.items()}
        self.tensors, self.used = {}, {"fc.weight", "fc.bias"}

    def conv(self, x, scope, kernel, padding="SAME", stride=1):
        name = torch_name(scope)
        parts = {
            part: self.weights[f"{name}.{part}"]
            for part in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
        }
        self.used |= {f"{name}.{part}" for part in parts}
        height, width, in_width, out_width = kernel
        assert parts["conv.weight"].shape == (out_width, in_width, height, width), scope
        pad = (height // 2, width // 2) if padding == "SAME" else 0
        x = F.conv2d(x, parts["conv.weight"], stride=stride, padding=pad)
        scale = parts["bn.weight"] / torch.sqrt(parts["bn.running_var"] + 0.001)
        shift = parts["bn.bias"] - parts["bn.running_mean"] * scale
        return self.keep(scope, torch.relu(x * scale[:, None, None] + shift[:, None, None]))

    def keep(self, scope, x):
        self.tensors[scope] = x
        return x

    def average(self, x):
        """TensorFlow's SAME average: of the pixels that are there."""
        ones = torch.ones_like(x[:1, :1])
        total = F.avg_pool2d(x, 3, 1, 1, divisor_override=1)
        return total / F.avg_pool2d(ones, 3, 1, 1, divisor_override=1)

    def run(self, x):
        """x: (N, 3, 299, 299), (pixels - 128) / 128."""
        x = self.conv(x, "conv", (3, 3, 3, 32), "VALID", 2)
        x = self.conv(x, "conv_1", (3, 3, 32, 32), "VALID")
        x = self.conv(x, "conv_2", (3, 3, 32, 64))
        x = self.keep("pool", F.max_pool2d(x, 3, 2))
        x = self.conv(x, "conv_3", (1, 1, 64, 80), "VALID")
        x = self.conv(x, "conv_4", (3, 3, 80, 192), "VALID")
        x = self.keep("pool_1", F.max_pool2d(x, 3, 2))
        for block, width, pooled in (
            ("mixed", 192, 32),
            ("mixed_1", 256, 64),
            ("mixed_2", 288, 64),
        ):
            x = self.block_35(x, block, width, pooled)
        x = self.mixed_3(x)
        for block, width in (
            ("mixed_4", 128),
            ("mixed_5", 160),
            ("mixed_6", 160),
            ("mixed_7", 192),
        ):
            x = self.block_17(x, block, width)
        x = self.mixed_8(x)
        x = self.block_8(x, "mixed_9", 1280, self.average)
        x = self.block_8(x, "mixed_10", 2048, lambda y: F.max_pool2d(y, 3, 1, 1))
        return self.keep("pool_3", F.avg_pool2d(x, 8)[:, :, 0, 0])

    def block_35(self, x, block, width, pooled):
        one = self.conv(x, f"{block}/conv", (1, 1, width, 64))
        five = self.conv(x, f"{block}/tower/conv", (1, 1, width, 48))
        five = self.conv(five, f"{block}/tower/conv_1", (5, 5, 48, 64))
        three = self.conv(x, f"{block}/tower_1/conv", (1, 1, width, 64))
        three = self.conv(three, f"{block}/tower_1/conv_1", (3, 3, 64, 96))
        three = self.conv(three, f"{block}/tower_1/conv_2", (3, 3, 96, 96))
        pool = self.conv(self.average(x), f"{block}/tower_2/conv", (1, 1, width, pooled))
        return self.keep(f"{block}/join", torch.cat((one, five, three, pool), 1))

    def mixed_3(self, x):
        one = self.conv(x, "mixed_3/conv", (3, 3, 288, 384), "VALID", 2)
        three = self.conv(x, "mixed_3/tower/conv", (1, 1, 288, 64))
        three = self.conv(three, "mixed_3/tower/conv_1", (3, 3, 64, 96))
        three = self.conv(three, "mixed_3/tower/conv_2", (3, 3, 96, 96), "VALID", 2)
        return self.keep("mixed_3/join", torch.cat((one, three, F.max_pool2d(x, 3, 2)), 1))

    def block_17(self, x, block, w):
        one = self.conv(x, f"{block}/conv", (1, 1, 768, 192))
        seven = self.conv(x, f"{block}/tower/conv", (1, 1, 768, w))
        seven = self.conv(seven, f"{block}/tower/conv_1", (1, 7, w, w))
        seven = self.conv(seven, f"{block}/tower/conv_2", (7, 1, w, 192))
        double = self.conv(x, f"{block}/tower_1/conv", (1, 1, 768, w))
        double = self.conv(double, f"{block}/tower_1/conv_1", (7, 1, w, w))
        double = self.conv(double, f"{block}/tower_1/conv_2", (1, 7, w, w))
        double = self.conv(double, f"{block}/tower_1/conv_3", (7, 1, w, w))
        double = self.conv(double, f"{block}/tower_1/conv_4", (1, 7, w, 192))
        pool = self.conv(self.average(x), f"{block}/tower_2/conv", (1, 1, 768, 192))
        return self.keep(f"{block}/join", torch.cat((one, seven, double, pool), 1))

    def mixed_8(self, x):
        three = self.conv(x, "mixed_8/tower/conv", (1, 1, 768, 192))
        three = self.conv(three, "mixed_8/tower/conv_1", (3, 3, 192, 320), "VALID", 2)
        seven = self.conv(x, "mixed_8/tower_1/conv", (1, 1, 768, 192))
        seven = self.conv(seven, "mixed_8/tower_1/conv_1", (1, 7, 192, 192))
        seven = self.conv(seven, "mixed_8/tower_1/conv_2", (7, 1, 192, 192))
        seven = self.conv(seven, "mixed_8/tower_1/conv_3", (3, 3, 192, 192), "VALID", 2)
        return self.keep("mixed_8/join", torch.cat((three, seven, F.max_pool2d(x, 3, 2)), 1))

    def block_8(self, x, block, width, pooling):
        def pair(y, scope):
            wide = self.conv(y, f"{scope}/mixed/conv", (1, 3, 384, 384))
            high = self.conv(y, f"{scope}/mixed/conv_1", (3, 1, 384, 384))
            return torch.cat((wide, high), 1)

        one = self.conv(x, f"{block}/conv", (1, 1, width, 320))
        three = pair(self.conv(x, f"{block}/tower/conv", (1, 1, width, 384)), f"{block}/tower")
        double = self.conv(x, f"{block}/tower_1/conv", (1, 1, width, 448))
        double = self.conv(double, f"{block}/tower_1/conv_1", (3, 3, 448, 384))
        double = pair(double, f"{block}/tower_1")
        pool = self.conv(pooling(x), f"{block}/tower_2/conv", (1, 1, width, 192))
        return self.keep(f"{block}/join", torch.cat((one, three, double, pool), 1))
