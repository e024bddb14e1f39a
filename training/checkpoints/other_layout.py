"""Continue a run on another layout: other ranks, expert-parallel size, ZeRO stage, or order.

Every rank's file of a checkpoint says which values of which parameters it holds
(engine/zero_fragments.py). Each rank of the new job reads the ranges that it needs itself, through
memory maps: nothing is converted on the disk, and beside its own state a rank holds one range at a
time.

L blocks, E experts.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_tools.exit_codes import CONFIG_ERROR_EXIT_CODE
from training.checkpoints.unpickling import unpickle
from training.engine.deepspeed_internals import (
    base_optimizer,
    holds_matrices,
    masters,
    renew_weights,
)
from training.engine.interface import Engine
from training.engine.optimizer import STEP
from training.engine.zero_fragments import EXPERTS, Fragment, fragments, states, values_per_slot
from training.engine.zero_weights import block_of
from training.ranks.agreement import RunError

ENTRY = "partitions"  # of the files that hold optimizer state


class NotReshardableError(RunError):
    """A checkpoint that does not say what its parts are of."""

    exit_code = CONFIG_ERROR_EXIT_CODE


class EngineCounters(NamedTuple):
    """What DeepSpeed's engine counts, as its own way of loading restores it."""

    global_steps: int
    global_samples: int
    skipped_steps: int


def holds_optimizer_state(state_dict: dict[str, Any]) -> bool:
    """Tell whether one of DeepSpeed's checkpoint files is one with optimizer state."""
    return any(state_dict.get(key) for key in ("optimizer_state_dict", "optimizer"))


def describe_partitions(engine: Engine, client_state: dict[str, Any]) -> dict[str, Any]:
    """Return what a file with optimizer state needs beside DeepSpeed's own entries.

    The tensors are those that DeepSpeed writes, so they take no more room in the file.
    """
    return {
        "fragments": [tuple(fragment) for fragment in fragments(engine)],
        "masters": [master.detach() for master in masters(engine)],
        "states": states(engine),
        "progress": tuple(getattr(engine, name) for name in EngineCounters._fields),
        "client_state": client_state,
    }


class StoredPartitions:
    """The optimizer state of a checkpoint, whatever layout wrote it. The files are mapped.

    Args:
        folder: of the checkpoint.
        files: names of its files, which match their checksums.
    """

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        names = sorted(name for name in files if name.endswith("optim_states.pt"))
        # ZeRO 0 without shared-out experts has all in one file.
        names = names or sorted(name for name in files if name.endswith("model_states.pt"))
        self.parts: list[dict[str, Any]] = []
        for name in names:
            stored = unpickle(folder / name, mmap=True)
            if ENTRY not in stored:
                raise NotReshardableError(
                    f"{folder} does not say which rank has what of the weights, so an older "
                    "version of this program wrote it; continue with that version."
                )
            self.parts.append(stored[ENTRY])
        self.counters = EngineCounters(*self.parts[0]["progress"])
        self.client_state: dict[str, Any] = self.parts[0]["client_state"]
        self._found: dict[str, list[tuple[Fragment, int]]] = {}
        for i, part in enumerate(self.parts):
            for fragment in map(Fragment._make, part["fragments"]):
                self._found.setdefault(fragment.name, []).append((fragment, i))
        for found in self._found.values():
            found.sort(key=lambda each: each[0].start)

    @property
    def has_states(self) -> bool:
        """Tell whether there was an update before it; there is no optimizer state otherwise."""
        return bool(self.parts[0]["states"][0])

    def step(self) -> float:
        """Return how many updates the state has seen; all parameters are updated together."""
        steps = {float(state[STEP]) for part in self.parts for state in part["states"]}
        assert len(steps) == 1, f"parameters with different numbers of updates: {steps}"
        return steps.pop()

    def read(self, name: str, key: str | None, start: int, numel: int, out: Tensor) -> None:
        """Copy values of a parameter.

        Args:
            name: of the parameter.
            key: of the optimizer's state; None = the fp32 master.
            start: the first value, counted as a Fragment's.
            numel: how many.
            out: (numel,) fp32, on any device.
        """
        stop, missing = start + numel, numel
        end = start
        for fragment, part in self._found[name]:
            low, high = max(end, fragment.start), min(stop, fragment.start + fragment.numel)
            if low >= high:
                continue
            source = self._tensor(part, fragment.master, key)
            offset = fragment.offset + low - fragment.start
            out[low - start : high - start].copy_(source[offset : offset + high - low])
            missing -= high - low
            end = high
        assert missing == 0, f"{name}: {missing} of {numel} values from {start} on are nowhere"

    def whole(
        self, name: str, key: str | None, shape: torch.Size, slot_of_expert: Tensor
    ) -> Tensor:
        """Put a parameter together, its experts in their own order.

        Args:
            name: of the parameter.
            key: of the optimizer's state; None = the fp32 master.
            shape: of the whole.
            slot_of_expert: (L, E) on the host: where the experts are in the checkpoint.
        """
        value = torch.empty(shape, dtype=torch.float32)
        flat = value.view(-1)
        slots, size = [0], value.numel()
        if EXPERTS in name:
            slots, size = slot_of_expert[block_of(name)].tolist(), value.numel() // shape[0]
        for expert, slot in enumerate(slots):
            self.read(name, key, slot * size, size, flat[expert * size : (expert + 1) * size])
        return value

    def _tensor(self, part: int, master: int, key: str | None) -> Tensor:
        stored = self.parts[part]
        tensor = stored["masters"][master] if key is None else stored["states"][master][key]
        return tensor.flatten()


