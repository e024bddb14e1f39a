"""Muon: orthogonal updates against float64 singular vectors, owners of matrices, what travels."""

import json
import sys

import pytest
import torch

from models.matrices import MatrixShape, matrix_shapes
from models.switch_dit import MODEL_SIZES, ModelSize
from tests.support.configs import small
from tests.support.ranks import run_ranks
from training.config.deepspeed_config import merge_deepspeed
from training.cost.closed_forms import count_parameters
from training.cost.memory import muon_traffic
from training.engine.build import build_engine, build_model
from training.engine.deepspeed_internals import base_optimizer
from training.engine.muon import (
    NEWTON_SCHULZ,
    NUM_ITERATIONS,
    UPDATE_RMS,
    MatrixExchange,
    choose_owners,
    cut_into_matrices,
    orthogonal,
)
from training.engine.zero_fragments import Fragment

DEPTH, WIDTH = 3, 32


def of_singular_values(matrix):
    """What the iterations make of a matrix, by its singular value decomposition in float64."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    a, b, c = NEWTON_SCHULZ
    for _ in range(NUM_ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag_embed(s) @ vh, s


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 16, 5), (2, 5, 16), (1, 1, 4), (0, 4, 4)])
def test_singular_vectors_stay_and_singular_values_come_near_one(shape):
    batch = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = batch.clone()

    found = orthogonal(batch)

    expected, values = of_singular_values(batch)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(batch, before)
    assert values.numel() == 0 or (values.min() > 0.5 and values.max() < 1.3)


def test_the_scale_of_an_update_leaves_nothing_behind():
    matrix = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(0))

    torch.testing.assert_close(orthogonal(1e-3 * matrix), orthogonal(matrix), rtol=1e-3, atol=1e-3)
    assert not orthogonal(torch.zeros(2, 4, 6)).any()


@pytest.mark.parametrize("routing", ["switch", "dtr", "dense"])
@pytest.mark.parametrize("kind", ["affine", "mlp"])
def test_matrices_are_the_linear_maps_of_the_blocks(kind, routing):
    model = build_model(small(expert_kind=kind, routing=routing, num_experts=4))
    named = dict(model.named_parameters())

    shapes = matrix_shapes({name: tuple(param.shape) for name, param in named.items()})

    D, H = MODEL_SIZES["demo"].hidden_size, 4 * MODEL_SIZES["demo"].hidden_size
    expected = {
        "attn.qkv.weight": (D, D),
        "attn.proj.weight": (D, D),
        "mlp.fc1.weight": (H, D),
        "mlp.fc2.weight": (D, H),
        "adaLN_modulation.1.weight": (D, D),
    }
    if routing == "switch":
        experts = "mixture.deepspeed_moe.experts"
        names = ["weight"] if kind == "affine" else ["fc1_weight", "fc2_weight"]
        expected |= {f"{experts}.{name}": (D, D) for name in names}
    assert {n.removeprefix("blocks.0."): s for n, s in shapes.items() if ".0." in n[:9]} == expected
    assert len(shapes) == len(expected) * MODEL_SIZES["demo"].depth
    assert all(named[name].numel() % shape.numel == 0 for name, shape in shapes.items())


def test_cut_fragments_cover_their_matrices_once():
    shapes = {"a": MatrixShape(2, 3), "b": MatrixShape(4, 4)}
    ranks = [
        [Fragment("a", 0, 0, 0, 8)],
        [Fragment("a", 0, 5, 8, 10), Fragment("b", 1, 0, 0, 16)],
    ]

    slices = [each for rank in ranks for each in cut_into_matrices(rank, shapes)]

    covered = {}
    for each in slices:
        covered.setdefault(each.matrix, []).extend(range(each.start, each.start + each.numel))
    assert {m: sorted(values) for m, values in covered.items()} == {
        **{("a", i): list(range(6)) for i in range(3)},
        ("b", 0): list(range(16)),
    }
    assert [s[1:] for s in slices if s.matrix == ("a", 1)] == [(0, 0, 6, 2), (2, 0, 5, 4)]


def test_a_matrix_is_owned_by_whoever_has_most_of_it_while_work_stays_even():
    shapes = {"a": MatrixShape(4, 4)}
    held = [cut_into_matrices([Fragment("a", 0, 0, 64 * r, 64)], shapes) for r in range(2)]

    assert choose_owners(held, shapes) == {("a", i): i // 4 for i in range(8)}
    lopsided = choose_owners([[*held[0], *held[1]], []], shapes)
    assert list(lopsided.values()).count(1) >= 3, "a rank may have one matrix above the mean"


SHAPES = {"a": MatrixShape(3, 5), "b": MatrixShape(4, 2)}
NUM_A, NUM_B = 45, 16  # values of both parameters; one more belongs to no matrix


def parts_between(low, high):
    for name, first, numel in (("a", 0, NUM_A), ("b", NUM_A, NUM_B)):
        start, stop = max(low, first), min(high, first + numel)
        if start < stop:
            yield Fragment(name, 0, start - low, start - first, stop - start)


def exchange_by_ranks(rank, world_size, borders, wire):
    whole = torch.randn(NUM_A + NUM_B + 1, generator=torch.Generator().manual_seed(0))
    of_ranks = [
        cut_into_matrices(list(parts_between(*borders[r : r + 2])), SHAPES)
        for r in range(world_size)
    ]
    exchange = MatrixExchange(of_ranks, SHAPES, torch.distributed.group.WORLD, wire)
    here = slice(*borders[rank : rank + 2])

    (found,) = exchange.orthogonalise([whole[here].clone()], torch.device("cpu"))

    expected = [UPDATE_RMS * 5**0.5 * orthogonal(whole[:NUM_A].view(3, 3, 5)).flatten()]
    of_b = whole[NUM_A : NUM_A + NUM_B].view(2, 4, 2)
    expected += [UPDATE_RMS * 4**0.5 * orthogonal(of_b).flatten(), torch.zeros(1)]
    tolerance = 1e-5 if wire == torch.float32 else 2e-2
    torch.testing.assert_close(found, torch.cat(expected)[here], rtol=0, atol=tolerance)


@pytest.mark.processes
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("borders", [[0, 20, 40, 62], [0, 3, 3, 62], [0, 61, 62, 62]])
def test_cut_matrices_come_back_as_if_they_had_been_whole(borders, wire):
    run_ranks(exchange_by_ranks, 3, borders, wire)


def configured(expert_parallel_size):
    return small(
        optimizer="muon",
        num_experts=4,
        expert_parallel_size=expert_parallel_size,
        global_batch_size=4,
        gradient_clipping=0.0,
        patch_size=8,
    )


def count_what_travels(rank, world_size, folder):
    MODEL_SIZES["demo"] = ModelSize(DEPTH, WIDTH, num_heads=4)
    for stage, expert_parallel_size in ((0, 1), (2, 1), (2, 2), (3, 1), (3, 2)):
        config = configured(expert_parallel_size)
        path = folder / f"rank{rank}.json"
        zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
        path.write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": False}}))
        engine = build_engine(config, merge_deepspeed(path, config, world_size))
        sent = count_bytes_of_a_step(engine, rank)
        count = count_parameters(config)
        parts = (
            (count.matrices - count.expert_matrices, world_size),
            (count.expert_matrices, world_size // expert_parallel_size),
        )
        expected = sum(
            muon_traffic(number, stage=stage, num_sharing=sharing, wire_bytes=4)
            for number, sharing in parts
        )
        total = torch.tensor([float(sent)])
        torch.distributed.all_reduce(total)
        assert total.item() <= expected * world_size, (stage, expert_parallel_size)
        # Halves of adaLN's six matrices and of four experts are whole ones; of qkv's three, one is
        # cut, as are the projection and the MLP's two of four times the size: half goes and comes.
        assert stage != 3 or total.item() == 4 * DEPTH * (1 + 1 + 4 + 4) * WIDTH**2


def count_bytes_of_a_step(engine, rank):
    """Let an engine train a step; count what Muon's collectives send to other ranks."""
    sent, collective = 0, torch.distributed.all_to_all_single

    def counting(received, travelling, recv, send, group):
        nonlocal sent
        sent += (sum(send) - send[group.rank()]) * travelling.element_size()
        return collective(received, travelling, recv, send, group=group)

    t = torch.tensor([100, 600, 300, 900])
    output = engine(torch.ones(2, 4, 16, 16), t[2 * rank :][:2], torch.zeros(2).long(), t)
    engine.backward(output.prediction.square().mean())
    engine.module.eval()
    muon = sys.modules[MatrixExchange.__module__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon.torch.distributed, "all_to_all_single", counting)
        engine.step()
    assert sent == 4 * base_optimizer(engine).orthogonalise.sent_values
    return sent


@pytest.mark.processes
def test_what_travels_is_counted_and_no_more_than_the_dry_run_says(tmp_path):
    run_ranks(count_what_travels, 2, tmp_path)
