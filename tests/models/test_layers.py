import math

import pytest
import torch

from models.layers import (
    Attention,
    DiTBlock,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    sincos_positions,
    timestep_features,
)
from tests.support.tiny_models import tiny_options


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def with_random_parameters(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def test_positions_encode_column_then_row():
    table = sincos_positions(3, 5, 16)

    assert table.shape == (15, 16) and table.dtype == torch.float32
    for row in range(3):
        for column in range(5):
            expected = []
            for place in (column, row):
                angles = [place / 10_000 ** (i / 4) for i in range(4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(table[row * 5 + column], torch.tensor(expected))


def test_timestep_features_are_cosines_then_sines():
    features = timestep_features(torch.tensor([0, 7, 999]))

    for row, t in zip(features.tolist(), (0, 7, 999), strict=True):
        for i in (0, 1, 64, 127):
            angle = t * 10_000 ** (-i / 128)
            assert row[i] == pytest.approx(math.cos(angle), abs=1e-4)
            assert row[128 + i] == pytest.approx(math.sin(angle), abs=1e-4)


def test_patches_are_embedded_row_by_row():
    embed = PatchEmbed(2, 3, 8)
    x = torch.randn(2, 3, 4, 6)

    tokens = embed(x)

    weight = embed.proj.weight.flatten(1)
    for row in range(2):
        for column in range(3):
            patch = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1)
            torch.testing.assert_close(tokens[:, 3 * row + column], patch @ weight.T)


def test_attention_equals_a_loop_over_heads():
    attention = with_random_parameters(Attention(12, 3))
    x = torch.randn(2, 5, 12)

    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    heads = []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(4)
        heads.append(scores.softmax(-1) @ v[..., part])

    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, dim=-1)))


def test_a_new_block_is_the_identity_and_a_new_final_layer_is_zero():
    x, c = torch.randn(2, 5, 16), torch.randn(2, 16)

    assert torch.equal(DiTBlock(tiny_options())(x, c), x)
    assert torch.equal(FinalLayer(16, 2, 8)(x, c), torch.zeros(2, 5, 32))


def test_the_mask_splits_the_stream_between_block_and_bypass():
    block = with_random_parameters(DiTBlock(tiny_options())).double()
    x, c = torch.randn(2, 5, 16).double(), torch.randn(2, 16).double()
    mask = torch.rand(2, 5, 16).double()

    expected = block(x * mask, c) + (1 - mask) * x

    torch.testing.assert_close(block(x, c, mask - 1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timesteps_are_embedded_in_float32_whatever_the_weights(dtype):
    embedder = with_random_parameters(TimestepEmbedder(16)).to(dtype)
    t = torch.arange(1000)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        embedding = embedder(t)

    assert embedding.dtype == torch.float32
    weights = [p.float() for p in embedder.parameters()]
    hidden = torch.nn.functional.silu(timestep_features(t) @ weights[0].T + weights[1])
    torch.testing.assert_close(embedding, hidden @ weights[2].T + weights[3])


def test_the_last_row_of_the_label_table_is_the_null_class():
    embedder = LabelEmbedder(10, 16)

    assert embedder.embedding_table.num_embeddings == 11
    assert torch.equal(embedder(torch.tensor([10]))[0], embedder.embedding_table.weight[10])
