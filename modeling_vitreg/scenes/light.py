"""The colour of each sample: sun and shadows, surroundings, materials, sky; and the image they develop into."""

from typing import NamedTuple

import numpy as np

from .backgrounds import pattern
from .noise import noise
from .vectors import dot, turn
from .world import World


def paint(world: World, depth: np.ndarray, surface: np.ndarray) -> np.ndarray:
    """Image uint8 (rows, columns, 3) of samples (N,)."""
    rays = world.camera.rays(np.eye(3), *(range(side) for side in world.camera.shape))
    points = rays * depth + world.camera.position
    sunlit = _cast_shadows(world, points, surface)
    colour = np.empty_like(points)
    for number in np.flatnonzero(np.bincount(surface)):
        mask = surface == number
        samples = np.flatnonzero(mask)
        hits = _Hits(int(number), *(array.take(samples, axis=-1) for array in (points, rays, depth, sunlit)))
        shade = _shade_solid if number >= world.first_solid else _shade_plane if number else _shade_sky
        for channel, values in zip(colour, shade(world, hits)):
            channel[mask] = values
    light = sum(world.camera.samples(colour)) / 4
    developed = 1 - np.exp(-1.45 * np.maximum(light, 0))  # like film: bright light never clips
    return np.ascontiguousarray(np.moveaxis(np.sqrt(developed) * 255 + 0.5, 0, -1).astype(np.uint8))


class _Hits(NamedTuple):
    """Samples of one surface."""

    number: int  # of the surface
    points: np.ndarray  # [3, N]
    rays: np.ndarray  # [3, N]
    depth: np.ndarray  # [N]
    sunlit: np.ndarray  # [N], 0 or 1


def _cast_shadows(world: World, points: np.ndarray, surface: np.ndarray) -> np.ndarray:
    """Whether the sun reaches points (N,), 1 or 0. The samples of a pixel see different parts of it: soft edges."""
    rows, columns = world.camera.shape
    parts = np.array([[[0.6, -0.6], [1, -1]], [[1, 1], [-0.6, 0.6]], [[-0.6, 0.6], [-1, 1]]], np.float32) * 0.03
    suns = np.tile(world.light[:, :, None] + parts, (1, rows // 2, columns // 2)).reshape(3, -1)
    sunlit = np.ones(points.shape[1], np.float32)
    for number, solid in enumerate(world.solids, start=world.first_solid):
        aside = points - solid.centre
        towards = -dot(world.light, aside)
        is_near = (dot(aside, aside) - towards * towards < 1.2 * solid.radius**2) & (towards > 0)
        near = np.flatnonzero(is_near & (surface != number))
        origin, direction = (turn(solid.frame, vectors.take(near, axis=1)) for vectors in (aside, suns))
        sunlit[near[solid.shape.meet(origin, direction) < np.inf]] = 0
    return sunlit


def _shade_sky(world: World, hits: _Hits) -> np.ndarray:
    x, y, z = hits.rays
    height = np.maximum(y, 0.02) / np.sqrt(dot(hits.rays, hits.rays))
    cloud = noise(x / (height + 0.15) * 0.25, z / (height + 0.15) * 0.25) + 2.5 * world.cloudiness - 1.8
    sky = world.horizon + (world.zenith - world.horizon) * np.minimum(height * 2.2, 1)
    return sky + (0.85 - sky) * (np.clip(cloud * 0.6, 0, 0.9) * np.minimum(height * 8, 1))


def _shade_plane(world: World, hits: _Hits) -> np.ndarray:
    plane = world.planes[hits.number - 1]
    fading = 1 / (1 + (hits.depth / 6) ** 2)  # detail finer than a sample would flicker
    albedo = plane.colour + plane.accent * (pattern(plane.look, *turn(plane.tangents, hits.points)) * fading)
    colour = albedo * _illuminate(world, hits, plane.normal)
    if world.is_room:  # a lamp rather than the sun
        away = hits.points - world.solids[0].centre
        return colour * (1.1 / (1 + 0.06 * dot(away, away)))
    return colour + (world.horizon - colour) * np.clip(hits.depth / 40, 0, 0.9)  # haze


def _shade_solid(world: World, hits: _Hits) -> np.ndarray:
    solid = world.solids[hits.number - world.first_solid]
    own = turn(solid.frame, hits.points - solid.centre)
    own_normal = solid.shape.normal(own)
    normal = turn(solid.frame.T, own_normal)
    normal /= np.sqrt(dot(normal, normal))
    weight = solid.texture.weigh(turn(solid.cells, own) + solid.phase, own_normal, solid.share)
    albedo = solid.albedo[0] + (solid.albedo[1] - solid.albedo[0]) * weight
    colour = albedo * _illuminate(world, hits, normal)
    if solid.material == "matte":
        return colour
    view = hits.rays / np.sqrt(dot(hits.rays, hits.rays))
    facing = np.minimum(dot(normal, view), 0)
    mirrored = view - 2 * facing * normal
    below, above = 0.7 * world.planes[0].colour, world.planes[-1].colour if world.is_room else world.horizon
    surroundings = below + (above - below) * np.clip(mirrored[1] * 2 + 0.5, 0, 1)
    highlight = np.maximum(dot(mirrored, world.light), 0) * hits.sunlit
    if solid.material == "metallic":
        return colour * 0.45 + albedo * (surroundings * 0.9 + world.sun * 1.6 * highlight**12)
    fresnel = 0.05 + 0.5 * (1 + facing) ** 4
    return colour * 0.95 + fresnel * surroundings + 0.8 * highlight**60


def _illuminate(world: World, hits: _Hits, normal: np.ndarray) -> np.ndarray:
    """Light (3, N) that arrives at a surface with normals (3, N) or (3, 1)."""
    openness = np.ones(hits.points.shape[1], np.float32)
    for number, solid in enumerate(world.solids, start=world.first_solid):
        if number != hits.number:
            away = solid.centre - hits.points
            squared = dot(away, away)
            facing = np.maximum(dot(normal, away), 0) / (squared * np.sqrt(squared))
            openness /= 1 + 1.2 * solid.size**2 * facing  # a ball of that size hides as much of the surroundings
    lambert = np.maximum(dot(normal, world.light), 0) * hits.sunlit
    return world.ambient * (openness * (0.65 + 0.35 * normal[1])) + world.sun * lambert


__all__ = ["paint"]
