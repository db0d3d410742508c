"""From the counts of a cell to its first hidden vector.

Two embedders share the second half (positions, one mixing layer) and differ in the first:

* `TableEmbedder` (paper, section 3; the release): e = log1p(counts) E, with a gene table E.
* `SpectrumEmbedder` (this package): a factor model of lognorm expression whose loadings V are the
  fixed spectrum of the pretraining pool. With y = log1p(counts per 10,000), m the mean of y over
  the context, s the scale of a gene: x = clip((y - m) / s, -5, 10) and the posterior mean of the
  factors given the measured genes alone is z = x V (V^T V / noise + 1 / eigenvalues)^-1 / noise. A
  gene that was not measured takes no part; it is not a zero.

Both are a map per cell and, for the spectrum, one sum over the context (n, sum of y, sum of the
fractions), so that a context can be cut into blocks (docs/design.md, "A context is a sum").

Axes: `cells` (of a block), `entries` (non-zero counts of the block), `genes` (measured), `hidden`,
`factors`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellplm_tl.models.config import NORM_GROUPS, CellPLMConfig
from cellplm_tl.models.linear import Linear
from cellplm_tl.models.position import PositionalEncoding

TARGET_SUM = 1e4  # counts per cell that lognorm expression is scaled to
CLIP_LOW, CLIP_HIGH = -5.0, 10.0  # bounds of scaled expression
NORM_EPSILON = 1e-5
MIN_SHARE = 1e-6  # of the pool's counts that a panel is taken to have
SLICE_WIDTH = 64  # of the gene table: that of 13,000 genes lies in a core's second-level cache


class Counts(NamedTuple):
    """One block of cells of one context, as a CSR matrix over the measured genes.

    Parameters
    ----------
    values : Tensor, shape (entries,), float32
        Counts.
    columns : Tensor, shape (entries,), int
        Position of an entry's gene among the measured genes.
    offsets : Tensor, shape (cells + 1,), int
        Where a cell's entries begin.
    library_size : Tensor, shape (cells,), float32
        Counts of a cell over all genes that the data measure.

    Examples
    --------
    >>> import torch, cellplm_tl as cp
    >>> counts = cp.models.Counts(
    ...     values=torch.tensor([1.0, 2.0, 5.0]), columns=torch.tensor([0, 1, 1]),
    ...     offsets=torch.tensor([0, 2, 3]), library_size=torch.tensor([3.0, 5.0]))
    >>> counts.n_cells
    2
    """

    values: Tensor
    columns: Tensor
    offsets: Tensor
    library_size: Tensor

    @property
    def n_cells(self) -> int:
        """Number of cells in the block."""
        return self.offsets.shape[0] - 1

    def rows(self) -> Tensor:
        """Return the cell of every entry, (entries,) int64."""
        return torch.repeat_interleave(self.offsets.diff().long())

    def log1p(self) -> Tensor:
        """Return the natural logarithm of 1 + counts, (entries,)."""
        return self.values.log1p()

    def lognorm(self, target_sum: float | Tensor = TARGET_SUM) -> Tensor:
        """Return log1p of the counts, each cell's library scaled to `target_sum`, (entries,)."""
        scale = target_sum / self.library_size.clamp(min=1e-12)
        return (self.values * scale[self.rows()]).log1p()


class Embedded(NamedTuple):
    """What an embedder knows of the cells of a block."""

    hidden: Tensor  # (cells, hidden)
    factors: Tensor | None = None  # (cells, factors): posterior mean, spectrum only
    explained: Tensor | None = None  # (cells,): squared length of the part inside the factors
    total: Tensor | None = None  # (cells,): squared length of scaled expression


