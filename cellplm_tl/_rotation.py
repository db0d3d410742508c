"""The embedding of a spectrum model: components of latent and residual, block by block."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from cellplm_tl._anndata import Cells
from cellplm_tl._inference import Encoding, blocks, read_block
from cellplm_tl.models import CellPLM
from cellplm_tl.models.representation import (
    N_ITERATIONS,
    OVERSAMPLING,
    Columns,
    RepresentationBlock,
    find_rotation,
)


def rotate(
    network: CellPLM,
    cells: Cells,
    encoding: Encoding,
    n_components: int,
    rng: np.random.Generator,
    *,
    bar: tqdm | None = None,
    bar_share: float = 1.0,
) -> NDArray[np.float32]:
    """Rotate latent and residual to their principal components over all cells.

    Parameters
    ----------
    network
        With a spectrum.
    cells, encoding
        The cells and what :func:`encode` made of them.
    n_components
        Width of the result. Columns beyond the rank of the data are 0.
    rng
        Draws the columns that the iteration starts from; a gene's numbers do not depend on which
        others are measured.
    bar, bar_share
        Progress bar over the cells to advance, and by which share of it.

    Returns
    -------
    numpy.ndarray, shape (cells, n_components), float32
    """
    result = np.zeros((cells.n_cells, n_components), np.float32)
    n_columns = min(n_components + OVERSAMPLING, network.config.latent_size + len(cells.genes))
    start = rng.standard_normal((network.config.latent_size + network.config.n_genes, n_columns))
    n_latent = network.config.latent_size
    columns = Columns(
        torch.from_numpy(start[:n_latent].astype(np.float32)),
        torch.from_numpy(start[n_latent:][cells.gene_index].astype(np.float32)),
    )
    scale = latent_scale(encoding)

    n_passes = N_ITERATIONS + 2

    def sweep() -> Iterator[tuple[NDArray[np.int64], RepresentationBlock]]:
        for rows, block in _blocks(network, cells, encoding, scale):
            yield rows, block
            if bar is not None:
                bar.update(bar_share * len(rows) / n_passes)

    rotation = find_rotation(
        lambda: (block for _, block in sweep()), columns, cells.n_cells, n_components
    )
    for rows, block in sweep():
        scores = rotation.scores(block).numpy()
        result[rows, : scores.shape[1]] = scores
    return result


def latent_scale(encoding: Encoding) -> float:
    """Return the factor that gives the latent the total variance of the factors."""
    assert encoding.factors is not None
    if not len(encoding.latent):
        return 1.0
    latent = float(encoding.latent.var(0, dtype=np.float64).sum())
    factors = float(encoding.factors.var(0, dtype=np.float64).sum())
    return (factors / latent) ** 0.5 if latent > 0 else 1.0


def known_share(encoding: Encoding) -> tuple[NDArray[np.float32], float]:
    """Return the share of scaled expression that the factors explain: per cell, and of all cells.

    A cell without counts, or a context of one cell, has nothing to explain: its share is 0.
    """
    assert encoding.explained is not None and encoding.total is not None
    total = np.maximum(encoding.total, np.finfo(np.float32).tiny)
    share = np.clip(encoding.explained / total, 0, 1).astype(np.float32)
    everything = float(encoding.total.sum(dtype=np.float64))
    explained = float(encoding.explained.sum(dtype=np.float64))
    return share, explained / everything if everything > 0 else 0.0


def between_share(network: CellPLM, encoding: Encoding) -> float:
    """Return the share of the factors' variance that lies between contexts, and is taken off.

    The mean of each context, relative to that of all cells, is read as factors like a cell; their
    squared length, weighed by the contexts' cells, is compared with that of the cells within.
    """
    assert encoding.factors is not None
    panel = encoding.panel
    n_cells = max(1.0, sum(float(sums[0]) for sums in encoding.context_sums))
    overall = sum((sums[1] for sums in encoding.context_sums), torch.tensor(0.0)) / n_cells
    between = 0.0
    for size, lognorm, *_ in encoding.context_sums:
        difference = (lognorm / size.clamp(min=1) - overall) / panel.scale
        factors = difference @ panel.loadings @ panel.posterior  # (factors,)
        between += float(size * factors.square().sum())
    within = float(np.square(encoding.factors, dtype=np.float64).sum())
    return between / (between + within) if between + within > 0 else 0.0


def _blocks(
    network: CellPLM, cells: Cells, encoding: Encoding, scale: float
) -> Iterator[tuple[NDArray[np.int64], RepresentationBlock]]:
    embedder, panel = network.embedder, encoding.panel
    assert encoding.factors is not None
    for number, rows in blocks(cells, network):
        counts = read_block(cells, rows)
        expression = embedder.scaled(
            embedder.begin(counts, panel), panel, encoding.context_sums[number]
        )
        yield (
            rows,
            RepresentationBlock(
                torch.from_numpy(scale * encoding.latent[rows]),
                expression,
                torch.from_numpy(np.ascontiguousarray(encoding.factors[rows])),
                panel.loadings,
                network.config.residual_weight,
            ),
        )
