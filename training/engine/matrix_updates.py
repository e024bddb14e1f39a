"""Give ZeRO's masters to Muon: who holds which parts of which matrices."""

from typing import Any

import torch
from torch import Tensor

from models.matrices import MatrixShape
from training.engine.deepspeed_internals import holds_matrices, master_groups, masters
from training.engine.interface import Engine
from training.engine.muon import MatrixExchange, Slice, cut_into_matrices
from training.engine.zero_fragments import fragments

_SHAPE = "switch_dit_matrix_shape"  # attribute of the parameters that Muon updates


def mark_matrix(param: Tensor, shape: MatrixShape) -> None:
    """Remember, through whatever ZeRO does to a parameter, that its values are such matrices."""
    setattr(param, _SHAPE, shape)


def is_matrix(param: Tensor) -> bool:
    """Tell whether Muon updates a parameter."""
    return hasattr(param, _SHAPE)


class MatrixUpdates:
    """Makes updates of masters orthogonal; what the optimizer calls in each step.

    Args:
        engine: the DeepSpeed engine, whose optimizer has groups of matrices.
        wire: dtype in which parts of updates travel between ranks.
    """

    def __init__(self, engine: Engine, wire: torch.dtype) -> None:
        self._device, self._wire = engine.device, wire
        params = dict(engine.module.named_parameters())
        self._shapes = {name: getattr(p, _SHAPE) for name, p in params.items() if is_matrix(p)}
        of_matrices = holds_matrices(engine)
        self._number = {id(master): i for i, master in enumerate(masters(engine))}
        self._fragments: dict[int, list[Any]] = {i: [] for i, yes in enumerate(of_matrices) if yes}
        for fragment in fragments(engine):
            if of_matrices[fragment.master]:
                self._fragments[fragment.master].append(fragment)
        # ZeRO shares each master out over one group; some ranks hold nothing of it but padding.
        self._groups = master_groups(engine)
        self._exchanges: dict[tuple[int, ...], MatrixExchange] = {}

    def __call__(self, params: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
        """Return orthogonal updates for masters. All ranks that share them must call this."""
        numbers = tuple(self._number[id(param)] for param in params)
        if numbers not in self._exchanges:
            self._exchanges[numbers] = self._exchange(numbers)
        return self._exchanges[numbers].orthogonalise(updates, self._device)

    @property
    def sent_values(self) -> int:
        """Return how many values this rank sends to other ranks in a step."""
        return sum(exchange.sent_values for exchange in self._exchanges.values())

    def _exchange(self, numbers: tuple[int, ...]) -> MatrixExchange:
        """Plan, once, how the matrices of masters that are updated together travel."""
        own = [f._replace(master=i) for i, n in enumerate(numbers) for f in self._fragments[n]]
        slices = cut_into_matrices(own, self._shapes)
        group = self._groups[numbers[0]]
        if group is None or group.size() == 1:
            return MatrixExchange([slices], self._shapes)
        of_ranks: list[list[Slice]] = [[] for _ in range(group.size())]
        torch.distributed.all_gather_object(of_ranks, slices, group=group)
        return MatrixExchange(of_ranks, self._shapes, group, self._wire)
