"""Registration with the Auto classes of transformers, at once where it is imported and else when it is.

Registering needs the classes, hence torch and most of transformers. A finder watches for the imports of transformers
and of the files of the Hub; it registers when the outermost of them has finished.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType


_NAMES = ("configuration", "modeling", "dual_encoder", "mamba", "hat", "vision_language")
HUB_MODULES = tuple(f"modeling_vitreg.{name}_vitreg" for name in _NAMES)


def register_auto_classes() -> None:
    """Make the Auto classes of transformers know every class of this family."""
    import transformers

    configuration, modeling, dual_encoder, mamba, hat, language = map(importlib.import_module, HUB_MODULES)
    config, dual_config = configuration.ViTWithRegistersConfig, dual_encoder.ViTWithRegistersDualEncoderConfig
    others = (mamba.MambaRConfig, hat.HATNetConfig, language.ViTWithRegistersVisionLanguageConfig)
    for kind in (config, dual_config, *others):
        transformers.AutoConfig.register(kind.model_type, kind, exist_ok=True)
    backbones = (*modeling.AUTO_MODELS, *mamba.MAMBAR_AUTO_MODELS, *hat.HATNET_AUTO_MODELS)
    for model in (*backbones, language.ViTWithRegistersForConditionalGeneration):
        getattr(transformers, model._auto_class).register(model.config_class, model, exist_ok=True)
    for name in dual_encoder.DUAL_ENCODER_AUTO_CLASSES:
        model = dual_encoder.ViTWithRegistersDualEncoderModel
        getattr(transformers, name).register(dual_config, model, exist_ok=True)


def register_when_imported(modules: dict[str, ModuleType]) -> None:
    """Register now if transformers is among the modules, else when it or a file of the Hub is imported."""
    if "transformers" in modules:
        register_auto_classes()
    else:
        sys.meta_path.insert(0, _Watch())


class _Watch(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets others find a watched module, and counts how many are being imported."""

    def __init__(self):
        self.num_running = 0
        self.waiting = {"transformers", *HUB_MODULES}

    def find_spec(self, name, path=None, target=None):
        if name not in self.waiting:
            return None
        self.waiting.discard(name)  # so that the next line asks the other finders
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(self._run, spec.loader.exec_module)
        return spec

    def _run(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        self.num_running += 1
        try:
            execute(module)
        finally:
            self.num_running -= 1
        if self.num_running == 0 and self in sys.meta_path:
            sys.meta_path.remove(self)
            register_auto_classes()
