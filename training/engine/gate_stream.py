"""Work on a forward pass's gates while the GPU runs the blocks behind them.

Reading the gates would make the host wait for everything that is queued, which is the whole forward
pass. So they are read in a stream of their own, which waits for nothing but the gates.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class GateStream:
    """Tells when the gates of the last forward pass were computed, and works beside its blocks.

    On a CPU, which has computed everything by then, it does nothing.

    Args:
        device: of the training.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._computed: torch.cuda.Event | None = None

    def watch(self, gate: nn.Module) -> None:
        """Take note of every forward pass of the module that computes the gates."""
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)
            gate.register_forward_hook(self._note)

    def _note(self, *_: object) -> None:
        self._computed = torch.cuda.Event()
        self._computed.record()

    @contextmanager
    def beside_the_blocks(self) -> Iterator[None]:
        """Queue what runs inside behind the gates; what is queued later waits for it.

        Tensors that are made inside and kept must go through `keep`.
        """
        if self._stream is None or self._computed is None:
            yield
            return
        self._stream.wait_event(self._computed)
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor made beside the blocks, whose memory later work may read."""
        if self._stream is not None and tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(self._device))
        return tensor
