"""Vision-language model: a Vision Transformer with registers in front of a decoder of transformers.

A text holds one placeholder for each visual token and each visual register: system, image, registers, text. Visual
registers are learned vectors of the decoder's width. They read the visual tokens in the first `drop_layer` layers of
the decoder; then the visual tokens are dropped from hidden states, positions, masks and cache, and registers and text
go on alone, at the positions that they had (Victor; Wen et al. 2024, arXiv 2410.14072). Or the registers of the tower
are the only visual tokens, which needs nothing of the decoder but `inputs_embeds`.

Letters for shapes: B images, each with its text, N tokens of a text, n visual tokens, M visual registers, K tokens
that are kept, T keys, D width of the decoder, V words.

This file travels next to the weights, with the files of the image tower, and runs without the package.
"""

import copy
import functools
import inspect
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .configuration_vitreg import TwoTowersConfig
from .modeling_vitreg import ViTWithRegistersMixin, ViTWithRegistersModel, set_initial, without_reentrance


VISUAL_TOKENS = ("patches", "registers", "learned", "pooled")
_REMEDY = "set drop_layer=None, or use a decoder such as Llama, Qwen2, Phi or GPT-NeoX"
_NOT_READ = ("cache_position",)  # but by caches of fixed size, which are refused


class ViTWithRegistersVisionLanguageConfig(TwoTowersConfig):
    """Architecture of a vision-language model.

    Args:
        vision_config: `ViTWithRegistersConfig`, or a dictionary of its fields.
        text_config: configuration of a decoder of transformers, or a dictionary of its fields and its `model_type`,
            by default that of Llama.
        visual_tokens: what the decoder gets of an image: "patches", the "registers" of the tower, the "learned" tokens
            of a tower with TokenLearner, or "pooled", means of patches.
        pooled_grid: (rows, columns) of the means; for "pooled" only.
        num_visual_registers: M, learned vectors behind the visual tokens; 0 for none.
        drop_layer: the last layer of the decoder that reads the visual tokens, 1 to L; None or L: none is dropped.
        image_token_id: number of the placeholder in `input_ids`. It may lie outside the vocabulary.

    Raises:
        ValueError: a value outside its range, or an image tower that lacks the tokens.

    Example:
        >>> from transformers import LlamaConfig
        >>> from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersVisionLanguageConfig
        >>> tower = ViTWithRegistersConfig.from_preset("small/16")
        >>> config = ViTWithRegistersVisionLanguageConfig(tower, LlamaConfig(), num_visual_registers=8, drop_layer=3)
        >>> config.num_image_tokens
        204
    """

    model_type = "vitreg_vision_language"
    _auto_class = "AutoConfig"

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        visual_tokens="patches",
        pooled_grid=None,
        num_visual_registers=0,
        drop_layer=None,
        image_token_id=0,
        **kwargs,
    ):
        self.make_towers(vision_config, text_config, default="llama")
        self.visual_tokens = visual_tokens
        self.pooled_grid = list(pooled_grid) if isinstance(pooled_grid, tuple) else pooled_grid
        self.num_visual_registers, self.drop_layer = num_visual_registers, drop_layer
        self.image_token_id = image_token_id
        self._check()
        super().__init__(**kwargs)

    @property
    def num_dropped_layers(self) -> int:
        """Layers of the decoder without visual tokens."""
        depth = self.text_config.num_hidden_layers
        return depth - (depth if self.drop_layer is None else self.drop_layer)

    @property
    def num_image_tokens(self) -> int:
        """Placeholders that an image of `vision_config.image_size` has in a text: n + M."""
        rows, columns = self.pooled_grid or self.vision_config.grid_shape
        reduction = self.vision_config.reduction or {}
        counts = {"registers": self.vision_config.num_register_tokens, "learned": reduction.get("num_tokens")}
        return counts.get(self.visual_tokens, rows * columns) + self.num_visual_registers

    def _check(self):
        def expect(name, is_valid, wanted):
            if not is_valid:
                found = getattr(self, name)
                raise ValueError(f"ViTWithRegistersVisionLanguageConfig: expected {name} {wanted}, got {found!r}.")

        def is_count(value, low=0):
            return isinstance(value, int) and not isinstance(value, bool) and value >= low

        tokens, grid, depth = self.visual_tokens, self.pooled_grid, self.text_config.num_hidden_layers
        expect("visual_tokens", tokens in VISUAL_TOKENS, f"to be one of {', '.join(VISUAL_TOKENS)}")
        is_grid = isinstance(grid, list) and len(grid) == 2 and all(is_count(side, 1) for side in grid)
        wanted = "to be (rows, columns)" if tokens == "pooled" else "to be None unless visual_tokens is 'pooled'"
        expect("pooled_grid", is_grid if tokens == "pooled" else grid is None, wanted)
        expect("num_visual_registers", is_count(self.num_visual_registers), "to be 0 or more")
        expect("image_token_id", is_count(self.image_token_id), "to be 0 or more")
        is_layer = self.drop_layer is None or (is_count(self.drop_layer, 1) and self.drop_layer <= depth)
        expect("drop_layer", is_layer, f"to be None or 1 to {depth}, the layers of the decoder")
        has_registers = self.vision_config.num_register_tokens > 0
        expect("visual_tokens", tokens != "registers" or has_registers, "of a tower with num_register_tokens above 0")
        reduction = self.vision_config.reduction or {}
        has_learned = reduction.get("kind") == "learn" and not reduction.get("has_fuser")
        wanted = "of a tower whose token_reduction has the kind 'learn' and no fuser"
        expect("visual_tokens", tokens != "learned" or has_learned, wanted)


