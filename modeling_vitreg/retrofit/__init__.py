"""Registers for a finished model."""

from .register_neurons import NothingToRepair
from .repair import RetrofitError, RetrofitSettings, check_places, retrofit
from .training import METHODS, NUM_REGISTERS, finish_training, prepare_training


__all__ = [
    "METHODS",
    "NUM_REGISTERS",
    "NothingToRepair",
    "RetrofitError",
    "RetrofitSettings",
    "check_places",
    "finish_training",
    "prepare_training",
    "retrofit",
]
