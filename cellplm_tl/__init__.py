"""CellPLM for scanpy users: a transformer whose tokens are cells, on AnnData."""

from cellplm_tl import _weights, metrics, models, pl, pp, tl, train
from cellplm_tl._errors import CellPLMError, CellPLMWarning
from cellplm_tl._settings import settings

__version__ = "0.1.0.dev0"

__all__ = [
    "CellPLMError",
    "CellPLMWarning",
    "__version__",
    "metrics",
    "models",
    "pl",
    "pp",
    "settings",
    "tl",
    "train",
]

# To users, networks and the files they come in are one thing; models/ itself knows no files.
for _name in ("Model", "available", "load", "save"):
    setattr(models, _name, getattr(_weights, _name))
    models.__all__.append(_name)
