"""Names and shapes of official checkpoints, written down from their own code, and random tensors for them."""

import torch


def blocks(
    width: int, depth: int, hidden: int, *, scale: tuple = (), mlp: tuple = ("fc1", "fc2"), gate: int = 1
) -> dict:
    """The layers of everything that took timm's names."""
    shapes = {}
    for i in range(depth):
        layer = {
            "norm1.weight": (width,),
            "norm1.bias": (width,),
            "attn.qkv.weight": (3 * width, width),
            "attn.qkv.bias": (3 * width,),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "norm2.weight": (width,),
            "norm2.bias": (width,),
            f"mlp.{mlp[0]}.weight": (gate * hidden, width),
            f"mlp.{mlp[0]}.bias": (gate * hidden,),
            f"mlp.{mlp[1]}.weight": (width, hidden),
            f"mlp.{mlp[1]}.bias": (width,),
            **dict.fromkeys(scale, (width,)),
        }
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def stem(width: int, patch: int, *, num_positions: int | None) -> dict:
    shapes = {"cls_token": (1, 1, width), "patch_embed.proj.weight": (width, 3, patch, patch)}
    shapes |= {"patch_embed.proj.bias": (width,), "norm.weight": (width,), "norm.bias": (width,)}
    return shapes if num_positions is None else {**shapes, "pos_embed": (1, num_positions, width)}


def linear(name: str, outputs: int, inputs: int) -> dict:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def dinov2(width, depth, *, patch=14, side=37, num_registers=0, gated_hidden=None) -> dict:
    mlp = {"mlp": ("w12", "w3"), "gate": 2} if gated_hidden else {}
    shapes = stem(width, patch, num_positions=1 + side**2) | {"mask_token": (1, width)}
    if num_registers:
        shapes["register_tokens"] = (1, num_registers, width)
    return shapes | blocks(width, depth, gated_hidden or 4 * width, scale=("ls1.gamma", "ls2.gamma"), **mlp)


def dino(width, depth, *, patch=16, side=14) -> dict:
    return stem(width, patch, num_positions=1 + side**2) | blocks(width, depth, 4 * width)


def deit(width, depth, *, patch=16, side=14, num_classes=1000, is_distilled=False) -> dict:
    shapes = stem(width, patch, num_positions=1 + is_distilled + side**2) | linear("head", num_classes, width)
    if is_distilled:
        shapes |= {"dist_token": (1, 1, width)} | linear("head_dist", num_classes, width)
    return shapes | blocks(width, depth, 4 * width)


def deit3(width, depth, *, patch=16, side=14, num_classes=1000) -> dict:
    shapes = stem(width, patch, num_positions=side**2) | linear("head", num_classes, width)
    return shapes | blocks(width, depth, 4 * width, scale=("gamma_1", "gamma_2"))


def mae(width, depth, *, patch=16, side=14, has_decoder=True) -> dict:
    shapes = stem(width, patch, num_positions=1 + side**2) | blocks(width, depth, 4 * width)
    if not has_decoder:
        return shapes
    decoder = {f"decoder_{name}": shape for name, shape in blocks(48, 1, 96).items()}
    decoder |= {"mask_token": (1, 1, 48), "decoder_pos_embed": (1, 1 + side**2, 48)}
    return shapes | decoder | linear("decoder_embed", 48, width) | linear("decoder_pred", 3 * patch**2, 48)


