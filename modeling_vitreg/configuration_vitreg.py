"""Configuration of a Vision Transformer with registers.

One configuration represents every plain ViT of the field: ViT, DeiT, DeiT-III, DINO, DINOv2, DINOv3, MAE, BEiT,
EVA-02, AIMv2, RADIO, Sapiens2 and the vision towers of CLIP, SigLIP and Perception Encoder, each with any number of
registers (Darcet et al. 2024, arXiv 2309.16588). It is the only home of the order of tokens: class tokens,
distillation token, registers, patches.

This file travels next to the weights and runs without the package.
"""

import copy
import inspect
import math

from transformers import AutoConfig, PretrainedConfig


# Shim: `transformers.utils.backbone_utils` is announced for removal, `transformers.backbone_utils` exists from 5.1 on.
try:
    from transformers.backbone_utils import BackboneConfigMixin
except ImportError:
    from transformers.utils.backbone_utils import BackboneConfigMixin


POSITION_EMBEDDINGS = ("learned", "sincos", "rope", "learned_rope", "none")
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu", "swiglu")
POOLINGS = ("cls", "mean", "cls_mean", "cls_distillation", "cls_average", "cls_concat", "attention", "prr")
DROP_PATH_SCHEDULES = ("linear", "constant")
DROP_PATH_MODES = ("sample", "batch_subset")
MASKED_TARGETS = ("pixels", "features")
NORMS = ("layernorm", "rmsnorm")
ROPE_STYLES = ("dinov3", "capi", "axial", "mixed")
INTERPOLATIONS = ("bicubic", "bilinear", "bilinear_crop")
ATTENTION_GATES = ("head", "element")
POSITION_BIASES = ("layer", "shared")
# What `token_reduction` may hold, by its kind, with the defaults.
TOKEN_REDUCTIONS = {
    "merge": {"per_layer": None, "inflection": 0.0, "is_proportional": True},
    "learn": {"layer": None, "num_tokens": 8, "version": "1.1", "has_fuser": False},
    "halt": {
        "scale": 10.0,
        "center": 30.0,
        "eps": 0.01,
        "has_halting_cls_token": False,
        "has_removal": True,
        "ponder_weight": 5e-4,
        "distribution_weight": 1e-3,
        "target_layer": None,
    },
}
# Fields of a tower that are not its architecture: they differ between versions and may hold a local path.
_NOT_OF_A_TOWER = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")
MOST_LAYERS = 1000  # more than any published model has by far: a damaged file must not fill the memory

# width, depth, heads; the giant is DINOv2's, with its SwiGLU.
SIZES = {
    "tiny": {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3},
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "huge": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16},
    "giant": {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "hidden_act": "swiglu"},
}


