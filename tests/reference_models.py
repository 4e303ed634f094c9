"""Shared by the comparisons with reference implementations: random weights, tables of names, errors of tokens."""

import re

import torch


LIMIT = 1e-5

# Images of the tiny configuration, which was made for 32 x 32: this size, a larger and a smaller one, and oblong ones,
# the first two with as many patches as the table, the last in which one axis keeps its length.
SIZES = ((32, 32), (48, 48), (24, 24), (64, 16), (16, 64), (24, 40), (32, 56))


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Give every trained parameter a random value, factors around 1: zeros would hide what they multiply."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_factor = parameter.ndim == 1 and not name.endswith(("bias", "embedding"))
            if parameter.requires_grad:
                parameter.normal_(float(is_factor), 0.1)
    return model.eval()


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference of two tensors in units of the largest value of the second."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def token_errors(ours, theirs: torch.Tensor, places: dict) -> dict:
    """Relative error of each kind of tokens.

    Args:
        ours: an output of ours, tokens by name.
        theirs: (B, N, D), the same tokens in the order of the reference.
        places: index or slice of each kind in `theirs`.
    """
    return {kind: relative_error(ours[kind], theirs[:, place]) for kind, place in places.items()}


def layer_errors(ours: tuple, theirs: tuple, places: dict) -> dict:
    """Relative error of each kind of tokens in every hidden state; `places` as in `token_errors`."""
    assert len(ours) == len(theirs)
    return {
        f"{kind} of hidden state {number}": relative_error(ours[number][:, place], theirs[number][:, place])
        for number in range(len(theirs))
        for kind, place in places.items()
    }


def states_like(ours, theirs, *, is_normed: bool = True) -> tuple:
    """Our hidden states for `layer_errors`. Some models of transformers 4 return the last one behind the final norm.

    Args:
        is_normed: whether the last hidden state of theirs is normed at all.
    """
    is_last = torch.equal(theirs.hidden_states[-1], theirs.last_hidden_state)
    return (*ours.hidden_states[:-1], ours.last_hidden_state if is_last and is_normed else ours.hidden_states[-1])


def assert_small(errors: dict, record_property) -> None:
    """Print and record the largest error, and name those above the limit."""
    largest = max(errors.values())
    record_property("largest_relative_error", largest)
    print(f"largest relative error of {len(errors)} comparisons: {largest:.1e}")
    too_large = {what: error for what, error in errors.items() if not error <= LIMIT}  # so that nan is too large
    assert not too_large, too_large


def rename(weights: dict, names: dict) -> dict:
    """Replace, in the names of tensors, each pattern of a table by what stands beside it, one after the other."""
    renamed = {}
    for name, weight in weights.items():
        for theirs, ours in names.items():
            name = re.sub(theirs, ours, name)
        renamed[name] = weight
    return renamed


def concatenate(weights: dict, parts: tuple, whole: str) -> dict:
    """Put modules such as queries, keys and values, in this order, into one, in every layer that has them."""
    result = {name: weight for name, weight in weights.items() if not set(parts) & set(name.split("."))}
    for name in weights:
        if parts[0] in name.split("."):
            result[name.replace(parts[0], whole)] = torch.cat(
                [weights[name.replace(parts[0], part)] for part in parts]
            )
    return result
