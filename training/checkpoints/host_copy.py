"""What a checkpoint of this rank will hold, copied to host memory while training stands still."""

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.checkpoints.manifest import CheckpointManifest
from training.checkpoints.other_layout import ENTRY, describe_partitions, holds_optimizer_state
from training.checkpoints.resume_point import ResumeError
from training.checkpoints.unpickling import unpickle

FileContents = list[tuple[str, dict[str, Any]]]  # by file name


class HostCopies:
    """Copy nested state to the host, each tensor compactly, shared tensors once.

    Args:
        shared: tensors that stay where they are for as long as this object is used; what begins
            at the same address becomes a view of their copy.
    """

    def __init__(self, shared: Iterable[Tensor]) -> None:
        self._copies: dict[tuple[int, torch.dtype], Tensor] = {}
        for tensor in shared:
            if tensor.is_contiguous():
                flat = tensor.detach().view(-1)
                self._copies[_address(flat)] = flat.to("cpu", copy=True)

    def forget_shared(self) -> None:
        """Let go of the copies of shared tensors; those handed out stay."""
        self._copies.clear()

    def of(self, value: Any) -> Any:
        """Return a copy of tensors and containers; anything else is taken for constant."""
        if isinstance(value, Tensor):
            return self._of_tensor(value.detach())
        if isinstance(value, dict):
            copied = copy.copy(value)  # keeps the attributes of a state dict
            for key, item in value.items():
                copied[key] = self.of(item)
            return copied
        if type(value) in (list, tuple):
            return type(value)(self.of(item) for item in value)
        return value

    def _of_tensor(self, tensor: Tensor) -> Tensor:
        shared = self._copies.get(_address(tensor))
        if shared is not None and tensor.is_contiguous() and 0 < tensor.numel() <= len(shared):
            return shared[: tensor.numel()].view(tensor.shape)
        return tensor.to("cpu", copy=True)


def _address(tensor: Tensor) -> tuple[int, torch.dtype]:
    return tensor.data_ptr(), tensor.dtype


def take_snapshot(engine: Any, tag: str, client_state: dict[str, Any]) -> FileContents:
    """Copy what DeepSpeed would write of this rank. All ranks must call this.

    Args:
        engine: the DeepSpeed engine.
        tag: of the checkpoint.
        client_state: what else resuming needs.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    partitions = describe_partitions(engine, client_state)
    tensors = [*partitions["masters"]]
    for state in partitions["states"]:
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    copies, files = HostCopies(tensors), []

    class SnapshotEngine(TorchCheckpointEngine):
        def save(self, state_dict: dict[str, Any], path: str) -> None:
            if holds_optimizer_state(state_dict):
                # First, so that DeepSpeed's own entries are stored as views of these.
                state_dict = {ENTRY: partitions} | state_dict
            files.append((Path(path).name, copies.of(state_dict)))

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            pass

        def preserves_storage_sharing(self) -> bool:
            return False  # DeepSpeed need not copy parts of larger tensors first: we do

    with _checkpoint_engine(engine, SnapshotEngine()):
        engine.save_checkpoint("unused", tag=tag, client_state=client_state, save_latest=False)
    copies.forget_shared()  # the class above keeps this object until garbage is collected
    return files


def load_verified(engine: Any, folder: Path, manifest: CheckpointManifest) -> dict[str, Any]:
    """Let DeepSpeed load a checkpoint of its own layout. All ranks must call this.

    Args:
        engine: the DeepSpeed engine.
        folder: of the checkpoint.
        manifest: of the checkpoint; its files were compared with it.

    Returns:
        The client state.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class VerifiedEngine(TorchCheckpointEngine):
        def load(self, path: str, map_location: Any = None) -> Any:
            file = folder / Path(path).name
            if file.name not in manifest.files:  # it was not compared with a checksum
                raise ResumeError(
                    f"{file} is not a file of its checkpoint's manifest; move it elsewhere."
                )
            return unpickle(file, map_location)

    with _checkpoint_engine(engine, VerifiedEngine()), _plain_name(folder.parent) as parent:
        path, client_state = engine.load_checkpoint(parent, tag=folder.name)
    assert path is not None, f"DeepSpeed loaded nothing from {folder}"
    return client_state


@contextmanager
def _plain_name(folder: Path) -> Iterator[str]:
    """Give a folder a name without brackets for a while: DeepSpeed takes paths for patterns."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


@contextmanager
def _checkpoint_engine(engine: Any, ours: Any) -> Iterator[None]:
    """Let DeepSpeed's engine read and write checkpoints by another object for a while."""
    previous, engine.checkpoint_engine = engine.checkpoint_engine, ours
    try:
        yield
    finally:
        engine.checkpoint_engine = previous
