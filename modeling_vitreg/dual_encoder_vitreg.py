"""Dual encoder: a Vision Transformer with registers and a text tower of transformers, as CLIP (Radford et al. 2021).

Both towers map to one embedding space, and dot products measure similarity. The image embedding is made from the
pooled vector only, never from registers. Tensors have the names of transformers' `VisionTextDualEncoderModel`, which
can load the same files.

Letters for shapes: B images, T texts, N tokens of a text, E width of the common space.

This file travels next to the weights, with the two files of the image tower, and runs without the package.
"""

import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_vitreg import TwoTowersConfig
from .modeling_vitreg import ViTWithRegistersMixin, ViTWithRegistersModel, classification_loss, set_initial


# The names under which transformers finds the model; its pipeline looks for the second.
DUAL_ENCODER_AUTO_CLASSES = ("AutoModel", "AutoModelForZeroShotImageClassification")


class ViTWithRegistersDualEncoderConfig(TwoTowersConfig):
    """Architecture of a dual encoder. The defaults are those of CLIP ViT-B/16.

    Args:
        vision_config: `ViTWithRegistersConfig`, or a dictionary of its fields.
        text_config: configuration of a text tower of transformers, or a dictionary of its fields and its `model_type`,
            by default that of CLIP.
        projection_dim: width E of the embedding space.
        logit_scale_init_value: initial logarithm of the inverse temperature.

    Raises:
        ValueError: a value that the image tower does not allow, or a text tower that transformers does not know.

    Example:
        >>> from transformers import CLIPTextConfig
        >>> from modeling_vitreg import ViTWithRegistersConfig, ViTWithRegistersDualEncoderConfig
        >>> tower = ViTWithRegistersConfig.from_preset("small/16")
        >>> config = ViTWithRegistersDualEncoderConfig(tower, CLIPTextConfig(), projection_dim=512)
        >>> config.vision_config.num_register_tokens
        4
    """

    model_type = "vitreg_dual_encoder"
    _auto_class = "AutoConfig"

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        projection_dim=512,
        logit_scale_init_value=2.6592,
        **kwargs,
    ):
        if not isinstance(projection_dim, int) or isinstance(projection_dim, bool) or projection_dim < 1:
            raise ValueError(f"expected projection_dim to be a positive integer, got {projection_dim!r}")
        if not isinstance(logit_scale_init_value, (int, float)) or not math.isfinite(logit_scale_init_value):
            raise ValueError(f"expected logit_scale_init_value to be a finite number, got {logit_scale_init_value!r}")
        self.make_towers(vision_config, text_config, default="clip_text_model")
        self.projection_dim = projection_dim
        self.logit_scale_init_value = logit_scale_init_value
        super().__init__(**kwargs)


@dataclass
class ViTWithRegistersDualEncoderOutput(ModelOutput):
    """Output of `ViTWithRegistersDualEncoderModel`, with the fields of transformers' `CLIPOutput`.

    Args:
        loss: contrastive, on request.
        logits_per_image: (B, T), scaled cosine similarities of images and texts.
        logits_per_text: (T, B), the transpose.
        text_embeds: (T, E), L2-normalised.
        image_embeds: (B, E), L2-normalised.
        text_model_output: output of the text tower.
        vision_model_output: output of the image tower, a `ViTWithRegistersModelOutput` with all tokens by name.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_model_output: ModelOutput | None = None
    vision_model_output: ModelOutput | None = None

    def to_tuple(self) -> tuple:
        """The fields that are not None, in order, with the outputs of the towers as tuples."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


