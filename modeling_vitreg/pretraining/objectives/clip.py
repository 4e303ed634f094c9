"""CLIP: images and captions are matched within a batch.

The image tower is ours, with registers after the positions and before the first norm; the text tower is that of
transformers. Both are saved as one `ViTWithRegistersDualEncoderModel`, with code, tokenizer and image processor. Only
the pooled vector enters the loss, never a register.

Letters: B pairs, E width of the common space, N tokens of a caption, C classes.
Source: Radford et al. 2021, arXiv 2103.00020; OpenCLIP.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from modeling_vitreg.distributed import SINGLE_PROCESS, DistributedContext
from modeling_vitreg.dual_encoder_vitreg import (
    ViTWithRegistersDualEncoderConfig,
    ViTWithRegistersDualEncoderModel,
    matching_loss,
)
from modeling_vitreg.modeling_vitreg import ViTWithRegistersModel

from .adaptation import AdaptationSettings
from .head_objective import HeadObjective
from .objective import DataSummary, Objective, Panel


LARGEST_SCALE = math.log(100)
_WORD = re.compile(r"\w+")
_SPECIAL = ("<pad>", "<start>", "<unknown>", "<end>")


@dataclasses.dataclass(frozen=True)
class CLIPSettings(AdaptationSettings):
    """Settings of CLIP. Defaults are those of OpenCLIP's ViT-B/16.

    Args:
        words: words of the captions, each a token; found in the data where neither they nor a tokenizer are given.
        tokenizer: folder or Hub name of a tokenizer, in the place of words.
        text_model: folder or Hub name of a CLIP text tower to start from; empty for a new one of the sizes below.
        text_width, num_text_layers, num_text_heads: sizes of a new text tower.
        num_tokens: length of a caption, its end included; longer ones are cut.
        projection_size: E.
        logit_scale: the logarithm of the inverse temperature, at first; never above log 100.
        class_names: names of the labels that zero-shot accuracy is measured with; found in the data.
        prompt: what a class is called to the text tower, with {} for its name.
    """

    words: tuple[str, ...] = ()
    tokenizer: str = ""
    text_model: str = ""
    text_width: int = 512
    num_text_layers: int = 12
    num_text_heads: int = 8
    num_tokens: int = 77
    projection_size: int = 512
    logit_scale: float = 2.6592
    class_names: tuple[str, ...] = ()
    prompt: str = "a picture of a {}."

    def __post_init__(self):
        super().__post_init__()
        if not (self.words or self.tokenizer):
            raise ValueError("settings: expected words (taken from the captions) or a tokenizer, got neither")
        if "{}" not in self.prompt:
            raise ValueError(f"settings: expected prompt to hold {{}} in place of the class name, got {self.prompt!r}")


class CLIP(HeadObjective):
    """An image tower, a text tower, their projections and the scale of their products.

    Args:
        backbone: the image tower.
        crops: one global view.

    Raises:
        ValueError: several views, or a backbone with a mask token.
    """

    description = "matching of images with their captions (CLIP)"
    citation = "clip"
    settings_class = CLIPSettings
    annotation = "text"
    metrics = ("zero_shot",)
    panels = (*Objective.panels, Panel("Accuracy on evaluation images", {"zero_shot": "zero-shot"}, unit="%"))

    def __init__(self, backbone: ViTWithRegistersModel, **options: Any):
        super().__init__(backbone, **options)
        settings = self.settings
        self.make_text = CaptionTokens(make_tokenizer(settings), settings.num_tokens)
        text = _make_text_model(settings, self.make_text.tokenizer)
        config = ViTWithRegistersDualEncoderConfig(
            backbone.config,
            text.config,
            projection_dim=settings.projection_size,
            logit_scale_init_value=settings.logit_scale,
        )
        self.model = ViTWithRegistersDualEncoderModel(config, vision_model=backbone, text_model=text)
        self.adapt_backbone()

    @classmethod
    def settings_from_data(cls, settings: dict, data: DataSummary) -> dict:
        """Words of the captions and names of classes; see `Objective`."""
        found: dict = {}
        if not (settings.get("words") or settings.get("tokenizer")):
            if data.texts is None:
                raise ValueError(
                    "the words of a stream are unknown: name a tokenizer with --set settings.tokenizer=..., or leave "
                    "--streaming out"
                )
            found["words"] = find_words(data.texts())
        if data.class_names and not settings.get("class_names"):
            found["class_names"] = list(data.class_names)
        return found

    @classmethod
    def settings_for_estimate(cls, settings: dict) -> dict:
        """The 49,408 tokens of CLIP in place of the words of the data."""
        if settings.get("words") or settings.get("tokenizer"):
            return settings
        return settings | {"words": [f"word{number}" for number in range(49408 - len(_SPECIAL))]}

    @property
    def trained(self) -> dict[str, nn.Module]:
        joints = nn.ModuleList([self.model.visual_projection, self.model.text_projection])
        scale = nn.ParameterList([self.model.logit_scale])
        return {"backbone": self.encoder, "text": self.model.text_model, "projections": joints, "scale": scale}

    def encoder_of(self, model: ViTWithRegistersDualEncoderModel) -> ViTWithRegistersModel:
        return model.vision_model

    def write(self, model: ViTWithRegistersDualEncoderModel, folder: pathlib.Path) -> None:
        super().write(model, folder)
        save_tokenizer(self.make_text.tokenizer, folder)

    def after_step(self, *, step: int) -> None:
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, LARGEST_SCALE)

    def forward(self, batch: dict[str, Tensor], *, step: int) -> dict[str, Tensor]:
        """The contrastive loss, as `total`; with the `scale`.

        Args:
            batch: `global_views` (1, B, 3, h, w) and `texts` (B, N) with -1 after the end.
            step: number of the step.
        """
        images = embed_images(self.model, batch["global_views"].flatten(0, 1))
        texts = self.embed_texts(self.model, batch["texts"])
        scale = self.model.logit_scale.exp()
        return {"total": contrastive_loss(images, texts, scale, processes=self.processes), "scale": scale.detach()}

    def embed_texts(self, model: ViTWithRegistersDualEncoderModel, tokens: Tensor) -> Tensor:
        """(B, N) with -1 after the end -> (B, E), of length one."""
        padding = self.make_text.tokenizer.pad_token_id
        texts = model.get_text_features(tokens.masked_fill(tokens < 0, padding), (tokens >= 0).long())
        return F.normalize(texts, dim=-1)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, images: Tensor, targets: dict[str, Tensor]) -> dict[str, float]:
        """`zero_shot`: share of evaluation images nearest to the name of their class; see `Objective`."""
        if not self.settings.class_names or "labels" not in targets:
            return {}
        return {"zero_shot": (self.predict(model, images) == targets["labels"]).float().mean().item()}

    def _predict(self, model: nn.Module, images: Tensor) -> Tensor:
        prompts = [self.make_text(self.settings.prompt.format(name)) for name in self.settings.class_names]
        classes = self.embed_texts(model, torch.stack(prompts).to(model.device))  # [C, E]
        return (embed_images(model, images) @ classes.T).argmax(dim=1)

    def example_targets(self, num_images: int) -> dict[str, Tensor]:
        return {"texts": torch.zeros((num_images, self.settings.num_tokens), dtype=torch.long)}


def embed_images(model: ViTWithRegistersDualEncoderModel, images: Tensor) -> Tensor:
    """(B, 3, h, w) -> (B, E), of length one."""
    return F.normalize(model.get_image_features(images), dim=-1)


class CaptionTokens:
    """Captions to tokens (N,), with -1 after the end; what the workers of a loader call."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, num_tokens: int):
        self.tokenizer, self.num_tokens = tokenizer, num_tokens

    def __call__(self, caption: str) -> Tensor:
        """Tokens of a caption, cut to fit, its end kept."""
        found = self.tokenizer(caption, truncation=True, max_length=self.num_tokens)["input_ids"]
        return F.pad(torch.tensor(found), (0, self.num_tokens - len(found)), value=-1)


