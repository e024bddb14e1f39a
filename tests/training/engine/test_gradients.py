"""Every gradient, before clipping, equals that of plain autograd on one process."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from data_tools.stream.loader import Batch
from models.switch_dit import MODEL_SIZES, ModelSize
from tests.support.ranks import run_ranks
from training.config.deepspeed_config import merge_deepspeed
from training.config.precision import Hardware
from training.config.preset import load_preset
from training.engine.build import build_engine, build_model, set_learning_rate
from training.engine.objective import Objective

LOCAL_BATCH = 4
FP32_TOLERANCE = 1e-5  # largest difference, relative to the largest value of the gradient
# bf16 keeps 8 bits of each number that a gradient is made of: the norm of the difference, relative
# to the norm of the gradient.
BF16_TOLERANCE = 0.08


class Case(NamedTuple):
    """A layout and its experts."""

    stage: int
    group_size: int
    num_experts: int
    dispatch: str  # of affine experts, or "mlp"
    micro_batch_size: int = LOCAL_BATCH
    has_bf16: bool = False

    @property
    def top_ks(self):
        return (2,) if self.has_bf16 else sorted({1, 2, self.num_experts - 1, self.num_experts})


# ZeRO 3 comes last: it replaces torch's linear layer for the rest of the process.
CASES = {
    2: [
        Case(0, 2, 4, "merged"),
        Case(1, 2, 8, "dispatched", micro_batch_size=2),
        Case(2, 2, 4, "mlp"),
        Case(2, 2, 4, "dispatched", has_bf16=True),
        Case(3, 2, 8, "mlp", micro_batch_size=2),
        Case(3, 2, 4, "merged", has_bf16=True),
    ],
    4: [
        Case(1, 4, 4, "merged"),
        Case(2, 2, 8, "mlp"),
        Case(3, 2, 8, "merged"),
        Case(3, 4, 8, "mlp"),
        Case(3, 4, 4, "dispatched"),
    ],
}


def configuration(case, world_size):
    config = load_preset(str(Path(__file__).resolve().parents[3] / "tests/small.yaml"))
    is_mlp = case.dispatch == "mlp"
    return replace(
        config,
        model=replace(
            config.model,
            patch_size=8,
            num_experts=case.num_experts,
            expert_kind="mlp" if is_mlp else "affine",
            expert_hidden_ratio=0.25,
            expert_dispatch="auto" if is_mlp else case.dispatch,
        ),
        optim=replace(
            config.optim,
            global_batch_size=world_size * LOCAL_BATCH,
            micro_batch_size=case.micro_batch_size,
        ),
        run=replace(config.run, expert_parallel_size=case.group_size),
    )


def random_values(model, group_rank=0, group_size=1):
    """Values under which every parameter has a gradient, and some experts starve."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(sum(name.encode()))
        is_expert = ".experts." in name
        shape = list(getattr(parameter, "ds_shape", parameter.shape))
        local = shape[0]
        if is_expert:
            shape[0] *= group_size
        # bf16 values, so that rounding the weights changes no choice of an expert.
        value = (0.1 * torch.randn(shape, generator=generator)).bfloat16().float()
        if name == "gate.bias":
            starve(value)
        yield parameter, value[group_rank * local :][:local] if is_expert else value


