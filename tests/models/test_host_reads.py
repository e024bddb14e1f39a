"""The host waits for the device once per step, whatever the number of blocks."""

import pytest
import torch

from benchmarks.measure import HostReads, cuda_waits
from models.expert_parallel import ExpertParallelMixture
from models.network_options import NetworkOptions
from models.switch_dit import SwitchDiT
from tests.support.ranks import run_ranks

SIZES = {"input_size": (8, 8), "patch_size": 2, "in_channels": 2, "hidden_size": 16}
SIZES |= {"num_heads": 2, "num_classes": 3, "num_experts": 4, "top_k": 2, "num_timesteps": 20}
BATCH = 5
EXPERTS = [
    {"expert_dispatch": "merged"},
    {"expert_dispatch": "dispatched"},
    {"expert_kind": "mlp"},
    {"expert_dispatch": "merged", "activation_checkpointing": True},
]


class ReadsInBackward(torch.autograd.Function):
    """Looks at its gradient, as a careless exchange would."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        assert gradient.sum().item() == 3.0
        return gradient


def test_reads_are_counted_wherever_they_hide():
    x = torch.randn(3, requires_grad=True)
    flags = torch.tensor([True, False, True])

    with HostReads() as reads:
        ReadsInBackward.apply(x).sum().backward()
        values = x.detach()
        values[flags] = 1.0
        values.tolist(), int(values.sum()), values.to("cpu"), values.nonzero()
        if values.sum() > 0:
            values.cpu()

    assert x.grad is not None
    expected = {"item": 1, "__setitem__": 1, "tolist": 1, "__int__": 1, "nonzero": 1}
    assert reads.counts == expected | {"__bool__": 1, "cpu": 2}


def test_what_is_on_the_host_is_read_for_free():
    x = torch.arange(4.0)

    with HostReads() as reads:
        host = x.cpu()
        first, second = (host + 1).split([1, 3])
        assert second.sum().item() == 9.0 and first.tolist() == [1.0]
        host.numpy(), host[host > 1]

    assert reads.counts == {"cpu": 1}
    with HostReads() as reads:
        (host + x).tolist()
    assert reads.counts == {"tolist": 1}, "beside a number of the device it is one again"


def forward_and_backward(model, rank, group_size, device="cpu"):
    """Run a step of the model on this rank's samples."""
    group_t = torch.arange(group_size * BATCH, device=device) * 7 % 20
    t = group_t[rank * BATCH : (rank + 1) * BATCH]
    x, y = torch.ones(BATCH, 2, 8, 8, device=device), torch.zeros_like(t)
    model(x, t, y, group_t).prediction.square().mean().backward()


def count_reads_on_ranks(rank, world_size):
    for experts in EXPERTS:
        for depth in (2, 5):
            torch.manual_seed(0)  # gates alike on all ranks
            model = SwitchDiT(
                NetworkOptions(**SIZES, **experts, depth=depth, expert_parallel_size=world_size)
            )
            for module in model.modules():
                if isinstance(module, ExpertParallelMixture):
                    module.set_deepspeed_parallelism()
            with HostReads() as reads:
                forward_and_backward(model, rank, world_size)
            assert reads.counts == {"cpu": 1}, (experts, depth, reads.counts)
            assert model.blocks[-1].mixture.deepspeed_moe.ep_group is not None
            assert all(p.grad is not None for p in model.blocks[-1].mixture.parameters())


@pytest.mark.processes
def test_an_expert_parallel_step_reads_from_the_device_once_at_any_depth():
    run_ranks(count_reads_on_ranks, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("experts", EXPERTS)
def test_an_expert_parallel_step_waits_for_the_gpu_once_at_any_depth(experts, monkeypatch):
    # One GPU stands for rank 0 of two: what the other would send is made up on the spot.
    monkeypatch.setattr(ExpertParallelMixture, "group_rank_and_size", lambda _: (0, 2))
    monkeypatch.setattr(
        "deepspeed.comm.all_to_all_single", lambda output, *_, **__: output.fill_(0.5)
    )
    counts = []
    for depth in (2, 5):
        model = SwitchDiT(
            NetworkOptions(**SIZES, **experts, depth=depth, expert_parallel_size=2)
        ).cuda()
        forward_and_backward(model, 0, 2, "cuda")  # cuBLAS and the allocator start

        counts.append(cuda_waits(lambda model=model: forward_and_backward(model, 0, 2, "cuda")))

    assert [count.total() for count in counts] == [1, 1], counts
