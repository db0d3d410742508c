"""Cells divided in parts: nothing is lost, nothing is in two parts, and the seed decides."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from cellplm_tl._anndata import read_cells
from cellplm_tl.train.held_out import divide

SHARES = (0.7, 0.2, 0.1)


def matrix(cells, rows=None) -> np.ndarray:
    rows = np.arange(cells.n_cells) if rows is None else np.asarray(rows)
    block = cells.counts(rows)
    assert (block.values > 0).all()
    shape = (len(rows), len(cells.genes))
    return sparse.csr_matrix((block.values, block.columns, block.offsets), shape).toarray()


@pytest.mark.parametrize("shares", [SHARES, (0.5, 0.5), (1.0,), (0.25, 0.25, 0.25, 0.25)])
def test_the_parts_sum_to_the_counts(spectrum_cells, shares):
    cells = spectrum_cells()
    parts = divide(cells, shares, 3)
    np.testing.assert_array_equal(sum(matrix(part) for part in parts), matrix(cells))


def test_library_sizes_sum_too_and_unread_genes_are_shared_out(spectrum_cells):
    cells = spectrum_cells()
    rows = np.arange(cells.n_cells)
    sizes = [part.counts(rows).library_size for part in divide(cells, SHARES, 0)]
    np.testing.assert_allclose(sum(sizes), cells.counts(rows).library_size)


def test_the_share_of_what_no_model_knows(pbmc_counts, spectrum_genes):
    """The library of a part is its counts, and its share of those of other genes."""
    cells = read_cells(pbmc_counts[:50].copy(), spectrum_genes)
    rows = np.arange(50)
    other = cells.counts(rows).library_size - matrix(cells).sum(1)
    assert (other > 0).any()
    for part, share in zip(divide(cells, SHARES, 0), SHARES, strict=True):
        expected = matrix(part).sum(1) + share * other
        np.testing.assert_allclose(part.counts(rows).library_size, expected)


def test_shares(spectrum_cells):
    cells = spectrum_cells()
    total = float(matrix(cells).sum())
    for part, share in zip(divide(cells, SHARES, 1), SHARES, strict=True):
        error = np.sqrt(share * (1 - share) / total)  # of a binomial
        assert matrix(part).sum() / total == pytest.approx(share, abs=4 * error)


def test_parts_are_drawn_apart_given_what_is_expected(spectrum_cells):
    """Of two counts of one entry, each falls where it falls: a hypergeometric's variance."""
    cells = spectrum_cells()
    whole = matrix(cells)
    first = np.array([matrix(divide(cells, (0.5, 0.5), seed)[0]) for seed in range(30)])
    entries = whole >= 4
    excess = first[:, entries].var(0) / (whole[entries] / 4)
    assert excess.mean() == pytest.approx(29 / 30, abs=0.1)


def test_neither_block_nor_order_matters(spectrum_cells):
    cells = spectrum_cells()
    for part in divide(cells, SHARES, 5):
        whole = matrix(part)
        np.testing.assert_array_equal(matrix(part, [7]), whole[[7]])
        np.testing.assert_array_equal(matrix(part, [90, 3, 11]), whole[[90, 3, 11]])
        block = part.counts(slice(20, 25))
        np.testing.assert_array_equal(block.values, part.counts(np.arange(20, 25)).values)


def test_the_seed_decides(spectrum_cells):
    cells = spectrum_cells()
    first, again, other = (matrix(divide(cells, SHARES, seed)[1]) for seed in (2, 2, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_parts_of_some_cells_are_those_of_all(spectrum_cells):
    """So that what is held out of a sample was held out of the whole in training."""
    cells = spectrum_cells()
    for number in range(3):
        some, all_cells = (divide(cells, SHARES, 8, n)[number] for n in (40, None))
        assert some.n_cells == 40
        assert (np.diff(some.chosen) > 0).all()
        np.testing.assert_array_equal(matrix(some), matrix(all_cells)[some.chosen])


def test_more_cells_than_there_are_is_all(spectrum_cells):
    assert divide(spectrum_cells(), SHARES, 8, 1000)[0].n_cells == 160


def test_contexts_and_coordinates_in_the_numbers_of_the_part(spectrum_cells):
    cells = spectrum_cells(batch_key="sample")
    positions = np.random.default_rng(0).random((160, 2))
    object.__setattr__(cells, "coordinates", positions)  # frozen for all but a test
    part = divide(cells, SHARES, 8, 40)[0]
    of_cell = np.empty(160, int)
    for number, rows in enumerate(cells.contexts):
        of_cell[rows] = number
    assert len(part.contexts) == 2
    for number, rows in enumerate(part.contexts):
        assert (of_cell[part.chosen[rows]] == number).all()
        assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(np.sort(np.concatenate(part.contexts)), np.arange(40))
    np.testing.assert_array_equal(part.coordinates, positions[part.chosen])
    np.testing.assert_array_equal(part.gene_index, cells.gene_index)
    np.testing.assert_array_equal(part.genes, cells.genes)


def test_a_context_of_which_no_cell_was_drawn_is_gone(spectrum_cells):
    cells = spectrum_cells(batch_key="sample")
    part = divide(cells, SHARES, 0, 1)[0]
    assert [len(rows) for rows in part.contexts] == [1]


def test_without_coordinates_there_are_none(spectrum_cells):
    assert divide(spectrum_cells(), SHARES, 0)[0].coordinates is None


def test_an_empty_cell_stays_empty(spectrum_cells):
    for part in divide(spectrum_cells(), SHARES, 0):
        block = part.counts(np.array([0]))
        assert len(block.values) == 0
        assert block.library_size.tolist() == [0.0]