def starve(gate_bias):
    """Leave an expert of the first block, and all but one rank's of the second, without samples."""
    gate_bias[0, 1] = -30.0
    gate_bias[1, gate_bias.shape[1] // 4 :] = -30.0


def stored_batch(first, count):
    """Latents as they come from the data, the same for the same stream positions."""
    seeds = range(first, first + count)
    raw = [torch.randn(8, 16, 16, generator=torch.Generator().manual_seed(i)) for i in seeds]
    labels = torch.tensor([i % 10 for i in seeds])
    return Batch(torch.stack(raw).half(), labels, torch.arange(first, first + count))


def forward(model, objective, first, count):
    batch = objective.micro_batch(stored_batch(first, count))
    x_t = batch.x_t.to(next(model.parameters()).dtype)
    output = model(x_t, batch.t, batch.y, batch.group_t)
    terms, _ = objective.loss(output, batch, step=0)
    return output, terms


def single_process(config, first, count):
    """Loss terms, gradients by name, and how many samples each expert of each block serves."""
    model = build_model(config)
    with torch.no_grad():
        for parameter, value in random_values(model):
            parameter.copy_(value)
    alone = replace(config, run=replace(config.run, expert_parallel_size=1))
    objective = Objective(alone, 0, 1.0, 0.0, torch.device("cpu"))
    output, terms = forward(model, objective, first, count)
    terms.total.backward()
    served = (output.plan.expert_weight > 0).sum(1)  # (L, E)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return torch.stack(terms).detach(), gradients, served


def whole_gradient(parameter):
    """Averaged over all ranks, experts of all ranks one after the other. All ranks must call."""
    from deepspeed.moe.utils import is_moe_param
    from deepspeed.utils import groups, safe_get_full_grad

    gradient = safe_get_full_grad(parameter).float().contiguous()
    if not is_moe_param(parameter):
        return gradient
    group = groups._get_expert_parallel_group(parameter.group_name)
    parts = [torch.empty_like(gradient) for _ in range(group.size())]
    torch.distributed.all_gather(parts, gradient, group=group)
    return torch.cat(parts)


def sharded(engine, objective, case, rank, world_size, first):
    """Loss terms and gradients as `single_process`, and how many rows each block received."""
    micro, received = case.micro_batch_size, []
    totals = torch.zeros(4)
    own = first + rank * LOCAL_BATCH
    for start in range(own, own + LOCAL_BATCH, micro):
        output, terms = forward(engine, objective, start, micro)
        totals += torch.stack(terms).detach() * micro / LOCAL_BATCH
        received.append([sum(dispatch.recv_splits) for dispatch in output.plan.dispatch])
        engine.backward(terms.total)
        if start + micro < own + LOCAL_BATCH:
            engine.step()
    torch.distributed.all_reduce(totals)
    gradients = {name: whole_gradient(p) for name, p in engine.module.named_parameters()}
    engine.step()  # at learning rate 0: it only makes room for the next gradients
    received = torch.tensor(received).sum(0)
    everyone = [torch.empty_like(received) for _ in range(world_size)]
    torch.distributed.all_gather(everyone, received)
    return totals / world_size, gradients, torch.stack(everyone)


def compare(case, got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        difference = got[name] - value
        if case.has_bf16:
            assert difference.norm() <= BF16_TOLERANCE * value.norm(), (case, name)
        else:
            assert difference.abs().max() <= FP32_TOLERANCE * value.abs().max(), (case, name)


def check_gradients(rank, world_size, folder):
    MODEL_SIZES["demo"] = ModelSize(depth=3, hidden_size=64, num_heads=4)  # quicker
    for number, case in enumerate(CASES[world_size]):
        path = folder / f"rank{rank}-{number}.json"
        zero = {"zero_optimization": {"stage": case.stage}, "communication_data_type": "fp32"}
        path.write_text(json.dumps(zero | {"bf16": {"enabled": case.has_bf16}}))
        config = configuration(case, world_size)
        # ZeRO 0 cannot clip under expert parallelism; the others clip after what is compared.
        clipping = replace(config.optim, gradient_clipping=1e-3 if case.stage else 0.0)
        config = replace(config, optim=clipping)
        merged = merge_deepspeed(path, config, world_size, Hardware("these ranks", True))
        start = partial(
            random_values, group_rank=rank % case.group_size, group_size=case.group_size
        )
        engine = build_engine(config, merged, start)
        set_learning_rate(engine, 0.0)
        for top_k in case.top_ks:
            config = replace(config, model=replace(config.model, top_k=top_k))
            engine.module.gate.top_k = top_k
            objective = Objective(
                config, rank, 1.0, 0.0, torch.device("cpu"), world_size=world_size
            )
            terms, gradients, received = sharded(engine, objective, case, rank, world_size, 32)
            if rank > 0:
                continue
            wanted, expected, served = single_process(config, 32, world_size * LOCAL_BATCH)
            torch.testing.assert_close(
                *(terms, wanted), rtol=BF16_TOLERANCE if case.has_bf16 else 1e-6, atol=1e-6
            )
            compare(case, gradients, expected)
            if top_k < case.num_experts:
                assert served[0, 1] == 0, "the premise: an expert without any sample"
                for name, gradient in gradients.items():
                    if name.startswith("blocks.0.mixture."):
                        assert gradient.any() and not gradient[1].any(), name
            if top_k == 1:
                assert (received[:, 1] == 0).any(), "the premise: a rank without any sample"
                # With one sample, the order of a rank's gradients must still be its peers'.
                assert (received == 1).any() or case is not CASES[4][1], "another premise"
        engine.destroy()


@pytest.mark.processes
@pytest.mark.parametrize("world_size", CASES)
def test_every_gradient_equals_that_of_one_process(world_size, tmp_path):
    run_ranks(check_gradients, world_size, tmp_path)
