"""From Cells to a stream of training contexts: sampling, thinning, panels, masks.

Everything random in step i comes from the seed and i alone, so that a run that was interrupted goes
on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cellplm_tl._anndata import Cells, CountBlock
from cellplm_tl.models import Counts

PLATFORM_SHARE = 0.5  # of the steps, where there are platform effects
PLATFORM_QUANTILE = 0.9  # of the made-up factors, from which on nothing is lost


@dataclass(frozen=True)
class Source:
    """One data set of the pool, read as Cells.

    Parameters
    ----------
    name : str
        Of the data set.
    cells : Cells
        Matched to the model's genes, with its contexts.
    weight : float
        Relative chance of a step to draw from it.
    """

    name: str
    cells: Cells
    weight: float = 1.0


@dataclass(frozen=True)
class Corruption:
    """How counts are hidden from the network.

    Parameters
    ----------
    thin : float
        Share of the steps that split each cell's counts binomially in two, halves as a rule, one to
        read and one to predict; the others mask.
    kept_share : tuple of float
        When splitting: smallest and largest share of the counts that may be read, drawn uniformly.
    cell_mask_rate, gene_mask_rate : float
        When masking: share of the cells, and of the genes in each of them (Table 5: 0.75, 0.25).
    panel : float
        Share of the steps that measure a random panel only (the targets stay whole).
    panel_genes : tuple of int
        Smallest and largest panel, drawn log-uniformly.
    depth : float
        Share of the steps whose input is thinned further, by a factor drawn log-uniformly from
        `depth_range`.
    depth_range : tuple of float
        Of that factor.
    platform : float
        Standard deviation of the log of made-up factors, one per gene and context, by which half of
        the steps bias what the network may read, as another technology would; 0 for none.
    max_library_size : float
        Deeper cells (read counts, not molecules) are thinned to this total first.
    n_cells : tuple of int
        Smallest and largest context, drawn log-uniformly.
    n_targets : int
        Largest number of target genes in a step, drawn at random among those measured.

    Examples
    --------
    >>> import cellplm_tl as cp
    >>> masks_of_the_paper = cp.train.Corruption(thin=0.0, panel=0.0, depth=0.0)
    >>> masks_of_the_paper.cell_mask_rate, masks_of_the_paper.gene_mask_rate
    (0.75, 0.25)
    """

    thin: float = 0.5
    kept_share: tuple[float, float] = (0.5, 0.5)
    cell_mask_rate: float = 0.75
    gene_mask_rate: float = 0.25
    panel: float = 0.25
    panel_genes: tuple[int, int] = (200, 4000)
    depth: float = 0.3
    depth_range: tuple[float, float] = (0.1, 1.0)
    platform: float = 0.0
    max_library_size: float = 20_000.0
    n_cells: tuple[int, int] = (32, 384)
    n_targets: int = 3000


class Example(NamedTuple):
    """A context with some of its counts hidden."""

    source: int  # position of the data set
    counts: Counts  # what the network may read, over `genes`
    genes: Tensor  # (genes,) positions in the model's list: measured in this step
    coordinates: Tensor | None  # (cells, 2)
    target_genes: Tensor  # (targets,) positions in the model's list
    target: Tensor  # (cells, targets) counts
    weights: Tensor  # (cells, targets) 1 where hidden
    target_total: Tensor  # (cells,) library size of the hidden counts
    other: Counts | None  # the hidden half, over all that the set measures; None where masked
    other_genes: Tensor  # (measured by the set,) positions in the model's list


def draw_example(
    sources: Sequence[Source], corruption: Corruption, seed: int, step: int
) -> Example:
    """Draw the example of one step."""
    rng = np.random.default_rng([seed, step])
    weights = np.array([source.weight for source in sources])
    number = int(rng.choice(len(sources), p=weights / weights.sum()))
    cells = sources[number].cells
    sizes = np.array([len(rows) for rows in cells.contexts], float)
    context = cells.contexts[rng.choice(len(sizes), p=sizes / sizes.sum())]
    n_cells = min(len(context), _log_uniform(rng, corruption.n_cells))
    rows = np.sort(rng.choice(context, n_cells, replace=False))
    block = _without_excess(cells.counts(rows), corruption.max_library_size, rng)
    return hide(cells, rows, block, corruption, rng, number)


def hide(
    cells: Cells,
    rows: np.ndarray,
    block: CountBlock,
    corruption: Corruption,
    rng: np.random.Generator,
    number: int = 0,
) -> Example:
    """Hide a part of the counts of a block, and keep it as the target."""
    n_cells, n_genes = len(rows), len(cells.genes)
    of_entry = np.repeat(np.arange(n_cells), np.diff(block.offsets))
    targets = rng.permutation(n_genes)[: corruption.n_targets]
    position = np.full(n_genes, -1)
    position[targets] = np.arange(len(targets))
    at = position[block.columns]
    is_target = at >= 0

    target = np.zeros((n_cells, len(targets)), np.float32)
    other = None
    if rng.random() < corruption.thin:
        share = _uniform(rng, corruption.kept_share)
        kept = rng.binomial(block.values.astype(np.int64), share).astype(np.float32)
        hidden = block.values - kept
        target[of_entry[is_target], at[is_target]] = hidden[is_target]
        weights = np.ones_like(target)
        target_total = np.bincount(of_entry, hidden, n_cells)
        library = np.bincount(of_entry, kept, n_cells)
        other = _as_counts(hidden, block.columns, of_entry, target_total)
    else:
        masked_cells = rng.random(n_cells) < corruption.cell_mask_rate
        is_hidden = (rng.random(target.shape) < corruption.gene_mask_rate) & masked_cells[:, None]
        elsewhere = (rng.random(len(of_entry)) < corruption.gene_mask_rate) & masked_cells[of_entry]
        is_masked = np.where(is_target, is_hidden[of_entry, np.maximum(at, 0)], elsewhere)
        kept = np.where(is_masked, 0, block.values).astype(np.float32)
        target[of_entry[is_target], at[is_target]] = block.values[is_target]
        weights = is_hidden.astype(np.float32)
        target_total = library = np.asarray(block.library_size, float)

    if corruption.platform and rng.random() < PLATFORM_SHARE:
        factors = np.exp(rng.normal(0, corruption.platform, n_genes))
        bias = np.minimum(1, factors / np.quantile(factors, PLATFORM_QUANTILE))
        biased = rng.binomial(kept.astype(np.int64), bias[block.columns]).astype(np.float32)
        library = library - np.bincount(of_entry, kept - biased, n_cells)
        kept = biased
    # A panel measures fewer genes; the others are neither read nor part of the library.
    measured = np.arange(n_genes)
    if rng.random() < corruption.panel:
        size = min(n_genes, _log_uniform(rng, corruption.panel_genes))
        measured = np.sort(rng.choice(n_genes, size, replace=False))
    if rng.random() < corruption.depth:
        low, high = corruption.depth_range
        share = np.exp(rng.uniform(np.log(low), np.log(high)))
        shallow = rng.binomial(kept.astype(np.int64), share).astype(np.float32)
        library = library - np.bincount(of_entry, kept - shallow, n_cells)
        kept = shallow
    column = np.full(n_genes, -1)
    column[measured] = np.arange(len(measured))
    columns = column[block.columns]
    stays = (kept > 0) & (columns >= 0)
    if len(measured) < n_genes:
        library = np.bincount(of_entry[stays], kept[stays], n_cells)
    counts = _as_counts(kept[stays], columns[stays], of_entry[stays], library)
    coordinates = cells.coordinates
    return Example(
        number,
        counts,
        torch.from_numpy(cells.gene_index[measured]),
        None if coordinates is None else torch.from_numpy(coordinates[rows]),
        torch.from_numpy(cells.gene_index[targets]),
        torch.from_numpy(target),
        torch.from_numpy(weights),
        torch.from_numpy(np.asarray(target_total, np.float32)),
        other,
        torch.from_numpy(cells.gene_index),
    )


def _as_counts(
    values: np.ndarray, columns: np.ndarray, of_entry: np.ndarray, library_size: np.ndarray
) -> Counts:
    """Put entries, ordered by cell, together as Counts; entries of 0 are left out."""
    seen = values > 0
    per_cell = np.bincount(of_entry[seen], minlength=len(library_size))
    return Counts(
        torch.from_numpy(np.asarray(values[seen], np.float32)),
        torch.from_numpy(columns[seen].astype(np.int32)),
        torch.from_numpy(np.r_[0, per_cell.cumsum()]),
        torch.from_numpy(np.asarray(library_size, np.float32)),
    )


def _uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    low, high = bounds
    return low if low == high else rng.uniform(low, high)  # a fixed share draws nothing


def _log_uniform(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    low, high = bounds
    return round(np.exp(rng.uniform(np.log(low), np.log(high))))


def _without_excess(
    block: CountBlock, max_library_size: float, rng: np.random.Generator
) -> CountBlock:
    """Thin cells that are deeper than the largest library size, and make counts whole."""
    share = np.minimum(1.0, max_library_size / np.maximum(block.library_size, 1))
    of_entry = np.repeat(np.arange(len(share)), np.diff(block.offsets))
    values = rng.binomial(np.rint(block.values).astype(np.int64), share[of_entry])
    return block._replace(values=values.astype(np.float32), library_size=block.library_size * share)
