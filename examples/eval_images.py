"""Images for the evaluation of a training run, read once by all processes and their workers."""

import numpy as np
import torch
from arguments import EVAL_SCENES, MAPS, Run, annotation_of, name_data, open_split
from torch import Tensor, nn

from modeling_vitreg.distributed import gather_to_first, tell_others
from modeling_vitreg.encoding import PassSettings, read_all
from modeling_vitreg.encoding.images import Group
from modeling_vitreg.encoding.transforms import Cut
from modeling_vitreg.features.pixels import normalise
from modeling_vitreg.image_processing_vitreg import MODES
from modeling_vitreg.images import DataOptions, ImageSource, MissingSplit, open_images
from modeling_vitreg.images.messages import list_names
from modeling_vitreg.pretraining.monitoring.patches import choose_patches, classes_of_patches
from modeling_vitreg.pretraining.objectives.objective import TARGETS
from modeling_vitreg.scenes import FIRST_TEST_SCENE, SEMANTIC_NAMES, is_scenes, preset_settings


CHUNK = 64  # images that are read together


class EvalImages:
    """Training images for k-NN and norms, and images for metrics and pictures.

    Metrics are measured on another split or, if there is none, on other images of the training data; no label or map
    of them is used for training. Each process keeps the training images that it read, as bytes, and encodes them; the
    first process has all images for metrics.

    Attributes:
        train_labels: labels of all training images (N,), in order.
        num_classes: number of labels; below 2 there is no k-NN accuracy.
        images: images for metrics, normalised (N, C, h, w); None without annotations, and in other processes.
        targets: their annotations; see `Objective.evaluate`.
        origin: where they come from, in words.
        shown: images for pictures, normalised.
    """

    def __init__(self, run: Run, source, num_channels: int):
        self._run, number, side = run, run.options.num_eval_images, run.recipe.crops.global_size
        self._cut = Cut(MODES[num_channels], (1, 1), (side, side))
        self._statistics = run.recipe.statistics(num_channels)
        other, self.origin = self._find_split(source)
        group, labels = self._read(source, number if other is not None else number + number // 4)
        has_lists = source.has_label_lists
        is_labelled = annotation_of(run.recipe) not in MAPS and (has_lists or min(labels.values()) >= 0)
        self.num_classes = len(set(labels.values())) if is_labelled and not has_lists else 0
        is_measured = self.num_classes > 1 or bool(_maps_of(source)) or has_lists
        if other is None and is_measured:
            number = len(labels) * 4 // 5
        train = sorted(labels)[:number]
        self.train_labels = torch.tensor([labels[place] for place in train])
        self._train, held_out = group.split(sum(image.number <= train[-1] for image in group.images))
        if other is not None and is_measured:
            held_out, _ = self._read(other, number // 4)
        self.images, self.targets = None, {}
        if is_measured and (parts := gather_to_first(held_out, run.processes)):
            held_out = _join(parts)
            self.images = self.normalise(held_out.pixels)
            self.targets = {"labels": torch.tensor(_labels_of(held_out))}
            self.targets |= {TARGETS[name]: values for name, values in held_out.maps.items()}
            if has_lists:
                self._keep_known(source.class_names)
        self.shown = self.first_train_images("cpu") if self.images is None else self.images

    def _keep_known(self, names: tuple[str, ...]) -> None:
        """Leave out images without a list of labels, and name the classes that none of the others has."""
        is_known = self.targets["labels"].amin(dim=1) >= 0
        self.images, labels = self.images[is_known], self.targets["labels"][is_known]
        self.targets["labels"] = labels
        missing = [name for name, count in zip(names, labels.sum(dim=0)) if not count]
        if missing:
            self._run.say(
                f"{len(missing)} of {len(names)} classes are in none of the {len(labels)} evaluation images and not "
                f"counted in the mean average precision: {list_names(missing)}"
            )

    def normalise(self, pixels: Tensor) -> Tensor:
        """Bytes (N, C, h, w) as the model reads them."""
        return normalise(pixels, **self._statistics)

    def first_train_images(self, device: torch.device | str) -> Tensor:
        """Some training images on a device, normalised."""
        return self.normalise(self._train.pixels[:CHUNK].to(device))

    def encode_train(self, encoder: nn.Module) -> Tensor | None:
        """Pooled features (N, D) of all training images on the CPU, in the first process; None in the others."""
        own = encode(encoder, self._train.pixels, self.normalise)
        parts = gather_to_first((own, [image.number for image in self._train.images]), self._run.processes)
        if not parts:
            return None
        features, numbers = zip(*parts)
        return torch.cat(features)[np.argsort(np.concatenate(numbers))]

    def _find_split(self, source):
        run = self._run
        if is_scenes(run.options.data):
            name = f"held-out {name_data(run.options, run.recipe)}"
            return open_split(run.options, run.recipe, EVAL_SCENES, source.options), name
        is_found = isinstance(source, ImageSource) and not run.options.eval_split
        for split in ("validation", "test") if is_found else filter(None, [run.options.eval_split]):
            try:
                other = open_split(run.options, run.recipe, split, source.options)
                return other, f"images of the split {split}"
            except MissingSplit as error:
                if not is_found:
                    raise SystemExit(str(error)) from None
            except (ValueError, RuntimeError) as error:
                raise SystemExit(f"the split {split!r}: {error}") from None
        return None, "held-out images of the training data"

    def _read(self, source, number: int) -> tuple[Group, dict[int, int]]:
        """The images that this process reads, and the labels of all that can be read, by the place of the image."""
        if isinstance(source, ImageSource):
            order = np.arange(min(number, len(source)))  # of scenes those that `vitreg evaluate` reads
            if not is_scenes(self._run.options.data):
                order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:number].numpy()
            source = source.select(order)
        settings = PassSettings(
            batch_size=CHUNK,
            workers=self._run.options.workers,
            limit=number,
            title="evaluation images",
            has_progress_bar=self._run.is_main,
        )
        words = {"annotations": _maps_of(source), "context": self._run.processes}
        group, counts = read_all(source, self._cut, settings, **words)
        shape = (0, len(self._statistics["mean"]), *self._cut.sides)
        group = group or Group([], torch.empty(shape, dtype=torch.uint8), {})  # more processes than images
        labels = dict(zip([image.number for image in group.images], _labels_of(group)))
        parts = gather_to_first((labels, counts.unreadable), self._run.processes) or [(labels, {})]
        labels = tell_others({place: label for own, _ in parts for place, label in own.items()}, self._run.processes)
        lost = [reason for _, own in parts for reason in own.values()]
        reasons = "; ".join(lost[:3])
        if not labels:
            raise SystemExit(f"no evaluation image can be read: {reasons or 'the data is empty'}")
        if lost:
            self._run.say(f"{len(lost)} of {len(lost) + len(labels)} evaluation images cannot be read: {reasons}")
        return group, labels


class ProbeScenes:
    """Held-out scenes with masks, on which patches are probed, whatever images a run is trained on.

    Attributes:
        classes: (N, P) of the patches that `encode` returns.
        num_classes: of scenes.
    """

    num_classes = len(SEMANTIC_NAMES)

    def __init__(self, run: Run, num_channels: int, patch_shape: tuple[int, int]):
        side, number = run.recipe.crops.global_size, max(2, run.options.num_eval_images // 10)
        source = open_images(
            "scenes",
            options=DataOptions(image_column="image", mask_column="semantic_mask"),
            scenes=range(FIRST_TEST_SCENE, FIRST_TEST_SCENE + number),
            scene_settings=preset_settings("scenes", side=side),
        )
        settings = PassSettings(batch_size=CHUNK, workers=run.options.workers, title="scenes for the probe of patches")
        group, _ = read_all(source, Cut(MODES[num_channels], (1, 1), (side, side)), settings, annotations=["mask"])
        classes = classes_of_patches(group.maps["mask"], patch_shape)
        self._chosen = choose_patches(classes.shape[1])
        self._pixels, self.classes = group.pixels, classes[:, self._chosen]
        self._statistics = run.recipe.statistics(num_channels)

    @torch.no_grad()
    def encode(self, encoder: nn.Module) -> Tensor:
        """Normed patches (N, P, D) on the CPU."""
        device = next(encoder.parameters()).device
        parts = (normalise(part.to(device), **self._statistics) for part in self._pixels.split(CHUNK))
        return torch.cat([encoder(part).patch_tokens[:, self._chosen.to(device)].float().cpu() for part in parts])


@torch.no_grad()
def encode(encoder: nn.Module, pixels: Tensor, normalise, *, batch_size: int = 250) -> Tensor:
    """Pooled features (N, D) on the CPU of bytes, or of images that `normalise` leaves as they are."""
    device = next(encoder.parameters()).device
    batches = pixels.split(batch_size) if len(pixels) else ()
    parts = [encoder(normalise(part.to(device))).pooler_output.float().cpu() for part in batches]
    return torch.cat(parts or [torch.empty(0, encoder.config.hidden_size)])


def _maps_of(source) -> list[str]:
    return [kind for kind in MAPS if getattr(source.options, f"{kind}_column")]


def _labels_of(group: Group) -> list[int | tuple[int, ...]]:
    return [-1 if image.label is None else image.label for image in group.images]


def _join(parts: list[Group]) -> Group:
    """Images of several processes in the order of the source."""
    joined = Group.join([part for part in parts if part.images])
    order = np.argsort([image.number for image in joined.images])
    maps = {name: values[order] for name, values in joined.maps.items()}
    return Group([joined.images[place] for place in order], joined.pixels[order], maps)
