"""Time a whole DINOv2 training step of ours beside facebookresearch/dinov2's modules and lightly's example.

    git clone https://github.com/facebookresearch/dinov2
    pip install lightly
    python benchmarks/pretrain_step.py --dinov2 dinov2

A step is: teacher, student, the three losses, backward, clipping, AdamW, moving average; from normalised views and
masks that lie on the device. All programs have the same weights, views, masks, precision, prototypes and heads, and
take turns, round after round, so that a machine that changes its speed changes it for all. Before that it is shown
that they do the same job: as many parameters of the backbone, as many masked patches, the same losses. The figures
are medians with quartiles over rounds; the ratio is peer / ours within a round (above 1: ours is faster).

What each program is:

- ours: `DINOv2` with the groups and the fused AdamW of examples/pretrain.py. "packed" sends global and local
  views through the linear layers together, "batched" one after the other; the ratio refers to what is the default
  on the device.
- dinov2: its blocks, heads, losses and parameter groups in the order of its `forward_backward`, on one process, so
  without FSDP; without xFormers, so global and local views in two passes and attention by PyTorch.
- lightly: its modules and losses in the order of its benchmarks/imagenet/vitb16/dinov2.py, without Lightning and
  without the online classifier; one group of AdamW for each parameter, as there. Registers are added, and positions
  are resized with antialiasing, so that it computes what the others compute.

A peer that is not at hand is left out. Needs `pip install "modeling-vitreg[test]"`.
"""

import abc
import argparse
import contextlib
import copy
import functools
import math
import os
import pathlib
import re
import statistics
import sys
import time
import types
import warnings

import torch
from torch import Tensor, nn

from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersModel
from modeling_vitreg.pretraining.objectives.dinov2 import DINOv2, DINOv2Settings
from modeling_vitreg.pretraining.run.parameters import parameter_groups, set_rates
from modeling_vitreg.pretraining.views.crops import CropSettings
from modeling_vitreg.pretraining.views.masking import MaskSettings, draw_masks


CLIP, MOMENTUM, LEARNING_RATE, WEIGHT_DECAY = 3.0, 0.992, 1e-4, 0.04
TEACHER_TEMPERATURE, LAYER_DECAY, PATCH_MULTIPLIER = 0.04, 0.9, 0.2
KOLEO_WEIGHT = 0.1
HOW_TO_GET = {
    "dinov2": "git clone https://github.com/facebookresearch/dinov2, then --dinov2 dinov2",
    "lightly": "pip install lightly, or git clone https://github.com/lightly-ai/lightly, then --lightly lightly",
}


def main() -> None:
    options = parse_options()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="xFormers")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = True  # for all, because dinov2's loop asks for it
    torch.manual_seed(0)
    config = make_config(options)
    batch = make_batch(options, config)
    programs = make_programs(options, config)
    print(
        f"{options.width}, {config.num_register_tokens} registers, batch {options.batch}, 2 global views of "
        f"{config.image_size} and {options.local_crops} local views of {local_size(config)} pixels, "
        f"{options.prototypes} prototypes\n{options.centering}, stochastic depth {options.drop_path}, precision "
        f"{options.precision}{', compiled' * options.compile}, torch {torch.__version__}, {device_name(options)}\n"
    )
    check_sameness(programs, batch, options)
    report(programs, measure(programs, batch, options), options)


