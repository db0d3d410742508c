"""`cp.tl.denoise`: expected counts of the measured genes."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellplm_tl import _likelihood, _weights
from cellplm_tl._anndata import (
    Cells,
    build_record,
    cells_frame,
    check_slots,
    copy_in_memory,
    find_columns,
    read_cells,
    write_slots,
)
from cellplm_tl._anndata.blockwise import DenseFile, check_new_file
from cellplm_tl._denoising import POISSON_THETA, Denoiser, Judgement, judge
from cellplm_tl._errors import (
    BaselineWarning,
    ModelError,
    OptionError,
    SmoothingWarning,
    check_option,
)
from cellplm_tl._inference import progress_bar
from cellplm_tl._random import generator
from cellplm_tl._settings import free_memory, logger, settings
from cellplm_tl.train.denoising import fine_tune
from cellplm_tl.train.fit import TrainConfig

if TYPE_CHECKING:
    from anndata import AnnData

SCALES = ("counts", "lognorm")
OBJECTIVES = ("likelihood", "nonzero")
TARGET_SUM = 1e4  # of the scale "lognorm"
JUDGED_LEVEL = 0.9  # of the interval whose coverage is measured when none is asked for
HELD_OUT_SHARE = 0.1  # of the counts, in each of the two parts that are held out
# Share of the gene-gene correlation after denoising that held-out counts do not show, above which
# there is a warning: docs/methods/denoise.md has what usual data and other tools reach.
SMOOTHING_LEVEL = 0.75
MEANING = {
    "likelihood": "expectation: mean over what could be counted in the cell, not a count",
    "nonzero": "expectation if the gene is counted at all: not the expression of a cell",
}


def denoise(
    adata: AnnData,
    *,
    genes: Sequence[str] | None = None,
    scale: str | tuple[str, ...] = "counts",
    interval: float | None = None,
    objective: str = "likelihood",
    train: TrainConfig | None = None,
    out: str | os.PathLike[str] | None = None,
    model: str | os.PathLike[str] | _weights.Model = "mini",
    layer: str | None = None,
    gene_key: str | None = None,
    batch_key: str | None = None,
    spatial_key: str | None = "spatial",
    key_added: str = "cellplm_denoised",
    device: str | None = None,
    random_state: Any = 0,
    copy: bool = False,
) -> AnnData | None:
    """Denoise counts: what is expected of every gene in every cell (Wen et al., ICLR 2024).

    The values are expectations at each cell's own depth. They are smoother than anything that could
    be counted: use them to look at genes, not for differential tests, which would take their
    smoothness for certainty, and not to count how many cells express a gene.

    Parameters
    ----------
    adata : AnnData, shape (cells, genes)
        Counts of human genes in `X`, `layers["counts"]` or `layer`, as :func:`embed` reads them. In
        memory or backed.
    genes : sequence of str, optional
        Names of `var_names` to give; by default all. They go to `obsm` then.
    scale : {"counts", "lognorm"} or tuple of these, default "counts"
        `"counts"`: expected counts. `"lognorm"`: the expected log1p of the counts per 10,000 under
        the model's likelihood, which is less than the log1p of the expectation. With two, the
        second goes to its own layer.
    interval : float, optional
        Such as 0.9: also give the limits between which that share of counts is expected to lie, of
        the first `scale`.
    objective : {"likelihood", "nonzero"}, default "likelihood"
        `"nonzero"`: what a value is expected to be *if the gene is counted*, which is what the
        paper's protocol scores (appendix F.1: entries known not to be zero). It is not a denoised
        expression.
    train : TrainConfig, optional
        Fine-tune on these data first, by counts hidden from the network; takes about a minute
        for 1,000 cells on two cores. By default nothing is trained.
    out : str or path, optional
        New file (`.h5ad`, `.zarr`) that the result is written to block by block, for results that
        memory cannot hold: the matrix in `X`, further ones in `layers`, `var[key_added]` as below.
        `adata` gets the record alone.
    model : str, path or Model, default "mini"
        A name of :func:`cellplm_tl.models.available`, a path, or a loaded model; with a decoder.
    layer : str, optional
        Layer to read instead.
    gene_key : str, optional
        Column of `var` with gene names; by default one of Ensembl ids, else `var_names`.
    batch_key : str, optional
        Column of `obs` that names each cell's context: a tissue sample, a library, a field of view.
        By default all cells are one context. Neighbours are looked for within contexts.
    spatial_key : str, default "spatial"
        Key of `obsm` with coordinates, for models with positions.
    key_added : str, default "cellplm_denoised"
        Key of the result.
    device : str, optional
        `"cpu"`, `"cuda"`, …; by default `cp.settings.device`.
    random_state : int or numpy generator, default 0
        Of the counts that are held out, of the training, and of the start of the principal
        components: where two cells are nearly equally far away it can decide which is a neighbour.
    copy : bool, default False
        Return a new AnnData and leave `adata` as it is.

    Returns
    -------
    AnnData or None
        With `copy=True` the new object; else `adata` is changed:

        `layers[key_added]` : numpy.ndarray, shape (cells, genes), float32
            On the first `scale`. A second one is in `layers` under the key with its name behind,
            and limits with `_lower` and `_upper`. With `genes`, all are frames in `obsm` instead,
            shape (cells, asked for).
        `var[key_added]` : bool
            Whether the model knows the gene. The others get the mean of their context, at each
            cell's depth.
        `uns["cellplm"][key_added]` : dict
            The record; `held_out` has the scores on counts that nothing has read (denoised, decoder
            alone, neighbours alone, gene mean), the weight that was chosen, and the coverage of the
            interval; `smoothing` how much gene-gene correlation was invented.

    Raises
    ------
    InputError
        Not an AnnData, or it holds no counts (:class:`CountsError`), too few known human genes
        (:class:`GenesError`), or contexts that cannot be read (:class:`ContextError`).
    SlotError
        A slot or gene that was named does not exist, or `key_added` is that of an input.
    OptionError
        A value that is not allowed; a result that memory cannot hold; `out` exists already.
    ModelError
        The model cannot be found or read, or has no decoder.

    Warns
    -----
    SmoothingWarning
        More than three quarters of the gene-gene correlation after denoising is not in held-out
        counts.
    BaselineWarning
        The mean of each gene predicts held-out counts better.

    Notes
    -----
    With p what the decoder expects of a cell (fractions over the measured genes) and q the mean of
    the fractions of its 60 nearest neighbours in the embedding, the expectation is n (w p +
    (1 - w) q), n being the cell's counts. The weight w is what predicts held-out counts best: 10 %
    of the counts of up to 1,000 cells are set aside for it, and 10 % to judge. On these the inverse
    dispersions of the negative binomial are estimated, too, with those of the model as a prior.

    Intervals, and the expectation of log1p, are those of a negative binomial with that mean. A
    cell without counts gets zeros.

    Examples
    --------
    >>> import scanpy as sc, cellplm_tl as cp
    >>> adata = sc.datasets.pbmc68k_reduced().raw.to_adata()
    >>> cp.tl.denoise(adata, genes=["CD3E", "MS4A1"], scale="lognorm")
    >>> adata.obsm["cellplm_denoised"].columns.tolist()
    ['CD3E', 'MS4A1']
    """
    start = time.perf_counter()
    parameters = {name: value for name, value in locals().items() if name not in ("adata", "start")}
    scales = _check_options(scale, interval, objective, train)
    rng = generator(random_state)
    loaded = model if isinstance(model, _weights.Model) else _weights.load(model)
    _check_decoder(loaded, interval, train)
    needs_coordinates = loaded.config.positions != "none"
    cells = read_cells(
        adata,
        loaded.genes,
        layer=layer,
        gene_key=gene_key,
        batch_key=batch_key,
        spatial_key=spatial_key if needs_coordinates else None,
        need_coordinates=needs_coordinates,
    )
    columns = find_columns(adata, genes)
    names = _names(key_added, scales, interval)
    slot = "layers" if genes is None else "obsm"
    taken = [] if out else [*((slot, name) for name in names), ("var", key_added)]
    check_slots(adata, [*taken, ("uns", key_added)], cells.slots_read)
    n_bytes = 4 * adata.n_obs * len(columns) * len(names)
    path = None if out is None else check_new_file(out, n_bytes)
    if path is None:
        _check_memory(n_bytes)
    target = settings.torch_device(device)
    logger.info(
        "denoising %d cells in %d contexts with %s: %d genes matched",
        cells.n_cells,
        len(cells.contexts),
        loaded.name,
        len(cells.genes),
    )

    network, training = loaded.network, {}
    seed = int(rng.integers(2**31))
    share = HELD_OUT_SHARE if train is None else train.validation_share
    shares = (1 - 2 * share, share, share)
    if train is not None and cells.n_cells:
        seed += train.seed
        seeded = replace(train, seed=seed)
        network, strategy, loss = fine_tune(network, cells, seeded, shares=shares, device=target)
        training = {"strategy": strategy, "held_out_loss": loss}
    level = interval or JUDGED_LEVEL
    judgement = judge(network, cells, shares=shares, level=level, device=target, seed=seed)
    with progress_bar(cells.n_cells) as bar:
        denoiser = Denoiser(network, cells, device=target, rng=rng, bar=bar, bar_share=0.5)
        if judgement is not None:
            denoiser.decoder_share, denoiser.theta = judgement.decoder_share, judgement.theta
        spread = _Spread(cells, denoiser.context_of, adata.n_vars, columns)
        result = copy_in_memory(adata) if copy else adata
        make = _Maker(denoiser, spread, scales, names, interval, objective)

        def record() -> dict[str, Any]:
            return build_record(
                "denoise",
                model=loaded,
                parameters=parameters
                | {"model": loaded.name, "out": None if out is None else path},
                cells=cells,
                device=target,
                precision=settings.precision,
                random_state=random_state,
                seconds=time.perf_counter() - start,
                meaning=MEANING[objective],
                n_genes_by_mean=int((~spread.is_known).sum()),
                training=training or None,
                **_findings(judgement),
            )

        if path is None:
            matrices = {name: np.empty((cells.n_cells, len(columns)), np.float32) for name in names}
            for rows, block in make.blocks():
                for name in names:
                    matrices[name][rows] = block[name]
                bar.update(0.5 * (rows.stop - rows.start))
            slots = _slots(result, matrices, genes, slot)
            slots["var", key_added] = spread.known_columns
            write_slots(result, slots, record(), key_added)
        else:
            known = {key_added: spread.is_known}
            with DenseFile(path, adata, columns, names, known) as file:
                for rows, block in make.blocks():
                    file.write(rows, block)
                    bar.update(0.5 * (rows.stop - rows.start))
                file.finish(record(), key_added)
            write_slots(result, {}, record(), key_added)
    _warn(judgement)
    return result if copy else None


class _Spread:
    """From genes of the model to columns of the AnnData that were asked for.

    Columns of one gene share its expectation as they share its counts; a column whose gene the
    model does not know gets its context's mean.
    """

    def __init__(
        self,
        cells: Cells,
        context_of: NDArray[np.int64],
        n_vars: int,
        columns: NDArray[np.int64],
    ):
        gene = np.full(n_vars, -1)
        gene[cells.columns] = cells.gene_of_column
        self._gene_of_column = gene
        self.gene = torch.from_numpy(gene[columns])  # (asked,), -1 where the model knows none
        self.is_known = gene[columns] >= 0
        self._share = torch.ones(len(columns))
        self._background: list[Tensor] = []
        self._context_of = context_of  # (cells,)
        if not self.is_known.all() or len(cells.columns) > len(cells.genes):
            self._pass_through(cells, n_vars, columns)

    def _pass_through(self, cells: Cells, n_vars: int, columns: NDArray[np.int64]) -> None:
        """Sum the counts of all columns, context by context."""
        total_of_gene = np.zeros(len(cells.genes))
        total_of_column = np.zeros(n_vars)
        for rows in cells.contexts:
            sums = np.zeros(n_vars)
            for begin in range(0, len(rows), 1024):
                counts = cells.all_counts(rows[begin : begin + 1024])
                sums += np.bincount(counts.indices, counts.data, n_vars)
            known = sums[cells.columns]
            fraction = sums[columns] / max(1.0, known.sum())
            self._background.append(torch.from_numpy(fraction).float())
            total_of_column += sums
            np.add.at(total_of_gene, cells.gene_of_column, known)
        gene = self._gene_of_column[columns]
        n_columns = np.bincount(cells.gene_of_column, minlength=len(cells.genes))
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(
                total_of_gene[gene] > 0,
                total_of_column[columns] / total_of_gene[gene],
                1 / n_columns[gene],
            )
        self._share = torch.from_numpy(np.where(gene >= 0, share, 1.0)).float()

    def means(self, mean: Tensor, totals: Tensor, rows: slice) -> Tensor:
        """Return means (cells, asked) from those of genes (cells, genes)."""
        known = torch.from_numpy(self.is_known)
        result = torch.zeros(len(mean), len(self.gene))
        result[:, known] = mean[:, self.gene[known]] * self._share[known]
        if not self.is_known.all():
            contexts = self._context_of[rows]
            for number in np.unique(contexts):
                inside = torch.from_numpy(np.flatnonzero(contexts == number))
                background = self._background[number][~known]
                result[inside[:, None], torch.nonzero(~known)[:, 0]] = (
                    totals[inside][:, None] * background
                )
        return result

    def theta(self, theta: Tensor) -> Tensor:
        """Return inverse dispersions (asked,) from those of genes (genes,)."""
        known = torch.from_numpy(self.is_known)
        result = torch.full((len(self.gene),), POISSON_THETA)
        result[known] = theta[self.gene[known]]
        return result

    @property
    def known_columns(self) -> NDArray[np.bool_]:
        """Whether the model knows the gene, of every column of the AnnData."""
        return self._gene_of_column >= 0


class _Maker:
    """Makes the matrices that were asked for, block by block, in the order of the cells."""

    def __init__(
        self,
        denoiser: Denoiser,
        spread: _Spread,
        scales: tuple[str, ...],
        names: list[str],
        interval: float | None,
        objective: str,
    ):
        self._denoiser, self._spread = denoiser, spread
        self._scales, self._names = scales, names
        self._interval, self._objective = interval, objective

    def blocks(self) -> Iterator[tuple[slice, dict[str, NDArray[np.float32]]]]:
        """Give the rows of a block and, by name, its matrices (cells, asked)."""
        n_cells, size = self._denoiser.cells.n_cells, self._denoiser.block_cells()
        for begin in range(0, n_cells, size):
            rows = slice(begin, min(begin + size, n_cells))
            mean, theta, totals = self._denoiser.expected(np.arange(rows.start, rows.stop))
            mean, theta = self._spread.means(mean, totals, rows), self._spread.theta(theta)
            matrices = [self._values(scale, mean, theta, totals) for scale in self._scales]
            if self._interval is not None:
                tail = (1 - self._interval) / 2
                for level in (tail, 1 - tail):
                    count = _likelihood.quantile(mean, theta, level)
                    matrices.append(_rescaled(count, totals, self._scales[0]))
            yield rows, {n: m.numpy() for n, m in zip(self._names, matrices, strict=True)}

    def _values(self, scale: str, mean: Tensor, theta: Tensor, totals: Tensor) -> Tensor:
        factor = TARGET_SUM / totals.clamp(min=1)
        values = mean
        if scale == "lognorm":
            values = _likelihood.expected_log1p(mean, theta, factor)
        if self._objective == "nonzero":
            seen = _likelihood.seen_probability(mean, theta)
            single = torch.log1p(factor) if scale == "lognorm" else torch.ones_like(factor)
            # A gene of which nothing is expected is, if it is counted, counted once.
            values = torch.where(seen > 1e-6, values / seen.clamp(min=1e-6), single[:, None])
            values = values * (totals > 0)[:, None]
        return values


def _rescaled(counts: Tensor, totals: Tensor, scale: str) -> Tensor:
    if scale == "counts":
        return counts
    return torch.log1p(counts * (TARGET_SUM / totals.clamp(min=1))[:, None])


def _check_options(
    scale: Any, interval: float | None, objective: str, train: TrainConfig | None
) -> tuple[str, ...]:
    """Return the scales as a tuple, of options that are allowed."""
    scales = tuple(scale) if isinstance(scale, tuple | list) else (scale,)
    for one in scales:
        check_option("scale", one, SCALES)
    if not scales or len(set(scales)) < len(scales):
        raise OptionError(f"scale must name one scale or more, each once; got {scale!r}.")
    check_option("objective", objective, OBJECTIVES)
    is_number = isinstance(interval, int | float) and not isinstance(interval, bool)
    if interval is not None and not (is_number and 0 < interval < 1):
        raise OptionError(f"interval must be a number between 0 and 1, as 0.9; got {interval!r}.")
    if interval is not None and objective == "nonzero":
        raise OptionError("interval is of all counts, zeros among them: leave objective as it is.")
    if train is not None and not isinstance(train, TrainConfig):
        raise OptionError(f"train must be a cp.train.TrainConfig or None; got {train!r}.")
    if train is not None and not train.validation_share < 0.4:
        raise OptionError(
            "validation_share is held out twice, to choose and to judge by: it must be below 0.4; "
            f"got {train.validation_share}."
        )
    return scales


def _check_decoder(
    model: _weights.Model, interval: float | None, train: TrainConfig | None
) -> None:
    if not model.config.has_decoder:
        raise ModelError(
            f"the model {model.name!r} has no decoder, so that nothing leads back to genes; use "
            "'mini', or another model with one."
        )
    for name, value in (("interval", interval), ("train", train)):
        if value is not None and model.config.decoder == "gaussian":
            raise OptionError(
                f"{name} needs a likelihood of counts, which {model.name!r} lacks: leave it out, "
                "or use 'mini'."
            )


def _names(key_added: str, scales: tuple[str, ...], interval: float | None) -> list[str]:
    """Return the keys of all matrices, in the order in which they are made."""
    names = [key_added, *(f"{key_added}_{scale}" for scale in scales[1:])]
    limits = [] if interval is None else [f"{key_added}_lower", f"{key_added}_upper"]
    return names + limits


def _check_memory(n_bytes: int) -> None:
    """Say no to a result that memory cannot hold, before any work."""
    room = free_memory()
    if n_bytes > room:
        raise OptionError(
            f"the result needs {n_bytes / 1e9:.1f} GB, and {room / 1e9:.1f} GB of memory are free: "
            "write it to a file with out='….h5ad', or name the genes that you need with genes=[…]."
        )


def _slots(
    adata: AnnData,
    matrices: dict[str, NDArray[np.float32]],
    genes: Sequence[str] | None,
    slot: str,
) -> dict[tuple[str, str], Any]:
    """Return what is to be written: layers, or frames of the genes that were asked for."""
    if genes is None:
        return {(slot, name): matrix for name, matrix in matrices.items()}
    return {(slot, name): cells_frame(adata, matrix, genes) for name, matrix in matrices.items()}


def _findings(judgement: Judgement | None) -> dict[str, Any]:
    """Return the entries of the record on held-out counts."""
    if judgement is None:
        return {"held_out": {"n_cells": 0, "why": "too few cells to hold counts out"}}
    return {
        "held_out": {
            "n_cells": judgement.n_cells,
            "decoder_share": judgement.decoder_share,
            "scores": judgement.scores,
            "coverage": judgement.coverage,
        },
        "smoothing": judgement.smoothing,
    }


def _warn(judgement: Judgement | None) -> None:
    if judgement is None:
        return
    invented = judgement.smoothing.get("invented", 0.0)
    if invented > SMOOTHING_LEVEL:
        warnings.warn(
            f"{invented:.0%} of the gene-gene correlation after denoising is not in counts that "
            "were held out: do not read co-expression from the result. "
            "cp.pl.denoising(adata, …) shows it.",
            SmoothingWarning,
            stacklevel=3,
        )
    deviance = judgement.scores["poisson_deviance"]
    if deviance["denoised"] > deviance["gene_mean"]:
        warnings.warn(
            "the mean of each gene predicts held-out counts better than the denoised values "
            f"(Poisson deviance {deviance['gene_mean']:.4f} against {deviance['denoised']:.4f}): "
            "these cells are too few, too shallow or too unlike the pretraining pool. Try "
            "train=cp.train.TrainConfig(), or stay with the counts.",
            BaselineWarning,
            stacklevel=3,
        )
