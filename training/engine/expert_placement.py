"""Place a run's experts on ranks (models/placement.py), at the start and when asked again.

A new engine has expert e in slot e. Moving experts moves all that belongs to them, weights, Adam's
moments and averages, bit for bit, so nothing that is computed changes. The map of slots is part of
a checkpoint: there DeepSpeed's files are in the order of slots, ours in the order of experts.

L blocks, E experts, S diffusion timesteps, R ranks of an expert-parallel group.
"""

from typing import Any

import torch
from torch import Tensor

from models.placement import chosen_experts, place, rank_loads, worst_over_mean
from models.switch_dit import MODEL_SIZES
from training.config.tree import Config
from training.engine.deepspeed_internals import (
    base_optimizer,
    expert_group,
    renew_weights,
)
from training.engine.gate_table import engine_gate_table
from training.engine.interface import Engine
from training.engine.matrix_updates import is_matrix
from training.engine.objective import Objective
from training.engine.zero_weights import block_of, full_value, gathered_slots, set_full_value

NEW_ENGINE = "contiguous"  # how a new engine has placed its experts


class ExpertPlacement:
    """The placement of one run's experts; does nothing without expert parallelism.

    Args:
        config: the run's configuration.
        engine: the DeepSpeed engine.
        objective: deals timesteps by the placement.
    """

    def __init__(self, config: Config, engine: Engine, objective: Objective) -> None:
        self.config, self.engine, self.objective = config, engine, objective
        self.num_ranks = config.run.expert_parallel_size
        self._kind = NEW_ENGINE

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must say: plain values, equal on all ranks."""
        if self.num_ranks == 1:
            return {}
        return {"placement": self._kind, "slots": self.engine.module.gate.slots.tolist()}

    def slots_of(self, state: dict[str, Any]) -> Tensor:
        """Return where the experts are in a checkpoint with this state, (L, E) on the host."""
        model = self.config.model
        new = torch.arange(model.num_experts).repeat(MODEL_SIZES[model.size].depth, 1)
        return torch.tensor(state["slots"]) if "slots" in state else new

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over the slots of a checkpoint whose files the engine has loaded."""
        self._kind = state.get("placement", NEW_ENGINE)
        if "slots" in state:
            slots = torch.tensor(state["slots"])
            self.engine.module.gate.slots.copy_(slots)
            self.objective.use_slots(slots)

    def establish(self) -> None:
        """Place the experts as configured, unless they are already. All ranks must call this."""
        if self.num_ranks > 1 and self._kind != self.config.run.placement:
            self.rebalance()

    def rebalance(self) -> str:
        """Place the experts by the gates as they are now. All ranks must call this.

        Returns:
            On rank 0, what it has done to the load; empty on the others.
        """
        kind, slots = self.config.run.placement, self.engine.module.gate.slots
        table, target, report = engine_gate_table(self.engine, self.config), slots.clone(), ""
        if torch.distributed.get_rank() == 0:
            # Only one rank computes, so that no rounding can make ranks disagree.
            chosen = chosen_experts(table, self.config.model.top_k)
            weight = self.objective.timesteps.frequencies()
            target.copy_(torch.from_numpy(place(kind, chosen, weight, self.num_ranks)))
            before, after = (
                worst_over_mean(rank_loads(chosen, weight, each.cpu().numpy(), self.num_ranks))
                for each in (slots, target)
            )
            report = f"{kind} placement of experts: worst/mean load {before:.2f} -> {after:.2f}"
        torch.distributed.broadcast(target, src=0)
        move_experts(self.engine, target)
        self._kind = kind
        self.objective.use_slots(target.cpu())
        return report


def move_experts(engine: Engine, slot_of_expert: Tensor) -> None:
    """Move experts, with all their optimizer state, to other slots. All ranks must call this.

    Between steps only: gradients do not move. One parameter of one block at a time is gathered.

    Args:
        engine: the DeepSpeed engine; its module's slots are replaced.
        slot_of_expert: (L, E), equal on all ranks.
    """
    slots = engine.module.gate.slots
    source = slots.gather(1, slot_of_expert.argsort(1))  # (L, E) where each slot's expert was
    is_moved = (source != torch.arange(source.shape[1], device=source.device)).any(1).tolist()
    optimizer = base_optimizer(engine)
    for name, param in engine.module.named_parameters():
        group = expert_group(param)
        if group is None or not is_moved[block_of(name)]:
            continue
        for key in (
            None,
            *(optimizer.value_keys(is_matrix(param)) if optimizer.has_averages else ()),
        ):
            value = full_value(engine, param, key)
            E_local = len(value)
            mine = source[block_of(name)][group.rank() * E_local :][:E_local]
            set_full_value(engine, param, key, gathered_slots(value, param)[mine])
    renew_weights(engine)
    slots.copy_(slot_of_expert)
