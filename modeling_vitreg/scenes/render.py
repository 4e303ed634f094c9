"""Render a scene, given by its number, and its annotations."""

import numpy as np

from .geometry import dot
from .settings import CLASS_NAMES, FARTHEST, SEMANTIC_NAMES, Scene, SceneSettings, is_count, require
from .shading import paint
from .world import COLOUR_NAMES, LOOKS, Solid, World, arrange


def render_scene(index: int, *, settings: SceneSettings) -> Scene:
    """Render scene number `index`. A pixel belongs to the nearest surface that one of its samples meets.

    Raises:
        ValueError: `index` is negative or not an integer.
    """
    require(is_count(index), f"expected the index of a scene to be 0 or a positive integer, got {index!r}")
    rng = np.random.default_rng((settings.seed, index))
    world = arrange(rng, settings)
    with np.errstate(all="ignore"):  # a ray that misses divides by zero, and then loses every comparison
        depth, surface = _trace(world)
        image = paint(world, depth, surface)
    depths, surfaces = (world.camera.samples(grid) for grid in (depth, surface))
    depth, surface = depths[0], surfaces[0]
    for other_depth, other_surface in zip(depths[1:], surfaces[1:]):
        surface = np.where(other_depth < depth, other_surface, surface)
        depth = np.minimum(other_depth, depth)
    return _describe(rng, world, image, np.minimum(depth, FARTHEST), surface)


def _trace(world: World) -> tuple[np.ndarray, np.ndarray]:
    """Depth (N,) in metres and number of the surface (N,) that each sample meets."""
    camera = world.camera
    rows, columns = (range(side) for side in camera.shape)
    rays = camera.rays(np.eye(3), rows, columns)
    depth, surface = np.full(rays.shape[1], 60, np.float32), np.zeros(rays.shape[1], np.uint8)
    for number, plane in enumerate(world.planes, start=1):
        towards = dot(plane.normal, rays)
        t = (plane.offset - dot(plane.normal, camera.position)) / towards
        is_met = (towards < 0) & ((t < depth) | (surface == 0))
        surface[is_met] = number
        np.copyto(depth, np.minimum(t, 60), where=is_met)  # ends the ground before its pattern overflows
    depth, surface = depth.reshape(camera.shape), surface.reshape(camera.shape)
    for number, solid in enumerate(world.solids, start=world.first_solid):
        rows, columns = camera.rectangle(solid.centre, solid.radius)
        corner = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
        t = solid.shape.meet(solid.frame @ (camera.position - solid.centre), camera.rays(solid.frame, rows, columns))
        is_met = t.reshape(len(rows), len(columns)) < depth[corner]
        surface[corner][is_met] = number
        depth[corner][is_met] = t[is_met.reshape(-1)]
    return depth.reshape(-1), surface.reshape(-1)


def _describe(
    rng: np.random.Generator, world: World, image: np.ndarray, depth: np.ndarray, surface: np.ndarray
) -> Scene:
    first = world.first_solid
    areas = np.bincount(surface.reshape(-1), minlength=first + len(world.solids))[first:]
    order = [int(number) for number in np.argsort(-areas, kind="stable") if areas[number]]
    solids = [world.solids[number] for number in order]
    instances, meanings = np.zeros(first + len(areas), np.uint8), np.zeros(first + len(areas), np.uint8)
    meanings[:first] = [SEMANTIC_NAMES.index(name) for name in ("sky", *(plane.name for plane in world.planes))]
    for rank, number in enumerate(order, start=1):
        instances[first + number], meanings[first + number] = rank, world.solids[number].category
    instance_mask = instances[surface]
    boxes = np.array([_box(instance_mask == rank) for rank in range(1, len(order) + 1)], np.float32)
    return Scene(
        image=image,
        label=solids[0].category,
        colours=COLOUR_NAMES.index(" and ".join(solids[0].colours)),
        caption=write_caption(rng, world, solids, boxes),
        boxes=boxes,
        categories=np.array([solid.category for solid in solids]),
        instance_mask=instance_mask,
        semantic_mask=meanings[surface],
        depth=depth,
    )


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


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