@dataclass
class ViTWithRegistersVisionLanguageOutput(CausalLMOutputWithPast):
    """Output of `ViTWithRegistersForConditionalGeneration`, with the fields of transformers' `CausalLMOutputWithPast`.

    `logits` (B, K, V) and the hidden states behind `drop_layer` (B, K, D) have no dropped tokens.

    Args:
        kept_tokens: (B, K), the numbers of these tokens in `input_ids`; None where none is dropped.
        image_hidden_states: (B, n, D), the visual tokens behind the projector.
    """

    kept_tokens: Tensor | None = None
    image_hidden_states: Tensor | None = None


@dataclass
class _Dropping:
    """What one forward pass drops: numbers (B, K) of the tokens to keep, and (B, T) of the keys out of `num_keys`."""

    tokens: Tensor
    keys: Tensor
    num_keys: int
    done: dict = field(default_factory=dict)  # an argument is the same for all layers

    def shorten(self, name: str, value: object) -> object:
        """An argument of a layer, without the dropped tokens."""
        if name not in self.done or self.done[name][0] is not value:
            self.done[name] = (value, self._shorten(name, value))
        return self.done[name][1]

    def take(self, value: Tensor) -> Tensor:
        """Entries (B or 1, N, ...) of the kept tokens: (B, K, ...)."""
        index = self.tokens.to(value.device)
        return torch.take_along_dim(value, index.reshape(*index.shape, *[1] * (value.ndim - 2)), dim=1)

    def _shorten(self, name: str, value: object) -> object:
        parts = value if isinstance(value, (tuple, list)) else (value,)
        if name in _NOT_READ or not any(isinstance(part, Tensor) for part in parts):
            return value
        if name == "attention_mask":
            return self._shorten_mask(value)
        if name not in ("position_ids", "position_embeddings") or any(part.ndim < 2 for part in parts):
            raise ValueError(
                f"the layers of this decoder read {name!r}, and what becomes of it without some tokens is unknown: "
                f"{_REMEDY}"
            )
        return self.take(value) if isinstance(value, Tensor) else tuple(map(self.take, parts))

    def _shorten_mask(self, mask: Tensor) -> Tensor:
        if mask.ndim != 4 or mask.shape[-1] != self.num_keys:
            raise ValueError(
                f"expected a mask (B, 1, N, {self.num_keys}) in the layers of the decoder, got {tuple(mask.shape)}: "
                f"{_REMEDY}"
            )
        tokens, keys = self.tokens.to(mask.device), self.keys.to(mask.device)
        rows = torch.arange(len(tokens), device=mask.device)[:, None, None]
        mask = mask.expand(len(tokens), -1, -1, -1)
        return mask[rows, :, tokens[:, :, None], keys[:, None, :]].permute(0, 3, 1, 2)  # [B, K, T, 1] -> [B, 1, K, T]


