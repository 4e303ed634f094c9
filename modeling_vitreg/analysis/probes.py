"""Linear probes on tokens: position of a patch, its pixels, and the class of its image.

The probes are scikit-learn's, fitted on tokens of some images and tested on tokens of other images. Tokens are
layer-normed without weights and each channel is standardised, so the weights of the model's final norm do not matter.

Letters for shapes: T tokens, D width, I images.

Source: Darcet et al. 2024, arXiv 2309.16588, tables 1 and 5b. The paper names neither the distance nor the scale of
the pixels; here they are Euclidean, in patches, and the norm of the residual in normalised pixels.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler


TEST_SHARE = 0.3  # of the images
NUM_DRAWS = 3
_RANDOM_STATE = 0


@dataclass(frozen=True)
class TokenSample:
    """Patch tokens of several images.

    Args:
        tokens: (T, D).
        images: (T,), number of the image of each.
        places: (T,), number of the patch in its grid, row by row.
        is_outlier: (T,).
        pixels: (T, values), normalised pixels under each patch.
    """

    tokens: np.ndarray
    images: np.ndarray
    places: np.ndarray
    is_outlier: np.ndarray
    pixels: np.ndarray


def split_images(images: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Which tokens are tested: those of a random `TEST_SHARE` of the images, at least one.

    Args:
        images: (T,), image index of each token.
        seed: random seed.

    Raises:
        ValueError: fewer than two images.
    """
    names = np.unique(images)
    if len(names) < 2:
        raise ValueError(f"expected tokens of two images or more, got {len(names)}: one part must be kept for a test")
    num_test = min(max(round(TEST_SHARE * len(names)), 1), len(names) - 1)
    return np.isin(images, np.random.default_rng(seed).permutation(names)[:num_test])


def probe_position(sample: TokenSample, *, grid: tuple, seed: int = 0) -> dict:
    """Predict the position of a patch from its token by logistic regression over the grid.

    Returns:
        `chance`, `num_train` tokens, and for `outlier` and `normal` test tokens `num_test`, `accuracy` and `distance`,
        the mean Euclidean distance between predicted and true position in patches; None without tokens.

    Raises:
        ValueError: fewer than two images, or all training tokens at one position.
    """
    is_test = split_images(sample.images, seed=seed)
    probe = fit(classifier(), sample.tokens[~is_test], sample.places[~is_test])
    predicted = probe.predict(normalise(sample.tokens[is_test]))
    steps = np.array(np.unravel_index(predicted, grid)) - np.array(np.unravel_index(sample.places[is_test], grid))
    distances = np.sqrt((steps**2).sum(axis=0))
    groups = _groups(sample.is_outlier[is_test], accuracy=distances == 0, distance=distances)
    return {"chance": 1 / (grid[0] * grid[1]), "num_train": int((~is_test).sum()), **groups}


def probe_pixels(sample: TokenSample, *, seed: int = 0) -> dict:
    """Predict the pixels of a patch from its token by ridge regression.

    Returns:
        `num_train`, `error_of_mean` (error of the mean patch as prediction), and for `outlier` and `normal` test
        tokens `num_test` and `error`, the mean norm of the residual in normalised pixels; None without tokens.

    Raises:
        ValueError: fewer than two images.
    """
    is_test = split_images(sample.images, seed=seed)
    probe = fit(regressor(), sample.tokens[~is_test], sample.pixels[~is_test])
    residuals = probe.predict(normalise(sample.tokens[is_test])) - sample.pixels[is_test]
    blind = sample.pixels[~is_test].mean(axis=0) - sample.pixels[is_test]
    groups = _groups(sample.is_outlier[is_test], error=np.linalg.norm(residuals, axis=1))
    error_of_mean = float(np.linalg.norm(blind, axis=1).mean())
    return {"num_train": int((~is_test).sum()), "error_of_mean": error_of_mean, **groups}


def probe_class(draws: dict, labels: np.ndarray, *, seed: int = 0) -> dict:
    """Predict the class of an image from one of its tokens by logistic regression.

    Args:
        draws: kind of token to a list of draws, each a pair of image indices (I,) and tokens (I, D); images without
            such a token are left out.
        labels: (images,), class numbers of all images.
        seed: random seed of the split.

    Returns:
        For each kind the mean `accuracy` over its draws and their standard deviation `spread`, `num_draws`,
        `num_images` of the smallest draw, and `chance`, the share of the most frequent class of the test images; or
        `skipped` with a reason.
    """
    report = {}
    for kind, pairs in draws.items():
        try:
            results = [_classify(images, tokens, labels, seed=seed) for images, tokens in pairs]
        except ValueError as error:
            report[kind] = {"skipped": str(error)}
            continue
        accuracies, chances = zip(*results)
        report[kind] = {
            "accuracy": float(np.mean(accuracies)),
            "spread": float(np.std(accuracies)),
            "chance": float(np.mean(chances)),
            "num_draws": len(pairs),
            "num_images": min(len(images) for images, _ in pairs),
        }
    return report


def _classify(images: np.ndarray, tokens: np.ndarray, labels: np.ndarray, *, seed: int) -> tuple[float, float]:
    is_test, own = split_images(images, seed=seed), labels[images]
    if len(np.unique(own[~is_test])) < 2:
        raise ValueError("the images with such a token have fewer than two classes")
    probe = fit(classifier(), tokens[~is_test], own[~is_test])
    accuracy = (probe.predict(normalise(tokens[is_test])) == own[is_test]).mean()
    _, counts = np.unique(own[is_test], return_counts=True)
    return float(accuracy), float(counts.max() / counts.sum())


def classifier() -> Pipeline:
    """Unfitted classifier of all probes."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200, random_state=_RANDOM_STATE))


def regressor() -> Pipeline:
    """Unfitted regression of the pixel probe."""
    return make_pipeline(StandardScaler(), Ridge(alpha=1.0))


def fit(probe: Pipeline, tokens: np.ndarray, targets: np.ndarray) -> Pipeline:
    """Fit a probe on tokens (T, D) in place, and return it."""
    with warnings.catch_warnings():
        # The number of steps is part of the protocol, and a grid may have more positions than there are tokens.
        warnings.simplefilter("ignore", UserWarning)
        return probe.fit(normalise(tokens), targets)


def normalise(tokens: np.ndarray) -> np.ndarray:
    """Layer norm (T, D) without weights, in float64."""
    tokens = np.asarray(tokens, np.float64)
    centred = tokens - tokens.mean(axis=1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6)


def _groups(is_outlier: np.ndarray, **values: np.ndarray) -> dict:
    groups = {}
    for name, members in (("outlier", is_outlier), ("normal", ~is_outlier)):
        means = {key: float(value[members].mean()) if members.any() else None for key, value in values.items()}
        groups[name] = {"num_test": int(members.sum()), **means}
    return groups
