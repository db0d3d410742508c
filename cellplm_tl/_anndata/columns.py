"""Which columns of a matrix stand for which genes of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cellplm_tl._genes import canonical, choose_gene_names, resolve


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
    is_selected
        Whether a column is among them, shape ``(columns,)``.
    is_resolved
        Whether a column stands for any known gene, of the list or not, shape ``(columns,)``.
    names
        Names as given, shape ``(columns,)``.
    where
        Where the names were read.
    statuses
        How many names were found in which way.
    """

    genes: NDArray[np.object_]
    gene_index: NDArray[np.int64]
    selected: NDArray[np.int64]
    gene_of: NDArray[np.int64]
    is_selected: NDArray[np.bool_]
    is_resolved: NDArray[np.bool_]
    names: NDArray[np.object_]
    where: str
    statuses: dict[str, int]

    @property
    def n_summed(self) -> int:
        """How many columns are of genes that have another column."""
        return len(self.selected) - len(self.genes)

    @property
    def slots_read(self) -> tuple[str, ...]:
        """The slot that names the genes, like ``"var['gene_ids']"``; none for ``var_names``."""
        return () if self.where == "var_names" else (self.where,)

    def summary(self) -> dict[str, Any]:
        """Give the numbers for the record."""
        return {
            "read_from": self.where,
            "n_vars": len(self.names),
            "n_used": len(self.genes),
            "n_unmatched": len(self.names) - len(self.selected),
            "n_duplicated_columns": self.n_summed,
            "statuses": self.statuses,
        }


def match_columns(var: pd.DataFrame, genes: Sequence[str], gene_key: str | None) -> Columns:
    """Find the columns of the genes of a list; both sides are brought to the ids of today.

    Of ids in the list that mean one gene today, the first counts.
    """
    names, where = choose_gene_names(var, gene_key)
    resolution = resolve(names)
    is_resolved = np.asarray(resolution.gene_ids != "", dtype=bool)
    listed = pd.Index(canonical(genes))
    position = pd.Series(np.arange(len(listed)), index=listed)[~listed.duplicated()]
    found = position.reindex(resolution.gene_ids, fill_value=-1).to_numpy()
    is_selected = (found >= 0) & is_resolved
    selected = np.flatnonzero(is_selected)
    selected = selected[np.argsort(found[selected], kind="stable")]
    gene_index, gene_of = np.unique(found[selected], return_inverse=True)
    return Columns(
        genes=listed.to_numpy(dtype=object)[gene_index],
        gene_index=gene_index.astype(np.int64),
        selected=selected,
        gene_of=gene_of,
        is_selected=is_selected,
        is_resolved=is_resolved,
        names=names,
        where=where,
        statuses=resolution.counts(),
    )
