"""Vectors are columns (3, 1) or (3, N) of float32: x right, y up, z away from the camera."""

import numpy as np


def column(x: float, y: float, z: float) -> np.ndarray:
    """A vector (3, 1)."""
    return np.array([[x], [y], [z]], np.float32)


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Dot products (N,) or (1,) of vectors."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def turn(frame: np.ndarray, points: np.ndarray) -> np.ndarray:
    """frame @ points, in an order of additions that does not depend on a library of linear algebra."""
    x, y, z = points
    return frame[:, 0:1] * x + frame[:, 1:2] * y + frame[:, 2:3] * z


def rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Matrix (3, 3) that turns by roll about z, then by pitch about x, then by yaw about y."""
    (a, b, c), (d, e, f) = np.cos((yaw, pitch, roll)), np.sin((yaw, pitch, roll))
    about_y = np.array([[a, 0, d], [0, 1, 0], [-d, 0, a]])
    about_x = np.array([[1, 0, 0], [0, b, -e], [0, e, b]])
    about_z = np.array([[c, -f, 0], [f, c, 0], [0, 0, 1]])
    return about_y @ about_x @ about_z


__all__ = ["column", "dot", "rotation", "turn"]
