"""Features of a frozen encoder in, numbers out: how good they are without training the encoder any further."""

from .knn import knn_accuracy


__all__ = ["knn_accuracy"]
