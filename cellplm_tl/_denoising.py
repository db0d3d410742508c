"""Expected counts of cells: what a decoder says of them, and what their neighbours show.

The decoder knows what cells of the pretraining pool look like; the mean of a cell's nearest
neighbours knows what is in this data set, and is noisy. The expectation is a weighted mean of both,
the weight being what predicts held-out counts best: on tissues that the pool has, mostly the
decoder's; elsewhere the neighbours'. Everything is a fraction of a cell's counts over the measured
genes that the model knows, and is made for one block of cells at a time.

Axes: `cells`, `genes` (measured, and known to the model).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from tqdm import tqdm

from cellplm_tl import _likelihood
from cellplm_tl._anndata import Cells
from cellplm_tl._inference import Encoding, converted, encode
from cellplm_tl._rotation import find_frame, project
from cellplm_tl._settings import settings
from cellplm_tl.metrics import denoising as score
from cellplm_tl.models import CellPLM
from cellplm_tl.train.held_out import Part, divide

N_COMPONENTS = 30  # of the representation that neighbours are looked for in, as `embed`'s
N_NEIGHBORS = 60  # chosen for the floor on the development sets of the pool
NEIGHBOR_SHARE = 0.25  # of a small context that may be neighbours; but
MIN_NEIGHBORS = 10  # where there are as many cells
MAX_ANCHORS = 10_000  # cells of a context among which neighbours are looked for
DECODER_SHARES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0)  # that are tried
USUAL_SHARE = 0.5  # where too few cells are there to try them
MIN_JUDGED = 20  # cells
MAX_JUDGED = 1000  # cells
POISSON_THETA = 1e4  # inverse dispersion from which on a negative binomial is a Poisson
THETA_BOUNDS = (1e-2, POISSON_THETA)
THETA_PRIOR = 1.0  # weight of the model's dispersion, in squared expected counts
BLOCK_SHARE = 0.25  # of the memory budget, for the dense arrays of a block
DENSE_ARRAYS = 12  # of a block that live at once
MAX_BLOCK = 1024  # cells

SMOOTHING_GENES = 100  # the most reliable ones
MIN_RELIABILITY = 0.1  # correlation of a gene's two held-out parts
MIN_SMOOTHING_GENES = 10
TINY = 1e-30  # keeps a ratio of two zeros at 0


class Expected(NamedTuple):
    """What is expected of a block of cells."""

    mean: Tensor  # (cells, genes): counts at each cell's own depth
    theta: Tensor  # (genes,): inverse dispersion
    totals: Tensor  # (cells,): counts over the genes


class Denoiser:
    """A network on its cells, ready to say what is expected of any of them.

    Parameters
    ----------
    network
        With a decoder.
    cells : Cells or Part
        To be denoised, or a part of their counts.
    device
        Where the network runs.
    rng
        Of the anchors, and of the start of the principal components.
    bar, bar_share
        Progress bar to advance, and by which share of it.
    """

    def __init__(
        self,
        network: CellPLM,
        cells: Any,
        *,
        device: torch.device,
        rng: np.random.Generator,
        bar: tqdm | None = None,
        bar_share: float = 1.0,
    ):
        self.cells = cells
        self.decoder_share = USUAL_SHARE
        self._device = device
        encoding = encode(network, cells, device=device, bar=bar, bar_share=bar_share)
        self._network = converted(network, device, settings.precision)
        self._genes = torch.from_numpy(cells.gene_index).to(device)
        self._latent = encoding.latent
        self._profiles = _profiles(network, cells, encoding)
        self.context_of = np.empty(cells.n_cells, np.int64)
        for number, rows in enumerate(cells.contexts):
            self.context_of[rows] = number
        points = encoding.latent
        if network.config.embedder == "spectrum":
            frame = find_frame(network, cells, encoding, N_COMPONENTS, rng)
            points = project(network, cells, encoding, frame, N_COMPONENTS)
        self._points = points
        self._neighbors = [_Neighbors(cells, rows, points, rng) for rows in cells.contexts]
        self.theta = self._decode(np.arange(min(1, cells.n_cells)))[1].cpu()

    def block_cells(self) -> int:
        """Return how many cells a block may have within the memory budget."""
        per_cell = 4 * DENSE_ARRAYS * max(1, len(self.cells.genes))
        return int(np.clip(BLOCK_SHARE * settings.budget_bytes() / per_cell, 1, MAX_BLOCK))

    def totals(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the counts of cells over the genes, (cells,)."""
        block = self.cells.counts(rows)
        of_entry = np.repeat(np.arange(len(rows)), np.diff(block.offsets))
        return np.bincount(of_entry, block.values, len(rows)).astype(np.float64)

    def expected(self, rows: NDArray[np.int64]) -> Expected:
        """Return the expected counts of some cells: they sum to the counts that each cell has."""
        decoded, smoothed = self.fractions(rows)
        share = self.decoder_share
        mean = share * decoded + (1 - share) * smoothed
        totals = torch.from_numpy(self.totals(rows)).float()
        return Expected(mean * totals[:, None], self.theta, totals)

    def fractions(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return decoded fractions and those of the neighbours, both (cells, genes)."""
        decoded = self._decode(rows)[0].cpu()
        smoothed = torch.empty_like(decoded)
        for number in np.unique(self.context_of[rows]):
            inside = np.flatnonzero(self.context_of[rows] == number)
            points = self._points[rows[inside]]
            smoothed[torch.from_numpy(inside)] = self._neighbors[number].mean(points)
        return decoded, smoothed

    def _decode(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return decoded fractions (cells, genes), and inverse dispersions (genes,)."""
        n_genes = len(self._genes)
        fractions = torch.empty(len(rows), n_genes, device=self._device)
        theta = torch.full((n_genes,), POISSON_THETA)
        with torch.inference_mode():
            for number in np.unique(self.context_of[rows]):
                inside = np.flatnonzero(self.context_of[rows] == number)
                z = torch.from_numpy(self._latent[rows[inside]]).to(self._device)
                profile = self._profiles[number]
                if profile is not None:
                    profile = profile.to(self._device)
                mean, found = self._network.decode(z, self._genes, profile=profile)
                if found is None:  # gaussian: the mean is that of log1p
                    mean = mean.expm1().clamp(min=0)
                else:
                    theta = found.float()
                mean = mean.float()
                total = mean.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
                fractions[torch.from_numpy(inside).to(self._device)] = mean / total
        return fractions, theta


class _Neighbors:
    """The cells of a context, or some of them, among which a cell finds its neighbours."""

    def __init__(
        self, cells: Any, rows: NDArray[np.int64], points: NDArray, rng: np.random.Generator
    ):
        if len(rows) > MAX_ANCHORS:
            rows = np.sort(rng.choice(rows, MAX_ANCHORS, replace=False))
        block = cells.counts(rows)
        shape = (len(rows), len(cells.genes))
        counts = sp.csr_matrix((block.values, block.columns, block.offsets), shape)
        totals = np.asarray(counts.sum(1)).ravel()
        counts, rows = counts[totals > 0], rows[totals > 0]
        scale = sp.diags(1 / totals[totals > 0])
        self._fractions = (scale @ counts).astype(np.float32).tocsr()  # (anchors, genes)
        fewest = min(len(rows), MIN_NEIGHBORS)
        self._n = int(np.clip(NEIGHBOR_SHARE * len(rows), fewest, N_NEIGHBORS))
        self._index = NearestNeighbors(n_neighbors=self._n).fit(points[rows]) if self._n else None

    def mean(self, points: NDArray) -> Tensor:
        """Return the mean fractions of each point's nearest anchors, (points, genes)."""
        shape = (len(points), self._fractions.shape[0])
        if self._index is None:
            return torch.zeros(len(points), self._fractions.shape[1])
        nearest = self._index.kneighbors(points, return_distance=False)
        weights = np.full(nearest.size, 1 / self._n, np.float32)
        offsets = np.arange(0, nearest.size + 1, self._n)
        graph = sp.csr_matrix((weights, nearest.ravel(), offsets), shape)
        return torch.from_numpy((graph @ self._fractions).toarray())


def _profiles(network: CellPLM, cells: Any, encoding: Encoding) -> list[Tensor | None]:
    """Return the mean fractions of each context, for decoders that change them."""
    if network.config.decoder != "profile":
        return [None] * len(encoding.context_sums)
    genes = torch.from_numpy(cells.gene_index)
    return [
        network.embedder.background(network.embedder.profile(sums), genes, genes)
        for sums in encoding.context_sums
    ]


# --- judging on held-out counts -------------------------------------------------------------------


class Judgement(NamedTuple):
    """What held-out counts say of a denoiser."""

    n_cells: int  # that were judged
    decoder_share: float
    theta: Tensor  # (genes,)
    scores: pd.DataFrame  # one row for each predictor, one column for each score
    coverage: dict[str, float]
    smoothing: dict[str, Any]


def judge(
    network: CellPLM,
    cells: Cells,
    *,
    shares: tuple[float, float, float],
    level: float,
    device: torch.device,
    seed: int,
) -> Judgement | None:
    """Choose weight and dispersions on one half of some cells, and judge on the other half.

    They are chosen by the second part of the counts, and judged by the third.

    Parameters
    ----------
    network
        With a decoder. It may have been trained on the first part of the division by `seed`.
    cells
        Of which up to `MAX_JUDGED` are drawn.
    shares
        Of the counts: to be read, and two parts to predict.
    level
        Of the interval whose coverage is measured.
    seed
        Of the division.

    Returns
    -------
    Judgement or None
        None for too few cells.
    """
    parts = divide(cells, shares, seed, MAX_JUDGED)
    if parts[0].n_cells < MIN_JUDGED:
        return None
    rng = np.random.default_rng(seed)
    denoiser = Denoiser(network, parts[0], device=device, rng=rng)
    rows = np.arange(parts[0].n_cells)
    read, held_out, second = (_matrix(part, rows) for part in parts)
    has_counts = [np.asarray(part.sum(1)).ravel() > 0 for part in (read, held_out, second)]
    has_all = np.flatnonzero(np.logical_and.reduce(has_counts))
    choosing, judging = has_all[::2], has_all[1::2]
    if len(judging) < MIN_JUDGED // 2:
        return None

    decoded, smoothed = (part.numpy() for part in denoiser.fractions(rows))
    target = held_out[choosing]
    deviances = [
        score(target, w * decoded[choosing] + (1 - w) * smoothed[choosing])["poisson_deviance"]
        for w in DECODER_SHARES
    ]
    share = DECODER_SHARES[int(np.argmin(deviances))]
    mean = share * decoded + (1 - share) * smoothed

    totals = np.asarray(held_out.sum(1))[choosing]
    theta = _dispersion(held_out[choosing].toarray(), mean[choosing] * totals, denoiser)
    # Judged is by the other part, which nothing before has looked at.
    target, totals = second[judging], np.asarray(second.sum(1))[judging]
    scale = torch.from_numpy(1e4 / totals.ravel())
    constant = np.tile(np.asarray(_fractions(read).mean(0)), (len(rows), 1))
    predictors = {
        "denoised": mean,
        "decoder": decoded,
        "neighbors": smoothed,
        "gene_mean": constant,
    }
    scores = {}
    for name, fractions in predictors.items():
        expected = torch.from_numpy(fractions[judging] * totals).float()
        lognorm = _likelihood.expected_log1p(expected, theta, scale).numpy()
        scores[name] = score(target, fractions[judging], lognorm=lognorm)
    expected = torch.from_numpy(mean[judging] * totals).float()
    coverage = _coverage(target.toarray(), expected, theta, level)
    smoothing = invented_correlation(
        mean[has_all], *(part[has_all] for part in (read, held_out, second))
    )
    table = pd.DataFrame(scores).T
    return Judgement(len(judging), share, theta, table, coverage, smoothing)


def _matrix(part: Part, rows: NDArray[np.int64]) -> sp.csr_matrix:
    block = part.counts(rows)
    shape = (len(rows), len(part.genes))
    return sp.csr_matrix((block.values, block.columns, block.offsets), shape)


def _fractions(counts: sp.csr_matrix) -> sp.csr_matrix:
    totals = np.maximum(np.asarray(counts.sum(1)).ravel(), 1)
    return sp.csr_matrix(sp.diags(1 / totals) @ counts)


def _dispersion(counts: NDArray, expected: NDArray, denoiser: Denoiser) -> Tensor:
    """Return inverse dispersions: by moments, drawn towards those of the model.

    Beyond a Poisson's, the variance is m² / r: its estimate is the sum of (y - m)² - y over that of
    m², to which the model's own counts as `THETA_PRIOR` further squared counts.
    """
    excess = ((counts - expected) ** 2 - counts).sum(0)
    weight = (expected**2).sum(0)
    prior = 1 / denoiser.theta.double().numpy()
    inverse = (excess + THETA_PRIOR * prior) / (weight + THETA_PRIOR)
    low, high = THETA_BOUNDS
    return torch.from_numpy(1 / np.clip(inverse, 1 / high, 1 / low)).float()


def _coverage(counts: NDArray, expected: Tensor, theta: Tensor, level: float) -> dict[str, float]:
    """Return the share of held-out counts in the interval: of all, and where one is expected."""
    tail = (1 - level) / 2
    lower = _likelihood.quantile(expected, theta, tail).numpy()
    upper = _likelihood.quantile(expected, theta, 1 - tail).numpy()
    inside = (lower <= counts) & (counts <= upper)
    is_seen = expected.numpy() >= 1
    found = {"level": level, "of_all_entries": float(inside.mean())}
    if is_seen.any():
        found["of_entries_expected_above_1"] = float(inside[is_seen].mean())
    return found


def invented_correlation(
    denoised: NDArray, read: sp.csr_matrix, first: sp.csr_matrix, second: sp.csr_matrix
) -> dict[str, Any]:
    """Measure how much of the gene-gene correlation after denoising held-out counts do not show.

    The covariance of a gene in one part of the counts with a gene in another is free of counting
    noise; divided by the root of the same for each gene with itself, it is the correlation of what
    the counts are drawn from. Of these one pair says little; over all pairs their slope on the
    correlations after denoising says a lot.

    Parameters
    ----------
    denoised : (cells, genes)
        Fractions expected from `read`.
    read : (cells, genes)
        The counts that were read.
    first, second : (cells, genes)
        Two parts that were held out. Their noise is independent of `denoised` and of each other.

    Returns
    -------
    dict
        ``n_genes``, those with a reliable signal; and, where these are enough, ``invented``: 1 - b,
        with b the slope, so that 0 is none and 1 all of it; and ``pairs``, both correlations for
        every pair of genes.
    """
    r, h = (_centred_fractions(part) for part in (read, first + second))
    signal = (r * h).mean(0)  # (genes,)
    reliability = signal / np.maximum(r.std(0) * h.std(0), TINY)
    order = np.argsort(-reliability, kind="stable")[:SMOOTHING_GENES]
    genes = np.sort(order[reliability[order] > MIN_RELIABILITY])
    if len(genes) < MIN_SMOOTHING_GENES:
        return {"n_genes": len(genes)}
    a, b = (_centred_fractions(part)[:, genes] for part in (first, second))
    covariance = (a.T @ b + b.T @ a) / (2 * len(a))
    root = np.sqrt(signal[genes])
    d = denoised[:, genes] - denoised[:, genes].mean(0)
    d = d / np.maximum(np.sqrt((d**2).sum(0)), TINY)
    pair = np.triu_indices(len(genes), 1)
    after, shown = (d.T @ d)[pair], (covariance / np.outer(root, root))[pair]
    slope = float((after * shown).sum() / max((after**2).sum(), TINY))
    pairs = pd.DataFrame({"held_out": shown, "denoised": after}).astype(np.float32)
    return {"n_genes": len(genes), "invented": 1 - slope, "pairs": pairs}


def _centred_fractions(counts: sp.csr_matrix) -> NDArray:
    fractions = _fractions(counts).toarray()
    return fractions - fractions.mean(0)
