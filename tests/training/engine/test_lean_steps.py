"""A step does for all parameters at once what one operation can do, and waits for little."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import HostReads
from data_tools.stream.loader import Batch
from models.switch_dit import MODEL_SIZES, ModelSize
from tests.support.configs import SHIPPED, changed, small
from tests.support.ranks import run_ranks
from training.config.deepspeed_config import merge_deepspeed
from training.config.precision import Hardware
from training.config.tree import Config
from training.engine.build import build_engine
from training.engine.non_finite import poison_non_finite
from training.engine.objective import Objective
from training.monitoring.interval_sums import MetricSums
from training.ranks.stop_signal import StopSignal

CPU = torch.device("cpu")
OVERRIDDEN = (
    *("check_overflow", "get_grad_norm_direct", "unscale_and_clip_grads"),
    "allreduce_and_copy_with_multiple_ranks",
)
STEP_LIMIT = 60  # operators of the update, at any depth
XL_LIMIT = 3700  # of a whole step at XL's depth; before, 9,400
FREE = {"view", "t", "transpose", "expand", "select", "slice", "detach", "unsqueeze", "squeeze"} | {
    *("permute", "alias", "as_strided", "unbind", "split", "split_with_sizes", "_unsafe_view"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_"),
    *("_reshape_alias", "is_same_size", "lift_fresh", "resize_", "chunk"),
}


class Operators(TorchDispatchMode):
    """Counts the operators that would launch something, also those of a backward pass."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.counts[name] += name not in FREE
        return func(*args, **(kwargs or {}))


def parts(config: Config, name: str, has_bf16: bool, rank=0, world_size=1):
    """The engine and what else a step needs."""
    merged = merge_deepspeed(
        SHIPPED / f"{name}.json", config, world_size, Hardware("stated", has_bf16)
    )
    engine = build_engine(config, merged)
    objective = Objective(config, rank, 1.0, 0.0, CPU, world_size=world_size)
    depth, num_experts = len(engine.module.blocks), config.model.num_experts
    sums = MetricSums(depth, num_experts, config.diffusion.num_timesteps, CPU)
    return SimpleNamespace(engine=engine, objective=objective, sums=sums, rank=rank)


