"""Zero-shot classification: the scores of the dual encoder itself, and from images to the report."""

import math

import datasets
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from modeling_vitreg import ViTWithRegistersModel
from modeling_vitreg.evaluation import EncodingSettings, EvaluationSettings, evaluate, open_data
from modeling_vitreg.evaluation.zero_shot import embed_classes, embed_images, similarities
from modeling_vitreg.features import extract_features, load_encoder


class _Letters:
    """A tokenizer of letters: begin, letters, end, then padding; returns what transformers' tokenizers return."""

    model_max_length = 48

    def __call__(self, texts, *, padding, truncation, return_tensors):
        from transformers import BatchEncoding

        assert padding == "max_length" and truncation and return_tensors == "pt"
        rows = [[1] + [3 + ord(letter) % 41 for letter in text[:46]] + [2] for text in texts]
        mask = [[1] * len(row) + [0] * (48 - len(row)) for row in rows]
        rows = [row + [0] * (48 - len(row)) for row in rows]
        return BatchEncoding({"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)})


@pytest.fixture
def clip():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    text = {**sizes, "vocab_size": 50, "max_position_embeddings": 48, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    return CLIPModel(
        CLIPConfig(text_config={**text, "pad_token_id": 0}, vision_config=vision, projection_dim=12)
    ).eval()


def test_zero_shot_scores_equal_those_of_the_dual_encoder(clip):
    pixels, names, tokenizer = torch.randn(5, 3, 32, 32), ["cone", "ring", "ball"], _Letters()
    classes = embed_classes(clip, tokenizer, names, templates=["a {}"])
    scores = similarities(embed_images(load_encoder(clip), pixels), classes)
    texts = tokenizer([f"a {name}" for name in names], padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = clip(pixel_values=pixels, **texts)
    torch.testing.assert_close(scores * clip.logit_scale.exp(), output.logits_per_image, rtol=1e-4, atol=1e-5)
    assert not clip.training


def test_the_embedding_of_a_class_is_the_mean_of_its_prompts(clip):
    templates = ("a {}", "one {}.")
    (both,) = embed_classes(clip, _Letters(), ["cone"], templates=templates)
    single = [embed_classes(clip, _Letters(), ["cone"], templates=[template])[0] for template in templates]
    mean = [sum(pair) / 2 for pair in zip(*(vector.tolist() for vector in single))]
    norm = math.sqrt(sum(value**2 for value in mean))
    assert both.tolist() == pytest.approx([value / norm for value in mean], abs=1e-6)


def test_images_of_a_model_with_a_projection_are_projected_and_others_are_class_tokens(tiny):
    pixels = torch.randn(2, 3, 32, 32)
    model = ViTWithRegistersModel(tiny(projection_size=12)).eval()
    torch.testing.assert_close(embed_images(load_encoder(model), pixels), model(pixels).image_embeds)
    encoder = load_encoder(ViTWithRegistersModel(tiny()))
    (tokens,) = extract_features(encoder, pixels, is_normed=True)
    torch.testing.assert_close(embed_images(encoder, pixels), tokens.cls_token)


def test_zero_shot_needs_text_of_the_same_space(tiny):
    with pytest.raises(ValueError, match="a dual encoder with `get_text_features`, got ViTWithRegistersModel"):
        embed_classes(ViTWithRegistersModel(tiny()), _Letters(), ["cone"], templates=["a {}"])
    with pytest.raises(ValueError, match="width 12 and classes of width 8"):
        similarities(torch.ones(2, 12), torch.ones(3, 8))


def test_prompts_of_the_class_names_are_compared_with_every_test_image(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = open_data("scenes", image_size=32, num_train=2, num_test=12)
    encoder, tokenizer = load_encoder(clip, name="clip"), _Letters()
    settings = EvaluationSettings(encoding=EncodingSettings(has_progress_bar=False, batch_size=5))
    options = {"tasks": ["zero_shot"], "data": data, "settings": settings, "output_folder": tmp_path / "out"}
    top1, top5 = evaluate(encoder, tokenizer=tokenizer, **options).results
    images, labels = zip(*(data.test.read(number) for number in range(12)))
    pixels = encoder.prepare(images)
    classes = embed_classes(clip, tokenizer, data.test.class_names, templates=settings.zero_shot.templates)
    # Stable, for some classes are equally similar.
    order = similarities(embed_images(encoder, pixels), classes).argsort(dim=1, descending=True, stable=True)
    ranks = [row.tolist().index(label) for row, label in zip(order, labels)]
    assert top1["value"] == sum(rank == 0 for rank in ranks) / 12
    assert top5["value"] == sum(rank < 5 for rank in ranks) / 12
    assert top1["settings"]["templates"] == list(settings.zero_shot.templates) and top1["n"] == 12
    with pytest.raises(ValueError, match="zero_shot: the prompts need a tokenizer"):
        evaluate(encoder, **options | {"output_folder": tmp_path / "other"})
