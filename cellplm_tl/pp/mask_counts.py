"""Hide part of the counts, to see whether they are found again."""

from __future__ import annotations

import time
from numbers import Integral
from typing import Any

import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from cellplm_tl._anndata import build_record, check_slots, copy_in_memory, write_slots
from cellplm_tl._anndata.counts import read_counts
from cellplm_tl._errors import OptionError, check_option
from cellplm_tl._random import generator
from cellplm_tl.pp._drawing import check_share

KERNEL_SCALE = 20.0  # counts (appendix F.1): a count of 20 is hidden e times as rarely as one of 0
# What becomes of an entry.
SEEN, HIDDEN, VALIDATION = 0, 1, 2


def mask_counts(
    adata: AnnData,
    *,
    fraction: float = 0.1,
    validation_fraction: float = 0.0,
    kernel: str = "exponential",
    min_genes: int = 5,
    layer: str | None = None,
    key_added: str = "masked",
    random_state: Any = 0,
    copy: bool = False,
) -> AnnData | None:
    """Set a part of the non-zero counts to 0 and keep them, as CellPLM's test of denoising does.

    Denoise ``layers["masked"]``, and score the result on what was hidden with
    :func:`cellplm_tl.metrics.denoising`. All of these entries are known not to be zero, which
    rewards some methods unduly (see there); :func:`thin_counts` does not have this flaw.

    Parameters
    ----------
    adata : AnnData, shape (cells, genes)
        Raw counts in `X`, `layers["counts"]` or `layer`; log-normalised values where the counts can
        be recovered from them exactly. In memory or backed.
    fraction : float, default 0.1
        Share of each cell's non-zero counts that is hidden, rounded down.
    validation_fraction : float, default 0.0
        Share that is hidden as well and kept apart, to choose a method by.
    kernel : {"exponential", "uniform"}, default "exponential"
        Chance of a count x to be hidden before others of its cell: in proportion to exp(−x/20), or
        the same for all.
    min_genes : int, default 5
        Cells with fewer non-zero counts are left as they are.
    layer : str, optional
        Layer to read instead.
    key_added : str, default "masked"
        Key of the masked counts, and first part of the others'.
    random_state : int or numpy generator, default 0
        Seed. Cells are gone through in their order, and their genes in theirs: another order is
        another draw.
    copy : bool, default False
        Write to a copy of `adata` and return it.

    Returns
    -------
    AnnData or None
        The copy, or nothing; written are

        ``adata.layers[key_added]`` : CSR matrix, shape (cells, genes), float32
            The counts without those hidden.
        ``adata.layers["masked_truth"]`` : CSR matrix, shape (cells, genes), float32
            The hidden counts alone; its entries are the places to score.
        ``adata.layers["…_validation"]`` : CSR matrix, shape (cells, genes), float32
            With `validation_fraction` only: likewise those to validate on.
        ``adata.uns["cellplm"][key_added]`` : dict
            The record: parameters, state of the input, numbers of cells and counts concerned.

    Raises
    ------
    InputError
        `adata` is no AnnData, a view of a file, or holds no counts (:class:`CountsError`).
    SlotError
        There is no such layer, or `key_added` is that of the input.
    OptionError
        A share is not between 0 and 1, or both together are 1 or more; another kernel;
        `min_genes` is no positive integer.

    Notes
    -----
    Appendix F.1 of Wen et al. (ICLR 2024). Of a cell with n non-zero counts
    floor(`fraction` · n) are drawn without replacement by :meth:`numpy.random.Generator.choice`,
    then floor(`validation_fraction` · n) of the rest. The official code leaves cells with five
    non-zero counts out as well: its masks are those of ``min_genes=6, random_state=10,
    validation_fraction=0.1``, to the bit; ``kernel="uniform"`` is its "mcar".

    Examples
    --------
    >>> import anndata as ad, numpy as np, cellplm_tl as cp
    >>> adata = ad.AnnData(np.random.default_rng(0).poisson(1.0, (20, 100)).astype("float32"))
    >>> cp.pp.mask_counts(adata)
    >>> hidden = adata.layers["masked_truth"]
    >>> adata.layers["masked"].nnz, hidden.nnz, int((adata.X > 0).sum())
    (1170, 121, 1291)
    >>> scores = cp.metrics.denoising(adata.X, np.ones(adata.shape), masked=hidden)
    """
    start = time.perf_counter()
    parameters = {name: value for name, value in locals().items() if name not in ("adata", "start")}
    check_share("fraction", fraction)
    check_share("validation_fraction", validation_fraction, zero=True)
    if fraction + validation_fraction >= 1:
        raise OptionError(
            f"fraction and validation_fraction together must leave something to see; got "
            f"{fraction} and {validation_fraction}."
        )
    check_option("kernel", kernel, ("exponential", "uniform"))
    if not (isinstance(min_genes, Integral) and min_genes > 0):
        raise OptionError(f"min_genes must be a positive integer; got {min_genes!r}.")
    rng = generator(random_state)
    counts = read_counts(adata, layer=layer)
    parts = {key_added: SEEN, f"{key_added}_truth": HIDDEN}
    if validation_fraction:
        parts[f"{key_added}_validation"] = VALIDATION
    check_slots(adata, [("layers", key) for key in parts], counts.slots_read)

    shares = (fraction, validation_fraction)
    fate = _draw(counts.matrix, shares, kernel, min_genes, rng)
    slots = {("layers", key): _entries(counts.matrix, fate == part) for key, part in parts.items()}

    n_genes = np.diff(counts.matrix.indptr)
    record = build_record(
        "mask_counts",
        model=None,
        parameters=parameters,
        random_state=random_state,
        seconds=time.perf_counter() - start,
        slots_read=counts.slots_read,
        input=counts.input_state,
        n_cells_masked=int((n_genes >= min_genes).sum()),
        n_masked=int((fate == HIDDEN).sum()),
        n_validation=int((fate == VALIDATION).sum()),
    )
    result = copy_in_memory(adata) if copy else adata
    write_slots(result, slots, record, key_added)
    return result if copy else None


def _draw(
    counts: sp.csr_matrix,
    shares: tuple[float, float],
    kernel: str,
    min_genes: int,
    rng: np.random.Generator,
) -> NDArray[np.int8]:
    """Draw what becomes of every entry, cell by cell: hidden first, then validation, the rest."""
    fate = np.full(counts.nnz, SEEN, dtype=np.int8)
    for first, last in zip(counts.indptr[:-1], counts.indptr[1:], strict=True):
        n = last - first
        if n < min_genes:
            continue
        chance = np.ones(n)
        if kernel == "exponential":
            chance = np.exp(-counts.data[first:last].astype(np.float64) / KERNEL_SCALE)
            chance /= KERNEL_SCALE
        left = np.arange(first, last)
        for part, share in zip((HIDDEN, VALIDATION), shares, strict=True):
            weights = chance[left - first]
            drawn = rng.choice(left, int(share * n), replace=False, p=weights / weights.sum())
            fate[drawn] = part
            left = left[fate[left] == SEEN]
    return fate


def _entries(counts: sp.csr_matrix, is_chosen: NDArray[np.bool_]) -> sp.csr_matrix:
    """Give a matrix of the chosen entries alone."""
    offsets = np.concatenate([[0], np.cumsum(is_chosen)])[counts.indptr]
    columns = counts.indices[is_chosen]
    return sp.csr_matrix((counts.data[is_chosen], columns, offsets), shape=counts.shape)
