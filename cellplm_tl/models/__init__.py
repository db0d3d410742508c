"""The network of CellPLM: PyTorch alone, no AnnData, no files, no settings."""

from __future__ import annotations

from cellplm_tl.models.config import CellPLMConfig
from cellplm_tl.models.embedder import Counts
from cellplm_tl.models.network import CellPLM

__all__ = ["CellPLM", "CellPLMConfig", "Counts"]
