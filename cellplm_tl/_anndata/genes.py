"""Names of the genes of an AnnData, and their counts, for those who ask about nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellplm_tl._anndata.matrix import open_matrix
from cellplm_tl._anndata.state import find_state
from cellplm_tl._errors import CountsError, check_is_anndata
from cellplm_tl._genes import choose_gene_names

# Cells whose counts are summed: enough to tell which genes hold them.
SAMPLE_CELLS = 512


def read_gene_names(adata: Any, gene_key: str | None) -> tuple[NDArray[np.object_], str]:
    """Read what the genes are called, and where that stands: see :func:`choose_gene_names`."""
    check_is_anndata(adata)
    return choose_gene_names(adata.var, gene_key)


def read_gene_counts(adata: Any) -> NDArray[np.float64] | None:
    """Sum the counts in ``X`` of each gene over a sample of cells; None if they are no counts."""
    try:
        matrix = open_matrix(adata, None)
    except CountsError:
        return None
    sample = matrix.rows(matrix.sample(SAMPLE_CELLS)).copy()
    sample.eliminate_zeros()
    if not np.isfinite(sample.data).all() or (sample.data < 0).any():
        return None
    counts, _ = find_state(sample.data, sample.indptr).to_counts(sample.data, sample.indptr)
    return np.bincount(sample.indices, counts, matrix.shape[1]).astype(np.float64)