@torch.no_grad()
def load_resharded(
    engine: Engine, stored: StoredPartitions, source_slots: Tensor, target_slots: Tensor
) -> None:
    """Give an engine the weights and optimizer state of a checkpoint. All ranks must call this.

    Args:
        engine: the DeepSpeed engine, before its first step.
        stored: the checkpoint.
        source_slots: (L, E) on the host: where the experts are in the checkpoint.
        target_slots: (L, E) on the host: where they are in the engine.
    """
    optimizer, found = base_optimizer(engine), masters(engine)
    keys: list[list[str]] = [[] for _ in found]
    if stored.has_states:
        keys = [optimizer.value_keys(is_matrix) for is_matrix in holds_matrices(engine)]
        for master, own in zip(found, keys, strict=True):
            step = torch.tensor(stored.step(), dtype=torch.float32, device=master.device)
            optimizer.state[master] = {STEP: step} | {k: torch.zeros_like(master) for k in own}
    params = dict(engine.module.named_parameters())
    # The expert that is in a slot of the engine, and from there its slot in the checkpoint.
    source_of_slot = source_slots.gather(1, target_slots.argsort(1))
    for fragment in fragments(engine):
        name, master = fragment.name, found[fragment.master]
        ranges = [(fragment.start, fragment.start, fragment.numel)]
        if EXPERTS in name:
            source_slot = source_of_slot[block_of(name)].tolist()
            ranges = _by_slot(fragment, values_per_slot(params[name]), source_slot)
        for key in (None, *keys[fragment.master]):
            flat = (master if key is None else optimizer.state[master][key]).view(-1)
            for here, there, numel in ranges:
                offset = fragment.offset + here - fragment.start
                stored.read(name, key, there, numel, flat[offset : offset + numel])
    renew_weights(engine)
    for field, value in stored.counters._asdict().items():
        setattr(engine, field, value)


def _by_slot(fragment: Fragment, size: int, source_slot: list[int]) -> list[tuple[int, int, int]]:
    """Cut a fragment of experts at the borders of slots: (start here, start there, numel)."""
    ranges, start, stop = [], fragment.start, fragment.start + fragment.numel
    while start < stop:
        slot, within = divmod(start, size)
        numel = min(size - within, stop - start)
        ranges.append((start, source_slot[slot] * size + within, numel))
        start += numel
    return ranges
