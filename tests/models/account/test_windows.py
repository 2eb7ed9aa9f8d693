"""Windows of layers, and the replacement graph's input for them."""

import numpy as np
import pytest

from vitrine.models.account.windows import paper_windows, replacement_mask


@pytest.mark.parametrize(
    ("layers", "starts"),
    [(12, [0, 3, 7, 10]), (24, [0, 6, 14, 20, 22]), (3, [0, 1, 2]), (2, [0, 1]), (1, [0])],
)
def test_windows_are_the_papers_fractions(layers, starts):
    windows = paper_windows(layers)
    assert windows == [range(start, layers) for start in starts]
    assert range(layers) in windows
    assert range(max(0, layers - 2), layers) in windows


@pytest.mark.parametrize(
    ("tokens", "inside"), [("all", (True, True)), ("cls", (True, False)), ("patches", (False, True))]
)
def test_replaced_by_layer_and_token_type(tokens, inside):
    never = (False, False)
    np.testing.assert_array_equal(replacement_mask(4, range(1, 3), tokens), [never, inside, inside, never])
    assert not replacement_mask(4, range(0), tokens).any()
