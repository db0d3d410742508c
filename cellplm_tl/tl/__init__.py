"""Tools: each file of this folder holds one, named after it."""

from __future__ import annotations

from cellplm_tl.tl.annotate import annotate
from cellplm_tl.tl.denoise import denoise
from cellplm_tl.tl.embed import embed
from cellplm_tl.tl.gene_embeddings import gene_embeddings

__all__ = ["annotate", "denoise", "embed", "gene_embeddings"]
