import json
from pathlib import Path

import pytest
import torch

from data_tools.errors import ConfigError
from data_tools.stream.loader import Batch
from models.loss_weights import UncertaintyWeights, cluster_log_variances
from models.prior import prior_loss
from models.switch_dit import SwitchDiTOutput
from models.unit_matching import match_units
from tests.support import reference_objectives
from tests.support.configs import small
from training.config.validation import validate
from training.engine.objective import Objective

ROOT = Path(__file__).resolve().parents[3]
DEPTH, EXPERTS, TIMESTEPS = 6, 3, 1000  # of tests/small.yaml


def objective(rank=0, device="cpu", world_size=4, is_frozen=False, **values):
    return Objective(small(**values), rank, 0.5, 0.1, torch.device(device), world_size, is_frozen)


def stored(positions, label=0):
    """A batch of latents as they come from the data, the same for the same positions."""
    N = len(positions)
    raw = torch.randn(N, 8, 4, 4, generator=torch.Generator().manual_seed(int(positions[0])))
    return Batch(raw.half(), torch.full((N,), label), positions)


def gates(seed):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(DEPTH, TIMESTEPS, EXPERTS, generator=generator)).softmax(-1)


def output_for(micro_batch, gate_table=None, log_variance=None, channels=4):
    generator = torch.Generator().manual_seed(1)
    shape = (len(micro_batch.t), channels, 4, 4)
    prediction = torch.randn(shape, generator=generator)
    return SwitchDiTOutput(prediction, gate_table, None, log_variance)


@pytest.mark.parametrize("values", [{}, {"timestep_stratified": True}, {"timestep_shift": 2.0}])
def test_every_rank_knows_the_timesteps_of_its_expert_group(values):
    N, world_size, group_size, own = 4, 4, 2, 64 // 4
    first = 64 * 3 + 2 * N  # the third micro-step of the first rank in the fourth step
    plain = objective(**values)
    for rank in range(world_size):
        shared = objective(rank, expert_parallel_size=group_size, **values)
        positions = first + rank * own + torch.arange(N)
        leader = rank // group_size * group_size
        members = [first + (leader + k) * own + torch.arange(N) for k in range(group_size)]
        group = torch.cat(members)

        found = shared.micro_batch(stored(positions))

        assert torch.equal(found.t, plain.micro_batch(stored(positions)).t)
        assert torch.equal(found.group_t, plain.micro_batch(stored(group)).t)
        assert torch.equal(plain.timesteps.draw(0, group), found.group_t)


def test_ranks_agree_on_dealt_timesteps_and_go_on_after_a_resume():
    N, group_size = 8, 3
    sizes = {"world_size": 3, "expert_parallel_size": group_size, "global_batch_size": 24}
    values = sizes | {"timestep_dealing": "affine"}
    ranks = [objective(rank, **values) for rank in range(group_size)]
    plain = objective(0, **sizes)
    own = [torch.arange(N) + rank * N for rank in range(group_size)]
    drawn = plain.micro_batch(stored(own[0])).group_t
    assert torch.equal(ranks[0].micro_batch(stored(own[0])).group_t, drawn), "no gates known yet"

    for rank in ranks:
        batch = rank.micro_batch(stored(own[rank.rank]))
        rank.loss(output_for(batch, gates(1), channels=8), batch, step=0)
    resumed = objective(0, **values)
    resumed.load_state(ranks[0].state())

    batches = [rank.micro_batch(stored(own[rank.rank])) for rank in ranks]
    dealt = batches[0].group_t
    assert torch.equal(dealt.sort().values, drawn.sort().values) and not torch.equal(dealt, drawn)
    for batch, rank in zip(batches, ranks, strict=True):
        assert torch.equal(batch.group_t, dealt)
        assert torch.equal(batch.t, dealt[own[rank.rank]])
    # The noise stays where it is; only its strength is dealt.
    undealt = plain.micro_batch(stored(own[0]))
    assert torch.equal(batches[0].noise, undealt.noise)
    assert torch.equal(batches[0].x_start, undealt.x_start)
    assert not torch.equal(batches[0].x_t, undealt.x_t)
    assert torch.equal(resumed.micro_batch(stored(own[0])).group_t, dealt)

    resumed.use_slots(torch.arange(EXPERTS).flip(0).repeat(DEPTH, 1))

    assert torch.equal(resumed.micro_batch(stored(own[0])).group_t, drawn), "of other places"
    assert "served_at_home" not in resumed.state()


@pytest.mark.parametrize("num_classes", [1, 10, 10_000])
def test_a_dropped_label_is_the_class_behind_the_last(num_classes):
    label = num_classes - 1
    subject = objective(num_classes=num_classes, class_dropout_prob=0.1)

    y = subject.micro_batch(stored(torch.arange(2500), label)).y

    assert set(y.tolist()) == {label, num_classes}
    assert (y == num_classes).float().mean().item() == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("label", [0, 7])
def test_an_unconditional_model_sees_class_zero_whatever_the_data_has(label):
    batch = objective(num_classes=0).micro_batch(stored(torch.arange(64), label))

    assert not batch.y.any()


