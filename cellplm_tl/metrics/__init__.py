"""Scores: plain functions of arrays."""

from cellplm_tl.metrics.clustering import clustering

__all__ = ["clustering"]
