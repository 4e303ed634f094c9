"""Models of unknown kinds, windowed and hierarchical ones: their parts, and tokens against their own outputs."""

import pytest
import timm
import torch
import transformers
from torch import nn

from modeling_vitreg.features import extract_features, load_encoder
from modeling_vitreg.features.heads import read_heads
from modeling_vitreg.features.model_hash import hash_weights
from modeling_vitreg.features.parts import read_parts


def _swin(**more):
    sizes = {"img_size": 64, "patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    return timm.models.SwinTransformer(**sizes, num_classes=0, **more)


def _sam():
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "window_size": 4}
    more = {"neck_chans": 0, "global_attn_indexes": (1,), "use_rel_pos": True, "use_rope": False, "num_classes": 0}
    return timm.models.vision_transformer_sam.VisionTransformerSAM(**sizes, **more)


def _swin_of_transformers(kind="Swin"):
    sizes = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes, window_size=4))


# Name -> how to make it, blocks of the last grid, width, and stride in pixels.
GRIDS = {
    "swin of timm": (_swin, 2, 32, 8),
    "swin v2 of timm": (lambda: timm.models.SwinTransformerV2(
        img_size=64, embed_dim=16, depths=(1, 2), num_heads=(2, 4), window_size=4, num_classes=0
    ), 2, 32, 8),
    "convnext of timm": (lambda: timm.models.ConvNeXt(
        depths=(1, 1, 1, 2), dims=(8, 8, 8, 16), num_classes=0
    ), 2, 16, 32),
    "sam of timm": (_sam, 3, 32, 8),
    "hiera of timm": (lambda: timm.models.Hiera(
        embed_dim=16, num_heads=1, stages=(1, 1, 1, 2), num_classes=0
    ), 1, 128, 32),
    "swin of transformers": (_swin_of_transformers, 2, 32, 8),
    "swin v2 of transformers": (lambda: _swin_of_transformers("Swinv2"), 2, 32, 8),
    "convnext of transformers": (lambda: transformers.ConvNextModel(
        transformers.ConvNextConfig(image_size=64, depths=[1, 2], hidden_sizes=[8, 16], num_stages=2)
    ), 2, 16, 8),
}  # fmt: skip


def _maps_of(name, model, images):
    """Maps (B, D, rows, columns) of the last grid, by the library itself: before any final norm."""
    with torch.no_grad():
        if name.endswith("of timm"):
            return model.forward_intermediates(images, indices=[-1], intermediates_only=True)[-1]
        output = model(images, output_hidden_states=True)
    states = getattr(output, "reshaped_hidden_states", None) or output.hidden_states
    return states[-1]


@pytest.mark.parametrize("name", GRIDS)
def test_tokens_of_the_last_grid_are_those_of_the_library(name, randomise):
    make, num_layers, width, stride = GRIDS[name]
    side = 224 if name.startswith("hiera") else 64
    model, images = randomise(make()).eval(), torch.randn(2, 3, side, side)
    before = _settings(model)
    encoder = load_encoder(model)
    assert (encoder.num_layers, encoder.hidden_size, encoder.patch_shape) == (num_layers, width, (stride, stride))
    assert encoder.num_prefix_tokens == 0 and encoder.is_partial == (name != "sam of timm")
    assert ("layers" in encoder.describe()) == encoder.is_partial
    (tokens,) = extract_features(encoder, images)
    assert _settings(model) == before  # windows are as they were
    torch.testing.assert_close(tokens.patch_grid.permute(0, 3, 1, 2), _maps_of(name, model, images))


def _settings(model):
    kinds = (int, float, tuple)
    return [{key: value for key, value in vars(part).items() if isinstance(value, kinds)} for part in model.modules()]


def test_a_model_of_one_size_says_which_and_one_of_any_size_takes_others(randomise):
    encoder = load_encoder(_swin())
    assert not encoder.takes_any_size and encoder.image_size == (64, 64)
    with pytest.raises(ValueError, match=r"does not take images of 96 x 64 pixels .* it was made for 64 x 64"):
        extract_features(encoder, torch.randn(1, 3, 96, 64))
    model = randomise(_swin_of_transformers())
    encoder, images = load_encoder(model), torch.randn(1, 3, 96, 64)
    assert encoder.takes_any_size
    with torch.no_grad():
        expected = model.eval()(images, output_hidden_states=True).reshaped_hidden_states[-1]
    (tokens,) = extract_features(encoder, images)
    torch.testing.assert_close(tokens.patch_grid.permute(0, 3, 1, 2), expected)


def test_attention_on_windows_is_refused_and_not_misread():
    encoder, images = load_encoder(_swin()), torch.randn(1, 3, 64, 64)
    with pytest.raises(RuntimeError, match=r"rows of feature 'key', .* windows or other tokens; read feature 'token'"):
        extract_features(encoder, images, feature="key")
    with pytest.raises(ValueError, match="attention among all tokens, got one of layer 1 on windows"):
        read_heads(load_encoder(_sam()), images, lambda heads: None)


class _Plain(nn.Module):
    """Blocks of timm in a class of an unknown name; `scale` is done to values behind the softmax."""

    def __init__(self, scale=None):
        super().__init__()
        self.patch_embed, self.img_size = nn.Conv2d(3, 64, 16, stride=16), 64
        self.blocks = nn.ModuleList(timm.models.vision_transformer.Block(64, 2) for _ in range(2))
        self.cls_token, self.norm = nn.Parameter(torch.randn(1, 1, 64)), nn.LayerNorm(64)
        if scale is not None:
            self.blocks[0].attn.proj.register_forward_pre_hook(lambda _, inputs: (inputs[0] * scale,))

    def forward(self, pixels):
        tokens = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