def sparse_product(values: Tensor, columns: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """Multiply a CSR matrix (cells, genes) with a table (genes, width): (cells, width)."""
    return F.embedding_bag(
        columns,
        table,
        offsets.to(columns.dtype),
        mode="sum",
        per_sample_weights=values.to(table.dtype),
        include_last_offset=True,
    )


def with_length(rows: Tensor, length: float) -> Tensor:
    """Bring each row to a length; a row of zeros stays as it is."""
    return F.normalize(rows, dim=1) * length


class GroupNorm(nn.GroupNorm):
    """Normalise each cell in four consecutive groups of channels (the release)."""

    def __init__(self, width: int):
        super().__init__(NORM_GROUPS, width, eps=NORM_EPSILON)


def make_norm(config: CellPLMConfig, width: int) -> nn.Module:
    """Return the config's norm for embedder and decoder."""
    return GroupNorm(width) if config.norm == "groupnorm" else nn.LayerNorm(width, NORM_EPSILON)


class Mixing(nn.Module):
    """Positions and the mixing layer, which both embedders end in."""

    def __init__(self, config: CellPLMConfig):
        super().__init__()
        hidden = config.hidden
        self.positions = PositionalEncoding(hidden) if config.positions == "sinusoidal" else None
        self.linear = Linear(hidden, hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = make_norm(config, hidden)

    def forward(self, e: Tensor, positions: Tensor | None) -> Tensor:
        """(cells, hidden) expression, grid positions (cells, 2) → (cells, hidden)."""
        if self.positions is not None:
            e = e + self.positions(positions)
        return self.norm(self.dropout(self.linear(e).relu()))


class TableEmbedder(nn.Module):
    """Sum the rows of a learned gene table, weighted by log1p of the counts."""

    n_rounds = 0

    def __init__(self, config: CellPLMConfig):
        super().__init__()
        self.mixing = Mixing(config)
        self.table = nn.Parameter(torch.randn(config.n_genes, config.hidden) * config.hidden**-0.5)

    def panel(self, genes: Tensor) -> tuple[Tensor, ...]:
        """Return the measured genes' rows of the table, in slices (genes, up to 64).

        The product with the counts fetches rows in no order, and is as fast as they come.
        """
        return tuple(part[genes] for part in self.table.split(SLICE_WIDTH, 1))

    def gene_vectors(self, genes: Tensor) -> Tensor:
        """Return the rows of some genes, (genes, hidden)."""
        return self.table[genes]

    def begin(self, counts: Counts, panel: tuple[Tensor, ...]) -> Tensor:
        """Return the expression embedding of a block, (cells, hidden)."""
        values = counts.log1p()
        parts = [sparse_product(values, counts.columns, counts.offsets, part) for part in panel]
        return torch.cat(parts, 1).to(values.dtype)

    def finish(
        self,
        e: Tensor,
        panel: tuple[Tensor, ...],
        context: tuple[Tensor, ...],
        positions: Tensor | None,
    ) -> Embedded:
        """Mix the expression embedding of a block with its positions."""
        return Embedded(self.mixing(e, positions))


class SpectrumPanel(NamedTuple):
    """The factor model on the measured genes."""

    loadings: Tensor  # (genes, factors): V
    scale: Tensor  # (genes,): s
    gram: Tensor  # (factors, factors): V^T V
    posterior: Tensor  # (factors, factors): (V^T V / noise + 1 / eigenvalues)^-1 / noise
    target_sum: Tensor  # (): what a library is scaled to


class SpectrumBlock(NamedTuple):
    """A block in the units of the factor model: entries as stored, the rest one row per context."""

    lognorm: Tensor  # (entries,)
    columns: Tensor  # (entries,)
    offsets: Tensor  # (cells + 1,)
    measured: Tensor  # (cells,) float32: 0 where a cell has no counts, else 1
    library_size: Tensor  # (cells,)


class ScaledBlock(NamedTuple):
    """Scaled expression x of a block: x = measured * (base + a sparse matrix of differences)."""

    base: Tensor  # (genes,): x of a gene without counts
    differences: Tensor  # (entries,)
    columns: Tensor  # (entries,)
    offsets: Tensor  # (cells + 1,)
    measured: Tensor  # (cells,)

    def times(self, table: Tensor) -> Tensor:
        """Return x (cells, genes) times a table (genes, width)."""
        product = sparse_product(self.differences, self.columns, self.offsets, table)
        return product + self.measured[:, None] * (self.base @ table)

    def transposed_times(self, table: Tensor) -> Tensor:
        """Return x^T (genes, cells) times a table (cells, width)."""
        by_gene = torch.argsort(self.columns, stable=True)
        per_gene = torch.bincount(self.columns, minlength=self.base.shape[0])
        offsets = F.pad(per_gene.cumsum(0), (1, 0))  # (genes + 1,)
        rows = torch.repeat_interleave(self.offsets.diff().long())[by_gene]
        product = sparse_product(self.differences[by_gene], rows, offsets, table)
        return product + self.base[:, None] * (self.measured @ table)

    def squared_length(self) -> Tensor:
        """Return the sum of squares of each cell's row, (cells,)."""
        base = self.base[self.columns.long()]
        change = (base + self.differences).square() - base.square()
        rows = torch.repeat_interleave(self.offsets.diff().long())
        entries = torch.zeros_like(self.measured).index_add_(0, rows, change)
        return self.measured * self.base.square().sum() + entries


class FactorReader(nn.Module):
    """Map unit-variance factors and descriptors of a cell to its first hidden vector.

    The descriptors are log10 library size, log10 of the number of measured genes, and the share of
    scaled expression that the factors explain. With `unit_length` the factors of every cell are
    brought to the length that is to be expected, the root of their number, and log10 of the length
    that they had is a descriptor.
    """

    def __init__(self, config: CellPLMConfig):
        super().__init__()
        n_descriptors = 4 if config.unit_length else 3
        self.linear = Linear(config.factors + n_descriptors, config.hidden)
        self.mixing = Mixing(config)

    def forward(self, unit: Tensor, descriptors: Tensor, positions: Tensor | None) -> Tensor:
        """(cells, factors), (cells, descriptors), (cells, 2) → (cells, hidden)."""
        return self.mixing(self.linear(torch.cat((unit, descriptors), 1)), positions)


class FactorsAlone(nn.Module):
    """The floor: no network, the unit-variance factors are the hidden vector."""

    def __init__(self, config: CellPLMConfig):
        super().__init__()

    def forward(self, unit: Tensor, descriptors: Tensor, positions: Tensor | None) -> Tensor:
        """Return the factors, (cells, factors)."""
        return unit


class SpectrumEmbedder(nn.Module):
    """Read a cell as posterior factors of a fixed spectrum; see the module's text."""

    n_rounds = 1

    loadings: Tensor
    eigenvalues: Tensor
    scale: Tensor
    pool_profile: Tensor

    def __init__(self, config: CellPLMConfig):
        super().__init__()
        self.noise, self.target_sum = config.noise, config.target_sum
        self.unit_length = config.unit_length
        self.register_buffer("loadings", torch.zeros(config.n_genes, config.factors))
        self.register_buffer("eigenvalues", torch.ones(config.factors))
        self.register_buffer("scale", torch.ones(config.n_genes))
        uniform = torch.full((config.n_genes,), 1 / config.n_genes)
        self.register_buffer("pool_profile", uniform)  # mean fraction of a gene in the pool
        self.reader = FactorsAlone(config) if config.encoder == "none" else FactorReader(config)

    def panel(self, genes: Tensor) -> SpectrumPanel:
        """Prepare the factor model for the measured genes (positions in the model's list)."""
        loadings = self.loadings[genes].float()
        gram = loadings.double().T @ loadings.double()
        precision = gram / self.noise + torch.diag(1 / self.eigenvalues.double())
        posterior = torch.linalg.inv(precision) / self.noise
        in_pool = self.pool_profile[genes].sum().clamp(min=MIN_SHARE)
        share = 1.0 if self.target_sum == "library" else in_pool
        target_sum = torch.as_tensor(TARGET_SUM * share, dtype=torch.float32, device=genes.device)
        return SpectrumPanel(
            loadings, self.scale[genes], gram.float(), posterior.float(), target_sum
        )

    def gene_vectors(self, genes: Tensor) -> Tensor:
        """Return the loadings of some genes on factors of unit variance, (genes, factors)."""
        return self.loadings[genes].float() * self.eigenvalues.sqrt()

    def begin(self, counts: Counts, panel: SpectrumPanel) -> SpectrumBlock:
        """Normalise a block."""
        measured = (counts.library_size > 0).float()
        lognorm = counts.lognorm(panel.target_sum)
        return SpectrumBlock(lognorm, counts.columns, counts.offsets, measured, counts.library_size)

    def sums(
        self, number: int, block: SpectrumBlock, panel: SpectrumPanel
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return cells with counts (), summed lognorm (genes,) and summed fractions (genes,)."""
        columns, zeros = block.columns.long(), torch.zeros_like(panel.scale)
        lognorm = zeros.index_add(0, columns, block.lognorm)
        fractions = zeros.index_add(0, columns, block.lognorm.expm1() / panel.target_sum)
        return block.measured.sum(), lognorm, fractions

    def scaled(
        self, block: SpectrumBlock, panel: SpectrumPanel, context: tuple[Tensor, ...]
    ) -> ScaledBlock:
        """Centre a block on its context and scale it."""
        mean = context[1] / context[0].clamp(min=1)  # (genes,)
        base = (-mean / panel.scale).clamp(CLIP_LOW, CLIP_HIGH)
        columns = block.columns.long()
        entries = (block.lognorm - mean[columns]) / panel.scale[columns]
        differences = entries.clamp(CLIP_LOW, CLIP_HIGH) - base[columns]
        return ScaledBlock(base, differences, block.columns, block.offsets, block.measured)

    def infer(
        self, block: SpectrumBlock, panel: SpectrumPanel, context: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return factors (cells, factors) of a block, what they explain, of how much (cells,)."""
        x = self.scaled(block, panel, context)
        projection = x.times(panel.loadings)  # (cells, factors)
        factors = projection @ panel.posterior
        explained = (2 * projection - factors @ panel.gram).mul(factors).sum(1).clamp(min=0)
        return factors, explained, x.squared_length()

    def finish(
        self,
        block: SpectrumBlock,
        panel: SpectrumPanel,
        context: tuple[Tensor, ...],
        positions: Tensor | None,
    ) -> Embedded:
        """Return factors, the share they explain, and the first hidden vector of a block."""
        factors, explained, total = self.infer(block, panel, context)
        n_genes = torch.full_like(total, float(panel.scale.shape[0])).log10()
        descriptors = [
            block.library_size.clamp(min=1).log10(),
            n_genes,
            explained / total.clamp(min=1e-12),
        ]
        unit = self.unit_factors(factors)
        if self.unit_length:
            lengths = unit.norm(dim=1)
            descriptors.append(lengths.clamp(min=1e-6).log10())
            unit = with_length(unit, unit.shape[1] ** 0.5)
        hidden = self.reader(unit, torch.stack(descriptors, 1), positions)  # (cells, hidden)
        return Embedded(hidden, factors, explained, total)

    def read(self, counts: Counts, panel: SpectrumPanel) -> Tensor:
        """Return the unit-variance factors of a whole context, (cells, factors)."""
        block = self.begin(counts, panel)
        return self.unit_factors(self.infer(block, panel, self.sums(0, block, panel))[0])

    def unit_factors(self, factors: Tensor) -> Tensor:
        """Return factors (cells, factors) at unit prior variance, where the latent starts from."""
        return factors / self.eigenvalues.sqrt()

    def profile(self, context: tuple[Tensor, ...]) -> Tensor:
        """Return the context's mean fraction of each measured gene, (genes,)."""
        return context[2] / context[0].clamp(min=1)

    def background(self, profile: Tensor, measured: Tensor, genes: Tensor) -> Tensor:
        """Return a mean fraction for `genes`: the context's where measured, else the pool's.

        Parameters
        ----------
        profile : Tensor, shape (measured,)
            Of the context, fractions of what the panel measures.
        measured, genes : Tensor, int64
            Positions in the model's list.
        """
        fractions = self.pool_profile.clone()
        fractions[measured] = profile * fractions[measured].sum()
        return fractions[genes]
