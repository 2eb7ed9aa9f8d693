"""The initial weights, against the paper's products in float64."""

import open_clip
import pytest
import torch

from vitrine.training.pretraining.mimetic import mimetic_start, sine_cosine_positions
from vitrine.training.recipes.recipe import RecipeError

TEXT = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
VISION = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 8}


def tower(seed=0, **changes):
    torch.manual_seed(seed)
    return open_clip.CLIP(8, VISION | changes, TEXT).visual


@pytest.fixture
def products():
    """products(visual, seed) -> for each block its random matrices, drawn as `mimetic_start` draws them: float64."""

    def draw(visual, seed):
        generator = torch.Generator().manual_seed(seed)
        for block in visual.transformer.resblocks:
            width, heads = block.attn.embed_dim, block.attn.num_heads
            noise = [torch.randn(width, width, generator=generator).double() / width**0.5 for _ in range(heads + 1)]
            yield block.attn, torch.eye(width).double(), noise[:-1], noise[-1]

    return draw


def test_query_key_product_is_the_best_approximation_of_its_rank(products):
    visual = tower()
    mimetic_start(visual, torch.Generator().manual_seed(5))
    for attention, identity, noises, _ in products(visual, 5):
        query, key, _ = attention.in_proj_weight.detach().double().chunk(3)
        for head, noise in enumerate(noises):
            rows = slice(8 * head, 8 * head + 8)
            product, target = query[rows].T @ key[rows], 0.7 * noise + 0.7 * identity
            values = torch.linalg.svdvals(target)
            # Eckart and Young: of rank 8, and as far from `target` as its other singular values say, not further.
            assert torch.linalg.matrix_rank(product, rtol=1e-4) == 8
            assert torch.linalg.svdvals(target - product)[0] == pytest.approx(float(values[8]), rel=1e-4)
            assert (target - product).square().sum() == pytest.approx(float(values[8:].square().sum()), rel=1e-4)
            assert query[rows].norm() == pytest.approx(
                float(key[rows].norm()), rel=1e-4
            )  # the values are shared out evenly


def test_value_output_product(products):
    visual = tower()
    mimetic_start(visual, torch.Generator().manual_seed(6))
    for attention, identity, _, noise in products(visual, 6):
        value = attention.in_proj_weight.detach().double().chunk(3)[2]
        target = 0.4 * noise - 0.4 * identity
        torch.testing.assert_close(value.T @ attention.out_proj.weight.double().T, target, atol=1e-6, rtol=1e-5)


def test_attention_does_with_the_products_what_the_paper_says(products):
    """torch's own MultiheadAttention on one token, whose only key is itself: x -> x (0.4 Z - 0.4 I)."""
    visual = tower()
    mimetic_start(visual, torch.Generator().manual_seed(7))
    tokens = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(0))
    for attention, identity, _, noise in products(visual, 7):
        output, _ = attention(tokens, tokens, tokens)
        torch.testing.assert_close(output.double(), tokens.double() @ (0.4 * noise - 0.4 * identity), atol=1e-5, rtol=0)


def test_attention_starts_near_the_identity():
    """A token's largest attention weight is on itself, far more often than by chance."""
    visual = tower(width=64, head_width=16)
    before = visual.transformer.resblocks[0].attn.in_proj_weight.detach().clone()
    mimetic_start(visual, torch.Generator().manual_seed(1))
    attention = visual.transformer.resblocks[0].attn
    tokens = 2 * torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(0))

    def share_on_itself():
        weights = attention(tokens, tokens, tokens, average_attn_weights=False)[1]
        return (weights.argmax(-1) == torch.arange(16)).double().mean()

    assert share_on_itself() > 0.6
    with torch.no_grad():
        attention.in_proj_weight.copy_(before)
    assert share_on_itself() < 0.2


def test_only_attention_and_patches_positions_are_overwritten():
    visual, untouched = tower(), tower()
    mimetic_start(visual, torch.Generator().manual_seed(0))
    changed = {
        name
        for (name, one), other in zip(visual.named_parameters(), untouched.parameters(), strict=True)
        if not torch.equal(one, other)
    }
    blocks = {
        f"transformer.resblocks.{n}.attn.{part}" for n in (0, 1) for part in ("in_proj_weight", "out_proj.weight")
    }
    assert changed == blocks | {"positional_embedding"}
    assert torch.equal(visual.positional_embedding[0], untouched.positional_embedding[0])
    assert torch.equal(visual.positional_embedding[1:], sine_cosine_positions(4, 4, 32))
    assert all(parameter.requires_grad for parameter in visual.parameters())


def test_generator_decides():
    one, same, other = tower(seed=1), tower(seed=2), tower(seed=1)
    for visual, seed in ((one, 3), (same, 3), (other, 4)):
        mimetic_start(visual, torch.Generator().manual_seed(seed))
    weights = [visual.transformer.resblocks[1].attn.in_proj_weight for visual in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])


def test_positions_by_hand():
    """2 rows, 3 columns, width 8: frequencies 1 and 1 / 100; sin, sin, cos, cos of the row, then of the column."""
    positions = sine_cosine_positions(2, 3, 8)
    row, column = torch.tensor([[1.0, 0.01], [2.0, 0.02]])
    expected = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()])
    assert positions.shape == (6, 8)
    torch.testing.assert_close(positions[5], expected)
    torch.testing.assert_close(positions[0], torch.tensor([0.0, 0, 1, 1, 0, 0, 1, 1]))
    torch.testing.assert_close(positions[3][:4], expected[:4])  # row 1, column 0: row by row
    torch.testing.assert_close(positions[2][4:], expected[4:])


@pytest.mark.parametrize(("rows", "columns", "width"), [(8, 8, 128), (14, 14, 768), (4, 6, 32), (6, 4, 32), (1, 5, 4)])
def test_positions_distinguish_all_patches(rows, columns, width):
    """The nearest patch to a patch, by dot product, is itself, then one beside it."""
    positions = sine_cosine_positions(rows, columns, width).double()
    distance = torch.cdist(positions, positions)
    distance.fill_diagonal_(torch.inf)
    assert distance.min() > 0.1
    nearest = distance.argmin(1)
    here = torch.arange(rows * columns)
    steps = (here // columns - nearest // columns).abs() + (here % columns - nearest % columns).abs()
    assert (steps == 1).all()


def test_grid_that_is_no_square():
    visual = tower(image_size=[32, 48])
    mimetic_start(visual, torch.Generator().manual_seed(0))
    assert visual.grid_size == (4, 6)
    assert torch.equal(visual.positional_embedding[1:], sine_cosine_positions(4, 6, 32))


def test_width_that_positions_cannot_fill_is_refused():
    with pytest.raises(RecipeError, match=r"width = 30 must be a multiple of 4"):
        mimetic_start(tower(width=30, head_width=15), torch.Generator())