def dinov3(
    width, depth, *, heads, patch=16, num_registers=4, gated_hidden=None, has_bias=True, is_untied=False
) -> dict:
    shapes = stem(width, patch, num_positions=None) | {"mask_token": (1, width)}
    shapes |= {"storage_tokens": (1, num_registers, width), "rope_embed.periods": (width // heads // 4,)}
    if is_untied:
        shapes |= {"local_cls_norm.weight": (width,), "local_cls_norm.bias": (width,)}
    layers = blocks(width, depth, gated_hidden or 4 * width, scale=("ls1.gamma", "ls2.gamma"))
    for i in range(depth):
        if gated_hidden:
            for part in ("weight", "bias"):
                for old in ("fc1", "fc2"):
                    del layers[f"blocks.{i}.mlp.{old}.{part}"]
            layers |= linear(f"blocks.{i}.mlp.w1", gated_hidden, width) | linear(
                f"blocks.{i}.mlp.w2", gated_hidden, width
            )
            layers |= linear(f"blocks.{i}.mlp.w3", width, gated_hidden)
        if has_bias:
            layers[f"blocks.{i}.attn.qkv.bias_mask"] = (3 * width,)
        else:
            del layers[f"blocks.{i}.attn.qkv.bias"]
    return shapes | layers


def capi(width, depth, *, heads, patch=14, num_registers=16) -> dict:
    shapes = {"mask_token": (1, width), "registers": (1, num_registers, width)} | linear("patch_embed", width, width)
    shapes["patch_embed.weight"] = (width, 3, patch, patch)
    for part in ("encoder", "decoder"):
        for i in range(depth):
            block = f"{part}.blocks.{i}"
            shapes |= {f"{block}.residual1.fn.{x}_proj.weight": (width, width) for x in "qkv"}
            shapes |= {
                f"{block}.residual1.norm.weight": (width,),
                f"{block}.residual2.norm.weight": (width,),
                f"{block}.residual1.fn.proj.weight": (width, width),
                f"{block}.residual1.fn.rope.freqs": (2, width // heads),
                f"{block}.residual2.fn.fc1.weight": (4 * width, width),
                f"{block}.residual2.fn.fc2.weight": (width, 4 * width),
            }
    return {f"backbone.{name}": shape for name, shape in shapes.items()}


def clip(width, depth, *, patch=16, side=14, projection=512, has_text=True) -> dict:
    tower = {
        "class_embedding": (width,),
        "positional_embedding": (1 + side**2, width),
        "conv1.weight": (width, 3, patch, patch),
        "proj": (width, projection),
        **dict.fromkeys(("ln_pre.weight", "ln_pre.bias", "ln_post.weight", "ln_post.bias"), (width,)),
    }
    for i in range(depth):
        block = f"transformer.resblocks.{i}"
        tower |= dict.fromkeys(
            (f"{block}.{norm}.{leaf}" for norm in ("ln_1", "ln_2") for leaf in ("weight", "bias")), (width,)
        )
        tower |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        tower |= linear(f"{block}.attn.out_proj", width, width) | linear(f"{block}.mlp.c_fc", 4 * width, width)
        tower |= linear(f"{block}.mlp.c_proj", width, 4 * width)
    shapes = {f"visual.{name}": shape for name, shape in tower.items()}
    text = {"positional_embedding": (77, 64), "token_embedding.weight": (20, 64), "logit_scale": ()}
    text |= {
        "transformer.resblocks.0.ln_1.weight": (64,),
        "ln_final.weight": (64,),
        "text_projection": (64, projection),
    }
    return shapes | (text if has_text else {})


def fill(shapes: dict, *, seed: int = 0) -> dict:
    """Random tensors; what the official code computes is computed by its formula."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        is_factor = len(shape) == 1 and not name.endswith(("bias", "embedding"))
        state[name] = 0.1 * torch.randn(shape, generator=generator) + float(is_factor)
    for name, shape in shapes.items():
        if name == "rope_embed.periods":
            state[name] = 100 ** (2 * torch.arange(shape[0]) / (2 * shape[0]))
        elif name.endswith("bias_mask"):
            third = shape[0] // 3
            state[name] = torch.cat([torch.ones(third), torch.zeros(third), torch.ones(third)])
        elif name.endswith("rope.freqs"):
            frequencies = 7 * (7 / 7e-4) ** torch.linspace(0, -1, shape[1] // 4) * 2 * torch.pi
            state[name] = torch.zeros(shape)
            state[name][0, : shape[1] // 2] = frequencies.repeat(2)
            state[name][1, shape[1] // 2 :] = frequencies.repeat(2)
    return state
