"""Scores: plain functions of arrays."""

from cellplm_tl.metrics.annotation import annotation
from cellplm_tl.metrics.clustering import clustering
from cellplm_tl.metrics.denoising import denoising

__all__ = ["annotation", "clustering", "denoising"]
