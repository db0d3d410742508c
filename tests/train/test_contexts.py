"""Examples: what is hidden is predicted, what is read is not, all of it by the step alone."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cellplm_tl._anndata import CountBlock
from cellplm_tl.train.contexts import Corruption, Source, draw_example, hide


class Cells:
    """Cells of a matrix in memory; the second half of the genes of a longer list."""

    def __init__(self, matrix: sp.csr_matrix, contexts: list[np.ndarray]):
        self.matrix, self.contexts = matrix, contexts
        self.n_cells = matrix.shape[0]
        self.genes = np.array([f"G{i}" for i in range(matrix.shape[1])])
        self.gene_index = np.arange(matrix.shape[1]) + 7
        self.coordinates = None

    def counts(self, rows: np.ndarray) -> CountBlock:
        block = self.matrix[rows]
        library = np.asarray(block.sum(1), float).ravel()
        return CountBlock(block.data, block.indices, block.indptr, library)


@pytest.fixture
def cells() -> Cells:
    rng = np.random.default_rng(0)
    matrix = sp.csr_matrix(rng.poisson(1.5, (40, 30)).astype(np.float32))
    return Cells(matrix, [np.arange(0, 40, 2), np.arange(1, 40, 2)])


def dense(example) -> np.ndarray:
    """What may be read, (cells, genes of the data)."""
    counts = example.counts
    matrix = np.zeros((counts.n_cells, 30), np.float32)
    genes = example.genes[counts.columns.long()].numpy() - 7
    matrix[counts.rows().numpy(), genes] = counts.values.numpy()
    return matrix


def in_order(example, values: torch.Tensor) -> np.ndarray:
    """Targets in the order of the data's genes."""
    return values.numpy()[:, np.argsort(example.target_genes.numpy())]


PLAIN = Corruption(panel=0.0, depth=0.0, n_cells=(10, 10))


def test_halves_add_up(cells):
    rows = np.arange(12)
    corruption = Corruption(thin=1.0, panel=0.0, depth=0.0)
    example = hide(cells, rows, cells.counts(rows), corruption, np.random.default_rng(0))
    read, hidden = dense(example), in_order(example, example.target)
    np.testing.assert_array_equal(read + hidden, cells.matrix[rows].toarray())
    np.testing.assert_allclose(example.counts.library_size, read.sum(1))
    np.testing.assert_allclose(example.target_total, hidden.sum(1))
    assert example.weights.min() == 1
    assert 0.4 < read.sum() / (read + hidden).sum() < 0.6


def test_masks_hide_what_they_ask_for(cells):
    rows = np.arange(40)
    corruption = Corruption(thin=0.0, panel=0.0, depth=0.0)
    example = hide(cells, rows, cells.counts(rows), corruption, np.random.default_rng(1))
    truth, read = cells.matrix[rows].toarray(), dense(example)
    is_masked = in_order(example, example.weights) == 1
    np.testing.assert_array_equal(read, np.where(is_masked, 0, truth))
    np.testing.assert_array_equal(in_order(example, example.target), truth)
    np.testing.assert_allclose(example.counts.library_size, truth.sum(1))
    masked_cells = is_masked.any(1)
    assert 0.5 < masked_cells.mean() < 0.95  # 75 %
    assert is_masked[masked_cells].mean() == pytest.approx(0.25, abs=0.05)


def test_genes_that_are_no_targets_are_masked_at_the_same_rate(cells):
    rows = np.arange(40)
    corruption = Corruption(thin=0.0, panel=0.0, depth=0.0, cell_mask_rate=1.0, n_targets=10)
    example = hide(cells, rows, cells.counts(rows), corruption, np.random.default_rng(1))
    others = np.setdiff1d(np.arange(30), example.target_genes.numpy() - 7)
    truth = cells.matrix[rows].toarray()[:, others]
    assert (dense(example)[:, others] == 0)[truth > 0].mean() == pytest.approx(0.25, abs=0.05)


def test_a_panel_is_all_that_is_read_and_the_targets_stay_whole(cells):
    rows = np.arange(20)
    corruption = Corruption(thin=1.0, panel=1.0, panel_genes=(5, 5), depth=0.0)
    example = hide(cells, rows, cells.counts(rows), corruption, np.random.default_rng(0))
    assert len(example.genes) == 5
    assert len(example.target_genes) == 30
    np.testing.assert_allclose(example.counts.library_size, dense(example).sum(1))


def test_depth_takes_counts_from_what_is_read_only(cells):
    rows = np.arange(40)
    whole, shallow = (
        hide(cells, rows, cells.counts(rows), corruption, np.random.default_rng(2))
        for corruption in (
            Corruption(thin=1.0, panel=0.0, depth=0.0),
            Corruption(thin=1.0, panel=0.0, depth=1.0, depth_range=(0.1, 0.1)),
        )
    )
    assert torch.equal(whole.target, shallow.target)
    assert (dense(shallow) <= dense(whole)).all()
    assert dense(shallow).sum() == pytest.approx(0.1 * dense(whole).sum(), rel=0.3)
    np.testing.assert_allclose(shallow.counts.library_size, dense(shallow).sum(1))


def test_a_step_is_a_function_of_seed_and_number(cells):
    sources = [Source("a", cells), Source("b", cells, weight=2.0)]
    examples = [draw_example(sources, PLAIN, 0, step) for step in (3, 3, 4)]
    assert torch.equal(examples[0].target, examples[1].target)
    assert not torch.equal(examples[0].target, examples[2].target)
    drawn = [draw_example(sources, PLAIN, 0, step).source for step in range(150)]
    assert np.mean(drawn) == pytest.approx(2 / 3, abs=0.12)


def test_deep_cells_are_thinned_to_the_largest_library_size(cells):
    deep = Cells(cells.matrix * 1000, cells.contexts)
    corruption = Corruption(thin=1.0, panel=0.0, depth=0.0, max_library_size=5000.0)
    example = draw_example([Source("deep", deep)], corruption, 0, 0)
    total = example.counts.library_size + example.target_total
    np.testing.assert_allclose(total, 5000, rtol=0.1)


def test_only_cells_of_one_context_are_drawn(cells):
    marked = cells.matrix.toarray()
    marked[:, 0] = np.arange(40) % 2 + 1  # names the context
    cells = Cells(sp.csr_matrix(marked), cells.contexts)
    corruption = Corruption(thin=0.0, cell_mask_rate=0.0, panel=0.0, depth=0.0, n_cells=(8, 8))
    for step in range(5):
        example = draw_example([Source("a", cells)], corruption, 0, step)
        assert len(np.unique(dense(example)[:, 0])) == 1
