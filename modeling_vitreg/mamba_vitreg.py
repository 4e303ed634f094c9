"""Mamba-R: a bidirectional selective state space model of images with registers (Wang et al. 2024, arXiv 2405.14858).

Registers are spread evenly along the scan, and their outputs are the representation of the image; there is no class
token and no attention. Between layers the tokens have the order of the family, registers then patches: only the mixer
of a layer brings them into the order of the scan and back, so whatever reads tokens need not know of it.

Letters for shapes: B images, N tokens, P patches, R registers, D width, E inner width, S states of a channel, K steps
of a chunk.

This file travels next to the weights, with the files of the Vision Transformer, and runs without the package.
"""

import functools
import importlib
import importlib.util
import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_vitreg import OtherBackboneConfig, is_positive
from .modeling_vitreg import (
    ViTWithRegistersDropPath,
    ViTWithRegistersEmbeddings,
    ViTWithRegistersForImageClassification,
    ViTWithRegistersModel,
    ViTWithRegistersPreTrainedModel,
    ViTWithRegistersRegisterTokens,
    ViTWithRegistersTokens,
    set_initial,
)
from .positions_vitreg import is_traced


# Table 1 of the paper. `register_reduction` is the factor by which the neck narrows each register.
MAMBAR_SIZES = {
    "tiny": {"hidden_size": 192, "register_reduction": 1},
    "small": {"hidden_size": 384, "register_reduction": 2},
    "base": {"hidden_size": 768, "register_reduction": 4},
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 48,
        "num_register_tokens": 16,
        "register_reduction": 8,
    },
}
# What every model of this kind has of the fields of a Vision Transformer.
_FIXED = {
    "num_attention_heads": 1,
    "norm_type": "rmsnorm",
    "has_cls_token": False,
    "pooling": "mean",
    "interpolate_antialias": False,
}
_STEP_RANGE, _STEP_FLOOR = (1e-3, 1e-1), 1e-4  # of the initial step sizes