@pytest.mark.parametrize("process", ["epsilon", "v", "x0", "flow"])
@pytest.mark.parametrize("weight", ["constant", "min_snr", "p2"])
def test_the_total_is_weighted_and_its_parts_are_not(process, weight):
    subject = objective(
        objective=process, learned_variance=False, loss_weight=weight, routing="dense"
    )
    batch = subject.micro_batch(stored(torch.arange(16)))
    output = output_for(batch)

    terms, (mse, _) = subject.loss(output, batch, step=0)

    signals, sigmas = reference_objectives.process(process, "cosine", TIMESTEPS)
    expected = 0.0
    for i, t in enumerate(batch.t.tolist()):
        at = signals[t], sigmas[t]
        aim = reference_objectives.target(process, batch.x_start[i], batch.noise[i], *at)
        error = ((output.prediction[i].numpy() - aim) ** 2).mean()
        assert mse[i].item() == pytest.approx(error, rel=1e-4)
        gamma = {"min_snr": 5.0, "p2": 1.0}.get(weight)
        snr = (at[0] / at[1]) ** 2
        factor = reference_objectives.published_weight(weight, process, snr, at[1], gamma)
        expected += factor * error / 16
    assert terms.total.item() == pytest.approx(expected, rel=1e-4)
    assert terms.mse.item() == pytest.approx(mse.mean().item())
    assert terms.vlb.item() == 0.0 and terms.prior.item() == 0.0


def test_a_weight_leaves_the_variational_bound_alone():
    batch = objective().micro_batch(stored(torch.arange(8)))
    output = output_for(batch, channels=8)
    plain, _ = objective(routing="dtr").loss(output, batch, step=0)

    weighted, _ = objective(routing="dtr", loss_weight="p2").loss(output, batch, step=0)

    assert weighted.total < plain.total and weighted.vlb.item() == plain.vlb.item() > 0
    assert weighted.mse == plain.mse


def test_uncertainty_weights_scale_the_loss_of_their_timesteps():
    subject = objective(loss_weight="uncertainty", routing="dense")
    weights = UncertaintyWeights(TIMESTEPS)
    weights.scaled_log_variance.data.copy_(torch.linspace(-0.01, 0.01, 8))
    batch = subject.micro_batch(stored(torch.arange(8)))  # not one of each cluster
    output = output_for(batch, log_variance=weights(), channels=8)

    terms, (mse, _) = subject.loss(output, batch, step=0)

    _, vlb = subject.diffusion.loss_terms(
        output.prediction, batch.x_start, batch.x_t, batch.t, batch.noise
    )
    s = cluster_log_variances(output.loss_log_variance)[batch.t // 125]
    expected = 0.5 * (torch.exp(-s) * (mse + vlb) + 8 * s)
    torch.testing.assert_close(terms.total, expected.mean())
    terms.total.backward()
    assert weights.scaled_log_variance.grad.abs().sum() > 0


def prior_terms(subject, steps):
    """The prior's term of two micro-steps of each step, with gates that change every step."""
    terms = []
    for step in steps:
        for micro_step in range(2):
            batch = subject.micro_batch(stored(64 * step + 32 * micro_step + torch.arange(32)))
            output = output_for(batch, gates(step), channels=8)
            terms.append(subject.loss(output, batch, step)[0].prior.item())
    return terms


@pytest.mark.parametrize("every", [1, 3])
def test_units_are_matched_in_the_steps_that_the_interval_divides(every):
    subject = objective(prior_matching_every=every)

    found = prior_terms(subject, range(5))

    expected = []
    for step in range(5):
        matched = step - step % every
        units = match_units(gates(matched), 2, subject.prior, seed=matched)
        for micro_step in range(2):
            positions = 64 * step + 32 * micro_step + torch.arange(32)
            t = subject.timesteps.draw(0, positions)
            expected.append(prior_loss(gates(step), subject.prior, t, units).item())
    assert found == expected


@pytest.mark.parametrize(("every", "stop"), [(1, 2), (3, 1), (3, 2), (3, 3), (3, 5)])
def test_a_resumed_run_uses_the_matching_of_the_uninterrupted_one(every, stop):
    uninterrupted = prior_terms(objective(prior_matching_every=every), range(6))
    first, second = (objective(prior_matching_every=every) for _ in range(2))
    before = prior_terms(first, range(stop))

    second.load_state(json.loads(json.dumps(first.state())))

    assert before + prior_terms(second, range(stop, 6)) == uninterrupted


def test_a_run_without_a_stored_matching_matches_at_once():
    subject = objective(prior_matching_every=4)
    subject.load_state({})

    terms = prior_terms(subject, [2, 3, 4])

    assert len(set(terms)) == 6 and subject.state()["matched_step"] == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"objective": "flow", "learned_variance": True},
            "--learned-variance does not go with --objective flow, whose sampling steps have no "
            "variance; use --no-learned-variance or another objective.",
        ),
        (
            {"objective": "v", "loss_weight": "cosmap"},
            "--loss-weight cosmap is defined for --objective flow, not v; use constant, min_snr, "
            "p2 or uncertainty.",
        ),
        (
            {"noise_schedule": "linear", "num_timesteps": 20, "sample_steps": 7},
            "--num-timesteps 20 is too few for --noise-schedule linear, whose last step would hold "
            "more than all noise; use 21 or more, or cosine.",
        ),
        (
            {"loss_weight": "uncertainty", "num_timesteps": 7, "sample_steps": 7},
            "--loss-weight uncertainty needs at least 8 timesteps, one for each of its clusters, "
            "not --num-timesteps 7.",
        ),
        (
            {"timestep_sampling": "mode", "mode_scale": 1.8},
            "--mode-scale 1.8 is not between -1 and 1.7519, outside of which mode sampling is no "
            "density; choose one inside.",
        ),
        (
            {"timestep_sampling": "logit_normal", "timestep_mean": float("inf")},
            "--timestep-mean must be finite, not inf.",
        ),
    ],
)
def test_objectives_that_do_not_exist_are_refused_in_one_sentence(values, message):
    with pytest.raises(ConfigError) as raised:
        validate(small(**values), ROOT / "ds_configs" / "zero2.json", world_size=1)

    assert str(raised.value) == message


