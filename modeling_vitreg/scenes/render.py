"""From the number of a scene to its image and its truth."""

import numpy as np

from .captions import write_caption
from .light import paint
from .settings import FARTHEST, SEMANTIC_NAMES, Scene, SceneSettings, is_count, require
from .solids import COLOUR_NAMES
from .vectors import dot
from .world import World, arrange


def render_scene(index: int, *, settings: SceneSettings) -> Scene:
    """Render scene number `index`. A pixel belongs to the nearest surface that one of its samples meets.

    Raises:
        ValueError: `index` is negative or not an integer.
    """
    require(is_count(index), f"the index of a scene is 0 or a positive integer, got {index!r}")
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


__all__ = ["render_scene"]
