"""Zero-shot classification: the class whose prompts are most similar to the embedding of the image.

Letters: B images, C classes, T prompts of a class, E width of the embedding.

Source: Radford et al. 2021, arXiv 2103.00020, section 3.1.4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer

from modeling_vitreg.features import Encoder, extract_features
from modeling_vitreg.modes import eval_mode


_LONGEST_PROMPT = 512  # tokens; tokenizers without a limit report a huge number


@dataclass(frozen=True)
class ZeroShotSettings:
    """Prompts of the classes.

    Args:
        templates: texts with one "{}" each for the name of the class.
    """

    templates: tuple[str, ...] = ("a photo of a {}.", "a picture of a {}.")

    def __post_init__(self):
        if not self.templates or any(template.count("{}") != 1 for template in self.templates):
            raise ValueError(f"expected templates with one {{}} each, got {self.templates}")


@torch.no_grad()
def embed_images(encoder: Encoder, pixel_values: Tensor) -> Tensor:
    """Embeddings (B, E) of images, in the space of texts if the model has one.

    They are `get_image_features` of a dual encoder, `image_embeds` of a model with a projection, and otherwise the
    normed class token, or the mean of the normed patches if the model has no class token.
    """
    model, pixels = encoder.model, pixel_values.to(encoder.device, encoder.dtype)
    with eval_mode(model):
        if hasattr(model, "get_image_features"):
            return _tensor_of(model.get_image_features(pixel_values=pixels))
        if getattr(getattr(model, "config", None), "projection_size", None):
            return model(pixels).image_embeds
    (tokens,) = extract_features(encoder, pixel_values, is_normed=True)
    return tokens.cls_token if encoder.has_cls_token else tokens.patch_tokens.mean(dim=1)


@torch.no_grad()
def embed_classes(
    model: nn.Module, tokenizer: Callable, class_names: Sequence[str], *, templates: Sequence[str]
) -> Tensor:
    """Embeddings of classes: the mean over prompts of text embeddings of norm 1, normalised again.

    Args:
        model: dual encoder with `get_text_features`.
        tokenizer: tokenizer of transformers.
        class_names: C names.
        templates: T texts with one "{}" each.

    Returns:
        (C, E) in float32 on the device of the model.

    Raises:
        ValueError: the model has no text tower.
    """
    if not hasattr(model, "get_text_features"):
        raise ValueError(
            f"expected a dual encoder with `get_text_features`, got {type(model).__name__}: zero-shot classification "
            "needs a text tower or embeddings of the classes"
        )
    is_limited = getattr(tokenizer, "model_max_length", _LONGEST_PROMPT + 1) <= _LONGEST_PROMPT
    device, classes = next(model.parameters()).device, []
    with eval_mode(model):
        for name in class_names:
            prompts = [template.format(name) for template in templates]
            # Some towers read the token at a fixed position, and were trained on prompts of full length.
            inputs = tokenizer(
                prompts, padding="max_length" if is_limited else True, truncation=is_limited, return_tensors="pt"
            )
            texts = _tensor_of(model.get_text_features(**inputs.to(device))).float()  # [T, E]
            classes.append(F.normalize(F.normalize(texts, dim=1).mean(dim=0), dim=0))
    return torch.stack(classes)


def similarities(embeddings: Tensor, class_embeddings: Tensor) -> Tensor:
    """Cosines (B, C) of images (B, E) and classes (C, E).

    Raises:
        ValueError: the embeddings have different widths.
    """
    if embeddings.shape[1] != class_embeddings.shape[1]:
        raise ValueError(
            f"expected embeddings of one space, got images of width {embeddings.shape[1]} and classes of width "
            f"{class_embeddings.shape[1]}"
        )
    images, classes = (F.normalize(value.float(), dim=1) for value in (embeddings, class_embeddings))
    return images @ classes.to(images).T


def _tensor_of(output: object) -> Tensor:
    """The tensor of what transformers returns: a tensor, or from version 5 on an output that contains it."""
    return output if isinstance(output, Tensor) else output.pooler_output


def load_tokenizer(encoder: Encoder) -> Callable | None:
    """The tokenizer in the folder of a dual encoder; None for a model without a text tower."""
    if not hasattr(encoder.model, "get_text_features"):
        return None
    return AutoTokenizer.from_pretrained(encoder.name)
