"""MAGIC (van Dijk et al., Cell 2018), on square roots of counts per 10,000 as in its tutorial."""

import magic
import numpy as np

TARGET_SUM = 1e4


def denoise(method, input, seed):
    depth = np.asarray(input.X.sum(axis=1))  # (cells, 1)
    roots = np.sqrt(TARGET_SUM * input.X.toarray() / depth)
    smoothed = magic.MAGIC(random_state=seed, verbose=0).fit_transform(roots)
    fractions = np.maximum(smoothed, 0) ** 2
    fractions /= fractions.sum(axis=1, keepdims=True)
    return {"denoised": (fractions * depth).astype(np.float32)}
