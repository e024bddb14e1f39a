"""Which parameters of a network are matrices: linear maps of a block's stream or conditioning.

An optimizer that orthogonalises its updates (training/engine/muon.py) treats each as a whole.
"""

from collections.abc import Mapping
from typing import NamedTuple

# Linear layers side by side in one parameter, by its name in a block. Taken together, the largest
# of them would decide how far the others move (CMuon, arXiv 2608.02502).
FUSED = {"attn.qkv.weight": 3, "adaLN_modulation.1.weight": 6}


class MatrixShape(NamedTuple):
    """Rows and columns; which of them is the input does not matter."""

    rows: int
    columns: int

    @property
    def numel(self) -> int:
        """How many values a matrix has."""
        return self.rows * self.columns


def matrix_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, MatrixShape]:
    """Find the matrices of a network's blocks, for both kinds of experts and all routings.

    Embeddings, the gate and the final layer are not among them: their rows are looked up, or
    initialised to be scaled one by one.

    Args:
        shapes: of all parameters, by name; those of experts are stacked, (E, in, out).

    Returns:
        By name, the shape of each of the matrices that a parameter's values are, one after another.
    """
    found = {}
    for name, shape in shapes.items():
        root, _, place = name.partition(".")
        if root == "blocks" and len(shape) >= 2 and not name.endswith("bias"):
            rows, columns = shape[-2:]
            found[name] = MatrixShape(rows // FUSED.get(place.partition(".")[2], 1), columns)
    return found
