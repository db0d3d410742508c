"""What the functions that draw from counts have in common."""

from __future__ import annotations

from typing import Any

import numpy as np

from cellplm_tl._errors import OptionError


def check_share(name: str, value: Any, *, zero: bool = False) -> None:
    """Raise :class:`OptionError` unless `value` lies between 0 and 1 (0 itself: with `zero`)."""
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not is_number or not (0 < value < 1 or (zero and value == 0)):
        smallest = "0 or above" if zero else "above 0"
        raise OptionError(f"{name} must be a number {smallest} and below 1; got {value!r}.")
