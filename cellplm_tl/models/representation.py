"""Latent and residual of a spectrum model, rotated to principal components.

What the pool's factors leave unexplained is kept beside the latent, so that a tissue the pool has
never seen loses nothing: the representation of a cell is [c z, w r], with z the latent at unit
prior variance, c a factor that gives it the total variance of the factors, r = x - V f the residual
of scaled expression (f the factors), and w the config's `residual_weight`. Its principal components
over the data are the embedding. A cells x genes residual and a genes x genes covariance never
exist: the representation is only ever multiplied with a few columns, block by block, and the
products are summed over the cells.

Axes: `cells` (of a block), `latent`, `genes` (measured), `columns` (of a subspace).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cellplm_tl.models.embedder import ScaledBlock

OVERSAMPLING = 20  # columns beyond the components, which make the subspace iteration converge
N_ITERATIONS = 6


class Columns(NamedTuple):
    """Vectors over [latent, genes], as columns."""

    latent: Tensor  # (latent, columns)
    genes: Tensor  # (genes, columns)

    def joined(self) -> Tensor:
        """Return (latent + genes, columns) in float64."""
        return torch.cat((self.latent, self.genes)).double()


class Block(Protocol):
    """Representation of some cells, as a product waiting to happen."""

    def times(self, columns: Columns) -> Tensor:
        """Return the block times columns, (cells, columns)."""

    def transposed_times(self, cells: Tensor) -> Columns:
        """Return the transposed block times (cells, columns)."""


class RepresentationBlock(NamedTuple):
    """[c z, w (x - f V^T)] of a block, as a product waiting to happen."""

    latent: Tensor  # (cells, latent): c z
    expression: ScaledBlock  # x
    factors: Tensor  # (cells, factors): f
    loadings: Tensor  # (genes, factors): V
    weight: Tensor  # (cells,): w, divided by what the residual's length is brought to

    def times(self, columns: Columns) -> Tensor:
        """Return the block times columns, (cells, columns)."""
        explained = self.factors @ (self.loadings.T @ columns.genes)
        residual = self.expression.times(columns.genes) - explained
        return self.latent @ columns.latent + self.weight[:, None] * residual

    def transposed_times(self, cells: Tensor) -> Columns:
        """Return the transposed block times (cells, columns)."""
        weighed = self.weight[:, None] * cells
        explained = self.loadings @ (self.factors.T @ weighed)
        residual = self.expression.transposed_times(weighed) - explained
        return Columns(self.latent.T @ cells, residual)


class Rotation(NamedTuple):
    """Principal components of the representation over a set of cells."""

    components: Columns  # (latent + genes, components), orthonormal
    mean: Tensor  # (components,): the mean cell on the components

    def scores(self, block: RepresentationBlock) -> Tensor:
        """Return a block's principal component scores, (cells, components)."""
        return block.times(self.components) - self.mean


def find_rotation(
    blocks: Callable[[], Iterable[Block]],
    start: Columns,
    n_cells: int,
    n_components: int,
) -> Rotation:
    """Find the principal components of the cells of all blocks by subspace iteration.

    Every pass over the blocks adds up B^T (B Q) for the current columns Q, which is all that an
    iteration needs to know of the cells (Halko, Martinsson & Tropp, SIAM Review 2011, algorithm
    4.4).

    Parameters
    ----------
    blocks : callable
        Returns the blocks, each time from the start.
    start : Columns
        Random columns, `n_components + OVERSAMPLING` of them.
    n_cells : int
        In all blocks.
    n_components : int
        At most the number of columns.
    """
    n_latent = start.latent.shape[0]
    basis, _ = torch.linalg.qr(start.joined())  # (latent + genes, columns)
    mean = torch.zeros(basis.shape[0], dtype=torch.float64)
    for iteration in range(N_ITERATIONS + 1):
        columns = Columns(basis[:n_latent].float(), basis[n_latent:].float())
        product = torch.zeros_like(basis)  # B^T (B Q)
        inner = torch.zeros(basis.shape[1], basis.shape[1], dtype=torch.float64)  # (B Q)^T (B Q)
        total = torch.zeros_like(mean)  # B^T 1
        for block in blocks():
            scores = block.times(columns)  # (cells, columns)
            ones = torch.ones(scores.shape[0], 1)
            summed = block.transposed_times(torch.cat((scores, ones), 1)).joined()
            product += summed[:, :-1]
            total += summed[:, -1]
            inner += scores.double().T @ scores.double()
        mean = total / max(1, n_cells)
        projected = basis.T @ mean
        if iteration == N_ITERATIONS:
            break
        # Centring the cells takes n mean mean^T off the covariance.
        basis, _ = torch.linalg.qr(product - n_cells * torch.outer(mean, projected))
    covariance = inner - n_cells * torch.outer(projected, projected)
    _, vectors = torch.linalg.eigh(covariance)  # ascending
    components = basis @ vectors.flip(1)[:, :n_components]
    components = components * _signs(components)
    return Rotation(
        Columns(components[:n_latent].float(), components[n_latent:].float()),
        (components.T @ mean).float(),
    )


def _signs(components: Tensor) -> Tensor:
    """Return the signs that make each column's largest entry positive."""
    largest = components.abs().argmax(0, keepdim=True)
    signs = components.gather(0, largest).sign()
    return torch.where(signs == 0, 1.0, signs)
