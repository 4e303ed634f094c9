"""Captions: the solids in words, where they lie, and on what."""

import numpy as np

from .backgrounds import LOOKS
from .settings import CLASS_NAMES
from .solids import Solid
from .world import World


def write_caption(rng: np.random.Generator, world: World, solids: list[Solid], boxes: np.ndarray) -> str:
    """A sentence about visible solids, the main one first, and their boxes (solids, 4)."""
    ground, *walls = world.planes
    place = f"on {LOOKS[ground.name][ground.look][0]}"
    if rng.random() < 0.4:
        sky = "a cloudy sky" if world.cloudiness > 0.5 else "a clear sky"
        place += f" in front of {LOOKS['wall'][walls[0].look][0]}" if walls else f" under {sky}"
    main, *others = (_name(rng, solid) for solid in solids)
    if others:
        others[0] = f"{_relate(world, solids, boxes)} {others[0]}"
    listed = " and ".join(filter(None, [", ".join(others[:-1]), *others[-1:]]))
    forms = (
        ("{main} {place}", "{place} there is {main}", "a picture of {main} {place}", "{main} rests {place}"),
        ("{main} {listed}, {place}", "{place}, {main} stands {listed}", "a picture of {main} {listed}, {place}"),
        ("{main} {listed}, all {place}", "{place} there is {main} {listed}", "{main} {place}, {listed}"),
    )[min(len(others), 2)]
    sentence = str(rng.choice(forms)).format(main=main, place=place, listed=listed)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _name(rng: np.random.Generator, solid: Solid) -> str:
    size = "small " if solid.size < 0.25 else "large " if solid.size > 0.38 else ""
    colours, name = " and ".join(solid.colours), CLASS_NAMES[solid.category]
    words = (
        f"{size}{solid.material} {colours} {name}",
        f"{size}{colours} {name} that is {solid.material}",
        f"{size}{solid.material} {name} in {colours}",
    )[rng.integers(3)]
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _relate(world: World, solids: list[Solid], boxes: np.ndarray) -> str:
    """How the main object lies relative to the next."""
    aside = (boxes[0, 0] + boxes[0, 2] - boxes[1, 0] - boxes[1, 2]) / world.camera.shape[1]
    if abs(aside) > 0.15:
        return "to the left of" if aside < 0 else "to the right of"
    return "in front of" if solids[0].centre[2, 0] < solids[1].centre[2, 0] else "behind"


__all__ = ["write_caption"]
