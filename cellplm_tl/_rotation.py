"""The embedding of a spectrum model: principal components of latent and residual, block by block.

The representation of a cell is [c z, w r] (see `models.representation`). A `Frame` is what turns
the representation of any cell into its embedding: directions, their mean, and two scales. It is
found on some cells, as a rule those of the data themselves, and can be used on others: those of a
query in the space of its reference, or any cell in the space that is stored with a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellplm_tl._anndata import Cells
from cellplm_tl._inference import Encoding, blocks, read_block
from cellplm_tl.models import CellPLM
from cellplm_tl.models.representation import (
    N_ITERATIONS,
    OVERSAMPLING,
    Columns,
    RepresentationBlock,
    Rotation,
    find_rotation,
)

N_PASSES = N_ITERATIONS + 1  # over the cells, to find a frame; one more projects them

ROWS = 4096  # cells that are looked at in one go where nothing but their latent is needed

Advance = Callable[[float], object]  # told of every pass over some cells: how many


class Frame(NamedTuple):
    """What turns latent and residual of any cell into its embedding."""

    rotation: Rotation  # components over the latent and the genes below
    genes: NDArray[np.int64]  # (genes,): positions in the model's list, ascending
    latent_scale: float  # c
    residual_length: float  # root mean square length of r, in models of unit length


def find_frame(
    network: CellPLM,
    cells: Cells,
    encoding: Encoding,
    n_components: int,
    rng: np.random.Generator,
    advance: Advance = lambda n: None,
    *,
    residual_only: bool = False,
) -> Frame:
    """Find the principal components of latent and residual over all cells.

    Parameters
    ----------
    network
        With a spectrum.
    cells, encoding
        The cells and what :func:`encode` made of them.
    n_components
        Width of the embedding; components beyond the rank of the data are left out.
    rng
        Draws the columns that the iteration starts from; a gene's numbers do not depend on which
        others are measured.
    advance
        Told of the cells of every pass.
    residual_only
        Leave the latent out.
    """
    n_latent, n_genes = network.config.latent_size, len(cells.genes)
    n_columns = min(n_components + OVERSAMPLING, n_latent + n_genes)
    start = rng.standard_normal((n_latent + network.config.n_genes, n_columns))
    columns = Columns(
        torch.from_numpy(start[:n_latent].astype(np.float32)),
        torch.from_numpy(start[n_latent:][cells.gene_index].astype(np.float32)),
    )
    scale = 0.0 if residual_only else latent_scale(network, encoding)
    scales = scale, residual_length(encoding)

    def sweep() -> Iterator[RepresentationBlock]:
        for rows, block in representation_blocks(network, cells, encoding, *scales):
            yield block
            advance(len(rows))

    rotation = find_rotation(sweep, columns, cells.n_cells, n_components)
    return Frame(rotation, cells.gene_index, *scales)


def project(
    network: CellPLM,
    cells: Cells,
    encoding: Encoding,
    frame: Frame,
    n_components: int,
    advance: Advance = lambda n: None,
) -> NDArray[np.float32]:
    """Return the embedding of all cells in a frame, (cells, n_components) float32.

    Directions of genes that the cells do not measure take no part. Columns beyond the frame's
    components are 0.
    """
    result = np.zeros((cells.n_cells, n_components), np.float32)
    rotation = _on_genes(frame, cells.gene_index, n_components)
    scales = frame.latent_scale, frame.residual_length
    for rows, block in representation_blocks(network, cells, encoding, *scales):
        scores = rotation.scores(block).numpy()
        result[rows, : scores.shape[1]] = scores
        advance(len(rows))
    return result


def latent_scale(network: CellPLM, encoding: Encoding) -> float:
    """Return the factor that gives the latent's part the total variance of the factors."""
    assert encoding.factors is not None
    n_cells = len(encoding.latent)
    total, square = torch.zeros(network.config.latent_size, dtype=torch.float64), 0.0
    for begin in range(0, n_cells, ROWS):
        part = latent_part(network, encoding, slice(begin, begin + ROWS)).double()
        total += part.sum(0)
        square += float(part.square().sum())
    latent = (square - float(total.square().sum()) / max(1, n_cells)) / max(1, n_cells)
    factors = float(encoding.factors.var(0, dtype=np.float64).sum()) if n_cells else 0.0
    return (factors / latent) ** 0.5 if latent > 0 else 1.0


def residual_length(encoding: Encoding) -> float:
    """Return the root mean square length of what the factors leave unexplained."""
    lengths = _residual_lengths(encoding)
    return float(np.square(lengths, dtype=np.float64).mean() ** 0.5) if len(lengths) else 0.0


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


def latent_part(network: CellPLM, encoding: Encoding, rows: slice | NDArray[np.int64]) -> Tensor:
    """Return z of some cells; of unit length, and joined by the factors' direction, if so set."""
    factors = None if encoding.factors is None else torch.from_numpy(encoding.factors[rows])
    return network.direction(torch.from_numpy(encoding.latent[rows]), factors)


def _residual_lengths(encoding: Encoding) -> NDArray[np.float32]:
    assert encoding.explained is not None and encoding.total is not None
    return np.sqrt(np.maximum(encoding.total - encoding.explained, 0))


def representation_blocks(
    network: CellPLM,
    cells: Cells,
    encoding: Encoding,
    latent_scale: float,
    residual_length: float,
) -> Iterator[tuple[NDArray[np.int64], RepresentationBlock]]:
    """Give the representation of every block of cells."""
    embedder, panel = network.embedder, encoding.panel
    assert encoding.factors is not None
    lengths = _residual_lengths(encoding)
    for number, rows in blocks(cells, network):
        counts = read_block(cells, rows)
        expression = embedder.scaled(
            embedder.begin(counts, panel), panel, encoding.context_sums[number]
        )
        weight = np.full(len(rows), network.config.residual_weight, np.float32)
        if network.config.unit_length:
            weight *= residual_length / np.maximum(lengths[rows], np.finfo(np.float32).eps)
            weight[lengths[rows] == 0] = 0
        yield (
            rows,
            RepresentationBlock(
                latent_scale * latent_part(network, encoding, rows),
                expression,
                torch.from_numpy(np.ascontiguousarray(encoding.factors[rows])),
                panel.loadings,
                torch.from_numpy(weight),
            ),
        )


def _on_genes(frame: Frame, genes: NDArray[np.int64], n_components: int) -> Rotation:
    """Return a frame's rotation for cells that measure these genes."""
    components, mean = frame.rotation
    if not np.array_equal(frame.genes, genes):
        at = np.minimum(np.searchsorted(frame.genes, genes), len(frame.genes) - 1)
        has_direction = torch.from_numpy(frame.genes[at] == genes)
        directions = components.genes[torch.from_numpy(at)] * has_direction[:, None]
        components = Columns(components.latent, directions)
    first = slice(n_components)
    return Rotation(Columns(components.latent[:, first], components.genes[:, first]), mean[first])
