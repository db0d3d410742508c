"""Random states as users give them: what scanpy takes."""

from __future__ import annotations

from typing import Any

import numpy as np

from cellplm_tl._errors import OptionError


def generator(random_state: Any) -> np.random.Generator:
    """Make a generator of an integer, a numpy generator or an old `RandomState`."""
    if isinstance(random_state, np.random.RandomState):
        return np.random.default_rng(random_state.randint(2**31))
    try:
        return np.random.default_rng(random_state)
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"random_state must be an integer of at least 0 or a numpy generator, not "
            f"{random_state!r}."
        ) from error