def find_decoder_layers(language_model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a decoder of transformers in which tokens can be dropped.

    Raises:
        ValueError: there is no list of layers that take hidden states and a mask, or the layers do not see all tokens.
    """
    config, kind = language_model.config, type(language_model).__name__
    reach = [getattr(config, name, None) for name in ("sliding_window", "layer_types", "attention_layers")]
    reach = {part for value in reach if value for part in (value if isinstance(value, (list, tuple)) else [value])}
    if reach - {"full_attention", "global"}:
        raise ValueError(
            f"expected a decoder whose layers all attend to all tokens, got {kind} with {', '.join(map(str, reach))}: "
            f"set sliding_window=None in its configuration if it has one; else {_REMEDY}"
        )
    found = []
    for module in language_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            names = [set(_parameters(layer)) for layer in module]
            if all(each >= {"hidden_states", "attention_mask"} and "cache_params" not in each for each in names):
                found.append(module)
    if len(found) != 1:
        raise ValueError(
            f"expected a decoder with one list of {config.num_hidden_layers} layers of attention, found {len(found)} "
            f"in {kind}: {_REMEDY}"
        )
    return found[0]


def _parameters(module: nn.Module) -> list:
    return list(inspect.signature(module.forward).parameters)


class ViTWithRegistersForConditionalGeneration(ViTWithRegistersMixin, PreTrainedModel, GenerationMixin):
    """Write texts about images.

    Args:
        config: the architecture.
        vision_model: `ViTWithRegistersModel` to use; by default a new one from `config.vision_config`.
        language_model: decoder with its head to use; by default a new one from `config.text_config`.

    Raises:
        ValueError: a decoder that takes no `inputs_embeds`, or in whose layers tokens cannot be dropped.

    Example:
        >>> ids = torch.tensor([[1, *[config.image_token_id] * config.num_image_tokens, 5, 6]])
        >>> output = model(ids, pixel_values=torch.rand(1, 3, 224, 224), labels=ids)
        >>> model.generate(ids, pixel_values=torch.rand(1, 3, 224, 224), max_new_tokens=20)
    """

    config_class = ViTWithRegistersVisionLanguageConfig
    base_model_prefix = "vision_language"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _auto_class = "AutoModelForImageTextToText"
    _no_split_modules = []  # each tower has its own
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False  # a cache of fixed size has no shorter layers

    def __init__(
        self,
        config: ViTWithRegistersVisionLanguageConfig,
        vision_model: ViTWithRegistersModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        if vision_model is None:
            vision_model = ViTWithRegistersModel(config.vision_config, use_mask_token=False, use_projection=False)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        if language_model.config.is_encoder_decoder or "inputs_embeds" not in _parameters(language_model):
            raise ValueError(
                f"expected a decoder that takes inputs_embeds, got {type(language_model).__name__}: use one such as "
                "LlamaForCausalLM"
            )
        self.vision_model, self.language_model = vision_model, language_model
        config.adopt_towers(vision_model.config, language_model.config)
        self.generation_config = copy.deepcopy(language_model.generation_config)
        width = language_model.get_input_embeddings().embedding_dim
        self.projector = nn.Sequential(
            nn.Linear(vision_model.config.hidden_size, width), nn.GELU(), nn.Linear(width, width)
        )
        num_registers = config.num_visual_registers
        self.visual_registers = nn.Parameter(torch.empty(num_registers, width)) if num_registers else None
        self._dropping = None
        # CODEPATH: models that drop visual tokens; else the decoder is left alone.
        if config.num_dropped_layers:
            for number, layer in enumerate(find_decoder_layers(language_model)[-config.num_dropped_layers :]):
                drop = functools.partial(self._drop, names=_parameters(layer), is_first=number == 0)
                layer.register_forward_pre_hook(drop, with_kwargs=True)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        cache: DynamicCache | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> ViTWithRegistersVisionLanguageOutput | tuple:
        """Logits of the next word.

        Args:
            input_ids: (B, N), in each row n + M placeholders for its image, or none.
            pixel_values: images (B, C, height, width); None for texts alone, or if the cache has them.
            attention_mask: (B, T), zero for padding on either side, over the tokens in the cache too.
            position_ids: (B, N) or (1, N).
            past_key_values, cache: earlier tokens; transformers calls it so up to 5.23, and from 5.24 on.
            labels: (B, N), the words; -100 is ignored, and so are placeholders.
            use_cache: return a cache; by default as the decoder, and not in training.
            logits_to_keep: return the logits of the last tokens only; 0 for all.
            return_dict: False for a tuple.
            num_items_in_batch: words that the sum of the losses is divided by; by default those of the labels.
            kwargs: for the decoder, such as `output_hidden_states`.

        Raises:
            ValueError: placeholders and images do not fit, a cache that this model did not fill, or a decoder that
                needs all tokens.
        """
        cache = past_key_values if cache is None else cache
        inputs_embeds, visual, is_image = self._embed(input_ids, pixel_values)
        if use_cache is None:
            use_cache = getattr(self.config.text_config, "use_cache", True) and not self.training
        dropping = None
        # CODEPATH: models that drop visual tokens; else the decoder is left alone.
        if self.config.num_dropped_layers:
            cache = DynamicCache(config=self.config.text_config) if use_cache and cache is None else cache
            dropping = self._plan(is_image, 0 if visual is None else visual.shape[1], cache)
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
        kwargs |= self._name_cache(cache)
        if logits_to_keep and labels is None and "logits_to_keep" in _parameters(self.language_model):
            kwargs["logits_to_keep"] = logits_to_keep
        output = self._run(dropping, self.language_model, inputs_embeds=inputs_embeds, return_dict=True, **kwargs)
        known = ViTWithRegistersVisionLanguageOutput.__dataclass_fields__
        output = ViTWithRegistersVisionLanguageOutput(**{name: output[name] for name in output if name in known})
        output.kept_tokens, output.image_hidden_states = dropping and dropping.tokens, visual
        if labels is not None:
            labels = labels.masked_fill(is_image, -100)
            labels = labels if dropping is None else dropping.take(labels)
            output.loss = self._loss(output.logits, labels, num_items_in_batch)
        output.logits = output.logits[:, -logits_to_keep:]
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Visual tokens (B, n, D) of images (B, C, height, width), behind the projector, without visual registers."""
        output, kind = self.vision_model(pixel_values, return_dict=True), self.config.visual_tokens
        if kind == "registers":
            tokens = output.register_tokens
        elif kind == "learned":
            tokens = self.vision_model.norm_tokens(output.reduction.learned_tokens)
        elif kind == "pooled":
            grid = output.patch_grid.permute(0, 3, 1, 2)  # [B, rows, columns, D] -> [B, D, rows, columns]
            tokens = F.adaptive_avg_pool2d(grid, self.config.pooled_grid).flatten(2).transpose(1, 2)
        else:
            tokens = output.patch_tokens
        return self.projector(tokens)

    def make_processor(self, image_processor, tokenizer, **options):
        """A `LlavaProcessor`, which puts as many placeholders into a text as an image of any size needs.

        Args:
            image_processor: that of the image tower.
            tokenizer: with the placeholder `<image>` as the token `config.image_token_id`.
            options: of `LlavaProcessor`, such as a chat template.

        Raises:
            ValueError: the tokenizer has another placeholder, or patches are not square.
        """
        from transformers import LlavaProcessor

        number = tokenizer.convert_tokens_to_ids("<image>")
        if number != self.config.image_token_id:
            raise ValueError(
                f'expected "<image>" to be token {self.config.image_token_id}, `config.image_token_id`, got {number}: '
                'call tokenizer.add_tokens(["<image>"], special_tokens=True) and set config.image_token_id'
            )
        (rows, columns), is_fixed = self.config.vision_config.patch_shape, self.config.visual_tokens != "patches"
        if rows != columns and not is_fixed:
            raise ValueError(
                f"expected square patches, got {rows} x {columns} pixels: write the placeholders yourself"
            )
        return LlavaProcessor(
            image_processor,
            tokenizer,
            patch_size=2**31 if is_fixed else rows,  # of a patch larger than the image there is none
            num_additional_image_tokens=self.config.num_image_tokens if is_fixed else self.config.num_visual_registers,
            vision_feature_select_strategy="full",
            **options,
        )

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs) -> dict:
        """As in transformers; images go in with their placeholders, once where there is a cache."""
        prepared = super().prepare_inputs_for_generation(input_ids, **kwargs)
        prepared.pop("inputs_embeds", None)  # None, up to 4.57
        if not (prepared["input_ids"] == self.config.image_token_id).any():
            prepared["pixel_values"] = None
        return prepared

    def get_input_embeddings(self) -> nn.Module:
        """The word embedding of the decoder."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embedding of the decoder."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The head of the decoder."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head of the decoder."""
        self.language_model.set_output_embeddings(new_embeddings)

    def no_weight_decay(self) -> set:
        """Names of all token and position parameters, to be exempt from weight decay."""
        names = {f"vision_model.{name}" for name in self.vision_model.no_weight_decay()}
        return names if self.visual_registers is None else names | {"visual_registers"}

    def _embed(self, input_ids: Tensor | None, pixel_values: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Words (B, N, D) with visual tokens and registers for placeholders; visual tokens (B, n, D); placeholders."""
        if input_ids is None:
            raise ValueError("expected `input_ids`, with a placeholder for each visual token, got None")
        is_image = input_ids == self.config.image_token_id
        words = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        if pixel_values is None:
            if is_image.any():
                raise ValueError("expected `pixel_values`, one image for each text with placeholders, got None")
            return words, None, is_image
        visual = self.get_image_features(pixel_values).to(words.dtype)
        expected, found = visual.shape[1] + self.config.num_visual_registers, is_image.sum(dim=1)
        if len(visual) != len(words) or (found != expected).any():
            raise ValueError(
                f"expected one image for each text, and in it {expected} times the token {self.config.image_token_id} "
                f"({visual.shape[1]} visual tokens, {self.config.num_visual_registers} registers), got {len(visual)} "
                f"images and texts with {found.tolist()}"
            )
        placed = visual
        # CODEPATH: models with visual registers.
        if self.visual_registers is not None:
            registers = self.visual_registers.to(words.dtype).expand(len(visual), -1, -1)
            placed = torch.cat([visual, registers], dim=1)
        return words.masked_scatter(is_image.unsqueeze(-1), placed), visual, is_image

    def _name_cache(self, cache: object) -> dict:
        # Shim: the argument of a decoder has another name from 5.24 on.
        name = "cache" if "cache" in _parameters(self.language_model) else "past_key_values"
        return {} if cache is None else {name: cache}

    def _loss(self, logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        size = self.config.text_config.vocab_size
        return self.language_model.loss_function(logits, labels, vocab_size=size, num_items_in_batch=num_items)

    def _plan(self, is_image: Tensor, num_drops: int, cache: DynamicCache | None) -> _Dropping | None:
        """Drop the first `num_drops` placeholders of each row (B, N); the cache remembers it for later tokens."""
        drops = is_image & (is_image.cumsum(1) <= num_drops)
        backend = self.language_model.config._attn_implementation
        if backend not in ("eager", "sdpa") or not isinstance(cache, (DynamicCache, type(None))):
            raise ValueError(
                f"drop_layer needs the attention implementation eager or sdpa and a DynamicCache, got {backend} and "
                f"{type(cache).__name__}"
            )
        num_past = 0 if cache is None else cache.get_seq_length()
        past, num_before = getattr(cache, "dropped_tokens", (None, 0)) if num_past else (None, 0)
        if past is None:
            if not num_drops:
                return None
            past = drops.new_zeros(len(drops), num_past)
        if past.shape != (len(drops), num_past):
            raise ValueError(
                f"expected the cache as this model left it, of {past.shape[0]} texts and {past.shape[1]} tokens, got "
                f"{len(drops)} texts and {num_past} tokens: a cache without dropped tokens cannot be cropped or split"
            )
        dropped, num_dropped = torch.cat([past, drops], dim=1), num_before + num_drops
        if cache is not None:
            cache.dropped_tokens = (dropped, num_dropped)
        # A stable sort puts the kept ones first, in order.
        tokens = torch.argsort(drops.int(), dim=1, stable=True)[:, : drops.shape[1] - num_drops]
        keys = torch.argsort(dropped.int(), dim=1, stable=True)[:, : dropped.shape[1] - num_dropped]
        return _Dropping(tokens, keys, dropped.shape[1])

    def _drop(self, layer: nn.Module, args: tuple, kwargs: dict, *, names: list, is_first: bool) -> tuple | None:
        """Before a layer behind `drop_layer`: its arguments for the tokens that are kept."""
        if self._dropping is None:
            return None

        def shorten(name, value):
            if name == "hidden_states":
                return self._dropping.take(value) if is_first else value
            return self._dropping.shorten(name, value)

        args = tuple(shorten(name, value) for name, value in zip(names, args))
        return args, {name: shorten(name, value) for name, value in kwargs.items()}

    def _run(self, dropping: _Dropping | None, function, *args, **kwargs):
        """Call a function whose layers follow a plan."""
        before, self._dropping = self._dropping, dropping
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            # As GPT-2, which gives its output the shape of its input.
            if dropping is None or not str(error).startswith("shape '["):
                raise
            kind = type(self.language_model).__name__
            raise ValueError(f"{kind} gives back as many tokens as it gets ({error}): {_REMEDY}") from error
        finally:
            self._dropping = before

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **options):
        # Shim: up to 5.22 the recomputation in the backward pass includes the hooks, which need the plan again.
        function = functools.partial(self._checkpoint, without_reentrance(gradient_checkpointing_func))
        super()._set_gradient_checkpointing(enable, function, **options)

    def _checkpoint(self, function, run, *args, **kwargs):
        return function(functools.partial(self._run, self._dropping, run), *args, **kwargs)

    def _auto_map(self) -> dict:
        return {
            "AutoConfig": "vision_language_vitreg.ViTWithRegistersVisionLanguageConfig",
            self._auto_class: "vision_language_vitreg.ViTWithRegistersForConditionalGeneration",
        }

    def _save_image_processor(self, folder) -> None:
        # Up to 4.57 a loader of remote code copies only the files that this one names itself.
        from .image_processing_vitreg import PROCESSORS  # noqa: F401
        from .positions_vitreg import rotate  # noqa: F401
        from .token_reduction_vitreg import make_tracker  # noqa: F401

        self.vision_model._save_image_processor(folder)

    def _init_weights(self, module: nn.Module) -> None:
        # Both towers initialise themselves.
        std = getattr(self.config.text_config, "initializer_range", 0.02)
        if module is self:
            set_initial(self.visual_registers, nn.init.normal_, std=std)
        elif isinstance(module, nn.Linear):
            set_initial(module.weight, nn.init.trunc_normal_, std=module.in_features**-0.5)
            set_initial(module.bias, nn.init.zeros_)


__all__ = [
    "ViTWithRegistersForConditionalGeneration",
    "ViTWithRegistersVisionLanguageConfig",
    "ViTWithRegistersVisionLanguageOutput",
]
