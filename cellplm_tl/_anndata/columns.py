"""Which columns of a matrix stand for which genes of a model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellplm_tl._errors import GenesError, GenesWarning
from cellplm_tl._genes import MOUSE_LIMIT, canonical, choose_gene_names, mouse_share, resolve

# Fewer genes, or a smaller share of the counts, are no basis for a result; below the second share
# there is one, and a warning.
MIN_GENES = 50
MIN_COVERAGE = 0.1
GOOD_COVERAGE = 0.5


@dataclass(frozen=True)
class Columns:
    """The columns of a matrix that stand for genes of a list.

    Attributes
    ----------
    genes
        Genes of the list that are measured, in the order of the list, shape ``(genes,)``.
    gene_index
        Position of each in the list, shape ``(genes,)``.
    selected
        Columns that stand for these genes, gene after gene, shape ``(selected,)``.
    gene_of
        Position in `genes` of each selected column, shape ``(selected,)``: ascending, and with
        repetitions where a gene has several columns.
    is_resolved
        Whether a column stands for any known gene, of the list or not, shape ``(columns,)``.
    names
        Names as given, shape ``(columns,)``, and `where` they were read.
    statuses
        How many names were found in which way.
    """

    genes: NDArray[np.object_]
    gene_index: NDArray[np.int64]
    selected: NDArray[np.int64]
    gene_of: NDArray[np.int64]
    is_resolved: NDArray[np.bool_]
    names: NDArray[np.object_]
    where: str
    statuses: dict[str, int]

    def summary(self) -> dict[str, Any]:
        """Give the numbers for the record."""
        return {
            "read_from": self.where,
            "n_vars": len(self.names),
            "n_used": len(self.genes),
            "n_unmatched": len(self.names) - len(self.selected),
            "n_duplicated_columns": len(self.selected) - len(self.genes),
            "statuses": self.statuses,
        }


def match_columns(var: pd.DataFrame, genes: Sequence[str], gene_key: str | None) -> Columns:
    """Find the columns of the genes of a list; both sides are brought to the ids of today.

    Of ids in the list that mean one gene today, the first counts.
    """
    names, where = choose_gene_names(var, gene_key)
    resolution = resolve(names)
    listed = pd.Index(canonical(genes))
    position = pd.Series(np.arange(len(listed)), index=listed)
    position = position[~listed.duplicated()]
    found = position.reindex(resolution.gene_ids, fill_value=-1).to_numpy()
    found[resolution.gene_ids == ""] = -1
    selected = np.argsort(found, kind="stable")
    selected = selected[np.searchsorted(found[selected], 0) :]
    gene_index, gene_of = np.unique(found[selected], return_inverse=True)
    return Columns(
        genes=listed.to_numpy(dtype=object)[gene_index],
        gene_index=gene_index.astype(np.int64),
        selected=selected.astype(np.int64),
        gene_of=gene_of.astype(np.int64),
        is_resolved=np.asarray(resolution.gene_ids != "", dtype=bool),
        names=names,
        where=where,
        statuses=resolution.counts(),
    )


def check_genes(columns: Columns, n_listed: int) -> None:
    """Raise unless enough of the model's genes are there, and they are human ones."""
    n_names, n_used = len(columns.names), len(columns.genes)
    first = ", ".join(repr(str(name)) for name in columns.names[:3])
    advice = "or name the column of adata.var that holds Ensembl ids or symbols with gene_key='…'."
    if mouse_share(columns.names) >= MOUSE_LIMIT:
        raise GenesError(
            f"{n_names:,} names in {columns.where} look like mouse genes; the first are {first}. "
            f"CellPLM models are human: map to human orthologs first, {advice}"
        )
    if n_used >= MIN_GENES:
        return
    n_resolved = int(columns.is_resolved.sum())
    if not n_resolved:
        raise GenesError(
            f"0 of {n_names:,} names in {columns.where} are known human genes; the first are "
            f"{first or 'none'}. Use human gene symbols or Ensembl ids, {advice}"
        )
    raise GenesError(
        f"{n_used} of the model's {n_listed:,} genes are in the data; at least {MIN_GENES} are "
        f"needed. Of {n_names:,} names in {columns.where}, {n_resolved:,} are known human genes; "
        f"the first names are {first}. Use the unfiltered genes (adata.raw.to_adata() often has "
        f"them), {advice}"
    )


def check_coverage(columns: Columns, coverage: float) -> None:
    """Raise or warn if the matched genes hold too small a part of the counts."""
    if coverage >= GOOD_COVERAGE:
        return
    found = (
        f"The {len(columns.genes):,} genes that data and model share hold {coverage:.1%} of the "
        f"counts; {len(columns.names) - len(columns.selected):,} of {len(columns.names):,} names "
        f"in {columns.where} are unmatched."
    )
    if coverage < MIN_COVERAGE:
        raise GenesError(
            f"{found} At least {MIN_COVERAGE:.0%} are needed. See what is unmatched with "
            "cellplm_tl.pp.match_genes(adata)."
        )
    warnings.warn(
        f"{found} The rest is unseen by the model. See what is unmatched with "
        "cellplm_tl.pp.match_genes(adata).",
        GenesWarning,
        stacklevel=2,
    )
