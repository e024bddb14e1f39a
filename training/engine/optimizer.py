"""AdamW, and Muon for matrices, that also average the weights; averages are optimizer state.

An average lies beside Adam's moments, one fp32 value for each fp32 master weight. So ZeRO shards,
saves and restores it like any other optimizer state, experts included.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from training.engine.average_profiles import EMA_KEY, Profile

ADAM_KEYS = ("exp_avg", "exp_avg_sq")  # state with a value per weight, in torch's words
MUON_KEYS = ("momentum",)
STEP = "step"  # the only state that is one number
IS_MATRIX = "is_matrix"  # entry of a group: Muon updates it

# Makes updates of masters orthogonal, a tensor like each of them.
Orthogonalise = Callable[[list[Tensor], list[Tensor]], list[Tensor]]


class EMAAdamW(torch.optim.AdamW):
    """AdamW whose state also holds averages of each parameter.

    The average of no steps is the start itself: before its first step a parameter has no state.
    Groups with a true IS_MATRIX are updated by Muon instead, with Nesterov's momentum and decoupled
    weight decay.

    Args:
        params: parameters or groups, as for AdamW.
        profiles: from `profiles_of`: how to average, by the key of the state.
        momentum: Muon's.
        kwargs: AdamW's.

    Attributes:
        orthogonalise: takes masters and their updates; set before the first step if there are
            matrices.
    """

    orthogonalise: Orthogonalise

    def __init__(
        self, params: Any, *, profiles: dict[str, Profile], momentum: float = 0.95, **kwargs: Any
    ) -> None:
        super().__init__(params, **kwargs)
        assert profiles, "at least one average"
        self.profiles, self.momentum = dict(profiles), momentum

    def value_keys(self, is_matrix: bool) -> list[str]:
        """List the state of a parameter, or master, that has a value per weight."""
        return [*(MUON_KEYS if is_matrix else ADAM_KEYS), *self.profiles]

    @property
    def has_averages(self) -> bool:
        """Tell whether an update has been made. Every rank knows: they update and skip together."""
        return any(EMA_KEY in state for state in self.state.values())

    @property
    def num_updates(self) -> int:
        """Return how many updates the averages are over: the steps done without skipped ones."""
        steps = (state[STEP] for state in self.state.values() if STEP in state)
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
        self._update()
        for p, averages in first.items():
            self.state[p].update(averages)
        steps = torch.stack([self.state[p][STEP] for p in touched]).double()
        for key, profile in self.profiles.items():
            weight = profile.new_weight(steps)
            if isinstance(weight, Tensor):
                # Fused Adam counts steps on the device: reading them would wait for it.
                weight = weight.tolist() if weight.is_cpu else weight.to(touched[0]).unbind()
            torch._foreach_lerp_([self.state[p][key] for p in touched], touched, weight)

    def _update(self) -> None:
        """Let AdamW or Muon update each group that has gradients."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get(IS_MATRIX)]
        if self.param_groups:
            super().step()
        self.param_groups = groups
        for group in groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group.get(IS_MATRIX) and params:
                self._update_matrices(params, group["lr"], group["weight_decay"])

    def _update_matrices(self, params: list[Tensor], lr: float, weight_decay: float) -> None:
        for p in params:
            if STEP not in self.state[p]:
                zeros = {key: torch.zeros_like(p) for key in MUON_KEYS}
                self.state[p].update(zeros, step=p.new_zeros(()))
        torch._foreach_add_([self.state[p][STEP] for p in params], 1.0)
        momenta = [self.state[p][MUON_KEYS[0]] for p in params]
        gradients = [p.grad.to(p.dtype) for p in params]
        torch._foreach_lerp_(momenta, gradients, 1.0 - self.momentum)
        updates = torch._foreach_lerp(gradients, momenta, self.momentum)
        updates = self.orthogonalise(params, updates)
        if weight_decay:
            torch._foreach_mul_(params, 1.0 - lr * weight_decay)
        torch._foreach_add_(params, updates, alpha=-lr)


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
