"""The tests of transformers' own models, on ours: model, backbone, configuration and pipeline tests.

`run.py` places this file among the tests of the library and says with VITREG_REMOTE_CODE whether the classes come from
the package or, through the library's loader of remote code, from the folders of saved models.
"""

import copy
import os
import pathlib
import unittest

import torch
import transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

from . import test_modeling_common
from .test_backbone_common import BackboneTesterMixin
from .test_configuration_common import ConfigTester
from .test_modeling_common import ModelTesterMixin
from .test_pipeline_mixin import PipelineTesterMixin
from .tiny_models import ARCHITECTURES, BACKBONES, MODELS, SIZES


def load_class(name: str, file: str = "modeling") -> type:
    """A model class, from the package or from the folder of a saved model."""
    if os.environ["VITREG_REMOTE_CODE"] == "0":
        import modeling_vitreg

        return getattr(modeling_vitreg, name)
    folder = pathlib.Path(os.environ["TRANSFORMERS_TINY_MODEL_PATH"], "vitreg", name)
    return get_class_from_dynamic_module(f"{file}_vitreg.{name}", folder)


MODEL_CLASSES = {name: load_class(name) for name in MODELS}
Model, ImageClassification, MaskedImageModeling, SemanticSegmentation, DepthEstimation, Backbone = (
    MODEL_CLASSES.values()
)

# The tests look up by name which labels a model takes.
modeling_auto.MODEL_MAPPING_NAMES["vitreg"] = Model.__name__
modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["vitreg"] = ImageClassification.__name__
modeling_auto.MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES["vitreg"] = MaskedImageModeling.__name__
modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES["vitreg"] = SemanticSegmentation.__name__
modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES["vitreg"] = Backbone.__name__
transformers.AutoModel.register(Model.config_class, Model, exist_ok=True)  # remote code is not registered
OTHERS = {file: [load_class(name, file) for name in names] for file, (_, names, _) in BACKBONES.items()}
for base, classifier in OTHERS.values():
    modeling_auto.MODEL_MAPPING_NAMES[base.config_class.model_type] = base.__name__
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[base.config_class.model_type] = classifier.__name__
    transformers.AutoModel.register(base.config_class, base, exist_ok=True)


def _zero_init(config, change=test_modeling_common._config_zero_init):
    """As in the library, which spares one truth value with "layer_scale" in its name; ours is another."""
    changed = change(config)
    changed.has_mlp_layer_scale = config.has_mlp_layer_scale
    return changed


test_modeling_common._config_zero_init = _zero_init


class ViTWithRegistersModelTester:
    """A tiny configuration of an architecture, images that fit it, and the sizes that the tests ask for."""

    batch_size = 3
    is_training = True
    num_masks = 5

    def __init__(self, architecture: str):
        self.settings = {**SIZES, **ARCHITECTURES[architecture]}
        config = self.get_config()
        for name in SIZES:
            setattr(self, name, getattr(config, name))
        self.num_channels = config.num_channels
        self.mask_length = config.grid_shape[0] * config.grid_shape[1]
        self.seq_length = config.num_prefix_tokens + self.mask_length

    def get_config(self):
        """A configuration of its own for each test."""
        return Model.config_class(**self.settings)

    def prepare_config_and_inputs_for_common(self):
        """The configuration and a batch of images."""
        shape = (self.batch_size, self.num_channels, self.image_size, self.image_size)
        return self.get_config(), {"pixel_values": torch.rand(shape, device=torch_device)}


class BackboneModelTester(ViTWithRegistersModelTester):
    """The same of a backbone that is no Vision Transformer."""

    def __init__(self, file: str):
        self.config_class, self.settings = OTHERS[file][0].config_class, BACKBONES[file][2]
        config = self.get_config()
        for name in ("image_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_channels"):
            setattr(self, name, getattr(config, name))
        self.seq_length = config.num_prefix_tokens + config.grid_shape[0] * config.grid_shape[1]

    def get_config(self):
        """A configuration of its own for each test."""
        return self.config_class(**self.settings)


