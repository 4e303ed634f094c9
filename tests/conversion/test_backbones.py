"""Backbones that are no Vision Transformers: their checkpoints go in and out with their bytes."""

import pytest
import torch
from official_layouts import fill, linear

from modeling_vitreg import MambaRForImageClassification
from modeling_vitreg.conversion import ConversionError, ConversionSettings, convert, export


QUIET = ConversionSettings(is_quiet=True)


def mamba_reg(width=32, depth=2, *, registers=3, reduction=2, side=4, classes=5) -> dict:
    """Names and shapes of models_mamba.py and mamba_custom.py of wangf3014/Mamba-Reg, for patches of 4 pixels."""
    inner, rank = 2 * width, -(-width // 16)
    shapes = {"cls_token": (1, registers, width), "pos_embed_cls": (1, registers, width), "norm_f.weight": (width,)}
    shapes |= {"pos_embed": (1, side * side, width), "patch_embed.proj.bias": (width,)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 4, 4)}
    for layer in range(depth):
        mixer = f"layers.{layer}.mixer"
        shapes |= {f"layers.{layer}.norm.weight": (width,), f"{mixer}.in_proj.weight": (2 * inner, width)}
        shapes |= {f"{mixer}.out_proj.weight": (width, inner)}
        for end in ("", "_b"):
            shapes |= {f"{mixer}.conv1d{end}.weight": (inner, 1, 4), f"{mixer}.conv1d{end}.bias": (inner,)}
            shapes |= {f"{mixer}.x_proj{end}.weight": (rank + 32, inner), f"{mixer}.D{end}": (inner,)}
            shapes |= linear(f"{mixer}.dt_proj{end}", inner, rank)
        shapes |= {f"{mixer}.A_log": (inner, 16), f"{mixer}.A_b_log": (inner, 16)}
    narrow = registers * width // reduction
    neck = {"neck.weight": (width // reduction, width), "norm_neck.weight": (narrow,)} if reduction > 1 else {}
    return shapes | neck | linear("head", classes, narrow)


@pytest.mark.parametrize("reduction", [1, 2])
def test_a_checkpoint_of_mamba_reg_goes_in_and_out_with_its_bytes(reduction, tmp_path):
    state = fill(mamba_reg(reduction=reduction))
    torch.save({"model": state, "epoch": 1}, tmp_path / "mambar_tiny.pth")
    report = convert(tmp_path / "mambar_tiny.pth", tmp_path / "in", settings=QUIET)
    assert report.source["layout"] == "mamba-reg" and report.target["class"] == "MambaRForImageClassification"
    model = MambaRForImageClassification.from_pretrained(tmp_path / "in").eval()
    config = model.config
    assert (config.num_register_tokens, config.register_reduction, config.image_size) == (3, reduction, 16)
    assert torch.isfinite(model(torch.randn(1, 3, 16, 16)).logits).all()
    backward = model.vitreg.layers[1].mixer.backward_direction
    assert torch.equal(backward.A_log, state["layers.1.mixer.A_b_log"])
    export(tmp_path / "in", tmp_path / "out.pth", to="mamba-reg", settings=QUIET)
    written = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert written.keys() == state.keys() and all(torch.equal(written[name], state[name]) for name in state)
    with pytest.raises(ConversionError, match="timm has no such backbone: export it with --to mamba-reg"):
        export(tmp_path / "in", tmp_path / "timm", to="timm", settings=QUIET)


def test_what_the_layout_of_mamba_reg_cannot_represent_is_named(tmp_path):
    torch.save({"model": fill(mamba_reg())}, tmp_path / "mambar.pth")
    convert(tmp_path / "mambar.pth", tmp_path / "in", settings=QUIET)
    model = MambaRForImageClassification.from_pretrained(tmp_path / "in", layer_norm_eps=1e-3)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ConversionError, match=r"cannot represent layer_norm_eps=0.001: it would be read as 1e-05"):
        export(tmp_path / "other", tmp_path / "out.pth", to="mamba-reg", settings=QUIET)
