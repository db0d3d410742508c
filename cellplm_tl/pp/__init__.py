"""Preparation of data: each file of this folder holds one function, named after it."""

from __future__ import annotations

from cellplm_tl.pp.match_genes import match_genes

__all__ = ["match_genes"]
