"""Pretraining and fine-tuning."""

from __future__ import annotations

from .contexts import Corruption
from .fit import TrainConfig
from .pretrain import PretrainConfig, pretrain

__all__ = ["Corruption", "PretrainConfig", "TrainConfig", "pretrain"]
