"""Whether two trainings that add the same numbers up in another order came to the same weights."""

LEARNING_RATE = 1e-3  # of tests/small.yaml and the demo's preset


def assert_trained_alike(found, expected, label=""):
    """Compare weights by name; those of runs with LEARNING_RATE.

    Adam divides a gradient by its own size. Where one is next to nothing, the rounding of it, which
    differs between CPUs too, moves that one weight by a fraction of the learning rate. So a tensor
    as a whole agrees to rounding, and no weight is off by what a step of its own would move it.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = found[name] - value
        if name.endswith("attn.qkv.bias"):
            # One value added to all keys changes no attention: that gradient is rounding alone.
            queries, _, values = difference.chunk(3)
            difference = (queries**2 + values**2).sqrt()
        root_mean_square = difference.square().mean().sqrt()
        assert root_mean_square <= 5e-4 * LEARNING_RATE, (label, name, root_mean_square)
        assert difference.abs().max() <= 0.05 * LEARNING_RATE, (label, name, difference.abs().max())
