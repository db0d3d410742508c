"""CellPLM for scanpy users: a transformer whose tokens are cells, on AnnData."""

from cellplm_tl._errors import CellPLMError, CellPLMWarning
from cellplm_tl._settings import settings

__version__ = "0.1.0.dev0"

__all__ = ["CellPLMError", "CellPLMWarning", "__version__", "settings"]
