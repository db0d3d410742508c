"""`cp.pl.denoising`: expression before and after, and what was made up on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellplm_tl._anndata import read_record
from cellplm_tl._anndata.counts import read_counts
from cellplm_tl._errors import InputError, OptionError, SlotError

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

TARGET_SUM = 1e4
SCALE = f"log1p of counts per {TARGET_SUM:,.0f}"
COLORS = {"measured": "tab:grey", "denoised": "tab:blue"}
DOTS: dict[str, Any] = {"s": 6, "alpha": 0.4, "linewidths": 0, "rasterized": True}


def denoising(
    adata: AnnData,
    genes: Sequence[str | tuple[str, str]],
    *,
    key: str = "cellplm_denoised",
    layer: str | None = None,
    figsize: tuple[float, float] | None = None,
) -> NDArray[np.object_]:
    """Draw genes before and after denoising, and the correlation that denoising has invented.

    Parameters
    ----------
    adata : AnnData, shape (cells, genes)
        What ``cp.tl.denoise`` has written into.
    genes : sequence of str or of pairs of str
        Names in `adata.var_names`. Those that stand alone are drawn as violins, measured beside
        denoised; a pair is drawn as one gene against the other, before and after.
    key : str, default "cellplm_denoised"
        The `key_added` of the call.
    layer : str, optional
        Layer with the counts that were denoised; by default `X`, or `layers["counts"]` if that
        holds counts and `X` does not.
    figsize : tuple of float, optional
        Width and height in inches; by default as the number of panels needs.

    Returns
    -------
    numpy.ndarray of matplotlib.axes.Axes, shape (panels,)
        The panels of a new figure, from left to right: violins of the single genes (a line at the
        mean), if there are any; two panels for each pair, with Pearson's correlation over cells in
        the title; and, if the record has looked into it, correlations of pairs of genes in held-out
        counts (freed of counting noise) against those after denoising, with the share that was
        invented in the title: what lies further from 0 than the diagonal is of the denoising.

    Raises
    ------
    InputError
        Not an AnnData; a gene that was not denoised; no whole counts to compare with
        (:class:`CountsError`).
    SlotError
        A slot or the record is not there.
    OptionError
        `genes` is empty, or holds something else than names and pairs.

    Notes
    -----
    Counts, and expected counts (``scale="counts"``), are shown as log1p of counts per 10,000 of the
    cell's measured total; ``scale="lognorm"`` as it is. matplotlib, which scanpy brings along, is
    imported when something is drawn.

    Examples
    --------
    What ``cp.tl.denoise`` writes, written by hand:

    >>> import anndata as ad, numpy as np
    >>> import cellplm_tl as cp
    >>> adata = ad.AnnData(np.random.default_rng(0).poisson(3.0, (50, 3)).astype("float32"))
    >>> adata.var_names = ["CD3D", "CD3E", "MS4A1"]
    >>> adata.layers["cellplm_denoised"] = adata.X * 0.5 + 1.5
    >>> adata.uns["cellplm"] = {"cellplm_denoised": {"tool": "denoise"}}
    >>> axes = cp.pl.denoising(adata, ["CD3D", "MS4A1", ("CD3D", "CD3E")])
    >>> len(axes)  # violins, and the pair before and after
    3
    """
    record = read_record(adata, "denoise", key, "adata")
    singles, pairs = _sorted_out(genes)
    shown = list(dict.fromkeys([*singles, *(name for pair in pairs for name in pair)]))
    values = _lognorm(adata, shown, record, key, layer)
    smoothing = record.get("smoothing", {})

    import matplotlib.pyplot as plt  # here: only who draws needs it

    widths = [max(3.0, 0.8 * len(singles) + 1)] * bool(singles) + [3.0] * 2 * len(pairs)
    widths += [3.0] * ("pairs" in smoothing)
    _, grid = plt.subplots(
        1,
        len(widths),
        figsize=figsize or (sum(widths) + 0.6 * len(widths), 3.4),
        width_ratios=widths,
        layout="constrained",
        squeeze=False,
    )
    panels = iter(grid[0])
    if singles:
        _draw_violins(next(panels), singles, values)
    for pair in pairs:
        _draw_pair((next(panels), next(panels)), pair, values)
    if "pairs" in smoothing:
        _draw_correlations(next(panels), smoothing["pairs"], smoothing["invented"])
    return grid[0]


def _sorted_out(genes: Any) -> tuple[list[str], list[tuple[str, str]]]:
    """Tell single genes from pairs."""
    if isinstance(genes, str):
        raise OptionError(f"genes must be a list of names or of pairs; got the text {genes!r}.")
    singles, pairs = [], []
    for entry in genes:
        if isinstance(entry, str):
            singles.append(entry)
        elif np.shape(entry) == (2,) and all(isinstance(name, str) for name in entry):
            pairs.append(tuple(entry))
        else:
            raise OptionError(f"genes must hold names and pairs of names; got {entry!r}.")
    if not singles and not pairs:
        raise OptionError("genes must hold one name or pair or more; got none.")
    return singles, pairs


def _lognorm(
    adata: AnnData, genes: list[str], record: Any, key: str, layer: str | None
) -> dict[str, pd.DataFrame]:
    """Return both states of the genes, each (cells, genes), log-normalised."""
    denoised = _denoised(adata, key, genes).to_numpy(dtype=np.float64)
    columns = adata.var_names.get_indexer_for(genes)
    counts = read_counts(adata, layer=layer).matrix
    library_size = np.maximum(np.asarray(counts.sum(axis=1)), 1)  # (cells, 1)
    measured = np.log1p(TARGET_SUM * counts[:, columns].toarray() / library_size)
    (scale, *_) = np.atleast_1d(record.get("parameters", {}).get("scale", "counts"))
    if scale == "counts":
        denoised = np.log1p(TARGET_SUM * denoised / library_size)
    return {
        "measured": pd.DataFrame(measured, columns=genes),
        "denoised": pd.DataFrame(denoised, columns=genes),
    }


def _denoised(adata: AnnData, key: str, genes: list[str]) -> pd.DataFrame:
    """Return the slot of the call, (cells, genes): a layer, or a frame for genes asked for."""
    wrong = [name for name in genes if (adata.var_names == name).sum() != 1]
    if wrong:
        raise InputError(
            f"{', '.join(wrong)}: not in adata.var_names, or more than once. The first names are "
            f"{', '.join(adata.var_names[:3])}."
        )
    if key in adata.layers:
        values = adata.layers[key][:, adata.var_names.get_indexer_for(genes)]
        return pd.DataFrame(np.asarray(values), columns=genes)
    if key not in adata.obsm:
        raise SlotError(
            f"neither adata.layers nor adata.obsm has {key!r}. Run cp.tl.denoise(adata) first, "
            "without out=, or pass another key."
        )
    frame = adata.obsm[key]
    missing = [name for name in genes if name not in frame]
    if missing:
        raise InputError(
            f"{', '.join(missing)}: not among the genes that were denoised, which are "
            f"{', '.join(frame.columns[:3])}, …"
        )
    return frame[genes]


def _draw_violins(axes: Axes, genes: list[str], values: dict[str, pd.DataFrame]) -> None:
    for (state, frame), offset in zip(values.items(), (-0.2, 0.2), strict=True):
        drawn: dict[str, Any] = axes.violinplot(
            frame[genes].to_numpy(),
            positions=np.arange(len(genes)) + offset,
            widths=0.36,
            showmeans=True,
            showextrema=False,
        )
        for body in drawn["bodies"]:
            body.set(facecolor=COLORS[state], alpha=0.6)
        drawn["cmeans"].set_color(COLORS[state])
        axes.plot([], [], color=COLORS[state], linewidth=6, alpha=0.6, label=state)
    axes.set_xticks(range(len(genes)), genes, rotation=90 if len(genes) > 4 else 0)
    axes.set(ylabel=SCALE)
    axes.legend(frameon=False)


def _draw_pair(
    panels: tuple[Axes, Axes], pair: tuple[str, str], values: dict[str, pd.DataFrame]
) -> None:
    one, other = pair
    ends = np.array([[0, 0], np.max([frame[[one, other]].max() for frame in values.values()], 0)])
    for axes, (state, frame) in zip(panels, values.items(), strict=True):
        axes.scatter(frame[one], frame[other], color=COLORS[state], **DOTS)
        correlation = frame[one].corr(frame[other])
        axes.set_title(f"{state}: r = {correlation:.2f}")
        axes.set(xlabel=one, ylabel=other)
        axes.set(xlim=ends[:, 0] * 1.05 - 0.02, ylim=ends[:, 1] * 1.05 - 0.02)


def _draw_correlations(axes: Axes, pairs: pd.DataFrame, invented: float) -> None:
    axes.axline((0, 0), slope=1, color="grey", linestyle="dashed", linewidth=1)
    axes.scatter(pairs["held_out"], pairs["denoised"], color=COLORS["denoised"], **DOTS)
    end = max(1.0, pairs["held_out"].abs().max())  # freed of noise, it can pass 1
    axes.set(xlim=(-1.05 * end, 1.05 * end), ylim=(-1.05, 1.05))
    axes.set(xlabel="correlation in held-out counts", ylabel="after denoising")
    axes.set_title(f"pairs of genes: {invented:.0%} invented")
