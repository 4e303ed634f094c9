"""Vision-language model: beside decoders of transformers that are run layer by layer, and from a bare folder."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_remote_code import run_without_the_package
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    BloomConfig,
    DynamicCache,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    T5Config,
)

from modeling_vitreg import (
    ViTWithRegistersForConditionalGeneration,
    ViTWithRegistersModel,
    ViTWithRegistersVisionLanguageConfig,
)
from modeling_vitreg.pretraining.objectives.clip import CLIPSettings, make_tokenizer, save_tokenizer


WORDS, IMAGE, PAD = 24, 30, 0  # the placeholder lies outside the vocabulary
SIZES = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": PAD}
SIZES |= {"bos_token_id": 1, "eos_token_id": None}
WIDE = {"intermediate_size": 48, "max_position_embeddings": 64}
DECODERS = {
    "llama": LlamaConfig(num_key_value_heads=2, **SIZES, **WIDE),
    "qwen2": Qwen2Config(num_key_value_heads=2, tie_word_embeddings=True, **SIZES, **WIDE),
    "gpt_neox": GPTNeoXConfig(rotary_pct=0.5, **SIZES, **WIDE),
    "phi": PhiConfig(partial_rotary_factor=0.5, **SIZES, **WIDE),
}
NUM_VISUAL = 6  # patches of images of 16 x 24 pixels
PIXELS = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make(tiny, randomise):
    """A model in which every parameter has a random value."""

    def build(decoder="llama", *, attention="sdpa", num_visual_registers=2, drop_layer=1, tower=None, **settings):
        tower = tower or {"num_hidden_layers": 1}
        config = ViTWithRegistersVisionLanguageConfig(
            tiny(image_size=(16, 24), **tower),
            DECODERS[decoder] if isinstance(decoder, str) else decoder,
            num_visual_registers=num_visual_registers,
            drop_layer=drop_layer,
            image_token_id=IMAGE,
            **settings,
        )
        config._attn_implementation = attention
        return randomise(ViTWithRegistersForConditionalGeneration(config))

    return build


def texts(num_image: int, *, side: str = "left") -> dict:
    """Two texts of different lengths, with the image behind one and two words, padded."""
    rows = [[1, *[IMAGE] * num_image, 5, 6, 7], [1, 9, *[IMAGE] * num_image, 8]]
    rows[1] += [11, 4]
    width = max(map(len, rows))
    padded = [
        row + [PAD] * (width - len(row)) if side == "right" else [PAD] * (width - len(row)) + row for row in rows
    ]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    mask = torch.tensor(mask if side == "right" else [row[::-1] for row in mask])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": torch.tensor(padded), "attention_mask": mask, "position_ids": positions}


def run_by_hand(model, inputs: dict, pixel_values=PIXELS) -> tuple[list, torch.Tensor, torch.Tensor]:
    """Tokens behind each layer, logits, numbers of the kept tokens: each layer of a decoder without hooks, its mask
    from the formula, on the whole text."""
    config = model.config
    decoder = AutoModelForCausalLM.from_config(config.text_config, attn_implementation="eager").eval()
    decoder.load_state_dict(model.language_model.state_dict())
    base = decoder.base_model
    norms = ("norm", "final_layer_norm", "final_layernorm")
    norm = next(getattr(base, name) for name in norms if hasattr(base, name))
    ids, mask, positions = (inputs[name] for name in ("input_ids", "attention_mask", "position_ids"))
    tokens = decoder.get_input_embeddings()(torch.where(ids == IMAGE, 0, ids))
    visual = model.projector(model.vision_model(pixel_values).patch_tokens)
    kept = []
    for row, words in enumerate(ids.tolist()):
        places = [place for place, word in enumerate(words) if word == IMAGE]
        parts = list(tokens[row])
        for number, place in enumerate(places):
            is_visual = number < NUM_VISUAL
            parts[place] = visual[row, number] if is_visual else model.visual_registers[number - NUM_VISUAL]
        tokens = torch.cat([tokens[:row], torch.stack(parts)[None], tokens[row + 1 :]])
        kept.append([place for place in range(len(words)) if place not in places[:NUM_VISUAL]])
    kept, states = torch.tensor(kept), [tokens]
    for number, layer in enumerate(base.layers):
        if number == config.drop_layer:
            tokens, mask, positions = (
                torch.stack([value[row, kept[row]] for row in range(len(kept))]) for value in (tokens, mask, positions)
            )
        allowed = torch.ones(tokens.shape[1], tokens.shape[1]).tril().bool() & mask[:, None, :].bool()
        allowed = allowed | torch.eye(tokens.shape[1]).bool()  # padding, which nothing reads, reads itself
        angles = base.rotary_emb(tokens, positions)
        output = layer(tokens, attention_mask=torch.where(allowed[:, None], 0.0, -1e30), position_embeddings=angles)
        tokens = output[0] if isinstance(output, tuple) else output
        states.append(tokens)
    states[-1] = norm(states[-1])
    return states, decoder.get_output_embeddings()(states[-1]), kept


def assert_equal_words(found, expected, mask) -> None:
    """Equality where there is no padding."""
    assert found.shape == expected.shape
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("decoder", "drop_layer"), [*((name, 1) for name in DECODERS), ("llama", 2), ("llama", 3)])
def test_tokens_behind_every_layer_are_those_of_the_decoder_run_by_hand(make, decoder, drop_layer, side, attention):
    model, inputs = make(decoder, drop_layer=drop_layer, attention=attention), texts(NUM_VISUAL + 2, side=side)
    with torch.no_grad():
        expected, logits, kept = run_by_hand(model, inputs)
        output = model(pixel_values=PIXELS, output_hidden_states=True, **inputs)
    full, short = inputs["attention_mask"], inputs["attention_mask"].gather(1, kept)
    assert len(output.hidden_states) == len(expected) == 4
    for number, (found, wanted) in enumerate(zip(output.hidden_states, expected)):
        assert_equal_words(found, wanted, full if number <= drop_layer else short)
    assert_equal_words(output.logits, logits, short if drop_layer < 3 else full)
    if drop_layer < 3:
        assert torch.equal(output.kept_tokens, kept)
        cache = output.get("cache", output.get("past_key_values"))
        lengths = [cache.get_seq_length(layer) for layer in range(3)]
        assert lengths == [full.shape[1]] * drop_layer + [short.shape[1]] * (3 - drop_layer)
    else:
        assert output.kept_tokens is None


def generate_by_hand(model, inputs: dict, num_words: int) -> torch.Tensor:
    """The likeliest words, each from the whole text."""
    inputs = dict(inputs)
    for _ in range(num_words):
        _, logits, _ = run_by_hand(model, inputs)
        word = logits[:, -1].argmax(dim=-1, keepdim=True)
        last = inputs["position_ids"][:, -1:] + 1
        for name, value in (("input_ids", word), ("attention_mask", torch.ones_like(word)), ("position_ids", last)):
            inputs[name] = torch.cat([inputs[name], value], dim=1)
    return inputs["input_ids"]


@pytest.mark.parametrize(("decoder", "drop_layer"), [*((name, 1) for name in DECODERS), ("llama", 2), ("llama", None)])
def test_generation_with_and_without_cache_gives_the_words_of_the_run_by_hand(make, decoder, drop_layer):
    model, inputs = make(decoder, drop_layer=drop_layer), texts(NUM_VISUAL + 2)
    with torch.no_grad():
        expected = generate_by_hand(model, inputs, 5)
    inputs.pop("position_ids")
    for use_cache in (True, False):
        options = {"max_new_tokens": 5, "do_sample": False, "use_cache": use_cache}
        found = model.generate(pixel_values=PIXELS, **inputs, **options)
        assert torch.equal(found, expected), use_cache
    beams = [
        model.generate(pixel_values=PIXELS, num_beams=3, max_new_tokens=5, use_cache=use_cache, **inputs)
        for use_cache in (True, False)
    ]
    assert torch.equal(*beams)
    alone = {name: value[:1] for name, value in inputs.items()}
    found = model.generate(pixel_values=PIXELS[:1], max_new_tokens=5, do_sample=False, **alone)
    assert torch.equal(found, expected[:1])


def cache_of(output) -> DynamicCache:
    return output.get("cache", output.get("past_key_values"))


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_text_in_pieces_gives_the_logits_of_the_whole(make, decoder):
    model, inputs = make(decoder), texts(NUM_VISUAL + 2)
    inputs = {name: value[:, :] for name, value in inputs.items()}
    with torch.no_grad():
        whole = model(pixel_values=PIXELS, **inputs)
        cut = inputs["input_ids"].shape[1] - 2  # the image is in the first piece
        first = {name: value[:, :cut] for name, value in inputs.items()}
        output = model(pixel_values=PIXELS, use_cache=True, **first)
        last = {name: value[:, cut:] for name, value in inputs.items()} | {"attention_mask": inputs["attention_mask"]}
        again = model(past_key_values=cache_of(output), **last)
        torch.testing.assert_close(again.logits, whole.logits[:, -2:], atol=1e-5, rtol=1e-5)
        # A second image in a later piece: the tokens of the first stay dropped.
        more = {name: torch.cat([value, value], dim=1) for name, value in inputs.items()}
        more["position_ids"] = (more["attention_mask"].cumsum(1) - 1).clamp(min=0)
        width = inputs["input_ids"].shape[1]
        output = model(pixel_values=PIXELS, use_cache=True, **inputs)
        second = {"input_ids": inputs["input_ids"], "position_ids": more["position_ids"][:, width:]}
        output = model(
            pixel_values=PIXELS.flip(0),
            past_key_values=cache_of(output),
            attention_mask=more["attention_mask"],
            **second,
        )
    kept = width - NUM_VISUAL
    assert output.logits.shape[1] == kept
    assert [cache_of(output).get_seq_length(layer) for layer in range(3)] == [2 * width, 2 * kept, 2 * kept]


def test_without_registers_and_dropping_it_is_the_decoder_on_projected_tokens(make):
    model, inputs = make(num_visual_registers=0, drop_layer=None), texts(NUM_VISUAL)
    words = model.get_input_embeddings()(inputs["input_ids"].clamp(max=WORDS - 1))
    visual = model.get_image_features(PIXELS)
    words[inputs["input_ids"] == IMAGE] = visual.flatten(0, 1)
    mask, positions = inputs["attention_mask"], inputs["position_ids"]
    expected = model.language_model(inputs_embeds=words, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(model(pixel_values=PIXELS, **inputs).logits, expected)


@pytest.mark.parametrize("decoder", ["llama", "phi"])
def test_loss_and_gradients_are_those_of_the_run_by_hand_with_and_without_checkpointing(make, decoder):
    model, inputs = make(decoder), texts(NUM_VISUAL + 2, side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    _, logits, kept = run_by_hand(model, inputs)
    targets = labels.masked_fill(labels == IMAGE, -100).gather(1, kept)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    parts = {"vision_model", "projector", "visual_registers"}
    names = [name for name, _ in model.named_parameters() if name.split(".")[0] in parts]
    parameters = [dict(model.named_parameters())[name] for name in names]
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    assert sum(gradient is not None and gradient.abs().sum() > 0 for gradient in wanted) > 15
    model.train()
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        output = model(pixel_values=PIXELS, labels=labels, **inputs)
        assert cache_of(output) is None
        torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-5)
        found = torch.autograd.grad(output.loss, parameters, allow_unused=True)
        for name, gradient, reference in zip(names, found, wanted):
            torch.testing.assert_close(gradient, reference, atol=1e-5, rtol=1e-4, msg=name)


def test_dropped_tokens_reach_later_words_through_registers_only(make):
    model, inputs = make(drop_layer=1), texts(NUM_VISUAL + 2)
    visual = []
    model.projector.register_forward_hook(lambda *call: visual.append(call[2]))
    output = model(pixel_values=PIXELS, output_hidden_states=True, **inputs)
    (gradient,) = torch.autograd.grad(output.logits[:, -1].sum(), visual[-1], retain_graph=True)
    assert (gradient.abs().sum(dim=-1) > 0).all()
    # Behind the first layer nothing reads them: their output there has no gradient.
    (gradient,) = torch.autograd.grad(output.logits.sum(), output.hidden_states[1])
    is_dropped = torch.ones_like(inputs["input_ids"]).scatter(1, output.kept_tokens, 0).bool()
    assert gradient[is_dropped].abs().sum() == 0 and (gradient[~is_dropped].abs().sum(dim=-1) > 0).any()


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"visual_tokens": "registers"}, 4),
        ({"visual_tokens": "pooled", "pooled_grid": (1, 3)}, 3),
        (
            {"visual_tokens": "learned", "tower": {"token_reduction": {"kind": "learn", "layer": 1, "num_tokens": 5}}},
            5,
        ),
    ],
)
def test_other_visual_tokens(make, settings, count):
    model = make(num_visual_registers=0, drop_layer=None, **settings)
    assert model.config.num_image_tokens == count
    output = model.vision_model(PIXELS)
    if settings["visual_tokens"] == "registers":
        expected = output.register_tokens
    elif settings["visual_tokens"] == "pooled":
        expected = output.patch_grid.mean(dim=1).unflatten(1, (3, 1)).mean(dim=2)  # columns of two patches
    else:
        expected = model.vision_model.layernorm(output.reduction.learned_tokens)
    torch.testing.assert_close(model.get_image_features(PIXELS), model.projector(expected))
    output = model(pixel_values=PIXELS, **texts(count))
    assert output.logits.shape == (2, count + 5, WORDS) and output.image_hidden_states.shape == (2, count, 32)


@pytest.mark.parametrize("settings", [{}, {"visual_tokens": "registers", "num_visual_registers": 0}])
def test_the_processor_of_transformers_writes_the_placeholders(make, tmp_path, photograph, settings):
    tokenizer = make_tokenizer(CLIPSettings(words=("a", "picture"), num_tokens=64))
    model = make(drop_layer=1, **settings)
    with pytest.raises(ValueError, match=r'expected "<image>" to be token 30, .* call tokenizer.add_tokens'):
        model.make_processor(None, tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    model.save_pretrained(tmp_path)
    model.make_processor(AutoImageProcessor.from_pretrained(tmp_path), tokenizer).save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    texts = ["<image>a picture", "a <image>"]
    inputs = processor(images=[photograph] * 2, text=texts, padding=True, return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 3, 16, 24)
    count = (inputs["input_ids"] == model.config.image_token_id).sum(dim=1)
    assert count.tolist() == [model.config.num_image_tokens] * 2 == [4 if settings else NUM_VISUAL + 2] * 2
    assert model.generate(**inputs, max_new_tokens=2).shape == (2, inputs["input_ids"].shape[1] + 2)


def test_towers_that_are_given_are_used_and_a_copy_drops_in_its_own_layers(make, tiny, randomise):
    tower = randomise(ViTWithRegistersModel(tiny(image_size=(16, 24))))
    decoder = randomise(AutoModelForCausalLM.from_config(DECODERS["llama"]))
    decoder.generation_config.max_new_tokens = 3
    config = ViTWithRegistersVisionLanguageConfig(
        tower.config, decoder.config, num_visual_registers=2, drop_layer=1, image_token_id=IMAGE
    )
    expected = copy.deepcopy(decoder.state_dict())
    model = ViTWithRegistersForConditionalGeneration(config, tower, decoder).eval()
    assert model.vision_model is tower and model.generation_config.max_new_tokens == 3
    assert all(torch.equal(value, expected[name]) for name, value in model.language_model.state_dict().items())
    twin, inputs = copy.deepcopy(model), texts(NUM_VISUAL + 2)
    before = model(pixel_values=PIXELS, **inputs).logits
    with torch.no_grad():
        twin.visual_registers.zero_()
    assert torch.equal(model(pixel_values=PIXELS, **inputs).logits, before)
    assert twin(pixel_values=PIXELS, **inputs).logits.shape == before.shape
    assert "visual_registers" in model.no_weight_decay()
    assert not model.no_weight_decay() - {name for name, _ in model.named_parameters()}


def test_a_new_process_without_the_package_generates_the_same(make, tmp_path):
    models, inputs = {decoder: make(decoder) for decoder in ("llama", "qwen2")}, texts(NUM_VISUAL + 2)
    for decoder, model in models.items():
        model.save_pretrained(tmp_path / decoder)
        assert str(tmp_path) not in (tmp_path / decoder / "config.json").read_text()
        has_head = "language_model.lm_head.weight" in load_file(tmp_path / decoder / "model.safetensors")
        assert has_head != model.config.text_config.tie_word_embeddings
    save_file({"pixel_values": PIXELS, **inputs}, tmp_path / "inputs.safetensors")
    run = run_without_the_package(
        """
        from safetensors.torch import load_file, save_file

        inputs, found = load_file("inputs.safetensors"), {}
        for name in ("llama", "qwen2"):
            model = transformers.AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True)
            assert type(model).__module__.startswith("transformers_modules."), type(model)
            with torch.no_grad():
                found[name + "-logits"] = model(**inputs).logits.contiguous()
            rest = {name: value for name, value in inputs.items() if name != "position_ids"}
            found[name + "-words"] = model.generate(**rest, max_new_tokens=4)
        save_file(found, "found.safetensors")
        model.save_pretrained("second")
        """,
        folder=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    found = load_file(tmp_path / "found.safetensors")
    positions = inputs.pop("position_ids")
    for decoder, model in models.items():
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / decoder)
        assert type(again) is ViTWithRegistersForConditionalGeneration
        with torch.no_grad():
            for each in (model, again):
                logits = each(pixel_values=PIXELS, position_ids=positions, **inputs).logits
                assert torch.equal(logits, found[f"{decoder}-logits"])
        words = again.generate(pixel_values=PIXELS, max_new_tokens=4, **inputs)
        assert torch.equal(words, found[f"{decoder}-words"])
    folders = [tmp_path / name for name in ("qwen2", "second")]
    first, second = ({path.name for path in folder.glob("*.py")} for folder in folders)
    assert first == second and "vision_language_vitreg.py" in first
    first, second = (json.loads((folder / "config.json").read_text()) for folder in folders)
    assert first["auto_map"] == second["auto_map"] and first["text_config"] == second["text_config"]


BAD_SETTINGS = {
    "expected visual_tokens to be one of patches, registers, learned, pooled, got 'cls'": {"visual_tokens": "cls"},
    "expected visual_tokens of a tower with num_register_tokens above 0": {
        "visual_tokens": "registers",
        "tower": {"num_register_tokens": 0},
    },
    "expected visual_tokens of a tower whose token_reduction has the kind 'learn'": {"visual_tokens": "learned"},
    r"expected pooled_grid to be \(rows, columns\), got None": {"visual_tokens": "pooled"},
    "expected pooled_grid to be None unless": {"pooled_grid": (2, 2)},
    "expected num_visual_registers to be 0 or more, got -1": {"num_visual_registers": -1},
    "expected drop_layer to be None or 1 to 3, the layers of the decoder, got 0": {"drop_layer": 0},
    "got 4": {"drop_layer": 4},
    "found 0 in MambaForCausalLM|got MambaForCausalLM with linear_attention": {
        "decoder": MambaConfig(vocab_size=WORDS, hidden_size=16, num_hidden_layers=3),
        "attention": "eager",
    },
    "whose layers all attend to all tokens, got MistralForCausalLM": {
        "decoder": MistralConfig(num_key_value_heads=2, sliding_window=4, **SIZES, **WIDE)
    },
}


@pytest.mark.parametrize("message", BAD_SETTINGS)
def test_settings_and_decoders_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(**BAD_SETTINGS[message])


def test_decoders_with_unknown_arguments_or_an_encoder_are_refused(make, tiny):
    with pytest.raises(ValueError, match="the layers of this decoder read 'alibi'"):
        model = make(BloomConfig(vocab_size=WORDS, hidden_size=32, n_layer=3, n_head=4), attention="eager")
        model(pixel_values=PIXELS, **{**texts(NUM_VISUAL + 2), "position_ids": None})
    with pytest.raises(ValueError, match="GPT2LMHeadModel gives back as many tokens as it gets"):
        make(GPT2Config(n_positions=64, **SIZES))(pixel_values=PIXELS, **texts(NUM_VISUAL + 2))
    with pytest.raises(ValueError, match="T5"):
        make(T5Config(vocab_size=WORDS, d_model=32, d_kv=8, d_ff=32, num_layers=3, num_heads=4))


def test_images_and_placeholders_that_do_not_fit_are_refused(make):
    model, inputs = make(), texts(NUM_VISUAL + 2)
    with pytest.raises(ValueError, match="expected `input_ids`"):
        model(pixel_values=PIXELS)
    with pytest.raises(ValueError, match="expected `pixel_values`"):
        model(**inputs)
    with pytest.raises(ValueError, match=r"8 times the token 30 \(6 visual tokens, 2 registers\), got 2 images"):
        model(pixel_values=PIXELS, **texts(7))
    with pytest.raises(ValueError, match="got 1 images and texts"):
        model(pixel_values=PIXELS[:1], **inputs)
    output = model(pixel_values=PIXELS, use_cache=True, **inputs)
    cache = cache_of(output)
    cache.batch_select_indices(torch.tensor([0]))
    with pytest.raises(ValueError, match="of 2 texts and 13 tokens, got 1 texts"):
        model(torch.tensor([[4]]), past_key_values=cache)
    with pytest.raises(ValueError, match=r"(?i)static|compil"):
        model.generate(pixel_values=PIXELS, max_new_tokens=2, cache_implementation="static", **inputs)