class MambaRConfig(OtherBackboneConfig):
    """Architecture of Mamba-R. The defaults are those of Mamba-R-B/16.

    Args:
        hidden_size: width D of the tokens.
        num_hidden_layers: depth.
        num_register_tokens: registers R, spread evenly; 0 for none, and then the patches are averaged.
        register_reduction: factor by which the neck narrows the registers before they are concatenated; 1 for no neck.
        state_size: states S of a channel.
        conv_kernel: steps that the causal convolution sees.
        expand: inner width E in units of D.
        time_step_rank: rank of the step sizes; default D / 16, rounded up.
        layer_norm_eps: of all norms.
        image_size, patch_size, num_channels, hidden_dropout_prob, drop_path_rate, drop_path_schedule, drop_path_mode,
            has_zero_init_classifier, initializer_range: as in `ViTWithRegistersConfig`.

    Raises:
        ValueError: a value outside its range, or a field of the Vision Transformer that this model lacks.

    Example:
        >>> from modeling_vitreg import MambaRConfig
        >>> MambaRConfig.from_preset("small").pooled_size
        2304
    """

    model_type = "vitreg_mamba"
    _title = "Mamba-R"
    _presets = MAMBAR_SIZES

    def __init__(
        self,
        hidden_size=768,
        num_hidden_layers=24,
        num_register_tokens=12,
        register_reduction=4,
        state_size=16,
        conv_kernel=4,
        expand=2,
        time_step_rank=None,
        layer_norm_eps=1e-5,
        image_size=224,
        patch_size=16,
        num_channels=3,
        hidden_dropout_prob=0.0,
        drop_path_rate=0.0,
        drop_path_schedule="linear",
        drop_path_mode="sample",
        has_zero_init_classifier=False,
        initializer_range=0.02,
        **kwargs,
    ):
        self._check_names(kwargs)
        self.register_reduction, self.time_step_rank = register_reduction, time_step_rank
        self.state_size, self.conv_kernel, self.expand = state_size, conv_kernel, expand
        super().__init__(
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_register_tokens=num_register_tokens,
            layer_norm_eps=layer_norm_eps,
            image_size=image_size,
            patch_size=patch_size,
            num_channels=num_channels,
            hidden_dropout_prob=hidden_dropout_prob,
            drop_path_rate=drop_path_rate,
            drop_path_schedule=drop_path_schedule,
            drop_path_mode=drop_path_mode,
            has_zero_init_classifier=has_zero_init_classifier,
            initializer_range=initializer_range,
            **_FIXED,
            **kwargs,
        )
        if self.time_step_rank is None:
            self.time_step_rank = math.ceil(hidden_size / 16)
        for name in ("register_reduction", "state_size", "conv_kernel", "expand", "time_step_rank"):
            self._require(
                is_positive(getattr(self, name)), f"{name} is a positive integer, got {getattr(self, name)!r}"
            )
        fits = hidden_size % register_reduction == 0
        self._require(fits, f"register_reduction divides hidden_size ({hidden_size}), got {register_reduction}")

    @property
    def inner_size(self) -> int:
        """Inner width E of a mixer."""
        return self.expand * self.hidden_size

    @property
    def has_neck(self) -> bool:
        """Whether registers are narrowed and normed before the classifier."""
        return self.register_reduction > 1 and self.num_register_tokens > 0

    @property
    def pooled_size(self) -> int:
        """Width of `pooler_output`: all registers, or the mean of the patches."""
        if not self.num_register_tokens:
            return self.hidden_size
        return self.num_register_tokens * (self.hidden_size // self.register_reduction)


# ------------------------------------------------------------------------------------------------------------------
# The scan
# ------------------------------------------------------------------------------------------------------------------

_CHUNK = 8  # steps between two states that are kept; a chunk of an image stays in the cache of a processor


def selective_scan(inputs: Tensor, steps: Tensor, decay: Tensor, write: Tensor, read: Tensor) -> Tensor:
    """Linear recurrence whose coefficients depend on the input (Gu and Dao 2023), with states in float32 or float64.

    for each image, channel e and token t:
        h[t] = exp(steps[t, e] decay[e]) * h[t - 1] + steps[t, e] inputs[t, e] write[t]    (S numbers, h[-1] = 0)
        y[t, e] = h[t] . read[t]

    The backward pass computes the states again from one kept in every chunk. Memory is linear in N, and S times
    smaller than that of all states divided by the length of a chunk.

    Args:
        inputs, steps: (B, N, E).
        decay: (E, S), negative.
        write, read: (B, N, S).

    Returns:
        (B, N, E), in the precision of the states.
    """
    kernel = _kernel(inputs.device.type, widen(inputs).dtype)
    with torch.autocast(inputs.device.type, enabled=False):
        inputs, steps, decay, write, read = map(widen, (inputs, steps, decay, write, read))
        # The kernel wants time last. Here it is in front, and channels last: what a step reads is contiguous.
        axes = (1, 2) if kernel else (0, 1)
        inputs, steps, write, read = (part.transpose(*axes).contiguous() for part in (inputs, steps, write, read))
        if kernel is not None:
            return kernel(inputs, steps, decay, write, read).transpose(1, 2)
        arguments = (inputs, steps, decay.t().contiguous(), write, read)
        scan = _scan_plainly if is_traced() else SelectiveScan.apply
        return scan(*arguments).transpose(0, 1)


@functools.cache
def _kernel(device: str, dtype: torch.dtype):
    """The kernel of mamba-ssm, or None where it is not installed or knows neither the device nor the precision."""
    if device != "cuda" or dtype != torch.float32 or importlib.util.find_spec("mamba_ssm") is None:
        return None
    return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn


def _run_chunk(state: Tensor, inputs, steps, decay, write, decays: Tensor, states: Tensor) -> Tensor:
    """Write the decays and the states (K, B, S, E) of a chunk into two buffers; returns the last state."""
    torch.mul(steps[:, :, None], decay, out=decays).exp_()
    torch.mul((steps * inputs)[:, :, None], write[..., None], out=states)
    for step in range(len(states)):
        states[step].addcmul_(decays[step], state)
        state = states[step]
    return state


def _scan_plainly(inputs, steps, decay, write, read) -> Tensor:
    """(N, B, E), one step after the other, as compilers and exporters can follow."""
    state, outputs = inputs.new_zeros(inputs.shape[1], *decay.shape), []
    for number in range(inputs.shape[0]):
        moved = (steps[number] * inputs[number])[:, None] * write[number][..., None]
        state = torch.exp(steps[number][:, None] * decay) * state + moved  # [B, S, E]
        outputs.append((read[number][:, None] @ state)[:, 0])  # [B, 1, S] x [B, S, E] -> [B, E]
    return torch.stack(outputs)


class SelectiveScan(torch.autograd.Function):
    """`selective_scan` for inputs with time in front: (N, B, E), decay (S, E), write and read (N, B, S)."""

    @staticmethod
    def forward(ctx, inputs, steps, decay, write, read):
        """(N, B, E)."""
        length = min(_CHUNK, len(inputs))
        starts = inputs.new_zeros(-(-len(inputs) // length), inputs.shape[1], *decay.shape)
        buffers, outputs = inputs.new_empty(2, length, *starts.shape[1:]), torch.empty_like(inputs)
        for number, start in enumerate(starts):
            now = slice(number * length, (number + 1) * length)
            decays, states = buffers[:, : len(inputs[now])]
            last = _run_chunk(start, inputs[now], steps[now], decay, write[now], decays, states)
            if number + 1 < len(starts):
                starts[number + 1] = last
            torch.matmul(read[now][:, :, None], states, out=outputs[now][:, :, None])
        ctx.save_for_backward(inputs, steps, decay, write, read, starts)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        """Gradients of all inputs, from the last chunk to the first; g is the gradient of the states."""
        inputs, steps, decay, write, read, starts = ctx.saved_tensors
        length = min(_CHUNK, len(inputs))
        to_inputs, to_steps, to_write, to_read = (torch.empty_like(part) for part in (inputs, steps, write, read))
        to_decay, carried = torch.zeros_like(starts[0]), torch.zeros_like(starts[0])
        buffers = inputs.new_empty(4, length, *starts.shape[1:])
        for number in reversed(range(len(starts))):
            now = slice(number * length, (number + 1) * length)
            decays, states, g, spare = buffers[:, : len(inputs[now])]
            _run_chunk(starts[number], inputs[now], steps[now], decay, write[now], decays, states)
            torch.mul(read[now][..., None], gradient[now][:, :, None], out=g)
            g[-1] += carried
            for step in range(len(g) - 2, -1, -1):
                g[step].addcmul_(g[step + 1], decays[step + 1])
            # A product and a sum: matrix-vector products of this shape are eight times slower on a CPU.
            torch.sum(torch.mul(states, gradient[now][:, :, None], out=spare), -1, out=to_read[now])
            torch.sum(torch.mul(g, (steps[now] * inputs[now])[:, :, None], out=spare), -1, out=to_write[now])
            written = (write[now][:, :, None] @ g)[:, :, 0]  # [K, B, 1, S] x [K, B, S, E] -> [K, B, E]
            g *= decays
            carried.copy_(g[0])
            g[1:] *= states[:-1]
            g[0] *= starts[number]
            for step in range(len(g)):
                to_decay.addcmul_(g[step], steps[now][step][:, None])
            torch.mul(written, steps[now], out=to_inputs[now])
            torch.sum(g.mul_(decay), 2, out=to_steps[now]).addcmul_(written, inputs[now])
        return to_inputs, to_steps, to_decay.sum(dim=0), to_write, to_read


# ------------------------------------------------------------------------------------------------------------------
# Layers
# ------------------------------------------------------------------------------------------------------------------


def scan_places(num_patches: int, num_registers: int, device=None) -> Tensor:
    """Place in the scan of each token (R + P,): registers, then patches.

    s = P // (R + 1) patches, register 0, s patches, register 1, ..., register R - 1, and the other patches: register i
    has place (i + 1) s + i.

    Raises:
        ValueError: fewer patches than R + 1, so that registers would lie side by side.
    """
    share = num_patches // (num_registers + 1)
    if not share:
        raise ValueError(
            f"expected at least {num_registers + 1} patches to lie around {num_registers} registers, got "
            f"{num_patches}: use larger images or fewer registers"
        )
    registers, patches = torch.arange(num_registers, device=device), torch.arange(num_patches, device=device)
    places = patches + (patches // share).clamp(max=num_registers)
    return torch.cat([(registers + 1) * share + registers, places])


class MambaRNorm(nn.RMSNorm):
    """RMSNorm of tokens in float32; the result has the precision of the weights."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = F.rms_norm(widen(hidden_states), self.normalized_shape, widen(self.weight), self.eps)
        return normed.to(self.weight.dtype)


class MambaRRegisterTokens(ViTWithRegistersRegisterTokens):
    """Registers and their positions, which are learned apart, as in the official checkpoints."""

    def __init__(self, num_tokens: int, width: int):
        super().__init__(num_tokens, width)
        self.positions = nn.Parameter(torch.empty(num_tokens, width))

    def forward(self, batch_size: int) -> Tensor:
        """Registers of each image, (B, R, D)."""
        return (self.weight + self.positions).expand(batch_size, -1, -1)


class MambaREmbeddings(ViTWithRegistersEmbeddings):
    """Images to registers and patches."""

    def __init__(self, config: MambaRConfig):
        super().__init__(config, use_mask_token=False)
        # CODEPATH: Mamba-R; else models without registers.
        if config.num_register_tokens:
            self.register_tokens = MambaRRegisterTokens(config.num_register_tokens, config.hidden_size)


class MambaRDirection(nn.Module):
    """One direction of a mixer: a causal convolution and a selective scan, with parameters of its own."""

    def __init__(self, config: MambaRConfig):
        super().__init__()
        width, self.num_states, self.rank = config.inner_size, config.state_size, config.time_step_rank
        self.kernel_size = config.conv_kernel
        self.conv = nn.Conv1d(width, width, config.conv_kernel, groups=width, padding=config.conv_kernel - 1)
        self.x_proj = nn.Linear(width, self.rank + 2 * self.num_states, bias=False)
        self.x_proj.initial_scale = 1.0
        self.dt_proj = MambaRStepProjection(self.rank, width)
        self.A_log = nn.Parameter(torch.empty(width, self.num_states))
        self.D = nn.Parameter(torch.empty(width))

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, N, E) to (B, N, E), in the precision of the states; token t sees tokens up to t."""
        convolved = self.conv(inputs.transpose(1, 2))[..., : inputs.shape[1]]
        inputs = F.silu(convolved).transpose(1, 2)
        ranks, write, read = self.x_proj(inputs).split([self.rank, self.num_states, self.num_states], dim=-1)
        steps = F.softplus(widen(self.dt_proj(ranks)))
        outputs = selective_scan(inputs, steps, -widen(self.A_log).exp(), write, read)
        return outputs + widen(self.D) * inputs


class MambaRStepProjection(nn.Linear):
    """The linear layer that makes step sizes; its bias starts at values that `_init_weights` draws."""


class MambaRMixer(nn.Module):
    """Both directions, gated, averaged and projected."""

    def __init__(self, config: MambaRConfig):
        super().__init__()
        self.in_proj = nn.Linear(config.hidden_size, 2 * config.inner_size, bias=False)
        self.in_proj.initial_scale = 1.0
        self.forward_direction = MambaRDirection(config)
        self.backward_direction = MambaRDirection(config)
        self.out_proj = nn.Linear(config.inner_size, config.hidden_size, bias=False)
        self.out_proj.initial_scale = config.num_hidden_layers**-0.5

    def forward(self, hidden_states: Tensor, places: Tensor) -> Tensor:
        """Tokens (B, N, D) to tokens.

        Args:
            hidden_states: registers, then patches.
            places: (N,), place of each token in the scan.
        """
        inputs, gates = self.in_proj(hidden_states[:, places.argsort()]).chunk(2, dim=-1)
        outputs = self.forward_direction(inputs) + self.backward_direction(inputs.flip(1)).flip(1)
        outputs = outputs * F.silu(widen(gates)) / 2
        return self.out_proj(outputs.to(gates.dtype))[:, places]


class MambaRLayer(GradientCheckpointingLayer):
    """A mixer after a norm, with stochastic depth. The sum over layers stays in float32."""

    def __init__(self, config: MambaRConfig, drop_path_rate: float):
        super().__init__()
        self.norm = MambaRNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = MambaRMixer(config)
        self.drop_path = ViTWithRegistersDropPath(config, drop_path_rate)

    def forward(self, hidden_states: Tensor, places: Tensor) -> Tensor:
        """Tokens (B, N, D) to tokens; `places` as in `MambaRMixer`."""
        return self.drop_path.add(hidden_states, self.branch, self.drop_path.choose(hidden_states), places)

    def branch(self, hidden_states: Tensor, places: Tensor) -> Tensor:
        """What the layer adds to the tokens."""
        return self.mixer(self.norm(hidden_states), places)

    def forward_with_attentions(self, *args):
        """Refuse, for a layer of this kind has no attention."""
        raise ValueError("Mamba-R has no attention: leave output_attentions out, or set it to False")


# ------------------------------------------------------------------------------------------------------------------
# Models
# ------------------------------------------------------------------------------------------------------------------


class MambaRMixin:
    """What differs from the Vision Transformer in models with and without a head."""

    config_class = MambaRConfig
    _no_split_modules = ["MambaREmbeddings", "MambaRLayer"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = False

    def _init_weights(self, module: nn.Module) -> None:
        if hasattr(module, "initial_scale"):  # linear layers of a mixer; the last is scaled by the depth
            bound = module.initial_scale * module.in_features**-0.5
            set_initial(module.weight, nn.init.uniform_, -bound, bound)
        elif isinstance(module, MambaRStepProjection):
            bound = module.in_features**-0.5
            set_initial(module.weight, nn.init.uniform_, -bound, bound)
            set_initial(module.bias, fill_step_bias)
        elif isinstance(module, nn.Conv1d):
            bound = module.kernel_size[0] ** -0.5
            for parameter in (module.weight, module.bias):
                set_initial(parameter, nn.init.uniform_, -bound, bound)
        elif isinstance(module, MambaRDirection):
            values = torch.arange(1, module.num_states + 1, dtype=torch.float32, device=module.A_log.device)
            set_initial(module.A_log, lambda weight: weight.copy_(values.log().expand_as(weight)))
            set_initial(module.D, nn.init.ones_)
        elif isinstance(module, nn.Conv2d):  # LeCun's law, cut at two deviations as in timm
            std = math.prod((module.in_channels, *module.kernel_size)) ** -0.5 / 0.87962566103423978
            set_initial(module.weight, nn.init.trunc_normal_, std=std, a=-2 * std, b=2 * std)
            set_initial(module.bias, nn.init.zeros_)
        else:
            super()._init_weights(module)
            if isinstance(module, MambaRRegisterTokens):
                set_initial(module.positions, nn.init.trunc_normal_, std=self.config.initializer_range)

    def no_weight_decay(self) -> set:
        """As in the Vision Transformer, and the logarithms of the decay and the direct connections of a mixer."""
        of_scan = {name for name, _ in self.named_parameters() if name.endswith((".A_log", ".D"))}
        return super().no_weight_decay() | of_scan

    def resize_register_tokens(self, num_register_tokens: int) -> None:
        """Refuse another number of registers.

        Raises:
            ValueError: the number differs; the classifier reads all registers, so none can be added or removed.
        """
        if num_register_tokens != self.config.num_register_tokens:
            raise ValueError(
                f"expected {self.config.num_register_tokens} registers, all of which the classifier reads, got "
                f"{num_register_tokens}: make a new model from a configuration with another number"
            )

    def _auto_map(self) -> dict:
        models = {model._auto_class: f"mamba_vitreg.{model.__name__}" for model in MAMBAR_AUTO_MODELS}
        return {"AutoConfig": "mamba_vitreg.MambaRConfig", **models}

    def _save_image_processor(self, folder: str | os.PathLike) -> None:
        # Up to 4.57 a loader of remote code copies only the files that this one names itself.
        from .image_processing_vitreg import PROCESSORS  # noqa: F401
        from .token_reduction_vitreg import make_tracker  # noqa: F401

        super()._save_image_processor(folder)


def widen(tensor: Tensor) -> Tensor:
    """In float32, or as it is in float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def fill_step_bias(bias: Tensor) -> None:
    """Write values whose softplus is log-uniform in 0.001 ... 0.1, the initial step sizes."""
    low, high = (math.log(value) for value in _STEP_RANGE)
    steps = torch.empty_like(bias).uniform_(low, high).exp_().clamp_(min=_STEP_FLOOR)
    bias.copy_(steps + torch.log(-torch.expm1(-steps)))


class MambaRModel(MambaRMixin, ViTWithRegistersModel):
    """Images to named tokens.

    Args:
        config: the architecture.
        use_mask_token, use_projection: for callers of `ViTWithRegistersModel`; there is neither.

    Example:
        >>> tokens = MambaRModel(MambaRConfig.from_preset("tiny"))(torch.rand(1, 3, 224, 224))
        >>> tokens.pooler_output.shape, tokens.register_tokens.shape, tokens.patch_grid.shape
        (torch.Size([1, 2304]), torch.Size([1, 12, 192]), torch.Size([1, 14, 14, 192]))
    """

    def __init__(self, config: MambaRConfig, use_mask_token: bool = False, use_projection: bool = False):
        ViTWithRegistersPreTrainedModel.__init__(self, config)
        self.embeddings = MambaREmbeddings(config)
        self.layers = nn.ModuleList(MambaRLayer(config, rate) for rate in config.drop_path_rates)
        self.layernorm = MambaRNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.neck = self.neck_norm = self.projection = self.attention_pooling = None
        # CODEPATH: Mamba-R; else models without a neck.
        if config.has_neck:
            self.neck = nn.Linear(config.hidden_size, config.hidden_size // config.register_reduction, bias=False)
            self.neck_norm = MambaRNorm(config.pooled_size, eps=config.layer_norm_eps)
        self.post_init()

    def embed(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> tuple:
        """The input of the first layer (B, N, D), at least float32; places of the tokens in the scan; the grid."""
        hidden_state = self.embeddings(pixel_values, bool_masked_pos)
        hidden_state = widen(hidden_state)
        grid = self.embeddings.grid_of(pixel_values)
        return hidden_state, scan_places(math.prod(grid), self.config.num_register_tokens, hidden_state.device), grid

    def pool(self, tokens: ViTWithRegistersTokens) -> Tensor:
        """(B, `config.pooled_size`): all registers, narrowed and normed where there is a neck, or the mean patch."""
        # CODEPATH: models without registers; else Mamba-R.
        if not self.config.num_register_tokens:
            return tokens.patch_tokens.mean(dim=1)
        registers = tokens.register_tokens
        if self.neck is None:
            return registers.flatten(1)
        return self.neck_norm(self.neck(registers).flatten(1))  # [B, R, D] -> [B, R D / reduction]

    def prefix_attention(self, pixel_values: Tensor, layers: list) -> tuple[dict, tuple]:
        """Refuse.

        Raises:
            ValueError: always; there is no attention.
        """
        raise ValueError("Mamba-R has no attention, so there are no attention maps: look at the norms of its tokens")


class MambaRForImageClassification(MambaRMixin, ViTWithRegistersForImageClassification):
    """One linear classifier on all registers."""

    def __init__(self, config: MambaRConfig):
        ViTWithRegistersPreTrainedModel.__init__(self, config)
        self.vitreg = MambaRModel(config)
        self.classifier = self._make_classifier(config.pooled_size)
        self.distillation_classifier = None
        self.post_init()


MAMBAR_AUTO_MODELS = (MambaRModel, MambaRForImageClassification)

__all__ = ["MambaRConfig", "MambaRForImageClassification", "MambaRModel"]
