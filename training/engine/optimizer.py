"""AdamW that also averages the weights, with the averages as optimizer state.

An average lies beside Adam's moments, one fp32 value for each fp32 master weight. So ZeRO shards,
saves and restores it like any other optimizer state, experts included.
"""

from typing import Any

import torch
from torch import Tensor

from training.engine.average_profiles import EMA_KEY, Profile


class EMAAdamW(torch.optim.AdamW):
    """AdamW whose state also holds averages of each parameter.

    The average of no steps is the start itself: before its first step a parameter has no state.

    Args:
        params: parameters or groups, as for AdamW.
        profiles: from `profiles_of`: how to average, by the key of the state.
        kwargs: AdamW's.
    """

    def __init__(self, params: Any, *, profiles: dict[str, Profile], **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        assert profiles, "at least one average"
        self.profiles = dict(profiles)

    @property
    def has_averages(self) -> bool:
        """Tell whether an update has been made. Every rank knows: they update and skip together."""
        return any(EMA_KEY in state for state in self.state.values())

    @property
    def num_updates(self) -> int:
        """Return how many updates the averages are over: the steps done without skipped ones."""
        steps = (state["step"] for state in self.state.values() if "step" in state)
        return max(map(int, steps), default=0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update the parameters, then their averages.

        ZeRO calls this once per parameter group, so the weight of the new parameters is computed
        from their own step counts and never from a counter of calls.
        """
        assert closure is None, "DeepSpeed passes no closure"
        touched = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not touched:
            return
        # Adam initialises only an empty state, so the first averages are kept aside until it has.
        first = {
            p: {key: p.detach().clone() for key in self.profiles}
            for p in touched
            if EMA_KEY not in self.state[p]
        }
        super().step()
        for p, averages in first.items():
            self.state[p].update(averages)
        steps = torch.stack([self.state[p]["step"] for p in touched]).double()
        for key, profile in self.profiles.items():
            weight = profile.new_weight(steps)
            if isinstance(weight, Tensor):
                # Fused Adam counts steps on the device: reading them would wait for it.
                weight = weight.tolist() if weight.is_cpu else weight.to(touched[0]).unbind()
            torch._foreach_lerp_([self.state[p][key] for p in touched], touched, weight)


class AgreeingEMAAdamW(EMAAdamW):
    """EMAAdamW for ZeRO 0: leaves an update out on all ranks if a gradient on one is not finite.

    ZeRO 1 to 3 do so themselves. `overflow` is what DeepSpeed's engine reads to count skipped
    steps.
    """

    overflow = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update, or not. All ranks must call this."""
        params = [p for group in self.param_groups for p in group["params"]]
        norms = torch._foreach_norm([p.grad for p in params if p.grad is not None])
        is_bad = (~torch.isfinite(torch.stack(norms))).any().to(torch.int32)
        torch.distributed.all_reduce(is_bad, op=torch.distributed.ReduceOp.MAX)
        self.overflow = bool(is_bad.item())
        if not self.overflow:
            super().step(closure)
