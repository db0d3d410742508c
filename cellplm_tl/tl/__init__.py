"""Tools: each file of this folder holds one, named after it."""

from __future__ import annotations

__all__: list[str] = []