def parse_options(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dinov2", type=pathlib.Path, help="a clone of facebookresearch/dinov2")
    parser.add_argument("--lightly", type=pathlib.Path, help="a clone of lightly-ai/lightly (default: as installed)")
    parser.add_argument(
        "--width", default="small/16", help='a preset, or width x layers / patch as in "64x2/16" (default small/16)'
    )
    parser.add_argument("--batch", type=int, default=8, help="images (default 8)")
    parser.add_argument("--local-crops", type=int, default=8, help="local views (default 8)")
    parser.add_argument("--prototypes", type=int, default=65536, help="of the shared head (default 65536)")
    parser.add_argument("--registers", type=int, default=4, help="(default 4)")
    parser.add_argument("--drop-path", type=float, default=0.1, help="rate of all layers (default 0.1)")
    parser.add_argument(
        "--centering",
        choices=("moving_mean", "sinkhorn"),
        default="moving_mean",
        help="of the teacher; lightly has moving_mean only and is left out with sinkhorn (default moving_mean)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="autocast (default no)")
    parser.add_argument("--repeats", type=int, default=9, help="rounds of all programs (default 9)")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds that do not count (default 2)")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: its own choice)")
    parser.add_argument("--compile", action="store_true", help="compile the layers of all programs")
    return parser.parse_args(words)


# The same job for all ------------------------------------------------------------------------------------------------


def make_config(options: argparse.Namespace) -> ViTWithRegistersConfig:
    size, _, patch = options.width.partition("/")
    patch = int(patch or 16)
    keywords = {
        "image_size": 224,
        "num_register_tokens": options.registers,
        "has_mask_token": True,
        # The value does not change the time. From 1e-5 all class tokens start alike, and KoLeo would compare rounding.
        "layer_scale_init_value": 1.0,
        "drop_path_rate": options.drop_path,
        "drop_path_schedule": "constant",
        # dinov2 cuts images from the batch above 0.1 and multiplies by zero up to there.
        "drop_path_mode": "batch_subset" if options.drop_path > 0.1 else "sample",
    }
    if own := re.fullmatch(r"(\d+)x(\d+)", size):
        width, depth = map(int, own.groups())
        config = ViTWithRegistersConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=max(width // 64, 1),
            patch_size=patch,
            **keywords,
        )
    else:
        config = ViTWithRegistersConfig.from_preset(options.width, **keywords)
    if config.hidden_act != "gelu":
        raise SystemExit(f"the programs share an MLP with GELU only, {options.width} has {config.hidden_act}")
    return config


def local_size(config: ViTWithRegistersConfig) -> int:
    """98 pixels at patch 14, 96 at 16: what DINOv2 uses, or what is nearest."""
    return round(97 / config.patch_size) * config.patch_size


def make_batch(options: argparse.Namespace, config: ViTWithRegistersConfig) -> dict:
    """Views of noise and masks of DINOv2, in the form that every program's loader makes."""
    settings, local = MaskSettings(), local_size(config)
    grid, num_views = config.grid_shape, 2 * options.batch
    num_patches = math.prod(grid)
    generator = torch.Generator().manual_seed(0)
    masks = draw_masks(options.batch, num_views=2, grid=grid, settings=settings, generator=generator).flatten(0, 1)
    num_masked = int(num_views * settings.share)
    bounds = torch.linspace(*settings.ratio, num_masked + 1)[1:]
    batch = {
        "global_views": torch.randn(2, options.batch, 3, config.image_size, config.image_size, generator=generator),
        "masks": masks,  # [2 B, P]
        "masked_patches": masks.flatten().nonzero().squeeze(1),
        "patch_weights": (1 / masks.sum(dim=1).clamp(min=1)).repeat_interleave(masks.sum(dim=1)),
        # dinov2 pads the masked patches to the most there could have been.
        "most_masked": sum(int(num_patches * bound) for bound in bounds.tolist()),
    }
    if options.local_crops:
        shape = (options.local_crops, options.batch, 3, local, local)
        batch["local_views"] = torch.randn(shape, generator=generator)
    return {name: value.to(options.device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def make_programs(options: argparse.Namespace, config: ViTWithRegistersConfig) -> dict:
    """Programs by name, all with the weights of the first; the one that the ratios refer to comes first."""
    by_default = "cuda" in options.device  # what is_packed=None means
    ours = Ours(options, config, is_packed=by_default)
    programs = {ours.name: ours}
    other = Ours(options, config, is_packed=not by_default)
    for name, kind in ((other.name, None), ("dinov2", Dinov2), ("lightly", Lightly)):
        if kind is Lightly and options.centering == "sinkhorn":
            print("lightly is left out: it has no Sinkhorn-Knopp")
            continue
        try:
            programs[name] = other if kind is None else kind(options, config)
        except ImportError as error:
            print(f"{name} is left out ({error}): {HOW_TO_GET[name]}")
    backbone, head = (ours.objective.student[name].state_dict() for name in ("backbone", "class_head"))
    for program in programs.values():
        program.load(backbone, head)
        program.to(options.device)
        program.optimizer = program.make_optimizer()
        if options.compile:
            program.compile_layers()
    return programs


class Program(nn.Module, abc.ABC):
    """A student with its teacher, its losses and its optimiser."""

    extra_parameters, reason = 0, ""
    optimizer: torch.optim.Optimizer

    @abc.abstractmethod
    def backbone(self) -> nn.Module:
        """The student's."""

    @abc.abstractmethod
    def load(self, backbone: dict[str, Tensor], head: dict[str, Tensor]) -> None:
        """Take over our weights, for student and teacher."""

    @abc.abstractmethod
    def make_optimizer(self) -> torch.optim.Optimizer:
        """As the program makes it."""

    @abc.abstractmethod
    def compile_layers(self) -> None:
        """Those of student and teacher."""

    @abc.abstractmethod
    def count_masked(self, batch: dict) -> int:
        """Patches that the program takes for masked."""

    @abc.abstractmethod
    def losses(self, batch: dict) -> dict[str, Tensor]:
        """Terms `dino`, `ibot`, `koleo`, and their weighted sum `total`."""

    @abc.abstractmethod
    def update(self) -> None:
        """All that follows the backward pass."""

    def bytes_held(self) -> int:
        """Of parameters, buffers and the state of the optimiser."""
        tensors = [*self.parameters(), *self.buffers()]
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor) and value.is_cuda]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Ours(Program):
    def __init__(self, options: argparse.Namespace, config: ViTWithRegistersConfig, *, is_packed: bool):
        super().__init__()
        self.name = f"ours, {'packed' if is_packed else 'batched'}"
        self.objective = DINOv2(
            ViTWithRegistersModel(config),
            settings=DINOv2Settings(
                num_prototypes=options.prototypes,
                centering=options.centering,
                momentum=(MOMENTUM, 1.0),
                koleo_weight=KOLEO_WEIGHT,
                is_packed=is_packed,
            ),
            crops=CropSettings(num_local=options.local_crops, local_size=local_size(config)),
            masks=MaskSettings(),
            num_steps=1000,
        )

    def backbone(self) -> nn.Module:
        return self.objective.student["backbone"]

    def load(self, backbone: dict[str, Tensor], head: dict[str, Tensor]) -> None:
        for network in (self.objective.student, self.objective.teacher):
            network["backbone"].load_state_dict(backbone)
            network["class_head"].load_state_dict(head)

    def make_optimizer(self) -> torch.optim.Optimizer:
        backbone, *heads = self.objective.trained.values()
        groups = parameter_groups(backbone, heads, layer_decay=LAYER_DECAY, patch_multiplier=PATCH_MULTIPLIER)
        return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)

    def compile_layers(self) -> None:
        self.objective.compile_layers()

    def count_masked(self, batch: dict) -> int:
        return len(batch["masked_patches"])

    def losses(self, batch: dict) -> dict[str, Tensor]:
        return self.objective(batch, step=0)

    def update(self) -> None:
        set_rates(self.optimizer, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        for part in self.objective.trained.values():
            nn.utils.clip_grad_norm_(part.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.after_step(step=0)


# facebookresearch/dinov2 ---------------------------------------------------------------------------------------------


class Dinov2(Program):
    def __init__(self, options: argparse.Namespace, config: ViTWithRegistersConfig):
        super().__init__()
        if options.dinov2 is None:
            raise ImportError("no --dinov2")
        os.environ["XFORMERS_DISABLED"] = "1"
        put_first(options.dinov2)
        from dinov2.layers import DINOHead, MemEffAttention
        from dinov2.layers import NestedTensorBlock as Block
        from dinov2.loss import DINOLoss, KoLeoLoss, ibot_patch_loss, iBOTPatchLoss
        from dinov2.models.vision_transformer import DinoVisionTransformer
        from dinov2.utils.param_groups import fuse_params_groups, get_params_groups_with_decay

        # Its loss asks for a sum over processes even where there is one only.
        ibot_patch_loss.dist = types.SimpleNamespace(is_initialized=lambda: False, all_reduce=lambda tensor: None)
        self.centering, self.num_locals = options.centering, options.local_crops
        self.groups_of, self.fuse = get_params_groups_with_decay, fuse_params_groups
        make_backbone = functools.partial(
            DinoVisionTransformer,
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_ratio=config.intermediate_size / config.hidden_size,
            init_values=config.layer_scale_init_value,
            block_fn=functools.partial(Block, attn_class=MemEffAttention),
            block_chunks=0,
            num_register_tokens=config.num_register_tokens,
            interpolate_antialias=config.interpolate_antialias,
            interpolate_offset=config.interpolate_offset,
        )
        make_head = functools.partial(DINOHead, in_dim=config.hidden_size, out_dim=options.prototypes)
        student = make_backbone(drop_path_rate=options.drop_path, drop_path_uniform=True)
        self.student = nn.ModuleDict({"backbone": student, "dino_head": make_head()})
        self.teacher = nn.ModuleDict({"backbone": make_backbone(), "dino_head": make_head()}).requires_grad_(False)
        self.dino_loss, self.ibot_loss, self.koleo_loss = (
            DINOLoss(options.prototypes),
            iBOTPatchLoss(options.prototypes),
            KoLeoLoss(),
        )

    def train(self, mode: bool = True):
        super().train(mode)
        self.teacher.eval()
        return self

    def backbone(self) -> nn.Module:
        return self.student["backbone"]

    def load(self, backbone: dict[str, Tensor], head: dict[str, Tensor]) -> None:
        weights = translate(backbone)
        weights["register_tokens"] = weights["register_tokens"].unsqueeze(0)  # [R, D] -> [1, R, D]
        weights["mask_token"] = weights["mask_token"].squeeze(0)  # [1, 1, D] -> [1, D]
        for network in (self.student, self.teacher):
            network["backbone"].load_state_dict(weights)
            network["dino_head"].load_state_dict(translate(head))

    def make_optimizer(self) -> torch.optim.Optimizer:
        groups = []
        for part in self.student.values():
            named = self.groups_of(part, lr_decay_rate=LAYER_DECAY, patch_embed_lr_mult=PATCH_MULTIPLIER)
            groups += [group | {"foreach": True} for group in self.fuse(named)]
        return torch.optim.AdamW(groups, betas=(0.9, 0.999))

    def compile_layers(self) -> None:
        for network in (self.student, self.teacher):
            for block in network["backbone"].blocks:
                block.compile()

    def count_masked(self, batch: dict) -> int:
        return len(batch["patch_weights"])

    def losses(self, batch: dict) -> dict[str, Tensor]:
        images, indices = batch["global_views"].flatten(0, 1), batch["masked_patches"]
        class_targets, patch_targets = self.targets(images, batch)
        global_tokens = self.student["backbone"](images, masks=batch["masks"], is_training=True)
        global_cls = global_tokens["x_norm_clstoken"]
        inputs = [global_cls, self.pad(global_tokens["x_norm_patchtokens"], batch)]
        if self.num_locals:
            local_images = batch["local_views"].flatten(0, 1)
            inputs.insert(0, self.student["backbone"](local_images, is_training=True)["x_norm_clstoken"])
        logits = self.student["dino_head"](torch.cat(inputs)).split([len(part) for part in inputs])
        *local_logits, global_logits, patch_logits = logits

        num_pairs = 2 + 2 * self.num_locals
        dino = self.dino_loss([global_logits], [class_targets.flatten(0, 1)]) * 2 / num_pairs
        if self.num_locals:
            dino = dino + self.dino_loss(local_logits[0].chunk(self.num_locals), class_targets) / num_pairs
        ibot = self.ibot_loss.forward_masked(
            patch_logits[: len(indices)],
            patch_targets,
            student_masks_flat=batch["masks"],
            n_masked_patches=len(indices),
            masks_weight=batch["patch_weights"],
        )
        koleo = sum(self.koleo_loss(view) for view in global_cls.chunk(2))
        return {"dino": dino, "ibot": ibot, "koleo": koleo, "total": dino + ibot + KOLEO_WEIGHT * koleo}

    @torch.no_grad()
    def targets(self, images: Tensor, batch: dict) -> tuple[Tensor, Tensor]:
        """Targets of the views, exchanged, (2, B, K), and of the masked patches (M, K)."""
        tokens, num_masked = self.teacher["backbone"](images, is_training=True), len(batch["masked_patches"])
        first, second = tokens["x_norm_clstoken"].chunk(2)
        inputs = torch.cat([second, first, self.pad(tokens["x_norm_patchtokens"], batch)])
        logits = self.teacher["dino_head"](inputs)
        class_logits, patch_logits = logits[: len(images)], logits[len(images) : len(images) + num_masked]
        if self.centering == "sinkhorn":
            count = torch.full((1,), num_masked, device=images.device)
            class_targets = self.dino_loss.sinkhorn_knopp_teacher(class_logits, teacher_temp=TEACHER_TEMPERATURE)
            patch_targets = self.ibot_loss.sinkhorn_knopp_teacher(
                patch_logits, teacher_temp=TEACHER_TEMPERATURE, n_masked_patches_tensor=count
            )
        else:
            class_targets = self.dino_loss.softmax_center_teacher(class_logits, teacher_temp=TEACHER_TEMPERATURE)
            self.dino_loss.update_center(class_logits)
            patch_logits = patch_logits.unsqueeze(0)
            patch_targets = self.ibot_loss.softmax_center_teacher(patch_logits, teacher_temp=TEACHER_TEMPERATURE)
            patch_targets = patch_targets.squeeze(0)
            self.ibot_loss.update_center(patch_logits)
        return class_targets.unflatten(0, (2, -1)), patch_targets

    def pad(self, patches: Tensor, batch: dict) -> Tensor:
        """The masked patches, filled up with zeros to the most there could be."""
        indices = batch["masked_patches"]
        padded = patches.new_zeros(batch["most_masked"], patches.shape[-1])
        padded[: len(indices)].copy_(patches.flatten(0, 1).index_select(0, indices))
        return padded

    def update(self) -> None:
        for group in self.optimizer.param_groups:
            group["weight_decay"] = WEIGHT_DECAY * group["wd_multiplier"]
            group["lr"] = LEARNING_RATE * group["lr_multiplier"]
        for part in self.student.values():
            nn.utils.clip_grad_norm_(part.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            own = list(self.teacher.parameters())
            torch._foreach_mul_(own, MOMENTUM)
            torch._foreach_add_(own, list(self.student.parameters()), alpha=1 - MOMENTUM)


# lightly -------------------------------------------------------------------------------------------------------------


class Lightly(Program):
    def __init__(self, options: argparse.Namespace, config: ViTWithRegistersConfig):
        super().__init__()
        if options.lightly:
            put_first(options.lightly)
        from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
        from lightly.models.modules import DINOv2ProjectionHead, MaskedVisionTransformerTIMM
        from lightly.models.utils import update_drop_path_rate, update_momentum
        from lightly.utils.optim import update_param_groups
        from timm.models.vision_transformer import VisionTransformer

        self.update_momentum, self.update_param_groups = update_momentum, update_param_groups
        self.num_views, self.num_prefix = 2 + options.local_crops, config.num_prefix_tokens
        self.num_registers = config.num_register_tokens
        self.extra_parameters = self.num_registers * config.hidden_size
        self.reason = "timm gives registers positions of their own"
        vit = VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_ratio=config.intermediate_size / config.hidden_size,
            init_values=config.layer_scale_init_value,
            reg_tokens=config.num_register_tokens,
            pos_embed="learn",
            dynamic_img_size=True,
            num_classes=0,
        )
        self.teacher_backbone = MaskedVisionTransformerTIMM(vit=vit, antialias=True, pos_embed_initialization="skip")
        self.student_backbone = copy.deepcopy(self.teacher_backbone)
        update_drop_path_rate(self.student_backbone.vit, drop_path_rate=options.drop_path, mode="uniform")
        make_head = functools.partial(DINOv2ProjectionHead, input_dim=config.hidden_size)
        self.teacher_head, self.student_head = (make_head(output_dim=options.prototypes) for _ in range(2))
        self.teacher_backbone.requires_grad_(False)
        self.teacher_head.requires_grad_(False)
        self.dino_loss, self.ibot_loss, self.koleo_loss = (
            DINOLoss(output_dim=options.prototypes),
            IBOTPatchLoss(output_dim=options.prototypes),
            KoLeoLoss(),
        )

    def train(self, mode: bool = True):
        super().train(mode)
        self.teacher_backbone.eval()
        self.teacher_head.eval()
        return self

    def backbone(self) -> nn.Module:
        return self.student_backbone

    def load(self, backbone: dict[str, Tensor], head: dict[str, Tensor]) -> None:
        weights = {f"vit.{name}": weight for name, weight in translate(backbone).items()}
        weights["mask_token"] = weights.pop("vit.mask_token")
        weights["vit.reg_token"] = weights.pop("vit.register_tokens").unsqueeze(0)  # [R, D] -> [1, R, D]
        table = weights["vit.pos_embed"]
        none = table.new_zeros(1, self.num_registers, table.shape[-1])
        weights["vit.pos_embed"] = torch.cat([table[:, :1], none, table[:, 1:]], dim=1)
        head = {name.replace("mlp.", "layers."): weight for name, weight in translate(head).items()}
        for network in (self.student_backbone, self.teacher_backbone):
            network.load_state_dict(weights)
        for network in (self.student_head, self.teacher_head):
            network.load_state_dict(head)

    def make_optimizer(self) -> torch.optim.Optimizer:
        depth, groups = len(self.student_backbone.vit.blocks), []
        for name, parameter in self.named_parameters():
            if "student" not in name:
                continue
            block = re.search(r"blocks\.(\d+)\.", name)
            layer = int(block.group(1)) + 1 if block else depth + 1
            if any(word in name for word in ("pos_embed", "mask_token", "cls_token", "reg_token", "patch_embed")):
                layer = 0
            rate = LEARNING_RATE * LAYER_DECAY ** (depth + 1 - layer)
            decay = 0.0 if name.endswith(".bias") or ".norm" in name or "gamma" in name else WEIGHT_DECAY
            rate *= PATCH_MULTIPLIER if "patch_embed" in name else 1
            groups.append({"name": name, "params": [parameter], "lr": rate, "weight_decay": decay})
        return torch.optim.AdamW(groups, lr=LEARNING_RATE)

    def compile_layers(self) -> None:
        for network in (self.student_backbone, self.teacher_backbone):
            for block in network.vit.blocks:
                block.compile()

    def sequence_mask(self, batch: dict) -> Tensor:
        """Masks of all tokens (2 B, N)."""
        return nn.functional.pad(batch["masks"], (self.num_prefix, 0))

    def count_masked(self, batch: dict) -> int:
        return int(self.sequence_mask(batch).sum())

    def losses(self, batch: dict) -> dict[str, Tensor]:
        images, mask = batch["global_views"].flatten(0, 1), self.sequence_mask(batch)
        with torch.no_grad():
            tokens = self.teacher_backbone.encode(images)
            class_targets, patch_targets = self.teacher_head(tokens[:, 0]), self.teacher_head(tokens[mask])
        tokens = self.student_backbone.encode(images, mask=mask)
        global_cls = tokens[:, 0]
        class_logits, patch_logits = self.student_head(global_cls), self.student_head(tokens[mask])
        if "local_views" in batch:
            local_cls = self.student_backbone.encode(batch["local_views"].flatten(0, 1), mask=None)[:, 0]
            class_logits = torch.cat([class_logits, self.student_head(local_cls)])
        dino = self.dino_loss(
            teacher_out=class_targets.chunk(2),
            student_out=class_logits.chunk(self.num_views),
            teacher_temp=TEACHER_TEMPERATURE,
        )
        side = math.isqrt(batch["masks"].shape[1])
        ibot = self.ibot_loss(
            teacher_out=patch_targets,
            student_out=patch_logits,
            mask=batch["masks"].unflatten(1, (side, side)),
            teacher_temp=TEACHER_TEMPERATURE,
        )
        koleo = sum(self.koleo_loss(view) for view in global_cls.chunk(2))
        return {"dino": dino, "ibot": ibot, "koleo": koleo, "total": dino + ibot + KOLEO_WEIGHT * koleo}

    def update(self) -> None:
        groups = self.optimizer.param_groups
        nn.utils.clip_grad_norm_([parameter for group in groups for parameter in group["params"]], CLIP)
        decays = [{"name": group["name"], "weight_decay": WEIGHT_DECAY} for group in groups if group["weight_decay"]]
        self.update_param_groups(self.optimizer, updates=decays)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.update_momentum(self.student_backbone, self.teacher_backbone, m=MOMENTUM)
        self.update_momentum(self.student_head, self.teacher_head, m=MOMENTUM)


def translate(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names as those that dinov2 and timm share."""
    rules = (
        ("embeddings.patch_embeddings.", "patch_embed.proj."),
        ("embeddings.position_embeddings.weight", "pos_embed"),
        ("embeddings.register_tokens.weight", "register_tokens"),
        ("embeddings.", ""),
        ("layers.", "blocks."),
        (".attention.", ".attn."),
        (".layer_scale1.weight", ".ls1.gamma"),
        (".layer_scale2.weight", ".ls2.gamma"),
        ("layernorm.", "norm."),
        ("last_layer.magnitude", "last_layer.weight_g"),
        ("last_layer.direction", "last_layer.weight_v"),
    )
    translated = {}
    for name, weight in weights.items():
        for ours, theirs in rules:
            name = name.replace(ours, theirs)
        translated[name] = weight
    return translated


def put_first(folder: pathlib.Path) -> None:
    if not folder.is_dir():
        raise SystemExit(f"there is no folder {folder}")
    sys.path.insert(0, str(folder.resolve()))


# Measuring -----------------------------------------------------------------------------------------------------------


def check_sameness(programs: dict, batch: dict, options: argparse.Namespace) -> None:
    """Show that the programs do the same job, or stop."""
    name_of_first = next(iter(programs))
    counts, masked, terms = {}, {}, {}
    for name, program in programs.items():
        counts[name] = sum(parameter.numel() for parameter in program.backbone().parameters())
        masked[name] = program.count_masked(batch)
        program.eval()  # no stochastic depth: then the losses have to agree
        with torch.no_grad(), autocast(options):
            losses = program.losses(batch)
        terms[name] = {term: losses[term].item() for term in ("dino", "ibot", "koleo", "total")}
        program.train()
    print(f"{'at the start':16} {'parameters':>11} {'masked':>7} {'dino':>8} {'ibot':>8} {'koleo':>8}")
    for name, program in programs.items():
        values = " ".join(f"{terms[name][term]:8.4f}" for term in ("dino", "ibot", "koleo"))
        extra = f"   {program.extra_parameters:+} parameters: {program.reason}" * bool(program.extra_parameters)
        print(f"{name:16} {counts[name]:11} {masked[name]:7} {values}{extra}")
    for name, program in programs.items():
        differences = [
            f"{term} {terms[name][term]:.4f} against {terms[name_of_first][term]:.4f}"
            for term in terms[name]
            if not math.isclose(
                terms[name][term], terms[name_of_first][term], rel_tol=tolerance_of(term, options), abs_tol=1e-3
            )
        ]
        if counts[name] - program.extra_parameters != counts[name_of_first]:
            differences.append(f"{counts[name]} parameters against {counts[name_of_first]}")
        if masked[name] != masked[name_of_first]:
            differences.append(f"{masked[name]} masked patches against {masked[name_of_first]}")
        if differences:
            raise SystemExit(f"not the same job, {name} and {name_of_first}: {'; '.join(differences)}")
    entropy = math.log(options.prototypes)
    print(
        f"the same job; near ln K = {entropy:.2f} for dino, and {MaskSettings().share:.0%} of it, the share of masked "
        f"views, for ibot\n"
    )


def tolerance_of(term: str, options: argparse.Namespace) -> float:
    """Relative; wide for KoLeo in bfloat16, in which the peers round the distances of near neighbours and ours not."""
    if options.precision == "no":
        return 1e-3
    return 0.2 if term in ("koleo", "total") else 0.02


def measure(programs: dict, batch: dict, options: argparse.Namespace) -> dict:
    """Seconds of each step, and on a GPU the peak of memory that a program alone would need."""
    is_cuda = "cuda" in options.device
    results = {name: {"seconds": [], "bytes": 0} for name in programs}
    for round_number in range(options.warm_up + options.repeats):
        for name, program in programs.items():
            if is_cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            with autocast(options):
                total = program.losses(batch)["total"]
            total.backward()
            program.update()
            del total
            if is_cuda:
                torch.cuda.synchronize()
            if round_number >= options.warm_up:
                results[name]["seconds"].append(time.perf_counter() - start)
                if is_cuda:
                    # All programs are on the device at once: count what the step adds to what this one holds.
                    peak = torch.cuda.max_memory_allocated() - before + program.bytes_held()
                    results[name]["bytes"] = max(results[name]["bytes"], peak)
    return results


def report(programs: dict, results: dict, options: argparse.Namespace) -> None:
    ours = results[next(iter(programs))]["seconds"]
    memory = f"{'peak, MiB':>10}" * ("cuda" in options.device)
    print(f"{'program':16} {'ms':>9} {'quartiles':>19} {'images/s':>9} {'ratio':>6} {'quartiles':>13} {memory}")
    for name in programs:
        seconds = results[name]["seconds"]
        low, middle, high = quartiles(seconds)
        ratios = quartiles([theirs / mine for theirs, mine in zip(seconds, ours)])
        memory = f"{results[name]['bytes'] / 2**20:10.0f}" * ("cuda" in options.device)
        spread = f"{1000 * low:.1f} - {1000 * high:.1f}"
        print(
            f"{name:16} {1000 * middle:9.1f} {spread:>19} {options.batch / middle:9.2f} {ratios[1]:6.2f} "
            f"{f'{ratios[0]:.2f} - {ratios[2]:.2f}':>13} {memory}"
        )


def quartiles(values: list) -> list:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


def autocast(options: argparse.Namespace):
    if options.precision == "no":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(options.device).type, dtype=torch.bfloat16)


def device_name(options: argparse.Namespace) -> str:
    if "cuda" in options.device:
        return torch.cuda.get_device_name(options.device)
    return f"{options.device}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
