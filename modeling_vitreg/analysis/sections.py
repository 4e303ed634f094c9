"""Sections of an artifact report. Each one is updated batch by batch, in constant memory, and computed at the end.

Letters for shapes: L layers, B images, N tokens, P patches, Q prefix tokens, R registers, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from modeling_vitreg.encoding import Consumer, Crop, EncodedBatch, Needs
from modeling_vitreg.features import Encoder, TokenFeatures, principal_colours
from modeling_vitreg.features.encoder import NO_ATTENTION
from modeling_vitreg.omissions import Failures

from .ablation import ablate_class_token, ablate_registers
from .activations import MassiveActivations
from .attention import AttentionMeans, find_duplicates, register_similarity
from .edits import edit_sinks
from .histograms import NormHistograms, bin_numbers
from .positions import PositionCounts, neighbour_similarity
from .reservoir import TokenReservoir, draw_tokens, make_sample
from .settings import Examples, SurveySettings
from .sinks import SinkSection, shift_consistency
from .verdict import judge, summarise_layer


_KINDS = ("cls", "distillation", "registers", "patches")


@dataclass
class Batch:
    """A batch, and what several sections measure of it.

    Args:
        encoded: images, and the outputs of the model for them.
        layers: tokens of layers 1 ... L.
        norms: (L, B, P) of the patches of these layers.
        input_norms: (1, B, P) of the patches of layer 0.
        bins: (L, B, P) of `norms`.
        similarity: (B, P) of patches to their neighbours.
    """

    encoded: EncodedBatch
    layers: list[TokenFeatures]
    norms: Tensor
    input_norms: Tensor
    bins: Tensor
    similarity: Tensor

    @property
    def encoder(self) -> Encoder:
        """The model."""
        return self.encoded.encoder

    @property
    def pixels(self) -> Tensor:
        """(B, C, height, width)."""
        return self.encoded.pixels

    @property
    def kinds(self) -> dict[str, int]:
        """Number of tokens of each kind, in their order."""
        return {name: part.shape[1] for name, part in zip(_KINDS, _parts(self.layers[0]))}

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.encoded.grid


def _measure_batch(encoded: EncodedBatch) -> Batch:
    numbers = range(encoded.encoder.num_layers + 1)
    embedded, *layers = (encoded.tokens(number) for number in numbers)
    norms = torch.stack([layer.patch_tokens.float().norm(dim=-1) for layer in layers])  # [L, B, P]
    input_norms = embedded.patch_tokens.float().norm(dim=-1)[None]  # [1, B, P]
    similarity = neighbour_similarity(encoded.encoder.embed_patches(encoded.pixels), grid=encoded.grid)
    return Batch(encoded, layers, norms, input_norms, bin_numbers(norms), similarity)


class NormSection:
    """Norms of patches, class token and registers of every layer, and the verdict."""

    def __init__(self, first: Batch):
        depth, self.num_images = len(first.layers), 0
        self._has_cls, num_registers = first.kinds["cls"] > 0, first.kinds["registers"]
        self._inputs, self._patches, self._registers = NormHistograms(1), NormHistograms(depth), NormHistograms(depth)
        self._cls_sums, self._register_sums = np.zeros(depth), np.zeros((depth, num_registers))

    def update(self, batch: Batch) -> None:
        """Add a batch."""
        self._patches.add(batch.norms, bins=batch.bins)
        if self._has_cls:
            self._cls_sums += [layer.cls_token.float().norm(dim=-1).sum().item() for layer in batch.layers]
        if self._register_sums.shape[1]:
            norms = torch.stack([layer.register_tokens.float().norm(dim=-1) for layer in batch.layers])  # [L, B, R]
            self._registers.add(norms)
            self._register_sums += norms.sum(dim=1).cpu().numpy()
        self._inputs.add(batch.input_norms)
        self.num_images += len(batch.pixels)

    def merge(self, other: NormSection) -> None:
        """Add what another process measured."""
        for name in ("_inputs", "_patches", "_registers"):
            getattr(self, name).merge(getattr(other, name))
        self._cls_sums += other._cls_sums
        self._register_sums += other._register_sums
        self.num_images += other.num_images

    def compute(self) -> dict:
        """`verdict` and `layers` of the report."""
        layers = [self._summarise(number) for number in range(len(self._cls_sums))]
        inputs = summarise_layer(self._inputs, 0)["rules"]["automatic"]
        return {"verdict": judge(layers, input_share=inputs["share"]), "layers": layers}

    def _summarise(self, number: int) -> dict:
        registers = self._register_sums[number] / self.num_images
        return {
            **summarise_layer(self._patches, number),
            "num_images": self.num_images,
            "num_patches": self._patches.num_tokens,
            "cls": float(self._cls_sums[number] / self.num_images) if self._has_cls else None,
            "registers": registers.tolist(),
            "register_histogram": self._registers.counts[number].tolist() if len(registers) else None,
        }


class AttentionSection:
    """Attention of the prefix tokens on the first images, and similarity of the registers on all images."""

    def __init__(self, first: Batch, *, num_images: int, failures: Failures):
        self.means = AttentionMeans(len(first.layers), kinds=first.kinds)
        self._wanted, self._failures = num_images, failures
        self._problem = NO_ATTENTION if first.encoder.num_heads == 0 else None
        self._similarity, self._num_images = torch.zeros(first.kinds["registers"], first.kinds["registers"]), 0
        self.grid, self.last_maps = first.grid, None  # (B, H, Q, P) of the first batch

    def update(self, batch: Batch, probabilities: list[Tensor] | None) -> None:
        """Add a batch; `probabilities` (B, H, Q, N) of each layer where they were read already."""
        if len(self._similarity):
            self._similarity += register_similarity(batch.layers[-1].register_tokens).cpu() * len(batch.pixels)
        self._num_images += len(batch.pixels)
        first = batch.encoded.count_first(self._wanted)
        if not first or not self.means.queries or self._problem:
            return
        try:
            if probabilities is None:
                layers = list(range(1, batch.encoder.num_layers + 1))
                probabilities = batch.encoded.attend(layers, first=first)
        except Exception as error:  # a layer whose attention cannot be read; the other sections can be measured
            reason = self._failures.note("attention", error)
            self._problem = f"the attention of this model cannot be read, so there are no attention maps: {reason}"
            return
        if self.last_maps is None:
            self.last_maps = probabilities[-1][..., len(self.means.queries) :].float().cpu()
        self.means.add(probabilities, batch.norms[-1].argmax(dim=1)[:first])

    def merge(self, other: AttentionSection) -> None:
        """Add what another process measured."""
        self._similarity += other._similarity
        self._num_images += other._num_images
        self._problem = self._problem or other._problem
        self.means.merge(other.means)

    def compute(self) -> dict:
        """`attention` of the report."""
        mean = self._similarity / self._num_images
        registers = {"num_images": self._num_images, "similarity": mean.tolist(), "duplicates": find_duplicates(mean)}
        return {**self._failures.attempt("attention", self._summarise), "registers": registers}

    def mean_maps(self) -> dict[str, np.ndarray]:
        """Map (rows, columns) of each query in the last layer, mean over images and heads."""
        if not self.means.num_images:
            return {}
        maps = self.means.mean_maps(-1)
        return {name: maps[query].reshape(self.grid) for query, name in enumerate(self.means.queries)}

    def _summarise(self) -> dict:
        if not self.means.queries:
            raise ValueError("the model has no class token and no registers")
        if not self.means.num_images:
            raise ValueError(self._problem or "not requested")
        return self.means.summarise(list(range(1, len(self.means) + 1)))


class InterventionSection:
    """The first images, on which registers, class token, heads and positions are changed at the end."""

    def __init__(self, first: Batch, settings: SurveySettings):
        self._encoder, self._settings, self._kept = first.encoder, settings, []
        self._has_registers, self._has_cls = first.kinds["registers"] > 0, first.kinds["cls"] > 0

    def update(self, batch: Batch) -> None:
        """Add a batch."""
        wanted = max(self._settings.num_ablation_images, self._settings.num_edit_images)
        if first := batch.encoded.count_first(wanted):
            numbers, labels = batch.encoded.numbers.tolist(), batch.encoded.labels
            self._kept += zip(numbers[:first], batch.pixels[:first].cpu(), labels[:first])

    def merge(self, other: InterventionSection) -> None:
        """Add the images of another process."""
        self._kept += other._kept

    def ablate(self) -> dict:
        """`ablation` of the report, of registers."""
        pixels, _ = self._take("num_ablation_images")
        if not self._has_registers:
            raise ValueError("the model has no registers")
        return ablate_registers(self._encoder.model, pixels, seed=self._settings.seed)

    def ablate_cls(self) -> dict:
        """The same of the class token."""
        pixels, _ = self._take("num_ablation_images")
        if not self._has_cls:
            raise ValueError("the model has no class token")
        return ablate_class_token(self._encoder.model, pixels, seed=self._settings.seed)

    def shift(self) -> dict:
        """`shift_consistency` of the report, see `sinks.shift_consistency`."""
        return shift_consistency(self._encoder, self._take("num_ablation_images")[0])

    def edit(self) -> dict:
        """`edits` of the report, see `edits.edit_sinks`."""
        pixels, labels = self._take("num_edit_images")
        return edit_sinks(self._encoder, pixels, labels, seed=self._settings.seed)

    def _take(self, name: str) -> tuple[Tensor, list]:
        wanted = getattr(self._settings, name)
        if not wanted:
            raise ValueError("not requested")
        if not (kept := [entry for entry in sorted(self._kept, key=lambda entry: entry[0]) if entry[0] < wanted]):
            raise ValueError(f"none of the first {wanted} images could be measured")
        return torch.stack([pixels for _, pixels, _ in kept]).to(self._encoder.device), [entry[2] for entry in kept]


class ProbeSection:
    """Tokens of the first images, which are probed at the end."""

    def __init__(self, first: Batch, *, num_images: int, seed: int, failures: Failures):
        self._reservoir = TokenReservoir(num_images, patch_shape=first.encoder.patch_shape, seed=seed)
        self._seed, self._failures, self._grid, self._layer = seed, failures, first.grid, len(first.layers)

    def update(self, batch: Batch) -> None:
        """Add a batch."""
        facts = {"numbers": batch.encoded.numbers, "labels": batch.encoded.labels}
        self._reservoir.add(batch.layers[-1], batch.norms[-1], pixel_values=batch.pixels, **facts)

    def merge(self, other: ProbeSection) -> None:
        """Add the tokens of another process."""
        self._reservoir.merge(other._reservoir)

    def compute(self, threshold: float) -> dict:
        """`probes` of the report; patches of the last layer above `threshold` are outliers.

        Raises:
            ValueError: not requested.
        """
        if not len(self._reservoir):
            raise ValueError("not requested")
        # Imported here: scikit-learn is slow to load and not needed elsewhere.
        from .probes import NUM_DRAWS, TokenSample, probe_class, probe_pixels, probe_position

        kept, seed, attempt = self._reservoir.collect(), self._seed, self._failures.attempt
        sample = TokenSample(**make_sample(kept, threshold=threshold))
        report = {
            "num_images": len(self._reservoir),
            "layer": self._layer,
            "threshold": threshold,
            "position": attempt("position probe", lambda: probe_position(sample, grid=self._grid, seed=seed)),
            "pixels": attempt("pixel probe", lambda: probe_pixels(sample, seed=seed)),
        }
        if (kept["labels"] < 0).any():
            return {**report, "class": {"skipped": "the images have no labels"}}
        draws = draw_tokens(kept, threshold=threshold, num_draws=NUM_DRAWS, seed=seed)
        return {**report, "class": attempt("class probe", lambda: probe_class(draws, kept["labels"], seed=seed))}


class Sections(Consumer):
    """All sections of a report, and the examples.

    Args:
        encoder: the model.
        settings: how much is measured.
    """

    PARTS: ClassVar = ("outlier_positions", "massive_activations", "attention", "sinks", "ablation", "probes")

    def __init__(self, encoder: Encoder, settings: SurveySettings):
        features = tuple((number, "token") for number in range(encoder.num_layers + 1))
        self.needs = Needs(features=features, transform=Crop(settings.image_size))
        self.settings, self.failures, self.num_images = settings, Failures(is_strict=settings.is_strict), 0
        self.examples = Examples(failures=self.failures)

    def update(self, encoded: EncodedBatch) -> None:
        """Add a batch."""
        batch = _measure_batch(encoded)
        if not self.num_images:
            self._begin(batch)
        self._norms.update(batch)
        self._positions.add(batch.bins, batch.similarity)
        for number, layer in enumerate(batch.layers):
            self._activations.add(number, _parts(layer))
        self._activations.count(len(batch.pixels))
        self._probes.update(batch)
        self._interventions.update(batch)
        self.num_images += len(batch.pixels)
        first = encoded.count_first(self.settings.num_attention_images)
        self._attention.update(batch, self._sinks.read(encoded, first) if first else None)
        if self.examples.images is None and self.settings.num_shown:
            self._show(batch)

    def merge(self, others: Sequence[Sections]) -> None:
        """Add what other processes measured."""
        for other in others:
            self.failures.tracebacks |= other.failures.tracebacks
        full = [sections for sections in (self, *others) if sections.num_images]
        if not full or full == [self]:
            return
        if full[0] is not self:  # this process saw no image
            full[0].failures.tracebacks |= self.failures.tracebacks
            self.__dict__ |= full[0].__dict__
        for other in full[1:]:
            for name in ("_norms", "_positions", "_activations", "_attention", "_sinks", "_interventions", "_probes"):
                getattr(self, name).merge(getattr(other, name))
            self.num_images += other.num_images

    def compute(self, num_seen: int) -> dict:
        """Verdict, layers and sections of the report, after `num_seen` images, finite or not."""
        if not self.num_images:
            sentence = f"Unknown: the features of all {num_seen} images contain NaN or infinity."
            sections = {name: {"skipped": "no image has finite features"} for name in self.PARTS}
            return {"verdict": {"level": "unknown", "sentence": sentence}, "layers": [], **sections}
        found, attempt, changes = self._norms.compute(), self.failures.attempt, self._interventions
        verdict, last = found["verdict"], found["layers"][-1]["rules"]["automatic"]["threshold"]
        self.examples.mean_maps = self._attention.mean_maps()
        positions = self._positions.summarise(verdict["layer"] - 1, threshold=verdict["threshold"])
        return {
            **found,
            "outlier_positions": positions,
            "massive_activations": self._activations.summarise(),
            "attention": self._attention.compute(),
            "sinks": {
                **attempt("attention sinks", self._sinks.compute),
                "shift_consistency": attempt("shift consistency", changes.shift),
                "edits": attempt("edits of sinks", changes.edit),
            },
            "ablation": {
                **attempt("register ablation", changes.ablate),
                "class_token": attempt("class token ablation", changes.ablate_cls),
            },
            "probes": attempt("linear probes", lambda: self._probes.compute(last)),
        }

    def _begin(self, first: Batch) -> None:
        settings, depth, width = self.settings, len(first.layers), first.layers[0].patch_tokens.shape[2]
        self._norms = NormSection(first)
        self._positions = PositionCounts(depth, grid=first.grid)
        self._activations = MassiveActivations(depth, width=width, kinds=first.kinds)
        self._attention = AttentionSection(first, num_images=settings.num_attention_images, failures=self.failures)
        heads = (depth, first.encoder.num_heads)
        self._sinks = SinkSection(*heads, kinds=first.kinds, failures=self.failures)
        self._interventions = InterventionSection(first, settings)
        probes = {"num_images": settings.num_probe_images, "seed": settings.seed}
        self._probes = ProbeSection(first, **probes, failures=self.failures)

    def _show(self, batch: Batch) -> None:
        shown, maps = slice(0, self.settings.num_shown), self._attention.last_maps
        self.examples.images = _denormalise(batch.pixels[shown], batch.encoder)
        self.examples.norms = batch.norms[:, shown].unflatten(-1, batch.grid).cpu().numpy()
        self.examples.colours = _colour(batch, shown)
        if maps is not None:
            maps = maps[shown].unflatten(-1, batch.grid).cpu().numpy()  # [B, H, Q, rows, columns]
            queries = self._attention.means.queries
            self.examples.attention = {name: maps[:, :, query] for query, name in enumerate(queries)}


def _parts(tokens: TokenFeatures) -> list[Tensor]:
    """Tokens (B, n, D) of each of `_KINDS`; n is 0 for kinds that the model lacks."""
    none = tokens.patch_tokens[:, :0]
    single = [none if token is None else token[:, None] for token in (tokens.cls_token, tokens.distillation_token)]
    single[0] = single[0] if tokens.cls_tokens is None else tokens.cls_tokens
    registers = none if tokens.register_tokens is None else tokens.register_tokens
    return [*single, registers, tokens.patch_tokens]


@torch.no_grad()
def _colour(batch: Batch, shown: slice) -> np.ndarray:
    patches = batch.encoder.norm_tokens(batch.layers[-1].patch_tokens[shown])
    return principal_colours(patches.unflatten(1, batch.grid)).numpy()


def _denormalise(pixels: Tensor, encoder: Encoder) -> np.ndarray:
    statistics = (encoder.image_mean, encoder.image_std)
    mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in statistics)
    return (pixels.float().cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
