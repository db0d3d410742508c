"""The network of CellPLM: PyTorch alone, no AnnData, no files, no settings."""

from __future__ import annotations

from .config import CellPLMConfig
from .embedder import Counts
from .network import CellPLM

__all__ = ["CellPLM", "CellPLMConfig", "Counts"]
