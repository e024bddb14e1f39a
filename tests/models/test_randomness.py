import pytest
import torch

from models.randomness import Stream, integers, normal, uniform

MASK_64 = (1 << 64) - 1


def splitmix64_output(state):
    """The n-th output of splitmix64 seeded with s is this function of s + n * increment."""
    z = state & MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK_64
    return z ^ (z >> 31)


def hash_in_python(seed, stream, position, element):
    increment = 0x9E3779B97F4A7C15
    of_seed = splitmix64_output((seed & MASK_64) + increment)
    key = splitmix64_output(of_seed + int(stream) + 1 + increment)
    of_position = splitmix64_output(position * increment + key)
    return splitmix64_output(of_position ^ splitmix64_output((element + 1) * increment))


def test_the_mixing_function_is_that_of_splitmix64():
    # First output of the published generator for seed 1234567.
    assert splitmix64_output(1234567 + 0x9E3779B97F4A7C15) == 6457827717110365317


@pytest.mark.parametrize("seed", [0, 1, -3, 2**63 + 5])
def test_numbers_equal_integer_arithmetic_of_unlimited_width(seed):
    positions = torch.tensor([0, 1, 7, 10**12])

    numbers = uniform(seed, Stream.NOISE, positions, 3)
    choices = integers(seed, Stream.TIMESTEP, positions, 1000)

    for row, position in enumerate(positions.tolist()):
        for element in range(3):
            expected = (hash_in_python(seed, Stream.NOISE, position, element) >> 40) / 2**24
            assert numbers[row, element].item() == expected
        hashed = hash_in_python(seed, Stream.TIMESTEP, position, 0)
        assert choices[row].item() == (hashed >> 1) % 1000


@pytest.mark.parametrize("draw", [uniform, normal])
def test_a_number_depends_on_neither_batch_nor_order_nor_count(draw):
    whole = draw(5, Stream.NOISE, torch.arange(64), 9)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0))

    assert torch.equal(draw(5, Stream.NOISE, shuffled[:10], 4), whole[shuffled[:10], :4])


def test_seeds_streams_and_positions_give_unrelated_numbers():
    draws = [
        normal(seed, stream, torch.arange(start, start + 200), 200).flatten()
        for seed, stream, start in [
            (0, Stream.NOISE, 0),
            (1, Stream.NOISE, 0),
            (0, Stream.POSTERIOR, 0),
            (0, Stream.NOISE, 200),
        ]
    ]

    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(4)

    assert correlation.abs().max() < 5 / 200  # 5 standard errors of 40,000 pairs


def test_normal_numbers_have_the_moments_of_a_normal_distribution():
    z = normal(3, Stream.NOISE, torch.arange(2000), 500).double()

    assert abs(z.mean()) < 5e-3
    assert abs(z.var() - 1) < 7e-3
    assert abs((z**4).mean() - 3) < 5e-2
    for edge in (-2.0, -1.0, 0.0, 1.0, 2.0):
        expected = torch.special.ndtr(torch.tensor(edge)).item()
        assert abs((z < edge).double().mean() - expected) < 2.5e-3
    assert torch.isfinite(z).all()


def test_uniform_numbers_fill_the_half_open_interval_evenly():
    u = uniform(9, Stream.LABEL_DROP, torch.arange(1000), 100)

    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, bins=20, min=0, max=1)
    assert ((counts - 5000) ** 2 / 5000).sum() < 50  # chi-square, 19 degrees of freedom


def test_integers_reach_every_value_equally_often():
    counts = integers(2, Stream.TIMESTEP, torch.arange(100_000), 10).bincount(minlength=10)

    assert counts.shape == (10,)
    assert ((counts - 10_000.0) ** 2 / 10_000).sum() < 35  # chi-square, 9 degrees of freedom


def test_stream_values_never_change():
    assert {stream.name: stream.value for stream in Stream} == {
        "POSTERIOR": 0,
        "FLIP": 1,
        "LABEL_DROP": 2,
        "TIMESTEP": 3,
        "NOISE": 4,
        "SAMPLE_START": 5,
        "SAMPLE_STEP": 6,
        "TIMESTEP_STRATUM": 7,
        "SAMPLE_LABEL": 8,
    }


@pytest.mark.gpu
def test_cpu_and_gpu_draw_the_same_numbers():
    positions = torch.arange(100)

    on_cpu = normal(0, Stream.NOISE, positions, 4096)
    on_gpu = normal(0, Stream.NOISE, positions.cuda(), 4096).cpu()

    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-6, atol=1e-7)
    assert torch.equal(
        uniform(0, Stream.FLIP, positions.cuda(), 8).cpu(), uniform(0, Stream.FLIP, positions, 8)
    )