def forward_and_backward(run, step, factor=1.0):
    """A micro-step on data that are the same for the same step."""
    config, N = run.objective.config, run.engine.train_micro_batch_size_per_gpu()
    generator = torch.Generator().manual_seed(100 * step + run.rank)
    channels, height, width = config.model.latent_shape
    raw = torch.randn(N, 2 * channels, height, width, generator=generator).half()
    place = 1000 * step + run.rank * (config.optim.global_batch_size // run.objective.world_size)
    positions = torch.arange(place, place + N)
    batch = run.objective.micro_batch(Batch(raw, torch.zeros(N, dtype=torch.int64), positions))
    output = run.engine(batch.x_t, batch.t, batch.y, batch.group_t)
    terms, samples = run.objective.loss(output, batch, step)
    run.engine.backward(poison_non_finite(terms.total) * factor)
    return terms, samples, batch, output


def whole_step(run, step):
    terms, samples, batch, output = forward_and_backward(run, step)
    run.engine.step()
    run.sums.add(step, terms, mse=samples.mse, t=batch.t, plan=output.plan, wait_sec=0.0)


def tiny(depth, **values):
    MODEL_SIZES["demo"] = ModelSize(depth, 32, 2)
    batch = {"global_batch_size": 2, "micro_batch_size": 2} | values
    return small(size="demo", num_experts=4, expert_dispatch="merged", **batch)


def count_operators(rank, world_size):
    for name, has_bf16 in (("zero2", True), ("zero2", False), ("zero1", False)):
        counts = []
        for depth in (2, 7):
            run = parts(tiny(depth), name, has_bf16)
            whole_step(run, 0)
            with Operators() as backward:
                forward_and_backward(run, 1)
            with Operators() as update:
                run.engine.step()
            counts.append(update.counts.total())
            num_params = len(list(run.engine.module.parameters()))
            if has_bf16:  # one copy of each gradient into the bucket that is averaged, and no more
                assert backward.counts["copy_"] <= num_params + 5, backward.counts
                assert backward.counts["add_"] <= 5, backward.counts
        assert counts[0] == counts[1] <= STEP_LIMIT, (name, has_bf16, counts, update.counts)


@pytest.mark.processes
def test_an_update_takes_as_many_operators_at_any_depth():
    run_ranks(count_operators, 1)


def count_operators_of_xl(rank, world_size):
    run = parts(tiny(MODEL_SIZES["XL"].depth), "zero2", True)
    whole_step(run, 0)
    with Operators() as step:
        whole_step(run, 1)
    assert step.counts.total() <= XL_LIMIT, (step.counts.total(), step.counts.most_common(20))


@pytest.mark.processes
def test_a_step_at_the_depth_of_xl_takes_a_bounded_number_of_operators():
    run_ranks(count_operators_of_xl, 1)


def weights_of(engine):
    return torch.cat([p.detach().flatten().float() for p in engine.module.parameters()])


def leave_steps_out(rank, world_size):
    for name, has_bf16 in (("zero2", True), ("zero2", False), ("zero1", True), ("zero1", False)):
        run = parts(tiny(2, gradient_clipping=0.5, global_batch_size=4), name, has_bf16, rank, 2)
        for step, factor in enumerate((1.0, math.nan, math.inf, -math.inf, 1.0)):
            before, skipped = weights_of(run.engine), run.engine.skipped_steps
            # Of one rank only: the others must leave the step out with it.
            forward_and_backward(run, step, factor if rank == 1 else 1.0)
            run.engine.step()
            after = weights_of(run.engine)
            is_left_out = not math.isfinite(factor)
            assert run.engine.skipped_steps - skipped == is_left_out, (name, has_bf16, factor)
            assert torch.equal(before, after) == is_left_out and after.isfinite().all()
            assert math.isfinite(run.engine.get_global_grad_norm()) != is_left_out


@pytest.mark.processes
@pytest.mark.precision
def test_a_gradient_that_is_not_finite_leaves_the_step_out_on_all_ranks():
    run_ranks(leave_steps_out, 2)


def compare_with_deepspeed(rank, world_size):
    for name, has_bf16, group_size in (
        *(("zero2", True, 1), ("zero2", True, 2)),
        *(("zero2", False, 1), ("zero1", False, 2)),
    ):
        config = tiny(2, gradient_clipping=0.5, global_batch_size=8)
        config = changed(config, expert_parallel_size=group_size)
        lean, usual = (parts(config, name, has_bf16, rank, world_size) for _ in range(2))
        for overridden in OVERRIDDEN:
            delattr(usual.engine.optimizer, overridden)
        for step in range(3):
            norms = []
            for run in (lean, usual):
                for micro_step in range(2):
                    forward_and_backward(run, 2 * step + micro_step)
                    run.engine.step()
                norms.append(float(run.engine.get_global_grad_norm()))
            assert norms[0] == norms[1], (name, has_bf16, group_size)
            assert torch.equal(weights_of(lean.engine), weights_of(usual.engine))


@pytest.mark.processes
@pytest.mark.precision
def test_a_lean_step_computes_what_deepspeed_computes():
    run_ranks(compare_with_deepspeed, 2)


def count_waits(rank, world_size):
    from deepspeed.accelerator import get_accelerator

    synchronised = Counter()
    accelerator = get_accelerator()
    accelerator.synchronize = lambda *_: synchronised.update(["synchronize"])
    for name, expected in (
        ("zero2", {"cpu": 1, "__bool__": 1}),  # to match the gates; the norm
        ("zero1", {"cpu": 1, "__bool__": 1}),
    ):
        # With a warm-up the averages' weights are on the device, and on a CPU that is the host.
        run = parts(tiny(2, ema_warmup=False), name, False)
        for step in range(3):  # DeepSpeed's timer begins at its third step
            whole_step(run, step)
        synchronised.clear()
        with HostReads() as reads:
            whole_step(run, 3)
        assert reads.counts == expected, (name, reads.counts)
        assert not synchronised


@pytest.mark.processes
def test_a_step_of_a_real_engine_waits_for_the_gates_and_for_the_norm():
    run_ranks(count_waits, 1)


def test_posting_a_stop_signal_writes_no_number_into_the_device(single_process_group):
    stop = StopSignal(CPU)

    with HostReads() as reads, Operators() as operators:
        stop.post(has_failed=True, is_save_due=True)

    stop.restore()
    # On a GPU only pinned memory is written, then copied without waiting.
    assert operators.counts["copy_"] == 4 and not reads.counts