@pytest.mark.parametrize("process", ["epsilon", "v", "x0", "flow"])
@pytest.mark.parametrize(
    "weight", ["constant", "min_snr", "p2", "uncertainty", "sigma_sqrt", "cosmap"]
)
@pytest.mark.parametrize("learned", [None, False, True])
def test_every_combination_is_either_refused_or_computed(process, weight, learned):
    values = {"objective": process, "loss_weight": weight, "learned_variance": learned}
    flow_only = weight in ("sigma_sqrt", "cosmap")
    is_wrong = process != "flow" if flow_only else False
    is_wrong = is_wrong or (process == "flow" and learned)
    arguments = ROOT / "ds_configs" / "zero2.json", 1
    if is_wrong:
        with pytest.raises(ConfigError):
            validate(small(**values), *arguments)
        return
    validate(small(**values), *arguments)
    subject = objective(**values)
    batch = subject.micro_batch(stored(torch.arange(8)))
    log_variance = UncertaintyWeights(TIMESTEPS)() if weight == "uncertainty" else None
    channels = 8 if subject.diffusion.learned_variance else 4
    output = output_for(batch, gates(0), log_variance, channels)

    terms, _ = subject.loss(output, batch, step=0)

    assert all(torch.isfinite(term) and term.dtype == torch.float32 for term in terms)


@pytest.mark.gpu
@pytest.mark.parametrize("weight", ["p2", "uncertainty"])
def test_a_step_waits_for_the_gpu_only_to_match_units(weight):
    subject = objective(
        device="cuda",
        loss_weight=weight,
        timestep_sampling="logit_normal",
        timestep_stratified=True,
        prior_matching_every=2,
    )
    stored_batch = stored(torch.arange(8))
    stored_batch = Batch(*(tensor.pin_memory() for tensor in stored_batch))
    log_variance = torch.zeros(TIMESTEPS, device="cuda")
    table = gates(0).cuda()
    prediction = torch.zeros(8, 8, 4, 4, device="cuda")
    output = SwitchDiTOutput(prediction, table, None, log_variance)
    batch = subject.micro_batch(stored_batch)
    subject.loss(output, batch, step=0)  # matches

    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = subject.micro_batch(stored_batch)
        subject.loss(output, batch, step=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_units_are_matched_while_the_blocks_run():
    subject, expected = (objective(device="cuda") for _ in range(2))
    gate = torch.nn.Identity()
    subject.gate_stream.watch(gate)
    batch = subject.micro_batch(stored(torch.arange(8)))
    table = gate(gates(0).cuda())
    output = SwitchDiTOutput(torch.zeros(8, 8, 4, 4, device="cuda"), table, None, None)
    torch.cuda.synchronize()

    gate(table)
    torch.cuda._sleep(4_000_000_000)  # two seconds, as of the blocks behind the gates
    terms, _ = subject.loss(output, batch, step=0)
    is_still_running = not torch.cuda.current_stream().query()

    assert is_still_running
    assert torch.equal(terms.prior, expected.loss(output, batch, step=0)[0].prior)


def test_frozen_latents_are_scaled_and_draw_no_posterior_noise():
    N = 4
    latents = torch.randn(N, 4, 16, 16)
    batch = Batch(latents, torch.zeros(N, dtype=torch.int64), torch.arange(N))
    frozen = objective(is_frozen=True).micro_batch(batch)
    assert torch.equal(frozen.x_start, (latents - 0.1) * 0.5)
    certain = torch.cat([latents, torch.full_like(latents, -200.0)], dim=1)
    moments = objective().micro_batch(batch._replace(raw_latents=certain))
    torch.testing.assert_close(moments.x_start, frozen.x_start, rtol=0, atol=1e-6)
    assert torch.equal(moments.noise, frozen.noise) and torch.equal(moments.t, frozen.t)
