"""Tools: each file of this folder holds one, named after it."""

from __future__ import annotations

from cellplm_tl.tl.embed import embed

__all__ = ["embed"]