class ArchitectureTest(ModelTesterMixin):
    """The tests of all models, on one architecture."""

    architecture: str
    all_model_classes = tuple(MODEL_CLASSES.values())
    norm_free_classes = (DepthEstimation,)  # these read the tokens before the final norm
    test_pruning = test_head_masking = False  # the library dropped both in 5.0
    test_torch_exportable = True
    test_can_init_all_missing_weights_before_2023 = True  # a test that the library skips for its oldest models

    def setUp(self):
        self.model_tester = ViTWithRegistersModelTester(self.architecture)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is DepthEstimation:  # the library's depth models have no loss
            inputs["labels"] = inputs["pixel_values"][:, 0]
        return inputs

    def check_training_gradient_checkpointing(self, gradient_checkpointing_kwargs=None):
        """As in the library: all parameters have a gradient, except the final norm in heads that do not read it."""
        others = tuple(model for model in self.all_model_classes if model not in self.norm_free_classes)
        for classes, has_every_gradient in ((others, True), (self.norm_free_classes, False)):
            self.all_model_classes, self.test_all_params_have_gradient = classes, has_every_gradient
            super().check_training_gradient_checkpointing(gradient_checkpointing_kwargs)

    def test_model_get_set_embeddings(self):
        """As in the library, but for a convolution over pixels in place of a table of words."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertIsInstance(model.get_input_embeddings(), torch.nn.Conv2d)
            patch_embeddings = copy.deepcopy(model.get_input_embeddings())
            model.set_input_embeddings(patch_embeddings)
            self.assertIs(model.get_input_embeddings(), patch_embeddings)
            self.assertIsNone(model.get_output_embeddings())

    @unittest.skip("vitreg: images have no vocabulary that could be resized")
    def test_resize_tokens_embeddings(self):
        pass


class DinoV2Test(ArchitectureTest, unittest.TestCase):
    architecture = "dinov2"


class DinoV3Test(ArchitectureTest, unittest.TestCase):
    architecture = "dinov3"


class MergingTest(ArchitectureTest, unittest.TestCase):
    architecture = "merging"


class MambaRTest(ArchitectureTest, unittest.TestCase):
    all_model_classes, norm_free_classes = tuple(OTHERS["mamba"]), ()
    has_attentions = False

    def setUp(self):
        self.model_tester = BackboneModelTester("mamba")


class DeiTTest(ArchitectureTest, unittest.TestCase):
    architecture = "deit"


class MAETest(ArchitectureTest, unittest.TestCase):
    architecture = "mae"
    norm_free_classes = (MaskedImageModeling, SemanticSegmentation, DepthEstimation)

    def test_model_outputs_equivalence(self):
        """As in the library, but for the base model: the test asks for the maximum of its outputs, and this one has no
        registers, so that `register_tokens` is empty."""
        self.all_model_classes = tuple(model for model in self.all_model_classes if model is not Model)
        super().test_model_outputs_equivalence()


class BackboneTest(BackboneTesterMixin, unittest.TestCase):
    """The tests of all backbones."""

    all_model_classes = (Backbone,)
    config_class = Backbone.config_class

    def setUp(self):
        self.model_tester = ViTWithRegistersModelTester("dinov2")


class ConfigurationTest(unittest.TestCase):
    """The tests of all configurations."""

    def test_config(self):
        tester = ConfigTester(
            self,
            config_class=Model.config_class,
            has_text_modality=False,
            # The tests of old versions set the n-th of these to n, counted from 0, which no size may be.
            common_properties=["num_register_tokens", "num_attention_heads", "num_hidden_layers"],
            **SIZES,
        )
        tester.run_common_tests()


class PipelineTest(PipelineTesterMixin, unittest.TestCase):
    """The tests of all pipelines, for the four tasks of the family."""

    pipeline_model_mapping = {
        "image-feature-extraction": Model,
        "image-classification": ImageClassification,
        "image-segmentation": SemanticSegmentation,
        "depth-estimation": DepthEstimation,
    }
