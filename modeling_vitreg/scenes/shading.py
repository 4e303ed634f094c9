"""The colour of each sample: noise, textures of solids, patterns of planes, light and shadows, sky."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .geometry import column, dot, turn


if TYPE_CHECKING:
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


class Texture(NamedTuple):
    """A pattern that fills the space of a solid, as if it was carved from it: no seams, any shape."""

    frequency: float  # cells per unit
    is_aligned: bool  # with the axes of the solid
    weigh: Callable  # points [3, N] in cells, normals [3, N], share -> weight of the second colour [N], 0 to 1


def _dot_weight(p: np.ndarray, normal: np.ndarray, share: float) -> np.ndarray:
    corner, middle = fraction(p) - 0.5, fraction(p + 0.5) - 0.5
    return np.minimum(dot(corner, corner), dot(middle, middle)) < (0.16 + 0.42 * share) ** 2


def _joint_weight(p: np.ndarray, normal: np.ndarray, share: float) -> np.ndarray:
    x, y, z = np.abs(normal)
    is_flat = y > 1.33 * np.hypot(x, z)
    height = np.where(is_flat, p[2], p[1])
    along = np.where((x > z) & ~is_flat, p[2], p[0]) * 0.5 + np.floor(height) % 2 / 2
    return (fraction(height) < share * 0.45) | (fraction(along) < share * 0.22)


def _vein_weight(p: np.ndarray, normal: np.ndarray, share: float) -> np.ndarray:
    x, y, z = p * np.float32(0.3)
    cloud = noise(x, y) + noise(y + 1.7, z) + noise(z, x + 2.9)
    return np.abs(np.sin(p[1] * 1.5 + cloud * 0.9)) ** (2 * share)


def _grain_weight(p: np.ndarray, normal: np.ndarray, share: float) -> np.ndarray:
    wobble = np.sin(p[0] * 1.9 + 0.8 * np.sin(p[1])) + np.sin(p[2] * 2.3 + p[1] * 0.7)
    return fraction(np.hypot(p[0] - 8, p[2] - 8) + 0.22 * wobble + 0.45 * p[1]) ** (4 * share)


def _mosaic_weight(p: np.ndarray, normal: np.ndarray, share: float) -> np.ndarray:
    """A tone for the nearest of points that are scattered over a lattice, one to a cube of it."""
    table, base = cell_table(), np.floor(p - 0.5)
    best, tone = np.full(p.shape[1], np.inf, np.float32), np.zeros(p.shape[1], np.float32)
    for corner in np.ndindex(2, 2, 2):
        cell = base + column(*corner)
        number = scatter(*cell)
        away = cell + 0.2 + 0.6 * table[:3, number] - p
        distance = dot(away, away)
        tone = np.where(distance < best, table[3, number], tone)
        best = np.minimum(distance, best)
    return tone


TEXTURES = {
    "striped": Texture(2.2, False, lambda p, normal, share: fraction(p[1]) < share),
    "checkered": Texture(2.3, True, lambda p, normal, share: np.floor(p).sum(0) % 2),
    "dotted": Texture(1.6, False, _dot_weight),
    "bricked": Texture(2.6, True, _joint_weight),
    "zigzag": Texture(
        2.0,
        False,
        lambda p, normal, share: fraction(p[1] + 1.6 * abs(fraction(0.7 * (p[0] + p[2])) - 0.5)) < share,
    ),
    "marbled": Texture(1.6, False, _vein_weight),
    "grained": Texture(2.8, False, _grain_weight),
    "mosaic": Texture(2.5, False, _mosaic_weight),
}


def pattern(look: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The pattern of a background at (u, v) in metres, (N,), about 0 with deviations of about 1."""
    table = cell_table()
    if look == "tiled":
        u, v = u * 2.5, v * 2.5
        is_joint = (fraction(u) < 0.05) | (fraction(v) < 0.05)
        return np.where(is_joint, np.float32(-2.5), table[0, scatter(np.floor(u), np.floor(v))] * 1.5)
    if look == "planked":
        row = np.floor(v * 6)
        board = np.floor(u * 0.7 + table[1, scatter(row)] * 8)
        streaks = noise(u * 0.15 + row, v * 2.5)
        return table[2, scatter(row, board)] * 2.4 + 0.5 * streaks - 2.0 * (fraction(v * 6) < 0.06)
    if look == "brick":
        row = np.floor(v * 7)
        along = u * 2.4 + row % 2 / 2
        is_joint = (fraction(v * 7) < 0.12) | (fraction(along) < 0.05)
        return np.where(is_joint, np.float32(2.2), table[3, scatter(row, np.floor(along))] * 1.5 - 0.7)
    if look == "panelled":
        return -2.5 * ((fraction(u) < 0.03) | (np.abs(v - 0.9) < 0.03)) - 1.5 * (v < 0.9) + 0.15 * noise(u, v)
    if look == "papered":
        return np.sin(u * 18) + 0.2 * noise(u, v)
    if look == "rippled":
        return 0.8 * np.sin(v * 22 + 2.2 * noise(u * 0.3, v * 0.3)) + 0.5 * noise(u, v)
    fine = {"plain": 0.3, "grassy": 3.0, "speckled": 4.0}[look]
    return noise(u * 0.2, v * 0.2) * 0.7 + noise(u * fine, v * fine) * min(fine / 4, 1)


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
