"""The average of the weights: against its closed form, and through saving and loading."""

import copy

import torch

from training.ema import EMA_KEY, EMAAdamW


def train(optimizer, param, steps):
    """Take steps on a fixed sequence of gradients; return the weights after each."""
    history = []
    for step in range(steps):
        param.grad = torch.full_like(param, float(step + 1))
        optimizer.step()
        history.append(param.detach().clone())
    return history


def test_constant_decay_matches_the_closed_form():
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    param = torch.nn.Parameter(start.clone())
    optimizer = EMAAdamW([param], lr=0.1, ema_decay=0.9)

    history = train(optimizer, param, 7)

    expected = 0.9**7 * start
    for age, weights in enumerate(reversed(history)):
        expected = expected + 0.1 * 0.9**age * weights
    torch.testing.assert_close(optimizer.state[param][EMA_KEY], expected)


def test_warm_up_limits_the_decay_of_early_steps():
    param = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = EMAAdamW([param], lr=0.1, ema_decay=0.5, ema_warmup=True)
    expected = param.detach().clone()

    for step, weights in enumerate(train(optimizer, param, 20)):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights

    torch.testing.assert_close(optimizer.state[param][EMA_KEY], expected)


def test_parameters_move_exactly_as_under_adamw():
    ours = torch.nn.Parameter(torch.ones(3))
    theirs = torch.nn.Parameter(torch.ones(3))
    settings = {"lr": 0.1, "weight_decay": 0.01, "betas": (0.8, 0.95)}

    a = train(EMAAdamW([ours], ema_decay=0.9, **settings), ours, 5)
    b = train(torch.optim.AdamW([theirs], **settings), theirs, 5)

    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_group_without_gradient_keeps_no_average():
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = EMAAdamW([used, unused], lr=0.1, ema_decay=0.9)

    train(optimizer, used, 1)

    assert EMA_KEY in optimizer.state[used]
    assert EMA_KEY not in optimizer.state[unused]


def test_saving_and_loading_continues_the_average():
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = EMAAdamW([param], lr=0.1, ema_decay=0.9)
    train(optimizer, param, 3)
    saved, weights = copy.deepcopy(optimizer.state_dict()), param.detach().clone()
    train(optimizer, param, 2)

    again = torch.nn.Parameter(weights)
    resumed = EMAAdamW([again], lr=0.1, ema_decay=0.9)
    resumed.load_state_dict(saved)
    train(resumed, again, 2)

    assert torch.equal(resumed.state[again][EMA_KEY], optimizer.state[param][EMA_KEY])