class ViTWithRegistersDualEncoderModel(ViTWithRegistersMixin, PreTrainedModel):
    """Embed images and texts in one space.

    Args:
        config: the architecture.
        vision_model: `ViTWithRegistersModel` to use; by default a new one from `config.vision_config`.
        text_model: text tower to use; by default a new one from `config.text_config`.
    """

    config_class = ViTWithRegistersDualEncoderConfig
    base_model_prefix = "dual_encoder"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _auto_class = "AutoModel"
    _no_split_modules = []  # each tower has its own
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: ViTWithRegistersDualEncoderConfig,
        vision_model: ViTWithRegistersModel | None = None,
        text_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        if vision_model is None:
            vision_model = ViTWithRegistersModel(config.vision_config)
        if text_model is None:
            text_model = AutoModel.from_config(config.text_config)
        self.vision_model, self.text_model = vision_model, unwrap_text_model(text_model)
        self._init_text_weights = text_model._init_weights
        config.adopt_towers(self.vision_model.config, self.text_model.config)
        self.visual_projection = nn.Linear(config.vision_config.pooled_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        return_loss: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ViTWithRegistersDualEncoderOutput | tuple:
        """Similarity of every image and every text.

        Args:
            input_ids: (T, N), from the tokenizer.
            pixel_values: images (B, C, height, width).
            attention_mask: (T, N), zero after the end of a text.
            position_ids, token_type_ids: (T, N), for text towers that have them.
            return_loss: return the contrastive loss; image i and text i are a pair.
            output_attentions, output_hidden_states: of both towers; transformers 5.0 records none of CLIP's text.
            return_dict: False for a tuple.

        Raises:
            ValueError: images or texts are missing, or their numbers differ and a loss is requested.
        """
        if input_ids is None or pixel_values is None:
            raise ValueError(
                f"expected texts and images, got no {'pixel_values' if pixel_values is None else 'input_ids'}: for "
                "one of them alone use get_text_features or get_image_features"
            )
        wanted = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        images = self.vision_model(pixel_values, **wanted, return_dict=True)
        texts = self._read_texts(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            **wanted,
        )
        image_embeds = F.normalize(self.visual_projection(images.pooler_output), dim=-1)
        text_embeds = F.normalize(self.text_projection(texts.pooler_output), dim=-1)
        logits_per_text = text_embeds @ image_embeds.t() * self.logit_scale.exp()  # [T, E] x [B, E] -> [T, B]
        output = ViTWithRegistersDualEncoderOutput(
            loss=matching_loss(logits_per_text) if return_loss else None,
            logits_per_image=logits_per_text.t(),
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=texts,
            vision_model_output=images,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Embeddings (B, E) of images (B, C, height, width), not normalised."""
        return self.visual_projection(self.vision_model(pixel_values, return_dict=True).pooler_output)

    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Embeddings (T, E) of texts, not normalised; arguments as in `forward`."""
        texts = self._read_texts(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, token_type_ids=token_type_ids
        )
        return self.text_projection(texts.pooler_output)

    def _auto_map(self) -> dict:
        models = dict.fromkeys(DUAL_ENCODER_AUTO_CLASSES, "dual_encoder_vitreg.ViTWithRegistersDualEncoderModel")
        return {"AutoConfig": "dual_encoder_vitreg.ViTWithRegistersDualEncoderConfig", **models}

    def _save_image_processor(self, folder: str | os.PathLike) -> None:
        # Up to 4.57 a loader of remote code copies only the files that this one names itself.
        from .image_processing_vitreg import PROCESSORS  # noqa: F401
        from .positions_vitreg import rotate  # noqa: F401
        from .token_reduction_vitreg import make_tracker  # noqa: F401

        self.vision_model._save_image_processor(folder)

    def _read_texts(self, input_ids: Tensor, **inputs) -> ModelOutput:
        """Run the text tower with the inputs that are not None: not every tower takes every argument."""
        inputs = {name: value for name, value in inputs.items() if value is not None}
        output = self.text_model(input_ids=input_ids, **inputs)
        if getattr(output, "pooler_output", None) is None:
            raise ValueError(
                f"expected a text tower with a pooled vector, `pooler_output`, got {type(self.text_model).__name__}: "
                "use another one, such as CLIPTextModel or BertModel"
            )
        return output

    def _init_weights(self, module: nn.Module) -> None:
        # A tower initialises itself where transformers still knows it as a model, which an unwrapped one is not; what
        # joins them starts as in the model of transformers that has these names.
        if module is self:
            set_initial(self.logit_scale, nn.init.constant_, float(self.config.logit_scale_init_value))
        elif module is self.visual_projection or module is self.text_projection:
            std = getattr(self.config.text_config, "initializer_range", 0.02)
            set_initial(module.weight, nn.init.normal_, std=std)
        else:
            self._init_text_weights(module)


def matching_loss(logits: Tensor) -> Tensor:
    """Symmetric contrastive loss: cross-entropy of each image over all texts, and of each text over all images.

    for each pair i:
        add  - log softmax_j(logits[i, j])[i] / 2
        add  - log softmax_j(logits[j, i])[i] / 2
    divide by the number of pairs

    Args:
        logits: (B, B); pairs are on the diagonal.

    Raises:
        ValueError: unequal numbers of images and texts.
    """
    if logits.shape[0] != logits.shape[1]:
        raise ValueError(
            f"expected as many texts as images, in pairs, got logits of shape {tuple(logits.shape)}: leave the loss "
            "out, or give each image its text"
        )
    pairs = torch.arange(len(logits), device=logits.device)
    return (classification_loss(logits, pairs) + classification_loss(logits.t(), pairs)) / 2


def unwrap_text_model(text_model: nn.Module) -> nn.Module:
    """The innermost network of a text tower. Shim: up to 5.0, CLIP and SigLIP hold it as `text_model`, which adds a
    prefix to the names of its tensors; without it the names are the same in every version."""
    return getattr(text_model, "text_model", text_model)


__all__ = [
    "ViTWithRegistersDualEncoderConfig",
    "ViTWithRegistersDualEncoderModel",
    "ViTWithRegistersDualEncoderOutput",
]
