"""The views of one image with their colours changed, as a batch of one image has them."""

from PIL import Image
from torch import Tensor

from modeling_vitreg.pretraining.views.colors import change_batch
from modeling_vitreg.pretraining.views.crops import CropSettings, MultiCrop


class ColoredCrop:
    """`MultiCrop`, and `change_batch` after it."""

    def __init__(self, settings: CropSettings, **options):
        self._crop = MultiCrop(settings, **options)

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        batch = {name: part.unsqueeze(1) for name, part in self._crop(image).items()}  # [V, ...] -> [V, 1, ...]
        return {name: part.squeeze(1) for name, part in change_batch(batch).items()}
