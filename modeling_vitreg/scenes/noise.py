"""Chance as a function of place: clouds, and a number for each cell of a lattice."""

import functools

import numpy as np


def noise(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Clouds at (x, y), (N,); they repeat after 4 units."""
    return _noise_table()[(y * 128).astype(np.int32) & 511, (x * 128).astype(np.int32) & 511]


@functools.cache
def _noise_table() -> np.ndarray:
    """Clouds (512, 512) that repeat in both directions, of variance 1: a spectrum that falls with the frequency."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(512)[:, None], np.fft.rfftfreq(512)) * 512
    spectrum = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
    table = np.fft.irfft2(spectrum * (frequency > 0) / np.maximum(frequency, 3) ** 1.6)
    return (table / table.std()).clip(-2.5, 2.5).astype(np.float32)


def scatter(*cells: np.ndarray) -> np.ndarray:
    """A number in 0 ... 1023, without order, for each cell (N,)."""
    mixed = functools.reduce(lambda total, cell: total * 73 + cell.astype(np.int32), cells, np.int32(17))
    return ((mixed * np.int32(1103515245) + np.int32(12345)) >> 12) & 1023


@functools.cache
def cell_table() -> np.ndarray:
    """4 numbers in 0 ... 1 for each number that `scatter` gives: (4, 1024)."""
    return np.random.default_rng(1).random((4, 1024), dtype=np.float32)


def fraction(x: np.ndarray) -> np.ndarray:
    """The part of x above its floor, at least 0 and below 1."""
    return x - np.floor(x)


__all__ = ["cell_table", "fraction", "noise", "scatter"]
