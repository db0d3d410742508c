"""Pictures of what the tools wrote: each function draws, and returns the axes."""

from cellplm_tl.pl.annotation import annotation
from cellplm_tl.pl.denoising import denoising

__all__ = ["annotation", "denoising"]
