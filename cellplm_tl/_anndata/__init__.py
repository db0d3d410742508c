"""The one door between AnnData and the rest of the package: cells come in, slots are written.

Reading top to bottom: :mod:`.matrix` gives rows of a matrix of any form, :mod:`.state` finds what
its values are and leads back to counts, :mod:`.columns` matches columns to genes, :mod:`.contexts`
reads contexts and coordinates; :mod:`.read` puts them together (:mod:`.files` for files),
:mod:`.write` is the way back.
"""

from cellplm_tl._anndata.files import read_file, read_gene_ids
from cellplm_tl._anndata.read import (
    Cells,
    CountBlock,
    find_columns,
    read_cells,
    read_gene_counts,
    read_gene_names,
    read_genes,
)
from cellplm_tl._anndata.write import (
    build_record,
    cells_frame,
    check_slots,
    copy_in_memory,
    read_record,
    write_slots,
)

__all__ = [
    "Cells",
    "CountBlock",
    "build_record",
    "cells_frame",
    "check_slots",
    "copy_in_memory",
    "find_columns",
    "read_cells",
    "read_file",
    "read_gene_counts",
    "read_gene_ids",
    "read_gene_names",
    "read_genes",
    "read_record",
    "write_slots",
]
