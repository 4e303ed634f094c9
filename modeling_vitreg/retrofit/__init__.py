"""Registers for a finished model."""

from .register_neurons import NothingToRepair
from .repair import RetrofitError, RetrofitSettings, retrofit


__all__ = ["NothingToRepair", "RetrofitError", "RetrofitSettings", "retrofit"]