def test_attention_of_an_unknown_model_is_read_in_half_precision_too():
    torch.manual_seed(0)
    model, images = _Plain(), torch.randn(2, 3, 64, 64)
    whole = load_encoder(model).prefix_attention(images, layers=1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = load_encoder(model).prefix_attention(images, layers=1)[0]
        with pytest.raises(ValueError, match="does more than a softmax of queries and keys, so it is not read"):
            load_encoder(_Plain(scale=1.1)).prefix_attention(images, layers=1)
    torch.testing.assert_close(half, whole, rtol=0.05, atol=0.01)  # both float32


class _Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mix, self.norm = nn.MultiheadAttention(width, 2, batch_first=True), nn.LayerNorm(width)

    def forward(self, tokens):
        normed = self.norm(tokens)
        return tokens + self.mix(normed, normed, normed)[0]


class _Unknown(nn.Module):
    """A ViT with names that nobody else uses: class token, 2 registers, then patches."""

    def __init__(self, width=16):
        super().__init__()
        self.stem, self.final = nn.Conv2d(3, width, 8, stride=8), nn.LayerNorm(width)
        self.first, self.extra = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 2, width))
        self.trunk = nn.ModuleDict({"steps": nn.ModuleList(_Block(width) for _ in range(3))})

    def forward(self, pixels):
        tokens = self.stem(pixels).flatten(2).transpose(1, 2)
        prefix = torch.cat([self.first, self.extra], dim=1).expand(len(tokens), -1, -1)
        states = [torch.cat([prefix, tokens], dim=1)]
        for step in self.trunk["steps"]:
            states.append(step(states[-1]))
        return states


PARTS = "blocks=trunk.steps,patches=stem,norm=final,cls=first,registers=extra"


@pytest.mark.parametrize("parts", [PARTS, read_parts(PARTS), "blocks=trunk.steps,norm=final,cls=1,registers=2"])
def test_an_unknown_model_is_read_by_the_names_of_its_parts(parts, randomise):
    model, images = randomise(_Unknown()).eval(), torch.randn(2, 3, 224, 112)
    encoder = load_encoder(model, parts=parts)
    found = extract_features(encoder, images, layers=[0, 1, 2, 3])
    with torch.no_grad():
        states = model(images)
    for tokens, expected in zip(found, states, strict=True):
        whole = torch.cat([tokens.cls_token[:, None], tokens.register_tokens, tokens.patch_tokens], dim=1)
        torch.testing.assert_close(whole, expected)
    assert found[0].grid == (28, 14) and found[0].register_tokens.shape == (2, 2, 16)
    (normed,) = extract_features(encoder, images, is_normed=True)
    torch.testing.assert_close(normed.cls_token, model.final(states[-1])[:, 0])
    with pytest.raises(ValueError, match="blocks of class _Block have no known attention"):
        encoder.prefix_attention(images, layers=-1)


def test_features_of_other_parts_are_other_features():
    model = _Unknown()
    prints = [
        hash_weights(load_encoder(model, parts=f"blocks=trunk.steps,norm=final,{tokens}"))
        for tokens in ("cls=1,registers=2", "cls=1,registers=2", "registers=3")
    ]
    assert prints[0] == prints[1] != prints[2]


def test_the_message_proposes_parts_that_work():
    with pytest.raises(ValueError, match=r"_Unknown: name its parts, perhaps --parts (\S+)$") as caught:
        load_encoder(_Unknown())
    proposed = str(caught.value).split("--parts ")[1]
    assert proposed == "blocks=trunk.steps,patches=stem"
    with pytest.raises(
        ValueError,
        match=r"224 x 224 pixels gives 787 tokens, and they fill no grid if 0 of them are no patches: name the tokens",
    ):
        load_encoder(_Unknown(), parts=proposed)
    assert load_encoder(_Unknown(), parts=f"{proposed},cls=1,registers=extra").num_register_tokens == 2


@pytest.mark.parametrize(
    "parts, message",
    [
        ("blocks", "expected NAME=PLACE,... with names out of blocks, patches, .* got 'blocks'"),
        ("heads=a", "got 'heads=a'"),
        ("blocks=a,blocks=b", "got 'blocks=b'"),
        ("cls=first", "expected blocks=PLACE"),
        ("blocks=trunk.nowhere", "--parts blocks=trunk.nowhere: expected a list of modules in _Unknown"),
        ("blocks=trunk.steps,patches=final", "--parts patches=final: expected a convolution in _Unknown"),
        ("blocks=trunk.steps,cls=nowhere", "--parts cls=nowhere: there is no such parameter in _Unknown"),
    ],
)
def test_parts_that_do_not_exist_are_named(parts, message):
    with pytest.raises(ValueError, match=message):
        load_encoder(_Unknown(), parts=parts)


def test_a_named_norm_must_be_one_of_tokens():
    encoder = load_encoder(_Unknown(), parts="blocks=trunk.steps,norm=stem,cls=1,registers=2")
    with pytest.raises(ValueError, match="--parts norm=stem: expected a norm of tokens, got Conv2d"):
        encoder.norm_tokens(torch.zeros(1, 4, 16))


def test_keys_of_blocks_without_attention_are_refused_with_a_remedy():
    encoder = load_encoder(GRIDS["convnext of timm"][0]())
    with pytest.raises(
        ValueError, match=r"blocks without known attention have no known layer of keys: .*feature=token"
    ):
        extract_features(encoder, torch.zeros(1, 3, 64, 64), feature="key")