def find_words(captions) -> list[str]:
    """The words of captions, sorted, in lower case."""
    return sorted({word for caption in captions for word in _WORD.findall(caption.lower())})


def make_tokenizer(settings: CLIPSettings) -> PreTrainedTokenizerFast:
    """The tokenizer that is named, or one that knows the words and puts a start and an end around them."""
    if settings.tokenizer:
        return AutoTokenizer.from_pretrained(settings.tokenizer)
    known = {word: number for number, word in enumerate((*_SPECIAL, *settings.words))}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unknown>"))
    tokenizer.normalizer = normalizers.Lowercase()
    # Punctuation is no word.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\W+"), behavior="removed")
    ends = [(word, known[word]) for word in ("<start>", "<end>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    special = {"pad_token": "<pad>", "bos_token": "<start>", "unk_token": "<unknown>", "eos_token": "<end>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=settings.num_tokens,
        model_input_names=["input_ids", "attention_mask"],  # a text tower of CLIP takes no kinds of tokens
        **special,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: pathlib.Path) -> None:
    """Save a tokenizer under a name that every version of transformers knows: version 5 writes a newer one, which 4
    cannot load; both load this."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def contrastive_loss(
    images: Tensor, texts: Tensor, scale: Tensor, *, processes: DistributedContext = SINGLE_PROCESS
) -> Tensor:
    """`matching_loss` of the pairs of all processes, with logits[i, j] = scale * images[i] . texts[j], in float32.

    Args:
        images, texts: (B, E) of this process, of length one.
        scale: scale of the products.
        processes: whose pairs compete.
    """
    images, texts = processes.all_gather(images.float()), processes.all_gather(texts.float())
    return matching_loss(scale.float() * images @ texts.T)


def _make_text_model(settings: CLIPSettings, tokenizer: PreTrainedTokenizerFast) -> CLIPTextModel:
    if settings.text_model:
        return CLIPTextModel.from_pretrained(settings.text_model, dtype=torch.float32)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.text_width,
            intermediate_size=4 * settings.text_width,
            num_hidden_layers=settings.num_text_layers,
            num_attention_heads=settings.num_text_heads,
            max_position_embeddings=settings.num_tokens,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
