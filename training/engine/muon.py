"""Muon (Jordan et al. 2024): updates of matrices are made orthogonal, at every ZeRO stage alike.

A matrix must be whole to be orthogonalised, and ZeRO cuts flat vectors. So each matrix has an owner
among the ranks that share it. One all-to-all brings the parts of its update there, one brings the
parts of the result back.

B matrices of one shape.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from models.matrices import MatrixShape

# Of the polynomial a x + b x^3 + c x^5 that five iterations apply to the singular values.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
# An update's root mean square is then about what Adam's is, so one learning rate and one weight
# decay serve both (Liu et al. 2025, arXiv 2502.16982, section 2.2).
UPDATE_RMS = 0.2
EPSILON = 1e-7
MAX_VALUES_AT_ONCE = 1 << 26  # of matrices orthogonalised together; three times that is memory


class Slice(NamedTuple):
    """`numel` values of a matrix from `start` on, at `offset` of a rank's master number `master`.

    Attributes:
        matrix: its parameter's name and its number in it.
    """

    matrix: tuple[str, int]
    start: int
    master: int
    offset: int
    numel: int


def cut_into_matrices(
    fragments: Sequence[tuple[str, int, int, int, int]], shapes: Mapping[str, MatrixShape]
) -> list[Slice]:
    """Cut fragments (zero_fragments.Fragment) at the borders of matrices."""
    slices = []
    for name, master, offset, start, numel in fragments:
        size, stop = shapes[name].numel, start + numel
        first = start
        while first < stop:
            number, within = divmod(first, size)
            part = min(size - within, stop - first)
            slices.append(Slice((name, number), within, master, offset + first - start, part))
            first += part
    return slices


def choose_owners(
    of_ranks: Sequence[Sequence[Slice]], shapes: Mapping[str, MatrixShape]
) -> dict[tuple[str, int], int]:
    """Give each matrix to one rank: to the one with most of it, unless that has much to do.

    Args:
        of_ranks: what each rank of the group holds.
        shapes: of the matrices, by the parameter's name.

    Returns:
        The owner's number in the group, equal on all ranks, by matrix.
    """
    held: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0] * len(of_ranks))
    for rank, slices in enumerate(of_ranks):
        for each in slices:
            held[each.matrix][rank] += each.numel
    cost = {m: shapes[m[0]].numel * min(shapes[m[0]]) for m in held}
    limit = sum(cost.values()) / len(of_ranks) + max(cost.values(), default=0)
    load = [0] * len(of_ranks)
    owners = {}
    for matrix in sorted(held, key=lambda m: (-cost[m], m)):
        by_share = sorted(range(len(load)), key=lambda r: (-held[matrix][r], load[r], r))
        owner = next(r for r in by_share if load[r] + cost[matrix] <= limit)
        owners[matrix] = owner
        load[owner] += cost[matrix]
    return owners


class MatrixExchange:
    """Orthogonalises the updates of some masters, which hold parts of matrices.

    Args:
        of_ranks: what each rank of `group` holds of the matrices.
        shapes: of the matrices, by the parameter's name.
        group: the ranks that share them; None = this rank has all of each.
        wire: dtype in which updates travel.

    Attributes:
        sent_values: how many values this rank sends to others in a step.
    """

    def __init__(
        self,
        of_ranks: Sequence[Sequence[Slice]],
        shapes: Mapping[str, MatrixShape],
        group: ProcessGroup | None = None,
        wire: torch.dtype = torch.float32,
    ) -> None:
        rank = 0 if group is None else group.rank()
        self.group, self.wire = group, wire
        owners = choose_owners(of_ranks, shapes)

        def place(each: Slice) -> tuple[Any, ...]:
            name, number = each.matrix
            return (*shapes[name], name, number, each.start)

        self._outgoing = sorted(of_ranks[rank], key=lambda s: (owners[s.matrix], place(s)))
        incoming = [
            sorted((s for s in slices if owners[s.matrix] == rank), key=place)
            for slices in of_ranks
        ]
        self._send_sizes = [0] * len(of_ranks)
        for each in self._outgoing:
            self._send_sizes[owners[each.matrix]] += each.numel
        self._recv_sizes = [sum(s.numel for s in slices) for slices in incoming]
        arrived = [each for slices in incoming for each in slices]
        # Where what arrives belongs among the whole matrices, and the other way round.
        self._order = sorted(range(len(arrived)), key=lambda i: place(arrived[i]))
        self._back = sorted(range(len(arrived)), key=self._order.__getitem__)
        self._arrived_sizes = [each.numel for each in arrived]
        own = sorted({(*shapes[s.matrix[0]], *s.matrix) for s in arrived})
        self._batches: dict[MatrixShape, int] = defaultdict(int)
        for rows, columns, *_ in own:
            self._batches[MatrixShape(rows, columns)] += 1
        travelling = sum(self._send_sizes) - self._send_sizes[rank]
        self.sent_values = travelling + sum(self._recv_sizes) - self._recv_sizes[rank]

    def orthogonalise(self, updates: list[Tensor], device: torch.device) -> list[Tensor]:
        """Make updates orthogonal and scale them. All ranks of the group must call this.

        Args:
            updates: contiguous, one for each master; what is in no matrix is ignored.
            device: to compute and communicate on.

        Returns:
            Tensors like `updates`, zero where there is no matrix.
        """
        views = self._slices_of(updates)
        sent = _cat(views, updates[0]).to(device)
        arrived = self._all_to_all(sent, self._send_sizes, self._recv_sizes)
        parts = arrived.split(self._arrived_sizes)
        whole = _cat([parts[i] for i in self._order], sent)
        done, first = [], 0
        for shape, count in self._batches.items():
            step = max(1, MAX_VALUES_AT_ONCE // shape.numel)
            for start in range(0, count, step):
                number = min(step, count - start)
                batch = whole[first : first + number * shape.numel].view(number, *shape)
                done.append(orthogonal(batch).mul_(UPDATE_RMS * max(shape) ** 0.5).flatten())
                first += number * shape.numel
        parts = _cat(done, sent).split([self._arrived_sizes[i] for i in self._order])
        returned = self._all_to_all(
            _cat([parts[i] for i in self._back], sent), self._recv_sizes, self._send_sizes
        ).to(updates[0].device)
        results = [torch.zeros_like(update) for update in updates]
        if self._outgoing:
            sizes = [each.numel for each in self._outgoing]
            torch._foreach_copy_(self._slices_of(results), returned.split(sizes))
        return results

    def _slices_of(self, tensors: list[Tensor]) -> list[Tensor]:
        flat = [tensor.view(-1) for tensor in tensors]
        return [flat[s.master][s.offset : s.offset + s.numel] for s in self._outgoing]

    def _all_to_all(self, values: Tensor, send: list[int], recv: list[int]) -> Tensor:
        if self.group is None or self.group.size() == 1:
            return values
        travelling = values.to(self.wire)
        received = travelling.new_empty(sum(recv))
        torch.distributed.all_to_all_single(received, travelling, recv, send, group=self.group)
        return received.to(values.dtype)


def orthogonal(batch: Tensor) -> Tensor:
    """Bring the singular values of matrices near 1, and leave the singular vectors.

    Five Newton-Schulz iterations on matrices of Frobenius norm 1: singular values above about 0.01
    end between 0.7 and 1.2. A matrix of zeros stays one.

    Args:
        batch: (B, rows, columns).

    Returns:
        (B, rows, columns), a new tensor.
    """
    is_tall = batch.shape[1] > batch.shape[2]
    x = batch.mT if is_tall else batch
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + EPSILON)
    if x.is_cuda:
        x = x.bfloat16()  # tensor cores; rounding moves singular values less than the polynomial
    a, b, c = NEWTON_SCHULZ
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(batch.dtype, copy=x.dtype == batch.dtype)


def _cat(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat(list(parts)) if parts else like.new_empty(0)
