"""Estimate of the memory, operations and traffic of a training run, and of the size of its states.

One micro-batch of the objective runs forward and backward on fake tensors, which have shapes and no contents; memory
and products are counted on the way. Assumed are the rate of the device, what torch holds of a sharded layer, and that
checkpoints recompute one layer at a time.

Not counted: the context of the device and of the communication library (1 to 2 GiB), fragmentation, and the savings
of `--compile`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from modeling_vitreg.memory import MemoryTracker

from .build import make_objective
from .objectives.heads import PrototypeHead
from .objectives.objective import Objective
from .objectives.registry import objective_class
from .run.recipe import Recipe
from .run.sharding import UNITS
from .views.masking import draw_masks


PRECISIONS = ("no", "bf16", "fp16")
# Dense products in bfloat16 a second, from the data sheets.
DEVICES = {"A100": 312e12, "H100": 989e12}
UTILISATION = 0.4  # an assumption: well-tuned runs of large ViTs reach 0.3 to 0.5


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Cost of a run. Bytes are per process, operations and traffic per step of the optimiser.

    Args:
        objective: its name.
        num_processes, micro_batch, precision, is_sharded, checkpoints_activations: as asked.
        num_accumulations: micro-batches of a process in a step.
        num_steps: number of steps of the run.
        images_per_step: over all processes.
        tokens_per_step: tokens of all views that the student sees, over all processes, before any are left out.
        parameters: parameters of each trained part, and of `teacher`, everything that is not trained.
        memory: bytes of
            weights - trained parameters, float32; sharded: the share of this process
            gradients - of them
            moments - two of AdamW
            teacher - everything that is not trained: the moving average and its heads, and buffers
            gathered - sharded only: see `_gathered_bytes`
            images - views of a micro-batch, float32
            copies - weights in half precision that autocast keeps for the backward pass
            logits - of the heads, and their targets: tensors whose last axis is the number of prototypes
            activations - all other tensors that are kept for the backward pass
            working - the peak of a step beyond that
        flops: of a step over all processes: `teacher`, `student` (forward; `heads` is the part of its heads) and
            `backward`, which includes what is computed again with checkpoints.
        reduced_bytes: what one process sends in a step, in rings; sums of a few vectors are not counted.
        state_bytes: size of a state on disk.
        host_bytes: memory of the process that writes it, beyond its usual memory.
    """

    objective: str
    num_processes: int
    micro_batch: int
    num_accumulations: int
    precision: str
    is_sharded: bool
    checkpoints_activations: bool
    num_steps: int
    images_per_step: int
    tokens_per_step: int
    parameters: dict[str, int]
    memory: dict[str, int]
    flops: dict[str, int]
    reduced_bytes: int
    state_bytes: int
    host_bytes: int

    @property
    def total_memory(self) -> int:
        """Bytes that one process needs at the highest point of a step."""
        return sum(self.memory.values())

    @property
    def flops_per_step(self) -> int:
        """Floating-point operations of a step over all processes; a product and its sum are two."""
        return sum(self.flops[name] for name in ("teacher", "student", "backward"))

    @property
    def total_flops(self) -> int:
        """Floating-point operations of the whole run."""
        return self.flops_per_step * self.num_steps

    def hours(self, *, flops_per_second: float = DEVICES["A100"], utilisation: float = UTILISATION) -> float:
        """Hours of the run if only the matrix products take time.

        Args:
            flops_per_second: peak rate of one device, as its data sheet says.
            utilisation: share of it that the run reaches; an assumption, the data and the network permitting.
        """
        return self.total_flops / (flops_per_second * utilisation * self.num_processes) / 3600


