from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cellplm_tl.models.position import PositionalEncoding, grid_positions


def equation_8(x: int, y: int, d: int) -> list[float]:
    """Appendix B, equation (8), channel by channel."""
    encoding = [0.0] * d
    for i in range(d // 4):
        encoding[2 * i] = math.sin(x / 10000 ** (4 * i / d))
        encoding[2 * i + 1] = math.cos(x / 10000 ** (4 * i / d))
        encoding[2 * i + d // 2] = math.sin(y / 10000 ** (4 * i / d))
        encoding[2 * i + 1 + d // 2] = math.cos(y / 10000 ** (4 * i / d))
    return encoding


@pytest.mark.parametrize("hidden", [4, 32, 1024])
def test_encoding_is_equation_8(hidden, assert_close):
    positions = [(0, 0), (1, 0), (0, 1), (17, 62), (99, 99), (99, 3)]
    expected = np.array([equation_8(x, y, hidden) for x, y in positions])
    encoding = PositionalEncoding(hidden)(torch.tensor(positions))
    assert_close(encoding, expected, rtol=0, atol=1e-5)  # float32 angles up to 99


def test_the_release_has_x_and_y_the_other_way_round(golden, assert_close):
    """The release's table, which its own forward pass never uses, puts y in the first half.

    It also expects coordinates in [0, 1) and has a grid of its own, q below.
    """
    arrays = golden("positional_encoding")
    module = PositionalEncoding(32)
    rows = torch.tensor(arrays["table_rows"])
    b_a = torch.stack((rows % 100, rows // 100), 1)  # row 100 a + b has b in the first half
    assert_close(module(b_a), arrays["table"], rtol=0, atol=1e-5)

    q = np.clip(np.trunc(100 * (1.02 * arrays["coord"].astype(np.float64) - 0.01)), 0, 99)
    x_y = torch.tensor(q.astype(np.int64))
    assert_close(module(x_y.flip(1)), arrays["out"], rtol=0, atol=1e-5)
    assert (module(x_y) - torch.tensor(arrays["out"])).abs().max() > 0.5

    module.placeholder.data = torch.tensor(arrays["missing_pe"])
    assert_close(module(torch.full((3, 2), -1)), arrays["missing_out"], rtol=0, atol=0)


def test_cells_without_coordinates_get_the_placeholder_and_train_it():
    module = PositionalEncoding(8)
    positions = torch.tensor([[3, 4], [-1, -1], [0, 0], [-1, -1]])
    encoding = module(positions)
    assert torch.equal(encoding[1], module.placeholder)
    assert torch.equal(encoding[3], module.placeholder)
    assert encoding[2].tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    encoding.sum().backward()
    assert module.placeholder.grad.tolist() == [2.0] * 8  # of two cells
    assert torch.equal(module(None), module.placeholder)


def test_the_placeholder_starts_small():
    torch.manual_seed(0)
    placeholder = PositionalEncoding(4096).placeholder
    assert placeholder.std().item() == pytest.approx(0.01, rel=0.05)


def test_grid_keeps_the_shape_of_the_tissue():
    coordinates = torch.tensor([[10.0, 5.0], [30.0, 5.0], [20.0, 15.0], [10.1, 14.9]])
    # The larger extent, x of 20 units, spans the grid: five positions per unit.
    assert grid_positions(coordinates).tolist() == [[0, 0], [99, 0], [50, 50], [0, 49]]


def test_grid_of_cells_without_coordinates():
    nan, inf = float("nan"), float("inf")
    coordinates = torch.tensor([[nan, nan], [0.0, 0.0], [1.0, nan], [2.0, 1.0], [inf, 0.0]])
    expected = [[-1, -1], [0, 0], [-1, -1], [99, 50], [-1, -1]]
    assert grid_positions(coordinates).tolist() == expected
    assert grid_positions(coordinates[:1]).tolist() == [[-1, -1]]
    assert grid_positions(coordinates[:0]).shape == (0, 2)


def test_grid_of_one_place_is_its_origin():
    assert grid_positions(torch.tensor([[7.0, -3.0]])).tolist() == [[0, 0]]
    assert grid_positions(torch.tensor([[7.0, -3.0]] * 3)).tolist() == [[0, 0]] * 3


@given(
    st.lists(st.tuples(*[st.integers(-5000, 5000)] * 2), min_size=2, max_size=20),
    st.integers(-(10**6), 10**6),
    st.sampled_from([2**-10, 0.5, 1.0, 4.0, 1024.0]),
)
def test_grid_does_not_depend_on_origin_or_unit(cells, shift, unit):
    """Powers of two as units: the arithmetic is exact, so that the grid must be equal."""
    coordinates = torch.tensor(cells, dtype=torch.float64)
    grid = grid_positions(coordinates)
    assert grid.min() >= 0
    assert grid.max() <= 99
    assert torch.equal(grid_positions((coordinates + shift) * unit), grid)
    extent = (coordinates.amax(0) - coordinates.amin(0)).max()
    if extent > 0:
        exact = (coordinates - coordinates.amin(0)) / extent * 100
        assert ((exact - grid >= 0) & (exact - grid <= 1)).all()
