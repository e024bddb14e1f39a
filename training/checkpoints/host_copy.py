"""Copy this rank's part of a checkpoint to host memory; load such a part."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.checkpoints.manifest import CheckpointManifest
from training.checkpoints.other_layout import ENTRY, describe_partitions, holds_optimizer_state
from training.checkpoints.resume_point import ResumeError
from training.checkpoints.unpickling import unpickle
from training.engine.deepspeed_internals import load_through, save_through
from training.engine.interface import Engine

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
                self._copies[_address(flat)] = on_host(flat)

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
        return on_host(tensor)


def on_host(tensor: Tensor) -> Tensor:
    """Copy a tensor to the host; from a GPU the copy is complete when its stream is waited for.

    Copies from a GPU go to pinned memory, several times as fast. When a checkpoint has been
    written, torch keeps that memory for the next one.
    """
    if not tensor.is_cuda:
        return tensor.to("cpu", copy=True)
    try:
        copied = torch.empty_like(tensor, device="cpu", pin_memory=True)
    except RuntimeError:  # the system pins no more
        return tensor.to("cpu", copy=True)
    return copied.copy_(tensor, non_blocking=True)


def _address(tensor: Tensor) -> tuple[int, torch.dtype]:
    return tensor.data_ptr(), tensor.dtype


def take_snapshot(engine: Engine, tag: str, client_state: dict[str, Any]) -> FileContents:
    """Copy what DeepSpeed would write of this rank. All ranks must call this.

    Args:
        engine: the DeepSpeed engine.
        tag: of the checkpoint.
        client_state: what else resuming needs.
    """
    partitions = describe_partitions(engine, client_state)
    tensors = [*partitions["masters"]]
    for state in partitions["states"]:
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    copies, files = HostCopies(tensors), []

    def copy_file(name: str, content: dict[str, Any]) -> None:
        if holds_optimizer_state(content):
            # First, so that DeepSpeed's own entries are stored as views of these.
            content = {ENTRY: partitions} | content
        files.append((name, copies.of(content)))

    save_through(engine, copy_file, tag, client_state)
    if engine.device.type == "cuda":
        torch.cuda.current_stream(engine.device).synchronize()
    copies.forget_shared()  # what DeepSpeed was given keeps this object until garbage is collected
    return files


def load_verified(engine: Engine, folder: Path, manifest: CheckpointManifest) -> dict[str, Any]:
    """Let DeepSpeed load a checkpoint of its own layout. All ranks must call this.

    Args:
        engine: the DeepSpeed engine.
        folder: of the checkpoint.
        manifest: of the checkpoint; its files were compared with it.

    Returns:
        The client state.
    """

    def load(file: Path, map_location: Any) -> Any:
        if file.name not in manifest.files:  # it was not compared with a checksum
            raise ResumeError(
                f"{file} is not a file of its checkpoint's manifest; move it elsewhere."
            )
        return unpickle(file, map_location)

    return load_through(engine, load, folder)
