"""Count the copies that travel and the loads of ranks, by placement of experts and dealing.

    python benchmarks/placement.py
    python benchmarks/placement.py --experts 16 64 --ranks 8 --top-k 2

One process computes the routing of a whole expert-parallel group. A cell of the table gives the
copies of a sample that travel to other ranks in a block, with timesteps by position -> dealt by
affinity, and the load of the worst rank over the mean, the mean over blocks (dealing does not
change it). Routings:

    prior     what the diffusion prior asks for, experts in the order of their windows
    matched   the same with the experts of each block shuffled, as the matching leaves them
    fresh     a gate before training
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: Python put this file's own folder first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor

from data_tools.errors import ArgumentParser
from data_tools.process.entry_point import enter
from models.dealing import deal, served_at_home
from models.gate import TimestepGate
from models.layers import TimestepEmbedder
from models.placement import (
    PLACEMENTS,
    BoolArray,
    IntArray,
    chosen_experts,
    place,
    rank_loads,
    reached_ranks,
    worst_over_mean,
)
from models.prior import diffusion_prior

ROUTINGS = ("prior", "matched", "fresh")
NUM_TIMESTEPS, HIDDEN_SIZE = 1000, 384


def gates_of(routing: str, depth: int, num_experts: int, top_k: int) -> Tensor:
    """Build a gate table (L, S, E); those of the prior are 0/1."""
    torch.manual_seed(0)
    if routing == "fresh":
        t = torch.arange(NUM_TIMESTEPS)
        with torch.no_grad():
            return TimestepGate(depth, HIDDEN_SIZE, num_experts)(TimestepEmbedder(HIDDEN_SIZE)(t))
    prior = diffusion_prior(NUM_TIMESTEPS, depth, num_experts, top_k)  # (S, U)
    # A window of L * K units holds K experts of every block if unit u is expert u // L of block
    # u % L.
    gates = prior.view(NUM_TIMESTEPS, num_experts, depth).permute(2, 0, 1)
    if routing == "matched":
        gates = torch.stack([block[:, torch.randperm(num_experts)] for block in gates])
    return gates.contiguous()


def copies_per_sample(
    chosen: BoolArray, slots: IntArray, group_t: IntArray, num_ranks: int
) -> float:
    """Count the copies that travel, per sample and block."""
    reached = reached_ranks(chosen, slots, num_ranks)[:, group_t]  # (L, G, R)
    own = np.arange(len(group_t)) // (len(group_t) // num_ranks)
    stays = reached[:, np.arange(len(group_t)), own]  # (L, G)
    return float((reached.sum(-1) - stays).mean())


def measure(
    gates: Tensor, top_k: int, num_ranks: int, kind: str, batches: list[IntArray]
) -> tuple[float, float, float]:
    """Return the copies by position and by affinity and the worst/mean load, means over batches.

    Args:
        gates: (L, S, E).
        top_k: K.
        num_ranks: R.
        kind: of placement.
        batches: timesteps (G,) of the group.
    """
    chosen = chosen_experts(gates, top_k)
    slots = place(kind, chosen, np.ones(NUM_TIMESTEPS, np.int64), num_ranks)
    at_home = served_at_home(gates, top_k, torch.from_numpy(slots), num_ranks).numpy()
    results = []
    for group_t in batches:
        count = np.bincount(group_t, minlength=NUM_TIMESTEPS)
        results.append(
            (
                copies_per_sample(chosen, slots, group_t, num_ranks),
                copies_per_sample(chosen, slots, deal(group_t, at_home), num_ranks),
                worst_over_mean(rank_loads(chosen, count, slots, num_ranks)),
            )
        )
    by_position, dealt, load = np.mean(results, axis=0).tolist()
    return by_position, dealt, load


def report(routing: str, top_k: int, args: argparse.Namespace) -> None:
    """Print the table of one routing and number of experts per sample."""
    print(f"\n{routing}, k = {top_k}: copies by position -> affine, worst/mean load")
    print("| experts | ranks | " + " | ".join(PLACEMENTS) + " |")
    print("| --- | --- |" + " --- |" * len(PLACEMENTS))
    for num_experts in args.experts:
        gates = gates_of(routing, args.depth, num_experts, top_k)
        for num_ranks in args.ranks:
            if num_experts % num_ranks:
                continue
            generator = np.random.default_rng(0)
            batches = list(
                generator.integers(0, NUM_TIMESTEPS, (args.steps, args.batch * num_ranks))
            )
            cells = []
            for kind in PLACEMENTS:
                before, after, load = measure(gates, top_k, num_ranks, kind, batches)
                cells.append(f"{before:.2f} -> {after:.2f}, {load:.2f}")
            print(f"| {num_experts} | {num_ranks} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Print all tables."""
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 8, 16], help="per block")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], help="of a group")
    parser.add_argument("--top-k", type=int, nargs="+", default=[2, 1], help="experts per sample")
    parser.add_argument("--depth", type=int, default=12, help="blocks")
    parser.add_argument("--batch", type=int, default=32, help="samples per rank and micro-batch")
    parser.add_argument("--steps", type=int, default=8, help="micro-batches")
    args = parser.parse_args()
    if min(min(vars(args)[name]) for name in ("experts", "ranks", "top_k")) < 1:
        parser.error("--experts, --ranks and --top-k must be 1 or more")
    if min(args.depth, args.batch, args.steps) < 1:
        parser.error("--depth, --batch and --steps must be 1 or more")
    if max(args.top_k) > min(args.experts):
        parser.error("--top-k must be at most the smallest of --experts")
    for top_k in args.top_k:
        for routing in ROUTINGS:
            report(routing, top_k, args)


if __name__ == "__main__":
    enter(main)
