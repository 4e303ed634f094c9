"""Positions of the patches: tables that are resized to the image, and rotary embeddings of queries and keys.

Letters for shapes: B images, N tokens, P patches, R registers, D width, H heads, d = D / H.

This file travels next to the weights and runs without the package.
"""

import contextlib
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_vitreg import ViTWithRegistersConfig


def resize_position_table(
    table: Tensor, grid: tuple, *, antialias: bool, offset: float, mode: str = "bicubic"
) -> Tensor:
    """Resize a position table, in float32, as `torch.nn.functional.interpolate` does.

    Resizing is linear and separable, so it is one small matrix for the rows and one for the columns. That is
    faster than the library's kernel, and it traces and exports with dynamic sizes.

    Args:
        table: (rows, columns, D).
        grid: rows and columns wanted.
        antialias: widen the kernel when the table shrinks.
        offset: added to the target when the scale is computed, unless the grid stays the same; 0.1 in the official
            DINO and DINOv2.
        mode: "bicubic", "bilinear", or "bilinear_crop", which resizes to a square of the longer side and cuts it.

    Returns:
        Table (*grid, D) in the dtype of `table`.
    """
    rows, columns, width = table.shape
    # 0 where the grid stays the same, else 1, by arithmetic: a comparison would tie a traced graph to its sizes.
    difference = (grid[0] - rows) ** 2 + (grid[1] - columns) ** 2
    offset = offset * (2 * difference // (difference + 1))
    with _without_autocast(table.device):
        make = _bicubic_weights if mode == "bicubic" else _bilinear_weights
        make = functools.partial(make, antialias=antialias, offset=offset, device=table.device)
        if mode == "bilinear_crop":
            longer = torch.sym_max(*grid) if torch.compiler.is_compiling() else max(grid)
            row_weights, column_weights = make(rows, longer)[: grid[0]], make(columns, longer)[: grid[1]]
        else:
            row_weights, column_weights = make(rows, grid[0]), make(columns, grid[1])
        resized = row_weights @ table.float().reshape(rows, columns * width)
        resized = column_weights @ resized.reshape(grid[0], columns, width)  # [rows', columns', D]
    return resized.to(table.dtype)


def _without_autocast(device: torch.device):
    """Keep float32 products in float32. On the meta device, which has no autocast, even the query raises."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _bicubic_weights(source: int, target: int, *, antialias: bool, offset: float, device) -> Tensor:
    """Weights (target, source) of the bicubic kernel; the border is replicated, or cut off where antialiased."""
    scale = source / (target + offset)
    centres = (torch.arange(target, device=device, dtype=torch.float32) + 0.5) * scale
    if antialias:
        stretch = (2 * centres[:1]).clamp(min=1)  # the first centre lies at half the scale
        pixels = torch.arange(source, device=device, dtype=torch.float32) + 0.5
        weights = _cubic_kernel((pixels - centres[:, None]) / stretch, sharpness=-0.5)
        return weights / weights.sum(dim=1, keepdim=True)
    # The kernel ends 2 pixels from a centre, which lies at most half a pixel outside; the rest goes to the border.
    pixels = torch.arange(-3, source + 3, device=device)
    border = pixels.clamp(0, source - 1)[:, None] == torch.arange(source, device=device)
    return _cubic_kernel(pixels + 0.5 - centres[:, None], sharpness=-0.75) @ border.float()


def _bilinear_weights(source: int, target: int, *, antialias: bool, offset: float, device) -> Tensor:
    """Weights (target, source) of the triangular kernel; the border is replicated, or cut off where antialiased."""
    scale = source / (target + offset)
    centres = (torch.arange(target, device=device, dtype=torch.float32) + 0.5) * scale
    pixels = torch.arange(source, device=device, dtype=torch.float32) + 0.5
    if not antialias:
        centres = centres.clamp(0.5, source - 0.5)
        return (1 - (pixels - centres[:, None]).abs()).clamp(min=0)
    stretch = (2 * centres[:1]).clamp(min=1)
    weights = (1 - (pixels - centres[:, None]).abs() / stretch).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)


def _cubic_kernel(distance: Tensor, *, sharpness: float) -> Tensor:
    """Cubic convolution kernel of Keys 1981; the library's `a` is -0.75 without and -0.5 with antialiasing."""
    a, x = sharpness, distance.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


def sincos_position_table(grid: tuple, width: int) -> Tensor:
    """Fixed table (rows, columns, D) of MAE (He et al. 2021): first half from the column, second from the row; in each
    sines, then cosines, of position / 10000^(i / (D/4)). Computed in float64, as there."""
    wide = {"dtype": torch.float64, "device": "cpu"}
    frequencies = 10000.0 ** -(torch.arange(width // 4, **wide) / (width // 4))
    angles = [torch.arange(side, **wide)[:, None] * frequencies for side in grid]
    rows, columns = (torch.cat([part.sin(), part.cos()], dim=1).float() for part in angles)
    return torch.cat([columns[None].expand(grid[0], -1, -1), rows[:, None].expand(-1, grid[1], -1)], dim=-1)


def is_traced() -> bool:
    """Whether a graph is being recorded. Sizes are symbolic then, and code must not branch on values."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def has_values(tensor: Tensor) -> bool:
    """Whether code may branch on the values of a tensor: not while a graph is recorded, and not if it has none (fake,
    meta, vmap)."""
    return not (
        is_traced()
        or type(tensor) is not Tensor
        or tensor.is_meta
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


class ViTWithRegistersPositionEmbeddings(nn.Module):
    """Position table of the patches, and of class and distillation token if they have slots. A fixed table is saved as
    a learned one is, so that a converted file keeps its bytes."""

    def __init__(self, config: ViTWithRegistersConfig):
        super().__init__()
        self.config = config
        self.native_grid = config.grid_shape
        # CODEPATH: ViT, DINOv2, CLIP; else MAE, whose table is fixed.
        if config.position_embedding_type != "sincos":
            num_positions = config.num_prefix_positions + math.prod(self.native_grid)
            self.weight = nn.Parameter(torch.empty(1, num_positions, config.hidden_size))
        else:
            table = sincos_position_table(self.native_grid, config.hidden_size)
            self.weight = nn.Buffer(table.flatten(0, 1)[None])

    def fill(self, weight: Tensor) -> None:
        """Write initial values: random for a learned table, sines and cosines for a fixed one."""
        if isinstance(self.weight, nn.Parameter):
            nn.init.trunc_normal_(weight, std=self.config.initializer_range)
        else:
            weight.copy_(sincos_position_table(self.native_grid, self.config.hidden_size).flatten(0, 1))

    def forward(self, grid: tuple) -> tuple[Tensor | None, Tensor]:
        """Positions of the prefix, (1, slots, D) or None, and of the patches of a grid, (1, P, D)."""
        slots = self.config.num_prefix_positions
        return self.weight[:, :slots] if slots else None, self._fit(self.weight[:, slots:], grid)

    @torch.no_grad()
    def resize(self, grid: tuple) -> None:
        """Replace the table by the one for another grid; the slots of the prefix are kept."""
        slots = self.config.num_prefix_positions
        table = torch.cat([self.weight[:, :slots], self._fit(self.weight[:, slots:], grid)], dim=1).clone()
        if isinstance(self.weight, nn.Parameter):
            self.weight = nn.Parameter(table, requires_grad=self.weight.requires_grad)
        else:
            self.weight = table
        self.native_grid = grid

    def _fit(self, positions: Tensor, grid: tuple) -> Tensor:
        if not is_traced() and grid == self.native_grid:
            return positions
        table = resize_position_table(
            positions[0].unflatten(0, self.native_grid),
            grid,
            antialias=self.config.interpolate_antialias,
            offset=self.config.interpolate_offset,
            mode=self.config.interpolate_mode,
        )
        return table.flatten(0, 1)[None]


def rotary_tables(
    config: ViTWithRegistersConfig, grid: tuple, *, training: bool, device, frequencies: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `rotary_angles`."""
    return turn(rotary_angles(config, grid, training=training, device=device, frequencies=frequencies))


def turn(angles: Tensor, grid: tuple | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of angles, as `rotate` takes them."""
    return angles.cos(), angles.sin()


def rotary_angles(
    config: ViTWithRegistersConfig, grid: tuple, *, training: bool, device, frequencies: Tensor | None = None
) -> Tensor:
    """Angles (N, d), in float32, of a 2-D rotary embedding. Class and distillation token are not rotated.

    DINOv3 (Simeoni et al. 2025): patch centres lie in [-1, 1] on each axis; a quarter of a head encodes the row, a
    quarter the column, and the other half repeats both. Registers are not rotated.
    CAPI (Darcet et al. 2025): the first patch lies at 0 on each axis, the last at 1, and registers lie around the
    border; one half of a head encodes the row, the other the column.
    Axial (EVA-02, Perception Encoder, RoPE-ViT): rows and columns are counted, and neighbouring channels form a pair;
    one half of a head encodes the first coordinate, the other the second.
    Mixed (RoPE-ViT): the same count, with the learned `frequencies` (2, L, H, d / 2); the angles are (L, H, N, d).
    """
    if frequencies is not None:
        angles = _mixed_angles(config, grid, frequencies)
    else:
        # CODEPATH: CAPI; EVA-02, Perception Encoder, RoPE-ViT; else DINOv3.
        make = {"capi": _capi_angles, "axial": _axial_angles}.get(config.rope_style, _dinov3_angles)
        angles = make(config, grid, training=training, device=device)
    return F.pad(angles, (0, 0, config.num_prefix_tokens + math.prod(grid) - angles.shape[-2], 0))


class ViTWithRegistersRotaryFrequencies(nn.Module):
    """Learned frequencies (2, L, H, d / 2) of a mixed rotary embedding, along the first and second coordinate."""

    def __init__(self, config: ViTWithRegistersConfig):
        super().__init__()
        heads = config.num_attention_heads
        self.theta = config.rope_theta
        self.weight = nn.Parameter(torch.empty(2, config.num_hidden_layers, heads, config.hidden_size // heads // 2))

    def fill(self, weight: Tensor) -> None:
        """Write initial values: those of axial embeddings, with axes at a random angle in each layer and head."""
        pairs = weight.shape[-1] // 2
        sizes = self.theta ** -(torch.arange(pairs, device=weight.device) / pairs)
        turns = 2 * math.pi * torch.rand(*weight.shape[1:3], 1, device=weight.device)
        turns = torch.cat([turns.expand(-1, -1, pairs), (turns + math.pi / 2).expand(-1, -1, pairs)], dim=-1)
        weight.copy_(torch.stack([turns.cos(), turns.sin()]) * sizes.tile(2))


def _counted(config: ViTWithRegistersConfig, grid: tuple, device) -> Tensor:
    """Coordinates (P, 2) of the patches, from 0 on, the row first unless `config.rope_columns_first`."""
    sides = [torch.arange(side, device=device, dtype=torch.float32) for side in grid]
    sides = [side + config.rope_grid_offset for side in sides]
    # CODEPATH: models with positions scaled to the grid of their pretraining, such as EVA-02.
    if config.rope_reference_grid is not None:
        reference = config.rope_reference_grid
        reference = reference if isinstance(reference, list) else [reference, reference]
        sides = [side / length * target for side, length, target in zip(sides, grid, reference)]
    places = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, 1)
    # CODEPATH: models that count columns first, such as Perception Encoder; else all others.
    return places.flip(-1) if config.rope_columns_first else places


def _axial_angles(config: ViTWithRegistersConfig, grid: tuple, *, training: bool, device) -> Tensor:
    quarter = config.hidden_size // config.num_attention_heads // 4
    frequencies = config.rope_theta ** -(torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    angles = _counted(config, grid, device)[:, :, None] * frequencies  # [P, 2, d/4]
    return angles.flatten(1).repeat_interleave(2, dim=-1)


def _mixed_angles(config: ViTWithRegistersConfig, grid: tuple, frequencies: Tensor) -> Tensor:
    first, second = _counted(config, grid, frequencies.device).unbind(-1)
    along_first, along_second = frequencies.float().unsqueeze(-2)  # [L, H, 1, d/2]
    angles = first[:, None] * along_first + second[:, None] * along_second  # [L, H, P, d/2]
    return angles.repeat_interleave(2, dim=-1)


def _dinov3_angles(config: ViTWithRegistersConfig, grid: tuple, *, training: bool, device) -> Tensor:
    centres = [(torch.arange(side, device=device, dtype=torch.float32) + 0.5) / side * 2 - 1 for side in grid]
    centres = torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=-1).flatten(0, 1)  # [P, 2]
    if training:
        centres = _augment_centres(config, centres)
    quarter = config.hidden_size // config.num_attention_heads // 4
    frequencies = config.rope_theta ** -(torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    return (2 * math.pi * centres[:, :, None] * frequencies).flatten(1).tile(2)  # [P, 2, d/4] -> [P, d]


def _capi_angles(config: ViTWithRegistersConfig, grid: tuple, *, training: bool, device) -> Tensor:
    sides = [torch.linspace(0, 1, side, device=device) for side in grid]
    patches = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, 1)  # [P, 2]
    quarter = config.num_register_tokens // 4
    way = torch.arange(quarter, device=device, dtype=torch.float32) / max(quarter, 1)
    rows = torch.cat([way, torch.ones_like(way), 1 - way, torch.zeros_like(way)])
    registers = torch.stack([rows, torch.cat([rows[3 * quarter :], rows[: 3 * quarter]])], dim=-1)  # [R, 2]
    registers = registers * patches.amax(dim=0)  # a grid of one row has all its patches at 0
    positions = torch.cat([registers, patches])
    return (positions[:, :, None] * capi_frequencies(config, device=device).tile(2)).flatten(1)  # [R + P, 2, d/2]


def capi_frequencies(config: ViTWithRegistersConfig, *, device=None) -> Tensor:
    """Rotation (d / 4,) of each pair of channels across the whole image, in radians, from 7 turns to 7e-4 turns."""
    quarter = config.hidden_size // config.num_attention_heads // 4
    return 2 * math.pi * 7 * 1e4 ** torch.linspace(0, -1, quarter, device=device)


def _augment_centres(config: ViTWithRegistersConfig, centres: Tensor) -> Tensor:
    # CODEPATH: training of DINOv3 only.
    if config.rope_shift is not None:
        centres = centres + torch.empty_like(centres[:1]).uniform_(-config.rope_shift, config.rope_shift)
    # CODEPATH: training of DINOv3 only.
    if config.rope_jitter is not None:
        reach = math.log(config.rope_jitter)
        centres = centres * torch.empty_like(centres[:1]).uniform_(-reach, reach).exp()
    # CODEPATH: training of DINOv3 only.
    if config.rope_rescale is not None:
        reach = math.log(config.rope_rescale)
        centres = centres * torch.empty_like(centres[:1, :1]).uniform_(-reach, reach).exp()
    return centres


def make_rotation(config: ViTWithRegistersConfig, number: int) -> Callable | None:
    """How layer `number`, from 1 on, rotates queries and keys; None for a model without rotary embedding."""
    # CODEPATH: ViT, DINOv2, CLIP; else models with rotary embedding.
    if not config.has_rope:
        return None
    # CODEPATH: RoPE-ViT, mixed.
    if config.rope_style == "mixed":
        return functools.partial(_rotate_mixed, number=number)
    # CODEPATH: EVA-02, Perception Encoder, RoPE-ViT; else DINOv3, CAPI.
    return _rotate_pairs if config.rope_style == "axial" else rotate


def _rotate_pairs(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """As `rotate`, with pairs of neighbouring channels."""
    cos, sin = rotary
    exact = x.float()
    turned = torch.stack([-exact[..., 1::2], exact[..., ::2]], dim=-1).flatten(-2)
    return (exact * cos + turned * sin).to(x.dtype)


def _rotate_mixed(x: Tensor, rotary: tuple[Tensor, Tensor], *, number: int) -> Tensor:
    cos, sin = rotary
    return _rotate_pairs(x, (cos[number - 1], sin[number - 1]))


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate queries or keys (B, H, N, d) by the angles of `rotary_tables`; channels i and d / 2 + i are a pair."""
    cos, sin = rotary
    exact = x.float()  # products and sums in half precision make the error half as large again
    first, second = exact.chunk(2, dim=-1)
    return (exact * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


# Relative position bias -------------------------------------------------------------------------------------------


class ViTWithRegistersPositionBias(nn.Module):
    """Learned values that are added to the scores of each head, by the offset between two patches (BEiT).

    The table has (2 rows - 1) (2 columns - 1) offsets, row by row, and three values more: prefix to patch, patch to
    prefix, prefix to prefix, where the prefix is every token without a place.
    """

    def __init__(self, config: ViTWithRegistersConfig):
        super().__init__()
        self.config = config
        self.native_grid = config.grid_shape
        num_offsets = math.prod(2 * side - 1 for side in self.native_grid)
        self.weight = nn.Parameter(torch.empty(num_offsets + 3, config.num_attention_heads))

    def forward(self, grid: tuple) -> Tensor:
        """Values (1, H, N, N), rows for queries, for images of a grid; the table is resized bilinearly."""
        rows, columns = (torch.arange(side, device=self.weight.device) for side in grid)
        places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # [P, 2]
        offsets = places[:, None] - places[None]  # [P, P, 2]
        numbers = (offsets[..., 0] + grid[0] - 1) * (2 * grid[1] - 1) + offsets[..., 1] + grid[1] - 1
        table = self._fit(grid)
        values, count = table[numbers], self.config.num_prefix_tokens  # [P, P, H]
        from_prefix, to_prefix, among_prefix = self.weight[-3:]
        above = torch.cat(
            [among_prefix.expand(count, count, -1), from_prefix.expand(count, values.shape[0], -1)], dim=1
        )
        below = torch.cat([to_prefix.expand(values.shape[0], count, -1), values], dim=1)
        return torch.cat([above, below]).permute(2, 0, 1).unsqueeze(0)

    @torch.no_grad()
    def resize(self, grid: tuple) -> None:
        """Replace the table by the one for another grid."""
        table = torch.cat([self._fit(grid), self.weight[-3:]]).clone()
        self.weight = nn.Parameter(table, requires_grad=self.weight.requires_grad)
        self.native_grid = grid

    def _fit(self, grid: tuple) -> Tensor:
        table = self.weight[:-3]
        if not is_traced() and tuple(grid) == tuple(self.native_grid):
            return table
        table = table.unflatten(0, [2 * side - 1 for side in self.native_grid])
        wanted = [2 * side - 1 for side in grid]
        return resize_position_table(table, wanted, antialias=False, offset=0.0, mode="bilinear").flatten(0, 1)


__all__ = [
    "ViTWithRegistersPositionBias",
    "ViTWithRegistersPositionEmbeddings",
    "ViTWithRegistersRotaryFrequencies",
    "capi_frequencies",
    "has_values",
    "is_traced",
    "make_rotation",
    "resize_position_table",
    "rotary_angles",
    "rotary_tables",
    "rotate",
    "sincos_position_table",
    "turn",
]
