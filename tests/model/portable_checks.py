"""What one version of transformers does with the Hub files; `test_versions.py` runs this program in several.

    python portable_checks.py save MODELS RESULT    with the package: every model, and what it computes
    python portable_checks.py load MODELS RESULT    without the package: what the same models compute here
    python portable_checks.py check MODELS RESULT   without the package: every check below

MODELS holds <architecture>/<head>/ as `save_pretrained` writes it; the dual encoder counts as a head. RESULT is a
safetensors file of outputs by the name <architecture>/<head>/<attention>/<rows>x<columns>.<path>, or JSON: the
tracebacks of each check.
"""

import json
import math
import shutil
import sys
import tempfile
import traceback
import warnings
import zlib
from pathlib import Path
from unittest import mock

import torch
import transformers
from safetensors.torch import load_file, save_file


HEADS = {
    "model": "AutoModel",
    "classification": "AutoModelForImageClassification",
    "masked": "AutoModelForMaskedImageModeling",
    "segmentation": "AutoModelForSemanticSegmentation",
    "depth": "AutoModelForDepthEstimation",
    "backbone": "AutoBackbone",
}
CLASSES = {**HEADS, "dual": "AutoModelForZeroShotImageClassification"}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
ROPE = {"position_embedding_type": "rope", "num_register_tokens": 2, "has_key_bias": False, "hidden_act": "swiglu"}
ARCHITECTURES = {
    "registers": {"num_register_tokens": 4, "layer_scale_init_value": 0.1, "out_indices": [1, 2]},
    "rope": {**ROPE, "pooling": "cls_mean", "num_classifier_layers": 2},
    "sincos": {"position_embedding_type": "sincos", "num_register_tokens": 0, "pooling": "mean"},
    "clip": {"has_pre_norm": True, "has_patch_bias": False, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "retrofitted": {
        "num_register_tokens": 3,
        "num_test_time_registers": 1,
        "register_neurons": {"1": [0, 5], "2": [7]},
        "layer_scale_init_value": 0.1,
    },
    "retrofitted rope": {**ROPE, "num_test_time_registers": 2, "register_neurons": {"2": [1, 3, 9]}},
    "appended": {"num_register_tokens": 4, "num_gated_registers": 3, "layer_scale_init_value": 0.1},
    "appended rope": {**ROPE, "num_gated_registers": 2},
    "distilled": {"has_distillation_token": True, "pooling": "cls_distillation", "interpolate_antialias": False},
}
TEXT = {
    "model_type": "clip_text_model",
    "vocab_size": 10,
    "max_position_embeddings": 12,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
ATTENTIONS = ("eager", "sdpa")
SIZES = ((32, 32), (24, 48))  # the size of the position table, and another
WEIGHTS, PROCESSOR = "model.safetensors", "preprocessor_config.json"
CHECKS = {}


def save(models: Path, result: Path) -> None:
    """Save every model with weights that no other version has, and what they compute."""
    from modeling_vitreg import (
        ViTWithRegistersConfig,
        ViTWithRegistersDualEncoderConfig,
        ViTWithRegistersDualEncoderModel,
    )
    from modeling_vitreg.modeling_vitreg import AUTO_MODELS

    classes, outputs = {model._auto_class: model for model in AUTO_MODELS}, {}
    classes[CLASSES["dual"]] = ViTWithRegistersDualEncoderModel
    for folder in folders(models, *CLASSES):
        torch.manual_seed(zlib.crc32(f"{transformers.__version__} {folder.parent.name} {folder.name}".encode()))
        config = ViTWithRegistersConfig(**TINY, **ARCHITECTURES[folder.parent.name], num_labels=5, num_depth_bins=16)
        if folder.name == "dual":
            config = ViTWithRegistersDualEncoderConfig(config, TEXT, projection_dim=16)
        model = classes[CLASSES[folder.name]](config).eval()
        for name, tensor in model.state_dict().items():  # no bias is zero, no norm the identity
            if tensor.is_floating_point():
                noise = torch.randn_like(tensor) / 8
                tensor.add_(noise.abs() if name.endswith("running_var") else noise)
        model.save_pretrained(folder)
        for attention in ATTENTIONS:
            model.set_attn_implementation(attention)
            outputs |= compute(model, folder, attention)
    save_file(outputs, result)


def load(models: Path, result: Path) -> None:
    """Load every model under both attentions, and write what it computes; whatever this prints is noise."""
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("always")
    outputs = {}
    for folder in folders(models, *CLASSES):
        for attention in ATTENTIONS:
            outputs |= compute(open_model(folder, attn_implementation=attention), folder, attention)
    save_file(outputs, result)


def check(models: Path, result: Path) -> None:
    """Run every check; one that fails does not stop the others."""
    report = dict.fromkeys(CHECKS, "")
    for name, (function, heads) in CHECKS.items():
        for folder in folders(models, *heads):
            torch.manual_seed(0)
            with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
                try:
                    function(folder, Path(scratch) / folder.name)
                except Exception:
                    report[name] += f"{folder}\n{traceback.format_exc()}\n"
    result.write_text(json.dumps(report, indent=2))


def folders(models: Path, *heads: str) -> list:
    """One folder for each head, by default all but the dual encoder, of each architecture."""
    return [models / architecture / head for architecture in ARCHITECTURES for head in heads or HEADS]


def open_model(folder: Path, head: str | None = None, **kwargs):
    """Load a folder as remote code, through the Auto class of a head, by default of the one it is named after."""
    auto = CLASSES[head or folder.name]
    loader, kwargs = getattr(transformers, auto), {"trust_remote_code": True, **kwargs}
    if auto == "AutoBackbone" and not transformers.__version__.startswith(("4.", "5.0.")):
        # From 5.1 on AutoBackbone asks the Hub about a local folder.
        reference = json.loads((folder / "config.json").read_text())["auto_map"][auto]
        loader = transformers.dynamic_module_utils.get_class_from_dynamic_module(reference, folder)
    model = loader.from_pretrained(folder, **kwargs)
    for code in (type(model), type(model.config)):
        assert code.__module__.startswith("transformers_modules."), f"{code} is not the code in the folder"
    return model


def inputs(folder: Path, size: tuple = SIZES[1]) -> dict:
    """The same images and labels in every process, for the head that the folder is named after."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *size, generator=generator)
    values = torch.rand(2, *size, generator=generator)
    targets = {
        "model": {"output_pre_norm": True},
        "classification": {"labels": torch.tensor([1, 4])},
        "masked": {"bool_masked_pos": values[:, ::8, ::8] < 0.5},
        "segmentation": {"labels": (values * 5).long()},
        "depth": {"labels": values * 10},
        "backbone": {},
        "dual": {
            "input_ids": torch.tensor([[1, 4, 9, 5, 3], [1, 6, 7, 3, 0]]),
            "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
            "return_loss": True,
        },
    }
    return {"pixel_values": images, "output_hidden_states": True, **targets[folder.name]}


@torch.no_grad()
def compute(model, folder: Path, attention: str) -> dict:
    """Everything that a model answers, for images of two sizes."""
    outputs = {}
    for size in SIZES:
        output = model(**inputs(folder, size), output_attentions=attention == "eager")
        found = named(output, f"{folder.parent.name}/{folder.name}/{attention}/{size[0]}x{size[1]}")
        # 5.0 records no layer of a text tower that is unwrapped.
        layers = ("text_model_output.hidden_states", "text_model_output.attentions")
        outputs |= {name: value for name, value in found.items() if not any(layer in name for layer in layers)}
    return outputs


def named(value, path: str = "") -> dict:
    """Every tensor of a nested output by its path."""
    if isinstance(value, torch.Tensor):
        return {path: value.detach().clone(memory_format=torch.contiguous_format)}
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else ()
    return {name: tensor for key, part in parts for name, tensor in named(part, f"{path}.{key}").items()}


def on(*heads: str):
    """Mark a check, which gets the folder of a model, of these heads or of all, and a path at which it may save."""

    def mark(function):
        CHECKS[function.__name__] = (function, heads)
        return function

    return mark


@on("masked", "segmentation")
def a_dropped_tensor_follows_its_initial_law_and_the_others_survive(folder: Path, scratch: Path) -> None:
    model_class, weights = type(open_model(folder)), load_file(folder / WEIGHTS)
    shutil.copytree(folder, scratch)
    for dropped in (name for name in weights if folder.name == "masked" or not name.startswith("vitreg.")):
        kept = {name: weights[name] for name in weights if name != dropped}
        save_file(kept, scratch / WEIGHTS, {"format": "pt"})
        model, information = model_class.from_pretrained(scratch, output_loading_info=True)
        assert set(information["missing_keys"]) == {dropped}, (dropped, information)
        assert_loaded_or_initial(model, kept)


@on("classification", "masked", "segmentation", "depth", "backbone")
def heads_share_the_weights_of_the_base(folder: Path, scratch: Path) -> None:
    base, weights = load_file(folder.parent / "model" / WEIGHTS), load_file(folder / WEIGHTS)
    model = open_model(folder.parent / "model", folder.name)
    assert_loaded_or_initial(model, {f"vitreg.{name}": tensor for name, tensor in base.items()})
    assert_same(open_model(folder, "model").state_dict(), {name: weights[f"vitreg.{name}"] for name in base})


@on("classification")
def a_classifier_of_another_size_starts_anew(folder: Path, scratch: Path) -> None:
    model, weights = open_model(folder, num_labels=7, ignore_mismatched_sizes=True), load_file(folder / WEIGHTS)
    assert model(**inputs(folder)).logits.shape[1] == len(model.config.id2label) == 7
    assert_loaded_or_initial(model, {name: weights[name] for name in weights if "classifier" not in name})


@on()
def initialisation_leaves_nothing_unset(folder: Path, scratch: Path) -> None:
    model = open_model(folder)
    with torch.device("meta"):
        model = type(model)(model.config)
    state = model.to_empty(device="cpu").state_dict(keep_vars=True)
    for tensor in state.values():
        tensor.fill_(math.nan if tensor.is_floating_point() else 7)
    for part in (*model.modules(), *state.values()):
        part._is_hf_initialized = False
    model.initialize_weights()
    assert_loaded_or_initial(model, {})


@on("model")
def hidden_states_are_the_outputs_of_the_layers(folder: Path, scratch: Path) -> None:
    model, states = open_model(folder), []
    model.layers[0].register_forward_pre_hook(lambda layer, arguments: states.append(arguments[0]))
    for layer in model.layers:
        layer.register_forward_hook(lambda layer, arguments, output: states.append(output))
    output = model(**inputs(folder))
    assert_same(named(output.hidden_states), named(tuple(states)))
    assert torch.equal(model.layernorm(output.hidden_states[-1]), output.last_hidden_state)
    assert torch.equal(output.pre_norm.hidden_state, output.hidden_states[-1])


@on()
def attention_maps_are_real_under_sdpa(folder: Path, scratch: Path) -> None:
    eager, sdpa = (
        open_model(folder, attn_implementation=attention)(**inputs(folder), output_attentions=True)
        for attention in ATTENTIONS
    )
    assert_same(named(sdpa), named(eager))
    assert len(sdpa.attentions) == 2
    for probabilities in sdpa.attentions:
        assert probabilities.shape[:3] == (2, 2, sdpa.hidden_states[0].shape[1])
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:3]))


@on()
def the_attention_can_be_switched(folder: Path, scratch: Path) -> None:
    model, fused = open_model(folder), torch.nn.functional.scaled_dot_product_attention
    for attention, calls in ((None, 2), ("eager", 0), ("sdpa", 2)):
        if attention is not None:
            model.set_attn_implementation(attention)
        with mock.patch("torch.nn.functional.scaled_dot_product_attention", wraps=fused) as spy:
            model(**inputs(folder))
        assert spy.call_count == calls, (attention, spy.call_count)


@on("classification")
@torch.enable_grad()
def gradient_checkpointing_recomputes_and_changes_no_gradient(folder: Path, scratch: Path) -> None:
    found = {}
    for use_reentrant in (None, False, True):
        model, calls = open_model(folder).train(), []
        if use_reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.vitreg.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(**inputs(folder)).loss.backward()
        assert len(calls) == (1 if use_reentrant is None else 2)
        found[use_reentrant] = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        torch.testing.assert_close(found[use_reentrant], found[None], rtol=1e-5, atol=1e-6)  # sums in another order
    assert len(found[None]) > 20


@on("classification", "segmentation", "depth")
def the_trainer_knows_what_the_labels_are(folder: Path, scratch: Path) -> None:
    # It evaluates without loss and metrics unless a batch has every argument with "label" in its name.
    assert transformers.utils.find_labels(type(open_model(folder))) == ["labels"]


@on()
def bfloat16_is_loaded_and_saved(folder: Path, scratch: Path) -> None:
    model = open_model(folder, dtype=torch.bfloat16)
    model.save_pretrained(scratch)
    again = open_model(scratch, dtype="auto")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    exact, rounded = (named(each(**inputs(folder))) for each in (open_model(folder), model))
    assert_same(named(again(**inputs(folder))), rounded)
    # Rounding may choose another token's activation for a test-time register, of the other sign.
    limit = 0.5 if json.loads((folder / "config.json").read_text()).get("register_neurons") else 0.05
    for name in exact:
        error = (rounded[name].float() - exact[name]).norm()
        assert error <= limit * exact[name].norm(), (name, error)


@on()
def saving_again_keeps_code_entries_and_image_statistics(folder: Path, scratch: Path) -> None:
    first, again = shutil.copytree(folder, scratch / "first" / folder.name), scratch / "again"
    settings = json.loads((first / PROCESSOR).read_text()) | {"image_mean": [0.1, 0.2, 0.3]}
    (first / PROCESSOR).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    open_model(first).save_pretrained(again)
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in first.iterdir()
    }
    assert json.loads((again / "config.json").read_text())["auto_map"].keys() == {"AutoConfig", *HEADS.values()}


@on()
def shards_hold_the_whole_model(folder: Path, scratch: Path) -> None:
    model = open_model(folder)
    model.save_pretrained(scratch, max_shard_size="20KB")
    assert len(list(scratch.glob("model-*-of-*.safetensors"))) > 1 and not (scratch / WEIGHTS).exists()
    assert_same(open_model(scratch).state_dict(), model.state_dict())


@on("backbone")
def a_backbone_takes_its_stages_when_it_is_loaded(folder: Path, scratch: Path) -> None:
    for kwargs in ({"out_indices": [0, 1]}, {"out_features": ["stem", "stage1"]}):
        model = open_model(folder, **kwargs)
        assert list(model.out_features) == ["stem", "stage1"] and list(model.channels) == [32, 32]
        output = model(**inputs(folder))
        assert len(output.feature_maps) == 2
        for state, found in zip(output.hidden_states, output.feature_maps):
            grid = model.split_tokens(state, found.shape[2:]).patch_grid
            torch.testing.assert_close(model.vitreg.norm_tokens(grid).permute(0, 3, 1, 2), found)


@on("model")
def pipelines_read_a_photograph(folder: Path, scratch: Path) -> None:
    from PIL import Image
    from skimage.data import astronaut

    photograph = Image.fromarray(astronaut()).resize((96, 64))

    def run(task: str, head: str):
        return transformers.pipeline(task, model=str(folder.with_name(head)), trust_remote_code=True)(photograph)

    tokens = torch.tensor(run("image-feature-extraction", "model"))
    assert tokens.isfinite().all() and tokens.shape[1] >= 16 and tokens.shape[::2] == (1, 32)
    scores = [label["score"] for label in run("image-classification", "classification")]
    assert len(scores) == 5 and math.isclose(sum(scores), 1, rel_tol=1e-4)
    assert {label["mask"].size for label in run("image-segmentation", "segmentation")} == {photograph.size}
    depth = run("depth-estimation", "depth")
    assert depth["depth"].size == photograph.size and depth["predicted_depth"].isfinite().all()


@on("dual")
def a_dual_encoder_classifies_with_words_of_the_user(folder: Path, scratch: Path) -> None:
    from PIL import Image
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: i for i, word in enumerate(["<pad>", "<start>", "<unknown>", "<end>", "a", "red", "blue", "cube"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<start>", 1), ("<end>", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", model_input_names=["input_ids", "attention_mask"]
    )
    shutil.copytree(folder, scratch)
    fast.save_pretrained(scratch)
    run = transformers.pipeline("zero-shot-image-classification", model=str(scratch), trust_remote_code=True)
    labels = ["a red cube", "a blue cube"]
    image = Image.new("RGB", (96, 64), (200, 30, 30))
    found = {entry["label"]: entry["score"] for entry in run(image, candidate_labels=labels, hypothesis_template="{}")}
    inputs = {**fast(labels, return_tensors="pt", padding=True), **run.image_processor([image], return_tensors="pt")}
    expected = open_model(folder)(**inputs).logits_per_image.softmax(dim=-1)[0]
    torch.testing.assert_close(torch.tensor([found[label] for label in labels]), expected)


@on("dual")
def a_dual_encoder_saves_and_shards_and_starts_anew_what_is_missing(folder: Path, scratch: Path) -> None:
    model, weights = open_model(folder), load_file(folder / WEIGHTS)
    model.save_pretrained(scratch / "again")
    for path in folder.iterdir():
        assert (scratch / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    model.save_pretrained(scratch / "shards", max_shard_size="20KB")
    assert_same(open_model(scratch / "shards", "dual").state_dict(), weights)
    for dropped in ("visual_projection.weight", "logit_scale", "text_model.final_layer_norm.weight"):
        kept = {name: weights[name] for name in weights if name != dropped}
        save_file(kept, scratch / "again" / WEIGHTS, {"format": "pt"})
        state = open_model(scratch / "again", "dual").state_dict()
        found = state.pop(dropped)
        assert_same(state, kept)
        initial = {"logit_scale": 2.6592, "text_model.final_layer_norm.weight": 1.0}
        if dropped in initial:
            torch.testing.assert_close(found, torch.full_like(found, initial[dropped]))
        else:
            assert abs(found.std() / 0.02 - 1) < 5 / math.sqrt(2 * found.numel()), found.std()


@on("dual")
def the_attention_of_both_towers_can_be_switched(folder: Path, scratch: Path) -> None:
    model = open_model(folder)
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        assert {tower.config._attn_implementation for tower in (model.vision_model, model.text_model)} == {attention}


def assert_same(found: dict, expected: dict) -> None:
    """Equal names and equal bits."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, f"{len(different)} of {len(expected)} differ: {different[:5]}"


def assert_loaded_or_initial(model, loaded: dict) -> None:
    """A tensor has the bits of the checkpoint; one that was not there has its initial value or law."""
    state = model.state_dict()
    assert_same({name: state.pop(name) for name in loaded}, loaded)
    for name, tensor in state.items():
        module, kind = ["", *name.split(".")][-2:]
        if kind in ("bias", "mask_token", "running_mean", "num_batches_tracked"):
            assert (tensor == 0).all(), name
        elif "norm" in module:
            assert (tensor == 1).all(), name
        elif "layer_scale" in module:
            assert (tensor == torch.tensor(model.config.layer_scale_init_value)).all(), name
        elif kind == "register_gates":
            assert (tensor == torch.tensor(1e-8)).all(), name  # closed
        elif module == "position_embeddings" and model.config.position_embedding_type == "sincos":
            torch.testing.assert_close(tensor[0], torch.stack([sines_and_cosines(patch) for patch in range(16)]))
        else:
            std, count = model.config.initializer_range, tensor.numel()
            assert abs(tensor.std() / std - 1) < 5 / math.sqrt(2 * count), (name, tensor.std())
            assert abs(tensor.mean()) < 5 * std / math.sqrt(count), (name, tensor.mean())


def sines_and_cosines(patch: int) -> torch.Tensor:
    """MAE's fixed position of a patch: first its column, then its row."""
    frequencies = 10000 ** -(torch.arange(TINY["hidden_size"] // 4) / (TINY["hidden_size"] // 4))
    row, column = divmod(patch, TINY["image_size"] // TINY["patch_size"])
    return torch.cat(
        [part for angle in (column * frequencies, row * frequencies) for part in (angle.sin(), angle.cos())]
    )


if __name__ == "__main__":
    command, models, result = sys.argv[1:]
    if command != "save":
        sys.modules["modeling_vitreg"] = None  # importing the package raises ImportError, even where it is installed
    {"save": save, "load": load, "check": check}[command](Path(models), Path(result))