class ViTWithRegistersConfig(BackboneConfigMixin, PretrainedConfig):
    """Architecture of a Vision Transformer with registers. The defaults are a ViT-B/16 with 4 registers.

    Args:
        hidden_size: width D of the tokens.
        num_hidden_layers: depth.
        num_attention_heads: heads H; must divide `hidden_size`.
        num_key_value_heads: heads of keys and values, each shared by H / K heads of queries (grouped-query attention,
            Sapiens2): one number, or one for each layer. Default H.
        has_query_key_norm: norm queries and keys of each head before the rotation (Sapiens2, timm's `qk_norm`).
        attention_gate: multiply the concatenated heads, before the output projection, by the sigmoid of a linear layer
            of the normed input (Qiu et al. 2025, arXiv 2505.06708): "head" has one gate for each head, "element" one
            for each channel (timm's `gated`); None: no gate.
        has_attention_norm: norm the concatenated heads before the gate and the output projection (EVA-CLIP).
        intermediate_size: width of the MLP. Default 4 D, or for SwiGLU 8/3 D rounded up to a multiple of 8 (DINOv2).
        hidden_act: "gelu" (erf), "gelu_pytorch_tanh", "quick_gelu" (OpenAI CLIP) or "swiglu" (SiLU gate; DINOv2 g).
        has_mlp_norm: norm the hidden units of the MLP (EVA-02's sub-LayerNorm).
        norm_type: "layernorm", or "rmsnorm", without mean and bias (CAPI, AIMv2, Sapiens2).
        layer_norm_eps: 1e-6 for ViT, DeiT, DINO, DINOv2 and MAE; 1e-5 for CLIP, DINOv3 and CAPI.
        image_size: pixels, a side or (rows, columns), of the position table. Inputs may have other sizes.
        patch_size: pixels, a side or (rows, columns); must divide `image_size`.
        num_channels: channels of an image.
        num_register_tokens: registers R, 0 or more.
        num_gated_registers: last registers, in front of the test-time ones, whose keys pass a learned gate: in the
            softmax of a head a key counts as often as its gate says, 1 for an ordinary register, 0 for none. Gates
            start closed, so that appended registers leave the outputs of a finished model unchanged.
        num_test_time_registers: last registers that take the activation of `register_neurons`; they start at zero
            and are not trained (Jiang et al. 2025, arXiv 2506.08010). 0 for models that were not retrofitted.
        register_neurons: hidden units of MLPs whose activation moves from all other tokens to the test-time
            registers, as {layer: [unit, ...]}; layers count from 1.
        has_cls_token: whether the sequence starts with a class token.
        num_cls_tokens: class tokens C; more than one for RADIO and Pixio.
        has_distillation_token: whether a distillation token follows the class token (DeiT).
        position_embedding_type: "learned" table, fixed "sincos" (MAE), "rope" (DINOv3), "learned_rope", which is both
            (EVA-02, Perception Encoder), or "none".
        has_prefix_positions: whether a learned table has slots for class and distillation token (ViT, DeiT, DINOv2,
            CLIP) or for patches only (DeiT-III). Registers never have a position.
        interpolate_antialias: whether a position table is resized with antialiasing (DINOv2 with registers, timm,
            OpenCLIP) or without (ViT, DeiT, DINO, DINOv2, MAE).
        interpolate_mode: "bicubic"; "bilinear" (TIPSv2); or "bilinear_crop", which resizes to a square of the longer
            side and cuts it to the image (RADIO).
        interpolate_offset: added to the rows and columns of the target before the scale is computed. 0.1 for the
            official code of DINO and DINOv2 without registers, 0.0 everywhere else.
        rope_style: "dinov3" encodes the centres of the patches and leaves prefix tokens alone. "capi" places the first
            and last patch on the edge and the registers, a multiple of four, on the border of the image; its
            frequencies do not depend on `rope_theta`. "axial" counts rows and columns and turns neighbouring channels
            (EVA-02, Perception Encoder, RoPE-ViT). "mixed" learns the frequencies of each layer, head and pair of
            channels along both axes (RoPE-ViT; Heo et al. 2024, arXiv 2403.13298).
        rope_theta: base of the periods of the rotary embedding; of "mixed", of their initial values.
        rope_grid_offset: "axial": number of the first row and column.
        rope_reference_grid: "axial": grid (rows, columns) that every other grid is scaled to, or None.
        rope_columns_first: "axial" and "mixed": whether the column is the first of the two coordinates.
        relative_position_bias: add to the scores of each head a learned value for the offset between two patches, from
            a table for each "layer" (BEiT, data2vec) or a "shared" one; tokens without a place share three values.
        rope_shift: while training, shift each axis by a uniform value in [-rope_shift, rope_shift]; None: do not.
        rope_jitter: while training, scale each axis by a log-uniform value in [1/rope_jitter, rope_jitter].
        rope_rescale: while training, scale both axes by one log-uniform value in [1/rope_rescale, rope_rescale].
        has_patch_bias: whether the patch embedding has a bias (not in CLIP).
        has_patch_norm: norm the patches before their positions are added (AIMv2).
        has_pre_norm: whether there is a norm before the first layer (CLIP).
        has_final_norm: whether there is a norm after the last layer (not in RADIO and PE spatial).
        has_query_bias, has_key_bias, has_value_bias: DINOv3 has none on the keys, its 7B none at all.
        layer_scale_init_value: initial value of LayerScale (Touvron et al. 2021), or None for no LayerScale.
        has_mlp_layer_scale: whether the MLP has LayerScale as attention does (not in timm's Sapiens2).
        hidden_dropout_prob: dropout after the embeddings and after both branches of a layer.
        attention_probs_dropout_prob: dropout of the attention probabilities.
        drop_path_rate: stochastic depth of the deepest layer.
        drop_path_schedule: "linear" from 0 to `drop_path_rate` over the depth, or "constant" (DeiT-III).
        drop_path_mode: "sample" drops a branch independently for each image; "batch_subset" runs it on a subset of the
            batch of fixed size, which also saves compute (DINOv2).
        pooling: `pooler_output`, the input of the classifier. "cls"; "mean" of patches; "cls_mean", both concatenated
            (DINOv2's linear head); "cls_distillation", two classifiers, averaged (DeiT); "cls_average", the mean of
            all class tokens (Pixio); "cls_concat", the class tokens of `pooled_cls_tokens`, concatenated (RADIO);
            "attention", a learned query that attends to all normed tokens (SigLIP, Perception Encoder, AIMv2);
            "prr", one attention without parameters among all normed tokens, of which the class token is read, or the
            mean of all where there is none (LocAtViT, timm).
        pooled_cls_tokens: numbers, from 0, of the class tokens that pooling "cls_concat" reads; default all.
        pooling_num_heads: heads of pooling "attention"; default `num_attention_heads`.
        pooling_intermediate_size: width of the MLP behind pooling "attention"; default `intermediate_size`, 0 for none
            (AIMv2).
        has_pooling_query: whether a linear layer follows the learned query of pooling "attention" (not in AIMv2).
        has_pooling_bias: whether queries, keys and values of pooling "attention" have biases (not in AIMv2).
        projection_size: width of `image_embeds`, a product of the pooled vector without bias (CLIP), or None.
        has_pooled_norm: apply the final norm to the pooled vector instead of the tokens (timm's `fc_norm`, fine-tuned
            MAE); only with pooling "mean".
        num_classifier_layers: number of last layers whose class tokens the classifier reads (DINOv2's 4-layer head).
        has_zero_init_classifier: initialise the classifier at zero, as the ViT paper does for fine-tuning.
        token_reduction: None, or how layers work on fewer tokens, as a dictionary with its "kind". "merge" (ToMe;
            Bolya et al. 2023, arXiv 2210.09461) joins the most similar patches between attention and MLP, and outputs
            give each patch the token that it went into. "per_layer" is the number of patches that each layer joins,
            or a list with one number for each; "inflection" i in [-1, 1] lets a single number r fall along the layers
            from (1 + |i|) r to (1 - |i|) r for i < 0, or rise for i > 0; "is_proportional": a token counts in the
            softmax as often as it has patches, which a model that was not trained with merging needs. "learn"
            (TokenLearner; Ryoo et al. 2021, arXiv 2106.11297) replaces all patches behind layer "layer" (default: the
            middle) by "num_tokens" learned means of them, by the module of "version" "1.1" or "1"; with "has_fuser",
            each later layer learns tokens anew and gives the result back to all patches. It has to be trained. "halt"
            (A-ViT; Yin et al. 2022, arXiv 2112.07658): a patch whose scores, sigmoid("scale" * its first channel -
            "center") of each layer, add up to 1 - "eps" halts, and its output is the mean of its states, weighted by
            the scores. "has_halting_cls_token": class tokens and distillation token may halt too, as in the original;
            registers never do. Later layers leave halted tokens out, or without "has_removal" mask them. Losses add
            "ponder_weight" times the layers that a token runs, and "distribution_weight" times the divergence of the
            scores of the layers from a prior around layer "target_layer" (default: three quarters of the depth).
        out_features, out_indices: stages that a backbone, a segmentation head and a depth head read. Stage 0, "stem",
            is the embedding, stage i the output of layer i. Default: the last.
        reshape_hidden_states: whether a backbone returns maps (B, D, rows, columns) or, for DPT, tokens (B, 1 + P, D)
            with the class token in front; neither has registers.
        apply_layernorm: whether a backbone applies the final norm to its feature maps.
        masked_target: what masked image modelling predicts: "pixels" (SimMIM) or "features" of a teacher.
        masked_target_size: width of the teacher's features; default `hidden_size`.
        num_depth_bins, min_depth, max_depth: bins of the depth head and their range in metres.
        semantic_loss_ignore_index: label of ignored pixels in segmentation.
        has_mask_token: whether the base model owns a mask token. Only masked modelling needs one, and a parameter
            without gradient stops distributed data parallel training.
        initializer_range: standard deviation of the truncated normal that weights, tokens and positions start from.

    Raises:
        ValueError: a value outside its range, or values that contradict each other.

    Example:
        >>> from modeling_vitreg import ViTWithRegistersConfig
        >>> config = ViTWithRegistersConfig.from_preset("small/14", num_register_tokens=4)
        >>> config.num_prefix_tokens
        5
    """

    model_type = "vitreg"
    _auto_class = "AutoConfig"
    _presets = SIZES

    def __init__(
        self,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=None,
        has_query_key_norm=False,
        attention_gate=None,
        has_attention_norm=False,
        intermediate_size=None,
        has_mlp_norm=False,
        hidden_act="gelu",
        norm_type="layernorm",
        layer_norm_eps=1e-6,
        image_size=224,
        patch_size=16,
        num_channels=3,
        num_register_tokens=4,
        num_gated_registers=0,
        num_test_time_registers=0,
        register_neurons=None,
        has_cls_token=True,
        num_cls_tokens=1,
        has_distillation_token=False,
        position_embedding_type="learned",
        has_prefix_positions=None,
        interpolate_antialias=True,
        interpolate_offset=0.0,
        interpolate_mode="bicubic",
        rope_style="dinov3",
        rope_theta=100.0,
        rope_grid_offset=0.0,
        rope_reference_grid=None,
        rope_columns_first=False,
        rope_shift=None,
        rope_jitter=None,
        rope_rescale=None,
        relative_position_bias=None,
        has_patch_bias=True,
        has_patch_norm=False,
        has_pre_norm=False,
        has_final_norm=True,
        has_query_bias=True,
        has_key_bias=True,
        has_value_bias=True,
        layer_scale_init_value=None,
        has_mlp_layer_scale=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        drop_path_rate=0.0,
        drop_path_schedule="linear",
        drop_path_mode="sample",
        pooling="cls",
        pooled_cls_tokens=None,
        pooling_num_heads=None,
        pooling_intermediate_size=None,
        has_pooling_query=True,
        has_pooling_bias=True,
        projection_size=None,
        has_pooled_norm=False,
        num_classifier_layers=1,
        token_reduction=None,
        has_zero_init_classifier=False,
        out_features=None,
        out_indices=None,
        reshape_hidden_states=True,
        apply_layernorm=True,
        masked_target="pixels",
        masked_target_size=None,
        num_depth_bins=256,
        min_depth=1e-3,
        max_depth=10.0,
        semantic_loss_ignore_index=255,
        has_mask_token=False,
        initializer_range=0.02,
        **kwargs,
    ):
        kwargs.pop("stage_names", None)  # derived from the depth, so that a stale list in a file cannot win
        num_labels, id2label = kwargs.get("num_labels", 2), kwargs.get("id2label")
        is_count = _is_count(num_labels) and num_labels >= 0
        _require(is_count, f"expected num_labels to be an integer, 0 or more, got {num_labels!r}")
        is_table = id2label is None or isinstance(id2label, dict)
        _require(is_table, f"expected id2label to be a dictionary, got {id2label!r}")
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        is_list = isinstance(num_key_value_heads, (list, tuple))
        self.num_key_value_heads = list(num_key_value_heads) if is_list else num_key_value_heads
        self.has_query_key_norm = has_query_key_norm
        self.attention_gate = attention_gate
        self.has_attention_norm = has_attention_norm
        self.has_mlp_norm = has_mlp_norm
        self.hidden_act = hidden_act
        self.norm_type = norm_type
        self.layer_norm_eps = layer_norm_eps
        self.image_size = list(image_size) if isinstance(image_size, (tuple, list)) else image_size
        self.patch_size = list(patch_size) if isinstance(patch_size, (tuple, list)) else patch_size
        self.num_channels = num_channels
        self.num_register_tokens = num_register_tokens
        self.num_gated_registers = num_gated_registers
        self.num_test_time_registers = num_test_time_registers
        # Strings as keys, as JSON gives them back.
        register_neurons = register_neurons or {}
        _require(
            isinstance(register_neurons, dict)
            and all(isinstance(u, (list, tuple)) for u in register_neurons.values()),
            f"expected register_neurons to be a dictionary of lists of units, got {register_neurons!r}",
        )
        self.register_neurons = {str(layer): list(units) for layer, units in register_neurons.items()}
        self.has_cls_token = has_cls_token
        self.num_cls_tokens = num_cls_tokens
        self.has_distillation_token = has_distillation_token
        self.position_embedding_type = position_embedding_type
        self.interpolate_antialias = interpolate_antialias
        self.interpolate_offset = interpolate_offset
        self.interpolate_mode = interpolate_mode
        self.rope_style = rope_style
        self.rope_theta = rope_theta
        self.rope_grid_offset = rope_grid_offset
        is_list = isinstance(rope_reference_grid, (list, tuple))
        self.rope_reference_grid = list(rope_reference_grid) if is_list else rope_reference_grid
        self.rope_columns_first = rope_columns_first
        self.rope_shift = rope_shift
        self.rope_jitter = rope_jitter
        self.rope_rescale = rope_rescale
        self.relative_position_bias = relative_position_bias
        self.has_patch_bias = has_patch_bias
        self.has_patch_norm = has_patch_norm
        self.has_pre_norm = has_pre_norm
        self.has_final_norm = has_final_norm
        self.has_query_bias = has_query_bias
        self.has_key_bias = has_key_bias
        self.has_value_bias = has_value_bias
        self.layer_scale_init_value = layer_scale_init_value
        self.has_mlp_layer_scale = has_mlp_layer_scale
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.drop_path_rate = drop_path_rate
        self.drop_path_schedule = drop_path_schedule
        self.drop_path_mode = drop_path_mode
        self.pooling = pooling
        is_list = isinstance(pooled_cls_tokens, (list, tuple))
        self.pooled_cls_tokens = list(pooled_cls_tokens) if is_list else pooled_cls_tokens
        self.pooling_num_heads = pooling_num_heads
        self.pooling_intermediate_size = pooling_intermediate_size
        self.has_pooling_query = has_pooling_query
        self.has_pooling_bias = has_pooling_bias
        self.projection_size = projection_size
        self.has_pooled_norm = has_pooled_norm
        self.num_classifier_layers = num_classifier_layers
        self.token_reduction = token_reduction
        self.has_zero_init_classifier = has_zero_init_classifier
        self.reshape_hidden_states = reshape_hidden_states
        self.apply_layernorm = apply_layernorm
        self.masked_target = masked_target
        self.masked_target_size = hidden_size if masked_target_size is None else masked_target_size
        self.num_depth_bins = num_depth_bins
        self.min_depth = min_depth
        self.max_depth = max_depth
        self.semantic_loss_ignore_index = semantic_loss_ignore_index
        self.has_mask_token = has_mask_token
        self.initializer_range = initializer_range

        if has_prefix_positions is None:
            has_prefix_positions = position_embedding_type in ("learned", "learned_rope") and has_cls_token
        self.has_prefix_positions = has_prefix_positions
        self._validate_types()
        if intermediate_size is None:
            is_gated = hidden_act == "swiglu"
            intermediate_size = (int(hidden_size * 8 / 3) + 7) // 8 * 8 if is_gated else 4 * hidden_size
        self.intermediate_size = intermediate_size

        self._validate()
        self._set_stages(out_features, out_indices)

    @classmethod
    def from_preset(cls, name, **overrides):
        """Configuration of a standard size: "tiny", "small", "base", "large", "huge" or "giant", as in "base/14".

        Other backbones have the sizes of their papers.

        Args:
            name: a size, with the patch size after a slash; without one the patch has its default.
            overrides: any argument of the configuration.

        Raises:
            ValueError: there is no such size, or the patch size is not a number.
        """
        size, _, patch = name.partition("/")
        if size not in cls._presets or not (patch or "16").isdigit():
            example, sizes = "base/14" if "base" in cls._presets else "small", ", ".join(cls._presets)
            raise ValueError(f"expected a preset such as {example!r} with a size of {sizes}, got {name!r}")
        return cls(**{**cls._presets[size], **({"patch_size": int(patch)} if patch else {}), **overrides})

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches: class token, distillation token and registers."""
        return self._num_cls_tokens + self.has_distillation_token + self.num_register_tokens

    @property
    def _num_cls_tokens(self) -> int:
        return self.num_cls_tokens if self.has_cls_token else 0

    @property
    def token_slices(self) -> dict:
        """Where each kind of token lies in the sequence: "cls", "distillation", "registers", "patches"."""
        counts = {
            "cls": self._num_cls_tokens,
            "distillation": int(self.has_distillation_token),
            "registers": self.num_register_tokens,
        }
        slices, start = {}, 0
        for kind, count in counts.items():
            slices[kind] = slice(start, start + count)
            start += count
        return {**slices, "patches": slice(start, None)}

    @property
    def patch_shape(self) -> tuple:
        """Pixels of a patch as (rows, columns)."""
        return _pair(self.patch_size)

    @property
    def grid_shape(self) -> tuple:
        """Patches of an image of `image_size` as (rows, columns)."""
        return tuple(side // patch for side, patch in zip(_pair(self.image_size), self.patch_shape))

    @property
    def num_prefix_positions(self) -> int:
        """Slots in front of the patches in the position table."""
        return (self._num_cls_tokens + self.has_distillation_token) if self.has_prefix_positions else 0

    @property
    def has_position_table(self) -> bool:
        """Whether positions are added to the patches."""
        return self.position_embedding_type in ("learned", "sincos", "learned_rope")

    @property
    def has_rope(self) -> bool:
        """Whether queries and keys are rotated by their positions."""
        return self.position_embedding_type in ("rope", "learned_rope")

    @property
    def key_value_heads(self) -> list:
        """Heads of keys and values of each layer."""
        heads = self.num_key_value_heads
        return heads if isinstance(heads, list) else [heads or self.num_attention_heads] * self.num_hidden_layers

    @property
    def pooled_size(self) -> int:
        """Width of `pooler_output`."""
        if self.pooling == "cls_concat":
            chosen = self.pooled_cls_tokens
            return self.hidden_size * (self.num_cls_tokens if chosen is None else len(chosen))
        return self.hidden_size * (2 if self.pooling == "cls_mean" else 1)

    @property
    def drop_path_rates(self) -> list:
        """Rate of stochastic depth of each layer."""
        if self.drop_path_schedule == "constant":
            return [self.drop_path_rate] * self.num_hidden_layers
        deepest = max(self.num_hidden_layers - 1, 1)
        return [self.drop_path_rate * layer / deepest for layer in range(self.num_hidden_layers)]

    @property
    def reduction(self) -> dict | None:
        """`token_reduction` with its defaults, checked anew: `from_pretrained` sets fields of a checked configuration.

        Raises:
            ValueError: a value outside its range, or one that contradicts the architecture.
        """
        given = self.token_reduction
        if given is None:
            return None
        kind = given.get("kind") if isinstance(given, dict) else None
        _require(
            kind in TOKEN_REDUCTIONS,
            f"token_reduction is None or a dictionary whose kind is {' or '.join(TOKEN_REDUCTIONS)}, got {given!r}",
        )
        unknown = set(given) - {"kind"} - set(TOKEN_REDUCTIONS[kind])
        _require(
            not unknown,
            f"token_reduction of kind {kind!r} has {', '.join(TOKEN_REDUCTIONS[kind])}, got {sorted(unknown)}",
        )
        reduction = {"kind": kind, **TOKEN_REDUCTIONS[kind], **given}
        _require(
            self.relative_position_bias is None and self.rope_style != "mixed",
            "token_reduction needs positions that move with a token: relative_position_bias and rope_style='mixed' "
            "have none",
        )
        validate = {"merge": self._validate_merging, "learn": self._validate_learning, "halt": self._validate_halting}
        validate[kind](reduction)
        return reduction

    @property
    def merges_per_layer(self) -> list:
        """Patches that each layer joins to others; for token_reduction of kind "merge"."""
        reduction, layers = self.reduction, self.num_hidden_layers
        count, inflection = reduction["per_layer"], reduction["inflection"]
        if isinstance(count, (list, tuple)):
            return list(count)
        first = int(count * (1 - inflection))
        step = (2 * count - 2 * first) / max(layers - 1, 1)
        return [int(first + step * layer) for layer in range(layers)]

    def _validate_merging(self, reduction):
        count, layers, patches = reduction["per_layer"], self.num_hidden_layers, math.prod(self.grid_shape)
        is_list = isinstance(count, (list, tuple))
        counts = count if is_list else [count] * layers
        _require(
            all(_is_count(each) and each >= 0 for each in counts) and len(counts) == layers,
            "token_reduction: per_layer is a number of patches, 0 or more, or a list of num_hidden_layers "
            f"({layers}) of them, got {count!r}",
        )
        _require(
            sum(counts) < patches,
            f"token_reduction: the layers would join {sum(counts)} of {patches} patches, which leaves none: a number "
            f"for all layers is at most {(patches - 1) // layers}",
        )
        inflection = reduction["inflection"]
        _require(
            _is_number(inflection) and -1 <= inflection <= 1 and not (is_list and inflection),
            f"token_reduction: inflection lies in [-1, 1], and is 0 for a list per_layer, got {inflection!r}",
        )
        proportional = reduction["is_proportional"]
        _require(
            isinstance(proportional, bool), f"token_reduction: is_proportional is true or false, got {proportional!r}"
        )

    def _validate_learning(self, reduction):
        layers, patches = self.num_hidden_layers, math.prod(self.grid_shape)
        layer = reduction["layer"] = layers // 2 if reduction["layer"] is None else reduction["layer"]
        _require(
            _is_count(layer) and 0 <= layer < layers,
            f"token_reduction: layer is the last one with all patches, from 0 to {layers - 1}, got {layer!r}",
        )
        number, version, has_fuser = (reduction[name] for name in ("num_tokens", "version", "has_fuser"))
        _require(
            _is_count(number) and 1 <= number < patches,
            f"token_reduction: num_tokens is from 1 to {patches - 1}, fewer than the patches, got {number!r}",
        )
        _require(version in ("1", "1.1"), f'token_reduction: version is "1" or "1.1", in quotes, got {version!r}')
        _require(isinstance(has_fuser, bool), f"token_reduction: has_fuser is true or false, got {has_fuser!r}")
        _require(
            has_fuser or (self.pooling.startswith("cls") and self.pooling != "cls_mean"),
            "token_reduction of kind 'learn' leaves no patches to pool: expected has_fuser=True or a pooling of class "
            f"tokens, got pooling {self.pooling!r}",
        )

    def _validate_halting(self, reduction):
        layers, value = self.num_hidden_layers, reduction.get
        for name, is_valid, what in (
            ("scale", lambda x: x > 0, "above 0"),
            ("center", lambda x: True, "that is finite"),
            ("eps", lambda x: 0 < x < 1, "between 0 and 1"),
            ("ponder_weight", lambda x: x >= 0, "of 0 or more"),
            ("distribution_weight", lambda x: x >= 0, "of 0 or more"),
        ):
            _require(
                _is_number(value(name)) and is_valid(value(name)),
                f"token_reduction: {name} is a number {what}, got {value(name)!r}",
            )
        for name in ("has_halting_cls_token", "has_removal"):
            is_valid = isinstance(value(name), bool)
            _require(is_valid, f"token_reduction: {name} is true or false, got {value(name)!r}")
        default = max(2, round(0.75 * layers))
        target = reduction["target_layer"] = (
            default if reduction["target_layer"] is None else reduction["target_layer"]
        )
        _require(layers > 1, "token_reduction of kind 'halt' needs two layers or more, got num_hidden_layers 1")
        _require(
            _is_count(target) and 2 <= target <= layers,
            f"token_reduction: target_layer is a layer from 2 to {layers}, got {target!r}",
        )
        moved = [name for name in ("num_test_time_registers", "num_gated_registers") if getattr(self, name)]
        _require(
            not moved or (moved == ["num_gated_registers"] and not reduction["has_halting_cls_token"]),
            f"token_reduction of kind 'halt' cannot move registers with rules of their own, got a model with {moved}: "
            "load it with token_reduction=None",
        )

    def _set_stages(self, out_features, out_indices):
        self.stage_names = ["stem"] + [f"stage{layer}" for layer in range(1, self.num_hidden_layers + 1)]
        self._out_features = self._out_indices = None
        for name, value, kind in (("out_features", out_features, str), ("out_indices", out_indices, int)):
            _require(
                value is None or (isinstance(value, (list, tuple)) and all(isinstance(each, kind) for each in value)),
                f"expected {name} to be None or a list of stages, got {value!r}",
            )
        if out_features is not None:
            self.out_features = out_features
            _require(
                out_indices is None or [i % len(self.stage_names) for i in out_indices] == self.out_indices,
                f"out_features {out_features} and out_indices {out_indices} name different stages: pass one of them",
            )
        else:
            self.out_indices = out_indices
        # One spelling, so that heads may index with it: -1 becomes the number of the last stage.
        self._out_indices = [self.stage_names.index(name) for name in self._out_features]

    def _validate(self):
        self._validate_sizes()
        self._validate_attention()
        self._validate_tokens()
        self._validate_pooling()
        self._validate_added_registers()
        self._validate_positions()
        self.token_reduction = self.reduction  # with its defaults
        for name, allowed in (
            ("hidden_act", ACTIVATIONS),
            ("norm_type", NORMS),
            ("rope_style", ROPE_STYLES),
            ("interpolate_mode", INTERPOLATIONS),
            ("attention_gate", (None, *ATTENTION_GATES)),
            ("relative_position_bias", (None, *POSITION_BIASES)),
            ("drop_path_schedule", DROP_PATH_SCHEDULES),
            ("drop_path_mode", DROP_PATH_MODES),
            ("masked_target", MASKED_TARGETS),
        ):
            self._expect(name, getattr(self, name) in allowed, f"to be one of {', '.join(map(str, allowed))}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            self._expect(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        _require(
            0 < self.min_depth < self.max_depth,
            f"expected 0 < min_depth < max_depth, got min_depth {self.min_depth} and max_depth {self.max_depth}",
        )

    def _validate_types(self):
        """Check the types of numbers and booleans, which a damaged file may hold anything in place of."""
        for name in (
            *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_channels", "num_cls_tokens"),
            *("num_depth_bins", "masked_target_size"),
        ):
            self._expect(name, is_positive(getattr(self, name)), "to be a positive integer")
        self._expect("num_hidden_layers", self.num_hidden_layers <= MOST_LAYERS, f"to be at most {MOST_LAYERS}")
        for name in (
            *("layer_norm_eps", "interpolate_offset", "rope_theta", "hidden_dropout_prob", "drop_path_rate"),
            *("attention_probs_dropout_prob", "min_depth", "max_depth", "initializer_range", "rope_grid_offset"),
        ):
            value = getattr(self, name)
            self._expect(name, _is_number(value) and value >= 0, "to be a finite number, 0 or more")
        for name in ("layer_scale_init_value", "rope_shift", "rope_jitter", "rope_rescale"):
            value = getattr(self, name)
            self._expect(name, value is None or _is_number(value), "to be None or a finite number")
        for name, value in vars(self).items():
            is_truth = name.startswith("has_") or name in ("interpolate_antialias", "apply_layernorm")
            is_truth |= name in ("reshape_hidden_states", "rope_columns_first")
            self._expect(name, not is_truth or isinstance(value, (bool, int)), "to be true or false")

    def _validate_sizes(self):
        self._expect("intermediate_size", is_positive(self.intermediate_size), "to be a positive integer")
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}",
        )
        for name in ("image_size", "patch_size"):
            is_valid = _are_sides(getattr(self, name))
            self._expect(name, is_valid, "to be a positive integer or a pair (rows, columns) of them")
        _require(
            all(side % patch == 0 for side, patch in zip(_pair(self.image_size), self.patch_shape)),
            f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}",
        )

    def _validate_attention(self):
        heads, layers = self.num_attention_heads, self.num_hidden_layers
        value = self.num_key_value_heads
        is_list = isinstance(value, list)
        wanted = f"to be a number or a list of num_hidden_layers ({layers}) numbers"
        self._expect("num_key_value_heads", not is_list or len(value) == layers, wanted)
        for count in value if is_list else [heads if value is None else value]:
            is_divisor = is_positive(count) and heads % count == 0
            self._expect("num_key_value_heads", is_divisor, f"to divide num_attention_heads ({heads})")
        _require(
            not self.has_mlp_norm or not self.register_neurons,
            "register_neurons move activations that has_mlp_norm=True would norm",
        )
        _require(
            self.layer_scale_init_value is not None or self.has_mlp_layer_scale,
            "has_mlp_layer_scale=False needs a layer_scale_init_value",
        )

    def _validate_pooling(self):
        is_attention = self.pooling == "attention"
        heads = self.num_attention_heads if self.pooling_num_heads is None else self.pooling_num_heads
        is_divisor = is_positive(heads) and self.hidden_size % heads == 0
        self._expect("pooling_num_heads", is_divisor, f"to divide hidden_size ({self.hidden_size})")
        width = self.pooling_intermediate_size
        is_width = width is None or (_is_count(width) and width >= 0)
        self._expect("pooling_intermediate_size", is_width, "to be None, 0 or a positive integer")
        is_used = self.pooling_num_heads is not None or width is not None
        is_used |= not (self.has_pooling_query and self.has_pooling_bias)
        _require(
            is_attention or not is_used, f"fields of attention pooling need pooling='attention', got {self.pooling!r}"
        )
        chosen = self.pooled_cls_tokens
        _require(
            chosen is None or self.pooling == "cls_concat",
            f"pooled_cls_tokens need pooling='cls_concat', got {self.pooling!r}",
        )
        is_choice = isinstance(chosen, list) and chosen and set(chosen) <= set(range(self.num_cls_tokens))
        limits = f"in 0 ... num_cls_tokens - 1 ({self.num_cls_tokens - 1})"
        self._expect("pooled_cls_tokens", chosen is None or is_choice, limits)
        _require(
            self.has_final_norm or not self.has_pooled_norm,
            "has_pooled_norm=True moves the final norm behind the pooling, but has_final_norm=False",
        )

    def _validate_tokens(self):
        is_number = _is_count(self.num_register_tokens) and self.num_register_tokens >= 0
        self._expect("num_register_tokens", is_number, "to be 0 or a positive integer")
        self._expect("pooling", self.pooling in POOLINGS, f"to be one of {', '.join(POOLINGS)}")
        _require(
            self.has_cls_token or not self.has_distillation_token,
            "has_distillation_token=True needs has_cls_token=True",
        )
        _require(
            self.has_cls_token or self.pooling in ("mean", "attention", "prr"),
            f"pooling={self.pooling!r} reads the class token, but has_cls_token=False: use pooling='mean'",
        )
        _require(
            self.num_cls_tokens == 1 or (self.has_cls_token and not self.has_distillation_token),
            f"num_cls_tokens={self.num_cls_tokens} needs has_cls_token=True and has_distillation_token=False",
        )
        _require(
            self.has_distillation_token or self.pooling != "cls_distillation",
            "pooling='cls_distillation' needs has_distillation_token=True",
        )
        size = self.projection_size
        self._expect("projection_size", size is None or is_positive(size), "to be None or a positive integer")
        _require(
            not self.has_pooled_norm or self.pooling == "mean",
            f"has_pooled_norm=True needs pooling='mean', got {self.pooling!r}",
        )
        layers = self.num_hidden_layers
        is_depth = _is_count(self.num_classifier_layers) and 1 <= self.num_classifier_layers <= layers
        self._expect("num_classifier_layers", is_depth, f"in 1 ... num_hidden_layers ({layers})")
        _require(
            self.num_classifier_layers == 1 or self.pooling in ("cls", "cls_mean"),
            f"num_classifier_layers={self.num_classifier_layers} concatenates class tokens: it needs pooling='cls' or "
            f"'cls_mean', got {self.pooling!r}",
        )

    def _validate_added_registers(self):
        count, gated, registers = self.num_test_time_registers, self.num_gated_registers, self.num_register_tokens
        is_number = _is_count(count) and 0 <= count <= registers
        self._expect("num_test_time_registers", is_number, f"in 0 ... num_register_tokens ({registers})")
        is_number = _is_count(gated) and 0 <= gated <= registers - count
        limits = f"in 0 ... {registers - count}, the registers without test-time registers"
        self._expect("num_gated_registers", is_number, limits)
        _require(
            count > 0 or not self.register_neurons,
            "register_neurons need a register to move to: set num_test_time_registers=1",
        )
        _require(
            count + gated == 0 or self.rope_style != "capi",
            "rope_style='capi' gives every register a position, and a register that is added to a finished model has "
            "none",
        )
        for layer, units in self.register_neurons.items():
            _require(
                layer.isdigit() and 1 <= int(layer) <= self.num_hidden_layers,
                f"register_neurons: expected layers in 1 ... {self.num_hidden_layers}, got {layer!r}",
            )
            _require(
                len(units) == len(set(units)) > 0
                and all(_is_count(unit) and 0 <= unit < self.intermediate_size for unit in units),
                f"register_neurons: expected distinct units in 0 ... {self.intermediate_size - 1} in layer {layer}, "
                f"got {units}",
            )

    def _validate_positions(self):
        kind = self.position_embedding_type
        known = ", ".join(POSITION_EMBEDDINGS)
        self._expect("position_embedding_type", kind in POSITION_EMBEDDINGS, f"to be one of {known}")
        _require(
            not self.has_prefix_positions or (kind in ("learned", "learned_rope") and self.has_cls_token),
            "has_prefix_positions=True needs position_embedding_type='learned' and has_cls_token=True",
        )
        _require(
            kind != "sincos" or self.hidden_size % 4 == 0,
            f"position_embedding_type='sincos' needs a hidden_size divisible by 4, got {self.hidden_size}",
        )
        _require(
            not self.has_rope or self.hidden_size // self.num_attention_heads % 4 == 0,
            f"position_embedding_type={kind!r} needs a width per head divisible by 4, got hidden_size "
            f"{self.hidden_size} with {self.num_attention_heads} heads",
        )
        self._validate_rope()

    def _validate_rope(self):
        for name in ("rope_shift", "rope_jitter", "rope_rescale"):
            value = getattr(self, name)
            _require(value is None or self.has_rope, f"{name}={value} needs position_embedding_type='rope'")
            _require(value is None or self.rope_style == "dinov3", f"{name}={value} needs rope_style='dinov3'")
        for name in ("rope_jitter", "rope_rescale"):
            value = getattr(self, name)
            self._expect(name, value is None or value >= 1, "to be None or at least 1")
        is_capi = self.rope_style == "capi"
        _require(
            self.rope_style == "dinov3" or self.has_rope,
            f"rope_style={self.rope_style!r} needs position_embedding_type='rope' or 'learned_rope'",
        )
        grid = self.rope_reference_grid
        is_grid = grid is None or _are_sides(grid)
        self._expect("rope_reference_grid", is_grid, "to be None or a pair (rows, columns) of positive integers")
        is_axial = self.rope_style == "axial"
        _require(
            is_axial or (grid is None and not self.rope_grid_offset),
            f"rope_reference_grid and rope_grid_offset need rope_style='axial', got {self.rope_style!r}",
        )
        _require(
            self.rope_style in ("axial", "mixed") or not self.rope_columns_first,
            f"rope_columns_first=True needs rope_style='axial' or 'mixed', got {self.rope_style!r}",
        )
        _require(
            not is_capi or self.num_register_tokens % 4 == 0,
            f"rope_style='capi' puts a quarter of the registers on each side of the image: expected "
            f"num_register_tokens to be a multiple of 4, got {self.num_register_tokens}",
        )
        self._expect("rope_theta", self.rope_theta > 0, "to be positive")

    def _expect(self, name, is_valid, wanted):
        _require(is_valid, f"expected {name} {wanted}, got {getattr(self, name)!r}")


class TwoTowersConfig(PretrainedConfig):
    """Base of the configurations that hold one of an image tower and one of a text tower of transformers."""

    sub_configs = {"vision_config": ViTWithRegistersConfig, "text_config": AutoConfig}

    def make_towers(self, vision_config, text_config, *, default):
        """Copy the configurations, or make them from their fields; to call before the constructor of the library,
        which hands the attention back end on to both.

        Args:
            default: `model_type` of the text tower if its fields name none.

        Raises:
            ValueError: neither a configuration nor fields, or a text tower that transformers does not know.
        """
        for name, value in (("vision_config", vision_config), ("text_config", text_config)):
            if not isinstance(value, (PretrainedConfig, dict, type(None))):
                raise ValueError(f"expected {name} to be a configuration or a dictionary of its fields, got {value!r}")
        self.vision_config = _make_tower(vision_config, default=ViTWithRegistersConfig.model_type)
        self.text_config = _make_tower(text_config, default=default)

    def adopt_towers(self, vision_config, text_config):
        """Hold the very configurations of two towers, so that what is changed in them is saved."""
        self.vision_config, self.text_config = vision_config, text_config
        if self._name_or_path:  # where the image processor lies
            vision_config._name_or_path = self._name_or_path
            vision_config._commit_hash = getattr(self, "_commit_hash", None)

    def to_diff_dict(self) -> dict:
        """The saved fields; of each tower the architecture only."""
        fields = super().to_diff_dict()
        for tower in self.sub_configs:
            fields[tower] = getattr(self, tower).to_diff_dict()
            for name in _NOT_OF_A_TOWER:
                fields[tower].pop(name, None)
        return fields


def _make_tower(fields, *, default):
    # There is no check for our own class: remote code may have loaded a second copy of it.
    if isinstance(fields, PretrainedConfig):
        return copy.deepcopy(fields)
    fields = dict(fields or {"model_type": default})
    kind = fields.pop("model_type", default)
    if kind == ViTWithRegistersConfig.model_type:
        return ViTWithRegistersConfig(**fields)
    return AutoConfig.for_model(kind, **fields)


class OtherBackboneConfig(ViTWithRegistersConfig):
    """Base of the configurations of backbones that are no Vision Transformers.

    Of the fields of `ViTWithRegistersConfig` each knows those that its constructor has. The others have fixed values,
    which users can neither set nor find in `config.json`.
    """

    _title = "this backbone"

    def __init__(self, **kwargs):  # transformers 5 makes one for a class without, which sets what it gets and no more
        super().__init__(**kwargs)

    @classmethod
    def _lacking(cls):
        vit, own = (set(inspect.signature(kind.__init__).parameters) for kind in (ViTWithRegistersConfig, cls))
        return vit - own

    def _check_names(self, given):
        """Refuse fields that the architecture lacks."""
        given = {name for name, value in given.items() if name != "has_mask_token" or value}
        lacking = ", ".join(sorted(self._lacking() & given))
        self._require(
            not lacking,
            f"expected fields of {self._title}, got {lacking}, which only the Vision Transformer has: remove them, or "
            "use ViTWithRegistersConfig",
        )

    def _require(self, is_true, message):
        if not is_true:
            raise ValueError(f"{type(self).__name__}: {message}.")

    def to_dict(self):
        """The fields of this architecture."""
        return {name: value for name, value in super().to_dict().items() if name not in self._lacking()}


def _pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool)


def is_positive(value):
    return _is_count(value) and value > 0


def _are_sides(value):
    return len(_pair(value)) == 2 and all(map(is_positive, _pair(value)))


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require(is_true, message):
    if not is_true:
        raise ValueError(f"ViTWithRegistersConfig: {message}.")


__all__ = ["OtherBackboneConfig", "ViTWithRegistersConfig"]
