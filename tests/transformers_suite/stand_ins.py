"""What transformers' common tests import from folders that its source archive does not have.

The pipeline tests of our four tasks and the arguments common to all configurations are written anew. Every other name
is a test class for something else, such as text generation, and an empty class stands in for it.
"""

import pathlib
import tempfile

from PIL import Image
from transformers import pipeline


config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}


def __getattr__(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


class PipelineTests:
    """A pipeline of one task, on images of every mode that a user may pass."""

    task: str

    def get_test_pipeline(self, model, tokenizer=None, image_processor=None, dtype="float32", **others):
        """The pipeline, and examples that the caller batches at random."""
        sizes = {"RGB": (24, 20), "RGBA": (16, 16), "LA": (9, 30), "L": (40, 17)}
        examples = [Image.new(mode, size, color="red") for mode, size in sizes.items()]
        return pipeline(self.task, model=model, image_processor=image_processor, dtype=dtype), examples

    def run_pipeline_test(self, pipe, examples) -> None:
        """Try an image, a path, and a list."""
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "image.png")
            examples[0].save(path)
            images, outputs = [*examples[:2], *examples], [pipe(str(path)), pipe(examples[1]), *pipe(examples)]
        for image, output in zip(images, outputs, strict=True):
            self.check(output, image, pipe.model.config)


class ImageFeatureExtractionPipelineTests(PipelineTests):
    task = "image-feature-extraction"

    def check(self, output, image, config):
        num_tokens = config.num_prefix_tokens + config.grid_shape[0] * config.grid_shape[1]
        assert [len(output), len(output[0]), len(output[0][0])] == [1, num_tokens, config.hidden_size]


class ImageClassificationPipelineTests(PipelineTests):
    task = "image-classification"

    def check(self, output, image, config):
        scores = [prediction["score"] for prediction in output]
        assert scores == sorted(scores, reverse=True)
        assert {prediction["label"] for prediction in output} == set(config.id2label.values())


class ImageSegmentationPipelineTests(PipelineTests):
    task = "image-segmentation"

    def check(self, output, image, config):
        assert output
        assert all(segment["mask"].size == image.size for segment in output)
        assert {segment["label"] for segment in output} <= set(config.id2label.values())


class DepthEstimationPipelineTests(PipelineTests):
    task = "depth-estimation"

    def check(self, output, image, config):
        assert output["depth"].size == image.size
        assert output["predicted_depth"].shape == image.size[::-1]
        assert 0 <= output["predicted_depth"].min() <= output["predicted_depth"].max() <= config.max_depth
