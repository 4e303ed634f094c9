"""What a forward pass of each of several encoders costs: parameters, operations, tokens, time and memory.

Letters for shapes: B images, N tokens, C channels, L layers.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import tqdm
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modeling_vitreg.encoding.precision import run_in
from modeling_vitreg.features import Encoder
from modeling_vitreg.features.families import find_part
from modeling_vitreg.features.parts import as_sequence, tensor_of
from modeling_vitreg.memory import MemoryTracker


NUM_COUNTED = 4  # images whose operations and tokens are counted, one by one


@dataclass(frozen=True)
class Cost:
    """What it costs to encode an image, without a head.

    Args:
        num_parameters: of the tower.
        flops: of one image, in matrix products, convolutions and attention; a product and its sum are two.
        tokens: L + 1 numbers, the tokens that enter each layer, and those that leave the last one; means over images.
        images_per_second: of each round.
        peak_bytes: weights, and the most that a batch of images needs beside them.
    """

    num_parameters: int
    flops: float
    tokens: list[float]
    images_per_second: list[float]
    peak_bytes: int


@torch.no_grad()
def measure_costs(
    encoders: Sequence[Encoder],
    pixels: Sequence[Tensor],
    *,
    num_rounds: int,
    precisions: Sequence[str],
    has_progress_bar: bool = True,
) -> list[Cost]:
    """Measure all encoders. For the time they take turns, round after round, after one round that does not count.

    A machine that changes its speed so changes it for all.

    Args:
        encoders: one or more.
        pixels: for each of them images (B, C, height, width), normalised.
        num_rounds: rounds that count.
        precisions: for each of them that of its products, see `encoding.precision`.
        has_progress_bar: show a progress bar.

    Raises:
        ValueError: fewer than one round, or images that do not fit.
    """
    if num_rounds < 1:
        raise ValueError(f"expected one round or more, got {num_rounds}")
    batches = [images.to(encoder.device) for encoder, images in zip(encoders, pixels)]
    jobs = list(zip(encoders, batches, precisions))
    counted = [count_operations(encoder, images[:NUM_COUNTED]) for encoder, images in zip(encoders, batches)]
    memory = [_measure_memory(*job) for job in jobs]
    speeds: list[list[float]] = [[] for _ in jobs]
    rounds = tqdm.trange(
        num_rounds + 1, desc="speed", unit="round", disable=not has_progress_bar, delay=2, leave=False
    )
    for round_number in rounds:
        for job, own in zip(jobs, speeds):
            seconds = _time(*job)
            if round_number:
                own.append(len(job[1]) / seconds)
    counts = [sum(parameter.numel() for parameter in encoder.tower.parameters()) for encoder in encoders]
    return [Cost(*parts) for parts in zip(counts, *zip(*counted), speeds, memory)]


@torch.no_grad()
def count_operations(encoder: Encoder, pixels: Tensor) -> tuple[float, list[float]]:
    """`flops` and `tokens` of `Cost`, means over images (B, C, height, width) that are encoded one by one.

    Attention runs as two products, because torch counts the fused kernels of some devices only.
    """
    flops, tokens = 0, []
    for image in pixels.split(1):
        with _frozen(encoder.tower), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            _run(encoder, image)
        flops += counter.get_total_flops()
        grid = tuple(side // patch for side, patch in zip(image.shape[2:], encoder.patch_shape))
        hooks = functools.partial(_count_tokens, encoder, grid=grid)
        found = encoder.run(image, hooks, num_expected=encoder.num_layers + 1)
        tokens.append([found[number] for number in range(encoder.num_layers + 1)])
    return flops / len(pixels), [statistics.fmean(layer) for layer in zip(*tokens)]


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No parameter needs a gradient: the counter follows those that do, and fails without a graph."""
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in learned:
            parameter.requires_grad = False
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad = True


def _count_tokens(encoder: Encoder, keep: Callable, grid: tuple[int, int]) -> Iterator:
    """Hooks that keep the number of tokens that enter each layer, and of those that leave the last one.

    Attention on windows sees a part of them, so it is asked only where a model shortens its sequence inside a layer.
    """

    def count(number: int, value: Tensor) -> None:
        keep(number, as_sequence(value, grid=grid).shape[1])

    def enter(number: int, arguments: tuple, keywords: dict) -> None:
        count(number, tensor_of((*arguments, *keywords.values())))

    is_shortened = getattr(getattr(encoder.tower, "config", None), "token_reduction", None) is not None
    for number, layer in enumerate(encoder.layers):
        module = find_part(layer, "attention") if is_shortened else layer
        yield module.register_forward_pre_hook(
            lambda _, *given, number=number: enter(number, *given), with_kwargs=True
        )
    last = len(encoder.layers)
    if is_shortened:
        mlp = find_part(encoder.layers[-1], "mlp")
        yield mlp.register_forward_pre_hook(lambda _, *given: enter(last, *given), with_kwargs=True)
    else:
        yield encoder.layers[-1].register_forward_hook(lambda _, __, value: count(last, tensor_of(value)))


def _run(encoder: Encoder, pixels: Tensor) -> None:
    encoder.run(pixels, lambda keep: iter(()), num_expected=0, is_inside_layers=False)


def _time(encoder: Encoder, pixels: Tensor, precision: str) -> float:
    _wait(pixels.device)
    start = time.perf_counter()
    with run_in(precision, encoder):
        _run(encoder, pixels)
    _wait(pixels.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _measure_memory(encoder: Encoder, pixels: Tensor, precision: str) -> int:
    """As the allocator of a GPU says, elsewhere as `MemoryTracker` counts it."""
    weights = [*encoder.tower.parameters(), *encoder.tower.buffers()]
    fixed = sum({weight.data_ptr(): weight.nbytes for weight in weights}.values())
    if pixels.is_cuda:
        before = torch.cuda.memory_allocated(pixels.device)
        torch.cuda.reset_peak_memory_stats(pixels.device)
        with run_in(precision, encoder):
            _run(encoder, pixels)
        return fixed + torch.cuda.max_memory_allocated(pixels.device) - before
    with run_in(precision, encoder), MemoryTracker(weights) as tracker:
        _run(encoder, pixels)
    return fixed + tracker.peak
