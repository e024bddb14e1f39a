"""Compute what collectives send over each link, and how long they take.

A ring all-reduce over W ranks sends 2 (W - 1) / W of the data from each, a reduce-scatter or
all-gather half of that. An all-to-all sends rows to the ranks that need them.
"""

import math
from typing import NamedTuple

import numpy as np

from benchmarks.hardware import GIGA, MICRO, Machine
from benchmarks.routing_shares import RoutingShares

ALL_REDUCE, ALL_GATHER = 2, 1  # times that a ring sends (W - 1) / W of the data


class Group(NamedTuple):
    """Ranks that take part in a collective."""

    size: int
    per_node: int  # of them in a node

    @property
    def num_nodes(self) -> int:
        """Nodes that they are on."""
        return -(-self.size // self.per_node)


class Transfer(NamedTuple):
    """What one rank sends, and for how long its links are busy."""

    sec: float = 0.0
    node_bytes: float = 0.0  # to ranks of its node
    net_bytes: float = 0.0  # through its link to other nodes

    def times(self, count: float) -> "Transfer":
        """Return the transfer repeated `count` times."""
        return Transfer(*(count * value for value in self))

    def plus(self, other: "Transfer") -> "Transfer":
        """Return the sum of two transfers, one after the other."""
        return Transfer(*(a + b for a, b in zip(self, other, strict=True)))


def group_of(world_size: int, stride: int, ranks_per_node: int) -> Group:
    """Return the group of every stride-th rank of the world; nodes hold consecutive ranks."""
    size = world_size // stride
    return Group(size, min(size, max(1, ranks_per_node // stride)))


def ring(num_bytes: float, passes: int, group: Group, machine: Machine, count: int = 1) -> Transfer:
    """Send data around a ring of the group's ranks, in `count` collectives.

    The ranks of a node share the node's links to the others, one ring through each, so each link
    carries their part only. An all-reduce has the latency of a ring or of a tree, whichever is
    less, as NCCL chooses.

    Args:
        num_bytes: of the whole data.
        passes: ALL_REDUCE or ALL_GATHER (also reduce-scatter).
        group: who takes part.
        machine: with the links.
        count: collectives that the data is cut into.
    """
    if group.size == 1 or num_bytes == 0:
        return Transfer()
    moved = passes * (group.size - 1) / group.size * num_bytes
    nodes = group.num_nodes
    share = machine.all_reduce_share if passes == ALL_REDUCE else machine.all_gather_share
    node_bytes = moved if group.per_node > 1 else 0.0
    net_bytes = moved / group.per_node if nodes > 1 else 0.0
    hops_us = (group.size - nodes) * machine.node_latency_us
    hops_us += (nodes - 1) * machine.net_latency_us
    if passes == ALL_REDUCE:
        tree_us = (group.per_node - 1) * machine.node_latency_us
        tree_us += math.ceil(math.log2(nodes)) * machine.net_latency_us
        hops_us = min(hops_us, tree_us)
    return Transfer(
        count * passes * hops_us * MICRO
        + max(
            node_bytes / (share * GIGA * machine.node_link_gb_per_sec),
            net_bytes / (share * GIGA * machine.net_link_gb_per_sec),
        ),
        node_bytes,
        net_bytes,
    )


def exchange(
    row_bytes: float, num_samples: int, routing: RoutingShares, machine: Machine
) -> Transfer:
    """Send the samples of a micro-batch to the ranks of their experts, once in every block.

    The blocks follow one another, and each ends when its slowest rank has sent and received; the
    way back and the backward pass move the same rows.

    Args:
        row_bytes: of a sample's tokens.
        num_samples: N, of each rank.
        routing: the copies that each rank sends and receives.
        machine: with the links.

    Returns:
        Of all blocks: the slowest rank's time, and the mean bytes that a rank sends.
    """
    R = routing.group_size
    if R == 1:
        return Transfer()
    in_node = min(R, machine.ranks_per_node)
    rank_bytes = num_samples * row_bytes
    worst = rank_bytes * np.maximum(routing.sent, routing.received).max(1)  # (L,)
    to_node = (in_node - 1) / (R - 1)  # share of the other ranks that are on the same node
    rate = GIGA * machine.all_to_all_share
    node_sec = to_node * worst / (rate * machine.node_link_gb_per_sec)
    net_sec = (1 - to_node) * worst / (rate * machine.net_link_gb_per_sec)
    latency = (in_node - 1) * machine.node_latency_us + (R - in_node) * machine.net_latency_us
    mean_bytes = rank_bytes * float(routing.sent.mean(1).sum())
    return Transfer(
        float(np.maximum(node_sec, net_sec).sum()) + len(worst) * latency * MICRO,
        to_node * mean_bytes,
        (1 - to_node) * mean_bytes,
    )
