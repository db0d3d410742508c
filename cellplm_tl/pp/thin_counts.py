"""Divide every count in two, so that one part can predict the other."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from anndata import AnnData

from cellplm_tl._anndata import build_record, check_slots, copy_in_memory, write_slots
from cellplm_tl._anndata.counts import read_counts
from cellplm_tl._random import generator
from cellplm_tl.pp._drawing import check_share


def thin_counts(
    adata: AnnData,
    *,
    share: float = 0.5,
    layer: str | None = None,
    key_added: str = "thinned",
    random_state: Any = 0,
    copy: bool = False,
) -> AnnData | None:
    """Divide the counts binomially into two parts: as if every cell had been sequenced twice.

    Denoise ``layers["thinned"]``, and score the result on ``layers["thinned_truth"]`` with
    :func:`cellplm_tl.metrics.denoising`: given the cell's true expression, the parts are
    (nearly) independent of each other, and so nothing is gained by copying the input.

    Parameters
    ----------
    adata : AnnData, shape (cells, genes)
        Raw counts in `X`, `layers["counts"]` or `layer`; log-normalised values where the counts can
        be recovered from them exactly. In memory or backed.
    share : float, default 0.5
        Chance of each molecule to stay, between 0 and 1.
    layer : str, optional
        Layer to read instead.
    key_added : str, default "thinned"
        Key of the thinned counts, and first part of the rest's.
    random_state : int or numpy generator, default 0
        Seed. Entries are gone through in the order of cells and genes: another order is another
        draw.
    copy : bool, default False
        Write to a copy of `adata` and return it.

    Returns
    -------
    AnnData or None
        The copy, or nothing; written are

        ``adata.layers[key_added]`` : CSR matrix, shape (cells, genes), float32
            What stays: binomial draws.
        ``adata.layers["thinned_truth"]`` : CSR matrix, shape (cells, genes), float32
            The rest; the two add up to the counts.
        ``adata.uns["cellplm"][key_added]`` : dict
            The record: parameters, state of the input, number of counts, of those that stayed, and
            of cells with counts left on both sides.

    Raises
    ------
    InputError
        `adata` is no AnnData, a view of a file, or holds no counts (:class:`CountsError`).
    SlotError
        There is no such layer, or `key_added` is that of the input.
    OptionError
        `share` is not between 0 and 1.

    Notes
    -----
    If a count is Poisson distributed with mean m, the parts are independent, with means
    `share` · m and (1 − `share`) · m. Shallow cells may keep no count on one of the sides.

    Examples
    --------
    >>> import anndata as ad, numpy as np, cellplm_tl as cp
    >>> adata = ad.AnnData(np.random.default_rng(0).poisson(1.0, (20, 100)).astype("float32"))
    >>> cp.pp.thin_counts(adata, share=0.2)
    >>> print(adata.layers["thinned"].sum(), adata.layers["thinned_truth"].sum(), adata.X.sum())
    417.0 1577.0 1994.0
    """
    start = time.perf_counter()
    parameters = {name: value for name, value in locals().items() if name not in ("adata", "start")}
    check_share("share", share)
    rng = generator(random_state)
    counts = read_counts(adata, layer=layer)
    keys = (key_added, f"{key_added}_truth")
    check_slots(adata, [("layers", key) for key in keys], counts.slots_read)

    thinned, rest = counts.matrix.copy(), counts.matrix.copy()
    thinned.data = rng.binomial(counts.matrix.data.astype(np.int64), share).astype(np.float32)
    rest.data = counts.matrix.data - thinned.data
    for part in (thinned, rest):
        part.eliminate_zeros()

    has_both = (np.diff(thinned.indptr) > 0) & (np.diff(rest.indptr) > 0)
    record = build_record(
        "thin_counts",
        model=None,
        parameters=parameters,
        random_state=random_state,
        seconds=time.perf_counter() - start,
        slots_read=counts.slots_read,
        input=counts.input_state,
        n_counts=int(counts.matrix.sum(dtype=np.float64)),
        n_thinned=int(thinned.sum(dtype=np.float64)),
        n_cells_with_both=int(has_both.sum()),
    )
    result = copy_in_memory(adata) if copy else adata
    slots = {("layers", key): part for key, part in zip(keys, (thinned, rest), strict=True)}
    write_slots(result, slots, record, key_added)
    return result if copy else None
