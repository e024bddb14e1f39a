"""Loss spikes: found where a loss jumps, and only there."""

import math
import random

from training.monitoring.loss_spikes import SpikeDetector


def losses(count):
    generator = random.Random(0)
    return [1.0 + 0.1 * generator.gauss(0.0, 1.0) for _ in range(count)]


def test_a_spike_is_found_and_ordinary_losses_are_not():
    detector = SpikeDetector(threshold=6.0)

    found = [detector.add(step, loss) for step, loss in enumerate([*losses(1000), 2.5, 3.0])]

    assert not any(found[:1000])
    assert found[1000].step == 1000 and 12 < found[1000].deviations < 18
    assert found[1001] is not None, "the first does not hide the second"
    assert str(found[1000]).startswith("loss spike at step 1000: 2.5 is 1")


def test_a_falling_loss_an_early_jump_and_threshold_zero_report_nothing():
    falling = [math.exp(-step / 100) + 0.01 * loss for step, loss in enumerate(losses(500))]
    early = [1.0, 1.1, 0.9, 50.0]

    assert not any(SpikeDetector(6.0).add(step, loss) for step, loss in enumerate(falling))
    assert not any(SpikeDetector(6.0).add(step, loss) for step, loss in enumerate(early))
    off = SpikeDetector(0.0)
    assert not any(off.add(step, loss) for step, loss in enumerate([*losses(200), 99.0]))
