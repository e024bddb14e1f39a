"""Make one decision of all ranks: share a value, refuse what differs, end a run alike.

A rank that raised alone before a collective would leave the others waiting in it.
"""

from typing import Any

import torch

from data_tools.exit_codes import CRASH_EXIT_CODE


class RunError(RuntimeError):
    """What ends a run after its start, raised on all ranks alike; one sentence for the user."""

    exit_code = CRASH_EXIT_CODE


def agreed_message(error: Exception | str | None) -> str | None:
    """Return the first error among the ranks on all of them. All ranks must call this."""
    messages: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(messages, None if error is None else str(error))
    return next((message for message in messages if message is not None), None)


def from_main(value: Any) -> Any:
    """Return the main rank's value on all ranks; others' is ignored. All ranks must call this."""
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def check_agreement(decisions: dict[str, Any]) -> None:
    """Compare what the ranks decided before they could talk. All ranks must call this.

    Args:
        decisions: what was decided, by the name a user knows it by.

    Raises:
        RunError: on all ranks, naming the first decision that differs from rank 0's: a node with
            an old copy of a file, other software, or other hardware.
    """
    everyone: list[dict[str, Any]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everyone, decisions)
    for rank, other in enumerate(everyone):
        for name, value in everyone[0].items():
            if other[name] != value:
                raise RunError(
                    f"rank {rank} has {name} {other[name]}, rank 0 has {value}; make the nodes "
                    "see the same files, software and hardware, and start again."
                )
