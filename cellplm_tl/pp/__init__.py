"""Preparation of data: each file of this folder holds one function, named after it."""

from __future__ import annotations

from cellplm_tl.pp.mask_counts import mask_counts
from cellplm_tl.pp.match_genes import match_genes
from cellplm_tl.pp.thin_counts import thin_counts

__all__ = ["mask_counts", "match_genes", "thin_counts"]
