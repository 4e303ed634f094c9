"""Backbones that are no Vision Transformers: their checkpoints go in and out with their bytes."""

import pytest
import torch
from official_layouts import fill, linear

from modeling_vitreg import HATNetForImageClassification, MambaRForImageClassification
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


def hat_net(widths=(16, 16, 32, 32), depths=(1, 2, 1, 1), *, kernels=(3, 5, 3, 3), expansions=(2, 3, 2, 1)) -> dict:
    """Names and shapes of HAT_Net.py of yun-liu/HAT-Net."""
    stem = {0: (16, 3, 3, 3), 1: (16,), 3: (widths[0], 16, 3, 3)}
    shapes = {f"patch_embed.{number}.weight": shape for number, shape in stem.items()}
    shapes |= {f"patch_embed.{number}.bias": shape[:1] for number, shape in stem.items()}
    for stage, (width, depth, kernel) in enumerate(zip(widths, depths, kernels)):
        hidden, pixel = expansions[stage] * width, (1, 1)
        norms, maps = ["attn.norm", "attn.proj_norm"], {"attn.qkv": 3 * width, "attn.proj": width}
        if stage < 3:
            norms, maps = [*norms, "attn.grid_norm", "attn.ds_norm"], maps | {"attn.q": width, "attn.kv": 2 * width}
        for block in (f"blocks.{stage}.{number}" for number in range(depth)):
            shapes |= {f"{block}.{name}.weight": (size, width, *pixel) for name, size in maps.items()}
            shapes |= {f"{block}.{name}.bias": (size,) for name, size in maps.items()}
            for name in (*norms, "conv.conv1.0", "conv.conv3.1"):
                shapes |= {f"{block}.{name}.weight": (width,), f"{block}.{name}.bias": (width,)}
            shapes |= {f"{block}.conv.conv1.1.weight": (hidden, width, *pixel)}
            shapes |= {f"{block}.conv.conv2.0.weight": (hidden, 1, kernel, kernel)}
            shapes |= {f"{block}.conv.conv3.0.weight": (width, hidden, *pixel)}
        if stage:
            shapes |= {f"ds{stage + 1}.conv.weight": (width, widths[stage - 1], 3, 3)}
            shapes |= dict.fromkeys(
                (f"ds{stage + 1}.{name}" for name in ("conv.bias", "norm.weight", "norm.bias")), (width,)
            )
    return shapes | linear("classifier.1", 5, widths[-1])


def trained_hat_net() -> dict:
    """Random tensors; the norms that are never called are as they were made, because no gradient reaches them."""
    state = fill(hat_net())
    for name in state:
        if "proj_norm" in name:
            state[name] = torch.full_like(state[name], name.endswith("weight"))
    return state


def test_a_checkpoint_of_hat_net_goes_in_and_out_with_its_bytes(tmp_path):
    state = trained_hat_net()
    torch.save({"model": state}, tmp_path / "HAT-Net.pth")
    report = convert(tmp_path / "HAT-Net.pth", tmp_path / "in", settings=QUIET)
    assert report.source["layout"] == "hat-net" and report.target["class"] == "HATNetForImageClassification"
    assert {name: report.source["assumed"][name] for name in ("head_size", "window_sizes")} == {
        "head_size": 16,
        "window_sizes": [8, 7, 7, 1],
    }
    dropped = report.ledger["dropped"]
    assert len(dropped) == 10 and set(dropped.values()) == {"its code never calls this norm"}
    model = HATNetForImageClassification.from_pretrained(tmp_path / "in").eval()
    config = model.config
    assert (config.depths, config.kernel_sizes, config.expansions) == ([1, 2, 1, 1], [3, 5, 3, 3], [2, 3, 2, 1])
    assert torch.equal(model.vitreg.layers[2].attention.key_value.weight, state["blocks.1.1.attn.kv.weight"])
    assert torch.isfinite(model(torch.randn(1, 3, 64, 64)).logits).all()
    export(tmp_path / "in", tmp_path / "out.pth", to="hat-net", settings=QUIET)
    written = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert written.keys() == state.keys() and all(torch.equal(written[name], state[name]) for name in state)


def test_what_the_layout_of_hat_net_cannot_represent_is_named(tmp_path):
    torch.save(trained_hat_net(), tmp_path / "HAT-Net.pth")
    settings = ConversionSettings(is_quiet=True, config_overrides={"window_sizes": [4, 4, 4, 1], "head_size": 8})
    convert(tmp_path / "HAT-Net.pth", tmp_path / "in", settings=settings)
    assert HATNetForImageClassification.from_pretrained(tmp_path / "in").config.head_size == 8
    with pytest.raises(ConversionError, match=r"cannot represent head_size=8: it would be read as 16"):
        export(tmp_path / "in", tmp_path / "out.pth", to="hat-net", settings=QUIET)
