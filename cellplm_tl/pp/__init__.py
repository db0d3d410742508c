"""Preparation of data: each file of this folder holds one function, named after it."""

from __future__ import annotations

__all__: list[str] = []