def estimate(
    recipe: Recipe,
    *,
    num_processes: int,
    micro_batch: int,
    precision: str = "bf16",
    is_sharded: bool = False,
    checkpoints_activations: bool = False,
) -> Estimate:
    """Estimate the cost of a run; takes seconds and hardly any memory, also for ViT-g.

    As on a GPU, views of different sizes are packed, and a flash kernel of attention keeps nothing of size N x N.

    Args:
        recipe: recipe of the run.
        num_processes: number of processes that share a batch.
        micro_batch: images that go through the network at once, in one process.
        precision: "no", "bf16" or "fp16".
        is_sharded: as with `--shard`.
        checkpoints_activations: as with `--checkpoint-activations`.

    Raises:
        ValueError: a number below one, an unknown precision, or a batch that cannot be divided so.
    """
    _check(recipe, num_processes, micro_batch, precision)
    num_accumulations = recipe.batch_size // (num_processes * micro_batch)
    settings = objective_class(recipe.objective).settings_for_estimate(recipe.settings)
    recipe = dataclasses.replace(recipe, settings=settings)
    objective = _make_shapes(recipe)
    learned = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    learned_bytes, weight_bytes = _bytes(learned), _bytes(objective.parameters())
    half = 4 if precision == "no" else 2
    trace = _trace(recipe, micro_batch, precision, is_sharded, checkpoints_activations)
    working = trace.peak - sum(trace.kept.values())
    if checkpoints_activations:
        # Python keeps a recomputed layer longer in this count than a device does: take the share of one layer.
        plain = _trace(recipe, micro_batch, precision, is_sharded, False)
        of_layers = sum(plain.kept.values()) - sum(trace.kept.values())
        working = plain.peak - sum(plain.kept.values()) + of_layers // len(objective.trained["backbone"].layers)
    saved_bytes = _bytes(objective.state_dict().values())
    reduced = learned_bytes * 2
    if is_sharded:
        # Of each micro-batch: the student's weights twice and the teacher's once, and a float32 sum of the gradients.
        reduced = num_accumulations * ((learned_bytes + weight_bytes) * half // 4 + learned_bytes)
    return Estimate(
        recipe.objective, num_processes, micro_batch, num_accumulations,
        precision, is_sharded, checkpoints_activations,
        num_steps=recipe.num_steps,
        images_per_step=recipe.batch_size,
        tokens_per_step=recipe.batch_size * _tokens_per_image(recipe, objective),
        parameters={name: _count(part.parameters()) for name, part in objective.trained.items()}
        | {"teacher": (weight_bytes - learned_bytes + trace.outside) // 4},
        memory=_memory(objective, trace, learned_bytes, weight_bytes, share=num_processes if is_sharded else 1)
        | {"gathered": _gathered_bytes(objective, half) if is_sharded else 0}
        | {"images": trace.images, **trace.kept, "working": working},
        flops={name: count * num_accumulations * num_processes for name, count in trace.flops.items()},
        reduced_bytes=reduced * (num_processes - 1) // num_processes,
        state_bytes=saved_bytes + 2 * learned_bytes + 4 * len(learned),
        host_bytes=saved_bytes + 2 * learned_bytes,  # weights and moments as gathered
    )  # fmt: skip


def _memory(
    objective: Objective, trace: _Trace, learned_bytes: int, weight_bytes: int, *, share: int
) -> dict[str, int]:
    """Bytes that one of `share` processes holds between steps."""
    return {
        "weights": math.ceil(learned_bytes / share),
        "gradients": math.ceil(learned_bytes / share),
        "moments": math.ceil(2 * learned_bytes / share),
        # A teacher that is no part of the objective is not sharded, and neither are buffers.
        "teacher": math.ceil((weight_bytes - learned_bytes) / share) + trace.outside + _bytes(objective.buffers()),
    }


def _check(recipe: Recipe, num_processes: int, micro_batch: int, precision: str) -> None:
    if num_processes < 1 or micro_batch < 1:
        raise ValueError(f"estimate: expected one or more processes and images, got {num_processes} and {micro_batch}")
    if precision not in PRECISIONS:
        raise ValueError(f"estimate: expected precision to be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if recipe.batch_size % (num_processes * micro_batch):
        raise ValueError(
            f"estimate: batch_size {recipe.batch_size} is not a multiple of {num_processes} processes x {micro_batch} "
            f"images: change one of them"
        )


# Counting ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Trace:
    """Of one micro-batch: bytes kept after the forward pass by kind, the highest of all, and operations by phase."""

    kept: dict[str, int]
    peak: int
    images: int
    outside: int
    flops: dict[str, int]


def _make_shapes(recipe: Recipe) -> Objective:
    """The objective without contents; one whose teacher has to be loaded is made on the CPU."""
    with contextlib.nullcontext() if objective_class(recipe.objective).has_external_teacher else torch.device("meta"):
        return make_objective(recipe)


def _trace(
    recipe: Recipe, micro_batch: int, precision: str, is_sharded: bool, checkpoints_activations: bool
) -> _Trace:
    objective = _make_shapes(recipe).train()
    backbone = objective.trained["backbone"]
    if checkpoints_activations:
        backbone.gradient_checkpointing_enable()
    num_masked = _mean_masked(recipe, objective, micro_batch)
    num_prototypes = {
        len(head.last_layer.direction) for head in objective.modules() if isinstance(head, PrototypeHead)
    }
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as products:
        # Sharded weights are gathered in half precision; otherwise autocast makes the copies, one by one.
        kind = torch.bfloat16 if is_sharded and precision != "no" else torch.float32
        _fill(objective, kind)
        batch = _make_batch(recipe, objective, micro_batch, num_masked)
        known = [*objective.parameters(), *objective.buffers(), *batch.values()]
        tracker = _Tracker(products, known=known, num_prototypes=num_prototypes)
        heads = [part for name, part in objective.trained.items() if name != "backbone"]
        with tracker, _count_in(heads, products) as of_heads:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision != "no"):
                losses = objective(batch, step=0)
            kept = tracker.kept()
            tracker.is_backward = True
            losses["total"].backward()
    images = _bytes([batch[name] for name in ("global_views", "local_views", "gram_views") if name in batch])
    flops = tracker.flops | {"heads": sum(of_heads)}
    return _Trace(kept=kept, peak=tracker.peak, images=images, outside=tracker.outside, flops=flops)


def _fill(objective: Objective, kind: torch.dtype) -> None:
    """Replace the parameters by ones of shapes alone, whose gradients are dropped: they are counted elsewhere."""
    for module in objective.modules():
        is_norm = isinstance(module, nn.LayerNorm)
        if is_norm:
            # On a GPU autocast raises what enters a norm to float32; on a CPU it does not.
            module.register_forward_pre_hook(lambda _, inputs: inputs[0].float())
        for name, parameter in list(module.named_parameters(recurse=False)):
            dtype = torch.float32 if is_norm else kind
            shapes = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=parameter.requires_grad)
            if shapes.requires_grad:
                shapes.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
            setattr(module, name, shapes)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _make_batch(recipe: Recipe, objective: Objective, micro_batch: int, num_masked: int) -> dict[str, Tensor]:
    """What `to_device` returns."""
    crops, shape = recipe.crops, (micro_batch, objective.encoder.config.num_channels)
    batch = {"global_views": torch.empty(crops.num_global, *shape, crops.global_size, crops.global_size)}
    if crops.num_local:
        batch["local_views"] = torch.empty(crops.num_local, *shape, crops.local_size, crops.local_size)
    batch |= objective.example_targets(micro_batch)
    if objective.masks is not None:
        num_patches = math.prod(_grid(objective, crops.global_size))
        batch["masks"] = torch.empty(crops.num_global * micro_batch, num_patches, dtype=torch.bool)
        batch["masked_patches"] = torch.empty(num_masked, dtype=torch.long)
    return batch


def _mean_masked(recipe: Recipe, objective: Objective, micro_batch: int) -> int:
    """Masked patches of a micro-batch, the mean of many draws, for block masks are random."""
    if objective.masks is None:
        return 0
    num_batches = math.ceil(1024 / micro_batch)
    masks = draw_masks(
        num_batches * micro_batch,
        num_views=recipe.crops.num_global,
        grid=_grid(objective, recipe.crops.global_size),
        settings=objective.masks,
        generator=torch.Generator().manual_seed(0),
    )
    return round(int(masks.sum()) / num_batches)


def _grid(objective: Objective, side: int) -> tuple[int, int]:
    rows, columns = objective.encoder.config.patch_shape
    return side // rows, side // columns


def _tokens_per_image(recipe: Recipe, objective: Objective) -> int:
    crops, num_prefix = recipe.crops, objective.encoder.config.num_prefix_tokens
    views = [(crops.num_global, crops.global_size), (crops.num_local, crops.local_size)]
    return sum(number * (num_prefix + math.prod(_grid(objective, side))) for number, side in views if number)


class _Tracker(MemoryTracker):
    """Bytes that are alive by kind, the most that ever were, and products by phase, operation by operation.

    Args:
        products: counts the operations; read after each.
        known: tensors that are counted elsewhere.
        num_prototypes: sizes of the last axis of logits.
    """

    def __init__(self, products: FlopCounterMode, *, known: list[Tensor], num_prototypes: set[int]):
        super().__init__(known)
        self._products, self._num_prototypes = products, num_prototypes
        self._outside: dict[int, int] = {}
        self.is_backward = False
        self.flops = {"teacher": 0, "student": 0, "backward": 0}

    def kept(self) -> dict[str, int]:
        """Bytes alive by kind."""
        sizes = {"copies": 0, "logits": 0, "activations": 0}
        for kind, size in self.alive.values():
            sizes[kind] += size
        return sizes

    @property
    def outside(self) -> int:
        """Bytes of weights that are no part of the objective, such as those of a frozen teacher."""
        return sum(self._outside.values())

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        before = self._products.get_total_flops()
        result = operation(*args, **(kwargs or {}))
        phase = "backward" if self.is_backward else "student" if torch.is_grad_enabled() else "teacher"
        self.flops[phase] += self._products.get_total_flops() - before
        weights = [value for value in tree_iter(args) if isinstance(value, nn.Parameter)]
        for weight in weights:
            storage = weight.untyped_storage()
            if storage._cdata not in self.known:
                self._outside[storage._cdata] = storage.nbytes()
        is_copy = bool(weights) and operation is torch.ops.aten._to_copy.default
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._outside:
                is_logits = tensor.ndim > 1 and tensor.shape[-1] in self._num_prototypes
                self.see(tensor, "copies" if is_copy else "logits" if is_logits else "activations")
        return result


@contextlib.contextmanager
def _count_in(modules: list[nn.Module], products: FlopCounterMode) -> Iterator[list[int]]:
    """Products within the forward passes of some modules."""
    counts: list[int] = []
    hooks = []
    for module in modules:
        hooks.append(module.register_forward_pre_hook(lambda *_: counts.append(-products.get_total_flops())))
        hooks.append(module.register_forward_hook(lambda *_: counts.append(products.get_total_flops())))
    yield counts
    for hook in hooks:
        hook.remove()


def _gathered_bytes(objective: Objective, half: int) -> int:
    """What a process holds of others' shards at most, by the order in which `fully_shard` works: the layer in use and
    the next one, what belongs to no layer, and the gradients of a layer, as computed and in float32 to be summed."""
    units = [module for module in objective.modules() if isinstance(module, UNITS)]
    sizes = [_count(unit.parameters()) for unit in units]
    rest = _count(objective.parameters()) - sum(sizes)
    return 2 * max(sizes) * half + rest * half + max(sizes) * (half + 4)


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)
