"""Schedules of the learning rate: their values, and what a continued run may change."""

import math

import pytest

from data_tools.errors import ConfigError
from tests.support.configs import small
from training.config.learning_rate import check_past, check_schedule, learning_rate
from training.monitoring.event_files import read_metrics

LR = 2.0


def scheduled(kind, **values):
    return small(**{"lr": LR, "warmup_steps": 10, "max_steps": 100, "lr_schedule": kind} | values)


def rates(config, *steps):
    return [learning_rate(config, step) for step in steps]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd", "inverse-sqrt"])
def test_every_schedule_warms_up_alike(kind):
    length = {"inverse-sqrt": 50}.get(kind)

    found = rates(scheduled(kind, lr_length=length), 0, 4, 9, 10)

    assert found == [0.2, 1.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("config", "steps", "expected"),
    [
        (scheduled("constant"), (50, 99, 500), (2.0, 2.0, 2.0)),
        (scheduled("linear"), (55, 100, 500), (1.0, 0.0, 0.0)),
        (scheduled("linear", lr_floor=0.1), (55, 100), (2.0 * 0.55, 0.2)),
        (scheduled("linear", lr_length=50), (30, 50, 99), (1.0, 0.0, 0.0)),
        (scheduled("cosine"), (55, 100), (1.0, 0.0)),
        (scheduled("cosine", lr_floor=0.5), (10 + 30,), (1.0 + 0.5 * (1 + math.cos(math.pi / 3)),)),
        (scheduled("wsd"), (79, 80, 85, 100), (2.0, 2.0, 1.0, 0.0)),
        (scheduled("wsd", lr_length=40), (60, 70, 100), (2.0, 1.0, 0.0)),
        (scheduled("inverse-sqrt", lr_length=25), (25, 100, 400), (2.0, 1.0, 0.5)),
    ],
)
def test_a_schedule_falls_as_its_formula_says(config, steps, expected):
    assert rates(config, *steps) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (scheduled("inverse-sqrt"), "give it, such as --lr-length 10"),
        (scheduled("constant", lr_length=5), "--lr-length 5 does nothing with --lr-schedule const"),
        (scheduled("cosine", lr_length=200), "--lr-length 200 is more than --max-steps 100"),
        (scheduled("wsd", lr_length=95), "--lr-length 95 of --lr-schedule wsd begins within"),
        (scheduled("linear", lr_length=8), "--warmup-steps 10 leaves --lr-schedule linear nothing"),
    ],
)
def test_a_schedule_without_room_is_refused(config, words):
    with pytest.raises(ConfigError, match=words):
        check_schedule(config)


@pytest.mark.parametrize(
    ("old", "new", "step"),
    [
        (scheduled("constant"), scheduled("wsd", max_steps=120), 96),
        (scheduled("constant"), scheduled("wsd", lr_length=60), 40),
        (scheduled("wsd"), scheduled("wsd", max_steps=1000), 80),
        (scheduled("linear", lr_length=50), scheduled("linear", lr_length=50, max_steps=300), 90),
        (scheduled("cosine"), scheduled("linear"), 11),
        (scheduled("constant"), scheduled("cosine"), 0),
    ],
)
def test_what_no_past_step_would_notice_may_change(old, new, step):
    check_past(old, new, step)


@pytest.mark.parametrize(
    ("old", "new", "step"),
    [
        (scheduled("cosine"), scheduled("cosine", max_steps=120), 50),
        (scheduled("constant"), scheduled("wsd", max_steps=120), 98),
        (scheduled("wsd"), scheduled("constant"), 82),
        (scheduled("linear"), scheduled("linear", lr_floor=0.1), 20),
        (scheduled("cosine"), scheduled("linear"), 12),
    ],
)
def test_another_past_is_refused(old, new, step):
    with pytest.raises(
        ConfigError,
        match=f"come to step {step}, which was --lr-schedule {old.optim.lr_schedule} of",
    ):
        check_past(old, new, step)


@pytest.mark.processes
def test_a_run_at_a_constant_rate_cools_down(train_forked, tmp_path, demo_latents):
    def train(max_steps, *flags, expect=0):
        return train_forked(
            *("--data", demo_latents, "--run-dir", tmp_path / "run", "--max-steps", max_steps),
            *("--global-batch-size", 4, "--warmup-steps", 0, "--log-every", 1, "--save-every", 4),
            *("--sample-every", 0, "--patch-size", 8, *flags),
            num_ranks=1,
            expect=expect,
        )

    train(4)
    train(8, "--lr-schedule", "wsd", "--lr-length", 4)

    found = [record["optim/lr"] for record in read_metrics(tmp_path / "run")]
    peak = found[0]
    assert found[:5] == [peak] * 5
    assert found[5:] == pytest.approx([peak * (1 - math.sqrt(u)) for u in (0.25, 0.5, 0.75)])
    said = train(12, "--lr-schedule", "wsd", "--lr-length", 4, expect=2)
    assert "say --reschedule to go on by the new one" in said
    train(12, "--lr-schedule", "wsd", "--lr-length", 4, "--reschedule")
    assert len(read_metrics(tmp_path / "run")) == 12
