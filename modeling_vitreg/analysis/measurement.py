"""Everything that is measured while the images of a survey pass, and the sections of the report at the end.

Letters for shapes: L layers, B images, N tokens, P patches, Q prefix tokens, R registers, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from modeling_vitreg.features import Encoder, TokenFeatures, extract_many

from .ablation import ablate_registers
from .activations import MassiveActivations
from .attention import AttentionMeans, find_duplicates, register_similarity
from .histograms import NormHistograms, bin_numbers
from .positions import PositionCounts, neighbour_similarity
from .reservoir import TokenReservoir, draw_tokens, make_sample
from .verdict import judge, summarise_layer


_KINDS = ("cls", "distillation", "registers", "patches")


@dataclass(frozen=True)
class SurveySettings:
    """How much is measured.

    Args:
        num_images: most images that are read; None for all.
        batch_size: images at a time.
        image_size: pixels of a side of the square that is cut out; None for the encoder's own.
        num_attention_images: first images whose attention is measured, 0 for none.
        num_ablation_images: first images on which registers are ablated, 0 for none; needs registers.
        num_probe_images: first images whose tokens the probes read, 0 for no probes; they take minutes, not seconds.
        num_shown: first images that are kept to be drawn, a batch at most.
        seed: of all draws.
        has_progress_bar: whether a progress bar is shown.
    """

    num_images: int | None = 1000
    batch_size: int = 32
    image_size: int | None = None
    num_attention_images: int = 32
    num_ablation_images: int = 8
    num_probe_images: int = 0
    num_shown: int = 4
    seed: int = 0
    has_progress_bar: bool = True


@dataclass
class Examples:
    """The first images, as arrays to be drawn.

    Args:
        images: (images, height, width, 3), from 0 to 1.
        norms: (layers, images, rows, columns), of patches before the final norm.
        attention: name of a query to maps (images, heads, rows, columns) of the last layer.
        mean_maps: name of a query to its map (rows, columns), mean over images and heads, of the last layer.
    """

    images: np.ndarray | None = None
    norms: np.ndarray | None = None
    attention: dict = field(default_factory=dict)
    mean_maps: dict = field(default_factory=dict)


class Measurement:
    """Everything that grows while the images pass.

    Args:
        encoder: that is measured.
        settings: how much is measured.
    """

    def __init__(self, encoder: Encoder, settings: SurveySettings):
        self.encoder, self.settings = encoder, settings
        self.num_seen = self.num_measured = 0
        self.size = self.grid = ()
        self.examples = Examples()
        self.first_pixels: list[Tensor] = []  # of the images on which registers are ablated
        self.attention_problem: str | None = None

    def add(self, images: tuple, labels: tuple) -> None:
        """Measure a batch of PIL images, with a label or None for each.

        Raises:
            ValueError: images that do not fit the model, or not the grid of those before.
        """
        pixels = self.encoder.prepare(list(images), size=self.settings.image_size).to(self.encoder.device)
        layers = range(self.encoder.num_layers + 1)
        embedded, *tokens = extract_many(self.encoder, pixels, wanted=[(layer, "token") for layer in layers])
        if not self.num_seen:
            self._begin(pixels, tokens[0])
        if tuple(tokens[0].grid) != self.grid:
            raise ValueError(f"expected images of one size, got a grid of {tokens[0].grid} behind one of {self.grid}")
        norms = torch.stack([layer.patch_tokens.float().norm(dim=-1) for layer in tokens])  # [L, B, P]
        input_norms = embedded.patch_tokens.float().norm(dim=-1)[None]  # [1, B, P]
        is_finite = torch.stack([_is_finite(layer) for layer in tokens]).all(dim=0) & norms.isfinite().all(2).all(0)
        is_finite &= input_norms[0].isfinite().all(1)
        self.num_seen += len(images)
        if not is_finite.all():
            labels = [label for label, kept in zip(labels, is_finite.tolist()) if kept]
            tokens = [_select(layer, is_finite) for layer in tokens]
            norms, input_norms, pixels = norms[:, is_finite], input_norms[:, is_finite], pixels[is_finite]
        if pixels.shape[0]:
            self._measure(pixels, tokens, norms, list(labels))
            self.inputs.add(input_norms)

    def _begin(self, pixels: Tensor, tokens: TokenFeatures) -> None:
        depth, settings = self.encoder.num_layers, self.settings
        self.size, self.grid = tuple(pixels.shape[2:]), tuple(tokens.grid)
        self.kinds = {name: part.shape[1] for name, part in zip(_KINDS, _parts(tokens))}
        self.inputs, self.patches, self.registers = NormHistograms(1), NormHistograms(depth), NormHistograms(depth)
        self.register_sums = np.zeros((depth, self.kinds["registers"]))
        self.cls_sums = np.zeros(depth)
        self.similarity = torch.zeros(self.kinds["registers"], self.kinds["registers"])
        self.places = PositionCounts(depth, grid=self.grid)
        self.peaks = MassiveActivations(depth, width=tokens.patch_tokens.shape[2], kinds=self.kinds)
        self.attention = AttentionMeans(depth, kinds=self.kinds)
        self.bank = TokenReservoir(settings.num_probe_images, patch_shape=self.encoder.patch_shape, seed=settings.seed)

    def _measure(self, pixels: Tensor, tokens: list[TokenFeatures], norms: Tensor, labels: list) -> None:
        # What the model makes comes first: should it fail, nothing of the batch was counted.
        similarity = neighbour_similarity(self.encoder.embed_patches(pixels), grid=self.grid)
        bins = bin_numbers(norms)
        self.patches.add(norms, bins=bins)
        self.places.add(bins, similarity)
        for number, layer in enumerate(tokens):
            self.peaks.add(number, _parts(layer))
        self.peaks.count(len(pixels))
        if self.kinds["cls"]:
            self.cls_sums += [layer.cls_token.float().norm(dim=-1).sum().item() for layer in tokens]
        if self.kinds["registers"]:
            register_norms = torch.stack([layer.register_tokens.float().norm(dim=-1) for layer in tokens])  # [L, B, R]
            self.registers.add(register_norms)
            self.register_sums += register_norms.sum(dim=1).cpu().numpy()
            self.similarity += register_similarity(tokens[-1].register_tokens).cpu() * len(pixels)
        self.bank.add(tokens[-1], norms[-1], pixel_values=pixels, labels=labels)
        missing = self.settings.num_ablation_images - sum(map(len, self.first_pixels))
        if missing > 0 and self.kinds["registers"]:
            self.first_pixels.append(pixels[:missing])
        self.num_measured += len(pixels)
        self._look(pixels, norms)

    def _look(self, pixels: Tensor, norms: Tensor) -> None:
        """Attention of the first images, and the images that are shown."""
        missing = self.settings.num_attention_images - self.attention.num_images
        probabilities = None
        if missing > 0 and self.attention.queries and self.attention_problem is None:
            try:
                layers = list(range(1, self.encoder.num_layers + 1))
                probabilities = self.encoder.prefix_attention(pixels[:missing], layers=layers)
                self.attention.add(probabilities, norms[-1].argmax(dim=1)[:missing])
            except Exception as error:  # of a family whose attention cannot be read; the rest can
                self.attention_problem = f"{type(error).__name__}: {error}"
        if self.examples.images is None and self.settings.num_shown:
            shown = slice(0, self.settings.num_shown)
            self.examples.images = _unnormalise(pixels[shown], self.encoder)
            self.examples.norms = norms[:, shown].unflatten(-1, self.grid).cpu().numpy()
            if probabilities is not None:
                maps = probabilities[-1][shown, :, :, len(self.attention.queries) :].float()  # [B, H, Q, P]
                maps = maps.unflatten(-1, self.grid).cpu().numpy()
                self.examples.attention = {name: maps[:, :, q] for q, name in enumerate(self.attention.queries)}

    def finish(self) -> dict:
        """The sections of the report."""
        if not self.num_measured:
            return _know_nothing(self.num_seen)
        layers = [self._summarise_layer(number) for number in range(self.encoder.num_layers)]
        inputs = summarise_layer(self.inputs, 0)["rules"]["automatic"]
        verdict = judge(layers, input_share=inputs["share"])
        return {
            "verdict": verdict,
            "layers": layers,
            "outlier_positions": self.places.summarise(verdict["layer"] - 1, threshold=verdict["threshold"]),
            "massive_activations": self.peaks.summarise(),
            "attention": {**_attempt(self._summarise_attention), "registers": self._summarise_registers()},
            "ablation": _attempt(self._ablate),
            "probes": _attempt(lambda: self._probe(layers[-1]["rules"]["automatic"]["threshold"])),
        }

    def _summarise_layer(self, number: int) -> dict:
        cls = self.cls_sums[number] / self.num_measured if self.kinds["cls"] else None
        registers = self.register_sums[number] / self.num_measured
        numbers = summarise_layer(self.patches, number)
        numbers |= {"num_images": self.num_measured, "num_patches": self.patches.num_tokens}
        numbers |= {"cls": None if cls is None else float(cls), "registers": registers.tolist()}
        return {**numbers, "register_histogram": self.registers.counts[number].tolist() if len(registers) else None}

    def _summarise_attention(self) -> dict:
        if not self.attention.num_images:
            why = self.attention_problem or "not asked for"
            raise ValueError(why if self.attention.queries else "the model has no class token and no registers")
        maps = self.attention.mean_maps(-1)
        self.examples.mean_maps = {
            name: maps[query].reshape(self.grid) for query, name in enumerate(self.attention.queries)
        }
        return self.attention.summarise(list(range(1, self.encoder.num_layers + 1)))

    def _summarise_registers(self) -> dict:
        mean = self.similarity / self.num_measured
        return {"num_images": self.num_measured, "similarity": mean.tolist(), "duplicates": find_duplicates(mean)}

    def _ablate(self) -> dict:
        if not self.settings.num_ablation_images:
            raise ValueError("not asked for")
        if not self.kinds["registers"]:
            raise ValueError("the model has no registers")
        return ablate_registers(self.encoder.model, torch.cat(self.first_pixels), seed=self.settings.seed)

    def _probe(self, threshold: float) -> dict:
        if not len(self.bank):
            raise ValueError("not asked for")
        # scikit-learn is slow to load and not needed elsewhere.
        from .probes import NUM_DRAWS, TokenSample, probe_class, probe_pixels, probe_position

        kept, seed = self.bank.collect(), self.settings.seed
        sample = TokenSample(**make_sample(kept, threshold=threshold))
        about = {"num_images": len(self.bank), "layer": self.encoder.num_layers, "threshold": threshold}
        report = {**about, "position": _attempt(lambda: probe_position(sample, grid=self.grid, seed=seed))}
        report["pixels"] = _attempt(lambda: probe_pixels(sample, seed=seed))
        if (kept["labels"] < 0).any():
            return {**report, "class": {"skipped": "the images have no labels"}}
        draws = draw_tokens(kept, threshold=threshold, num_draws=NUM_DRAWS, seed=seed)
        return {**report, "class": _attempt(lambda: probe_class(draws, kept["labels"], seed=seed))}


def _know_nothing(num_seen: int) -> dict:
    sentence = f"Unknown: the features of all {num_seen} images hold numbers that are not finite."
    names = ("outlier_positions", "massive_activations", "attention", "ablation", "probes")
    sections = {name: {"skipped": "no image has finite features"} for name in names}
    return {"verdict": {"level": "unknown", "sentence": sentence}, "layers": [], **sections}


def _parts(tokens: TokenFeatures) -> list[Tensor]:
    """Tokens (B, n, D) of each of `_KINDS`, n is 0 for those that the model lacks."""
    none = tokens.patch_tokens[:, :0]
    single = [none if token is None else token[:, None] for token in (tokens.cls_token, tokens.distillation_token)]
    registers = none if tokens.register_tokens is None else tokens.register_tokens
    return [*single, registers, tokens.patch_tokens]


def _is_finite(tokens: TokenFeatures) -> Tensor:
    """Which images (B,) have finite prefix tokens; the patches show by their norms."""
    return torch.cat(_parts(tokens)[:-1], dim=1).isfinite().flatten(1).all(dim=1)


def _select(tokens: TokenFeatures, kept: Tensor) -> TokenFeatures:
    names = ("patch_tokens", "cls_token", "distillation_token", "register_tokens")
    parts = {name: getattr(tokens, name) for name in names}
    parts = {name: part if part is None else part[kept] for name, part in parts.items()}
    return TokenFeatures(**{**vars(tokens), **parts})


def _attempt(measure: Callable[[], dict]) -> dict:
    """A section of the report, or why there is none: one that fails must not take the others with it."""
    try:
        return measure()
    except KeyboardInterrupt:
        return {"skipped": "stopped by hand"}
    except Exception as error:
        return {"skipped": str(error) or type(error).__name__}


def _unnormalise(pixels: Tensor, encoder: Encoder) -> np.ndarray:
    statistics = (encoder.image_mean, encoder.image_std)
    mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in statistics)
    return (pixels.float().cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


__all__ = ["Examples", "Measurement", "SurveySettings"]
