"""Fewer tokens inside the network: layers that join similar patches (ToMe; Bolya et al. 2023, arXiv 2210.09461),
layers that work on learned means of the patches (TokenLearner; Ryoo et al. 2021, arXiv 2106.11297), and layers behind
which patches halt (A-ViT; Yin et al. 2022, arXiv 2112.07658).

Layers take and return whole sequences (B, N, D); inside a layer the sequence is short. With merging, the patches of
one token are equal: a token of size s is worth s equal patches. With learned tokens, a patch is the mean of the tokens
that read it. A halted patch keeps its output. Hidden states, heads and attention maps therefore have the shapes of a
plain model. The prefix (class tokens, distillation token, registers) is never merged or pooled, and only halts if the
configuration says so.

Letters for shapes: B images, N tokens, P patches, M tokens that the patches went into, S learned tokens, Q tokens of
the prefix, T running tokens of all images, D width, H heads, d = D / H, L layers.

This file travels next to the weights and runs without the package.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .configuration_vitreg import ViTWithRegistersConfig
from .positions_vitreg import has_values, turn


LEARNER_WIDTH = 64  # of the hidden layer of TokenLearner 1.1 and of TokenFuser
LEARNER_EPS = 1e-6  # of their norms
HIDDEN = -1e30  # added to the score of a key that no token reads; finite, so that a row of them has a softmax
WHOLE_IMAGES = (
    "a model with token_reduction takes whole images, and this objective reads single patches or several views at "
    "once: load the model with token_reduction=None"
)


@dataclass
class TokenReduction(ModelOutput):
    """What became of the patches of each image.

    Args:
        token_assignment: (B, rows, columns), the token in 0 ... M - 1 that each patch went into.
        token_sizes: (B, M), the patches of each token.
    """

    token_assignment: Tensor | None = None
    token_sizes: Tensor | None = None

    def merge(self, patches: Tensor) -> Tensor:
        """Means over the patches of each token: (B, P, D) or (B, rows, columns, D) to (B, M, D)."""
        assignment, values = self.token_assignment.flatten(1), patches.reshape(len(patches), -1, patches.shape[-1])
        sums = values.new_zeros(len(values), self.token_sizes.shape[1], values.shape[-1])
        sums = sums.scatter_add(1, assignment.unsqueeze(-1).expand_as(values), values)
        return sums / self.token_sizes.unsqueeze(-1).to(sums.dtype)

    def unmerge(self, tokens: Tensor) -> Tensor:
        """Give each patch the value of its token: (B, M, D) to (B, rows, columns, D)."""
        return take(tokens, self.token_assignment.flatten(1)).unflatten(1, self.token_assignment.shape[1:])


@dataclass
class LearnedTokens(ModelOutput):
    """What a model with learned tokens read of each image.

    Args:
        token_maps: (B, S, rows, columns), the weight of each patch in each token; of the last layer that learned any.
        learned_tokens: (B, S, D) behind the last layer, before the final norm; None with a fuser, which gives them
            back to the patches.
    """

    token_maps: Tensor | None = None
    learned_tokens: Tensor | None = None


@dataclass
class HaltedTokens(ModelOutput):
    """How deep tokens went, and what it costs. Losses need a pass through all layers, else they are None.

    Args:
        halting_depth: (B, rows, columns), the number of layers that each patch ran, from 1 to L.
        prefix_depth: (B, Q), the same of the prefix.
        ponder_loss: mean, over the tokens that may halt, of the layers that a token ran plus its remainder.
        distribution_loss: divergence of the scores of the layers from `halting_prior`.
        loss: the two, weighted as the configuration says.
    """

    halting_depth: Tensor | None = None
    prefix_depth: Tensor | None = None
    ponder_loss: Tensor | None = None
    distribution_loss: Tensor | None = None
    loss: Tensor | None = None


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens (B, n, D) by their numbers in each image (B, m), as (B, m, D)."""
    starts = torch.arange(tokens.shape[0], device=index.device) * tokens.shape[1]
    rows = tokens.flatten(0, 1).index_select(0, (starts[:, None] + index).flatten())  # several times as fast as gather
    return rows.unflatten(0, index.shape)


def make_tracker(config: ViTWithRegistersConfig) -> Callable:
    """How a model prepares for its layers what it knows of positions, such as the angles of a rotary embedding."""
    # CODEPATH: models with fewer tokens; else all others.
    if config.token_reduction is not None:
        return functools.partial(TRACKERS[config.token_reduction["kind"]], config)
    # CODEPATH: models with rotary embedding; else all others.
    return turn if config.has_rope else _keep


def _keep(positions: object, grid: tuple) -> object:
    return positions


@dataclass
class Merged:
    """The tokens that the patches went into.

    Args:
        assignment: (B, P), the token of each patch.
        first: (B, M), one patch of each token.
        sizes: (B, M), in float32.
        angles: (B, 1, Q + M, d), the mean of a rotary embedding over the patches, which is that of the mean
            coordinate, because angles are linear in it; or None.
    """

    assignment: Tensor
    first: Tensor
    sizes: Tensor
    angles: Tensor | None


class TokenMerges:
    """The merges of one forward pass. Layer n writes entry n and reads entry n - 1, so that it may run twice."""

    def __init__(self, config: ViTWithRegistersConfig, angles: Tensor | None, grid: tuple):
        self.grid, self.num_prefix = grid, config.num_prefix_tokens
        self.angles, self.tables = angles, {}
        self.entries: dict[int, Merged | None] = {0: None}  # None: no patch was merged yet
        self.keys: dict[int, Tensor] = {}

    @property
    def output(self) -> TokenReduction | None:
        """The last entry by name; None if no layer merged."""
        merged = self.entries[max(self.entries)]
        if merged is None:
            return None
        return TokenReduction(merged.assignment.unflatten(1, self.grid), merged.sizes.long())

    def rotary(self, number: int) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines for the tokens in layer `number`."""
        if self.angles is None:
            return None
        merged = self.entries[number - 1]
        place = 0 if merged is None else number
        if place not in self.tables:
            self.tables[place] = turn(self.angles if merged is None else merged.angles)
        return self.tables[place]

    def compact(self, hidden_states: Tensor, number: int) -> Tensor:
        """One patch of each token that goes into layer `number`: (B, N, D) to (B, Q + M, D)."""
        merged = self.entries[number - 1]
        return hidden_states if merged is None else self._take(hidden_states, merged.first)

    def expand(self, tokens: Tensor, number: int) -> Tensor:
        """Give each patch the token that it is in behind layer `number`: (B, Q + M, D) to (B, N, D)."""
        merged = self.entries[number]
        return tokens if merged is None else self._take(tokens, merged.assignment)

    def expand_keys(self, probabilities: Tensor, number: int) -> Tensor:
        """Share what is attended to tokens evenly among their patches: (B, H, n, Q + M) to (B, H, n, N)."""
        merged = self.entries[number - 1]
        if merged is None:
            return probabilities
        shares = probabilities / F.pad(merged.sizes, (self.num_prefix, 0), value=1.0)[:, None, None]
        shares = self._take(shares.permute(0, 3, 1, 2).flatten(2), merged.assignment)
        return shares.unflatten(2, probabilities.shape[1:3]).permute(0, 2, 3, 1)

    def expand_queries(self, probabilities: Tensor, number: int) -> Tensor:
        """Give each patch what its token attends to: (B, H, Q + M, n) to (B, H, N, n)."""
        merged = self.entries[number - 1]
        if merged is None:
            return probabilities
        rows = self._take(probabilities.transpose(1, 2).flatten(2), merged.assignment)
        return rows.unflatten(2, probabilities.shape[1::2]).transpose(1, 2)

    def _take(self, tokens: Tensor, index: Tensor) -> Tensor:
        prefix = torch.arange(self.num_prefix, device=index.device).expand(index.shape[0], -1)
        return take(tokens, torch.cat([prefix, self.num_prefix + index], dim=1))

    def merge(self, tokens: Tensor, number: int, count: int) -> Tensor:
        """Join `count` patches to their most similar ones, at most half of them: (B, Q + M, D) to (B, Q + M', D)."""
        before = self.entries[number - 1]
        if count:
            keys = self.keys.pop(number)[:, self.num_prefix :]
            before, count = before or self._unmerged(keys), min(count, keys.shape[1] // 2)
        if count == 0:
            self.entries[number] = before
            return tokens
        plan = match(keys, count, is_first_even=self.num_prefix % 2 == 0)
        sizes = before.sizes.gather(1, plan.kept).scatter_add(1, plan.target, before.sizes.gather(1, plan.moved))
        places = torch.arange(plan.kept.shape[1], device=keys.device).expand_as(plan.kept)
        token_of = torch.zeros_like(before.first).scatter(1, plan.kept, places).scatter(1, plan.moved, plan.target)
        join = functools.partial(self._join, plan=plan, before=before.sizes, after=sizes)
        self.entries[number] = Merged(
            assignment=token_of.gather(1, before.assignment),
            first=before.first.gather(1, plan.kept),
            sizes=sizes,
            angles=None if before.angles is None else join(before.angles[:, 0]).unsqueeze(1),
        )
        return join(tokens)

    def _unmerged(self, keys: Tensor) -> Merged:
        """Each patch a token, for keys (B, P, d)."""
        patches = torch.arange(keys.shape[1], device=keys.device).expand(len(keys), -1)
        angles = None if self.angles is None else self.angles.expand(len(keys), 1, -1, -1)
        return Merged(patches, patches, torch.ones_like(patches, dtype=torch.float32), angles)

    def _join(self, tokens: Tensor, *, plan: "Matching", before: Tensor, after: Tensor) -> Tensor:
        """Means weighted by size. A patch that is not merged has the weight 1 and stays as it is, bit for bit."""
        shares = before.gather(1, plan.kept) / after
        kept = (
            self._take(tokens, plan.kept) * F.pad(shares, (self.num_prefix, 0), value=1.0).to(tokens.dtype)[..., None]
        )
        shares = before.gather(1, plan.moved) / after.gather(1, plan.target)
        moved = take(tokens, self.num_prefix + plan.moved) * shares.to(tokens.dtype)[..., None]
        target = (self.num_prefix + plan.target)[..., None].expand_as(moved)
        return kept.scatter_add(1, target, moved)


@dataclass
class Matching:
    """Which of the patches are kept (B, M'), in their new order; which are moved (B, r), and into which of the new."""

    kept: Tensor
    moved: Tensor
    target: Tensor


@torch.no_grad()
def match(keys: Tensor, count: int, *, is_first_even: bool) -> Matching:
    """Bipartite soft matching: patches at even places of the sequence may move to patches at odd places.

    for each patch a at an even place: best[a] = the patch b at an odd place of largest cosine similarity
    the `count` patches a with the largest similarities move to best[a]
    new order: the other even patches in their order, then the odd ones

    Args:
        keys: (B, P, d), means over the heads.
        count: at most P // 2.
        is_first_even: whether the first patch is at an even place, that is, whether the prefix has an even number of
            tokens. The places decide who may move, as in the reference.
    """
    start = 0 if is_first_even else 1
    keys = F.normalize(keys.float(), dim=-1)
    even, odd = keys[:, start::2], keys[:, 1 - start :: 2]
    best, partner = (even @ odd.transpose(1, 2)).max(dim=-1)  # [B, P / 2]
    order = best.argsort(dim=-1, descending=True, stable=True)
    moved, stay = order[:, :count], order[:, count:].sort(dim=-1).values
    places = torch.arange(odd.shape[1], device=keys.device).expand(len(keys), -1)
    return Matching(
        kept=torch.cat([2 * stay + start, 2 * places + 1 - start], dim=1),
        moved=2 * moved + start,
        target=partner.gather(1, moved) + stay.shape[1],
    )


class KeySizes(nn.Module):
    """The bias (B, 1, 1, Q + M) of the scores in layer `number`: a key counts as often as it has patches."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def forward(self, merges: TokenMerges) -> Tensor:
        """The logarithms of the sizes, 0 for the prefix."""
        return F.pad(merges.entries[self.number - 1].sizes.log(), (merges.num_prefix, 0))[:, None, None]


class MergingAttention(nn.Module):
    """What attention does in a layer with merging. It is mixed into the attention of the family."""

    bias_field = "token_reduction"

    def __init__(self, config: ViTWithRegistersConfig, number: int = 1):
        super().__init__(config, number)
        self.number, counts = number, config.merges_per_layer
        self.keeps_keys = counts[number - 1] > 0
        # Before the first merge there is no bias, so that a model that merges nothing is the plain one, bit for bit.
        # CODEPATH: ToMe with proportional attention; else without.
        if config.reduction["is_proportional"] and any(counts[: number - 1]):
            self.position_bias = KeySizes(number)

    def split_heads(self, packed: Tensor, rotary: TokenMerges) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; keeps the keys for the matching, normed, not rotated, as means over the heads."""
        if self.keeps_keys:
            with torch.no_grad():
                keys = packed.split(self.sizes, dim=-1)[1].unflatten(-1, (-1, self.sizes[0] // self.num_heads))
                rotary.keys[self.number] = self.key_norm(keys).mean(dim=2)  # [B, n, K, d] -> [B, n, d]
        return super().split_heads(packed, rotary.rotary(self.number))

    def prefix_attention(self, hidden_states: Tensor, rotary: TokenMerges, num_queries: int) -> Tensor:
        """Probabilities (B, H, Q, N) from normed tokens (B, N, D)."""
        return super().prefix_attention(rotary.compact(hidden_states, self.number), rotary, num_queries)

    def prefix_probabilities(self, packed: Tensor, rotary: TokenMerges, num_queries: int | None) -> Tensor:
        """Probabilities (B, H, Q, N) from queries, keys and values of the tokens inside the layer."""
        probabilities = rotary.expand_keys(super().prefix_probabilities(packed, rotary, num_queries), self.number)
        return rotary.expand_queries(probabilities, self.number) if num_queries is None else probabilities

    def expand(self, tokens: Tensor, merges: TokenMerges) -> Tensor:
        """Give each patch what its token has inside the layer: (B, Q + M, D) to (B, N, D)."""
        return merges.expand(tokens, self.number - 1)


class MergingLayer(nn.Module):
    """A layer that joins patches between its two branches. It is mixed into the layer of the family."""

    def __init__(self, config: ViTWithRegistersConfig, drop_path_rate: float, *others, number: int):
        super().__init__(config, drop_path_rate, *others, number=number)
        self.number, self.num_merged = number, config.merges_per_layer[number - 1]

    def forward(self, hidden_states: Tensor, rotary: TokenMerges, groups: tuple | None = None, reads=None) -> Tensor:
        """Tokens (B, N, D) to tokens. `groups` and `reads` belong to objectives that need all patches: refused."""
        if groups is not None:
            raise ValueError(WHOLE_IMAGES)
        return self._run(hidden_states, rotary)[0]

    def forward_with_attentions(self, hidden_states: Tensor, rotary: TokenMerges) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D) to tokens, and the attention probabilities (B, H, N, N), computed eagerly."""
        hidden_states, probabilities = self._run(hidden_states, rotary, wants_attentions=True)
        return hidden_states, rotary.expand_queries(rotary.expand_keys(probabilities, self.number), self.number)

    def _run(self, hidden_states: Tensor, merges: TokenMerges, wants_attentions: bool = False) -> tuple:
        tokens, probabilities = merges.compact(hidden_states, self.number), None
        if wants_attentions:
            branch, probabilities = self.attention_branch_with_probabilities(tokens, merges)
        else:
            branch = self.attention_branch(tokens, merges)
        # The record of the merges has all images, so no image is left out of a branch: factors do the same.
        tokens = self.drop_path.add(tokens, lambda _: branch, self.drop_path.choose(tokens, needs_all=True))
        tokens = merges.merge(tokens, self.number, self.num_merged)
        tokens = self.drop_path.add(tokens, self.mlp_branch, self.drop_path.choose(tokens))
        return merges.expand(tokens, self.number), probabilities


# Learned tokens ------------------------------------------------------------------------------------------------------


gelu = functools.partial(F.gelu, approximate="tanh")


class TokenLearner(nn.Module):
    """Patches (B, P, D) to S weighted sums of them (B, S, D), and the weights (B, S, P).

    version 1.1:  weights = softmax over patches of  out(gelu(hidden(norm(patches))))
    version 1:    weights = sigmoid of four convolutions of 3 x 3 on norm(patches), with GELU between them
    tokens[s] = sum over patches of weights[s, p] patches[p], which are not normed

    GELU is the tanh approximation. Initial weights are normal, of the variance of the uniform ones in the original.
    Source: google-research/scenic, `projects/token_learner`.
    """

    def __init__(self, config: ViTWithRegistersConfig):
        super().__init__()
        reduction, width = config.reduction, config.hidden_size
        number = reduction["num_tokens"]
        self.norm = nn.LayerNorm(width, eps=LEARNER_EPS)
        self.convolutions = None
        if reduction["version"] == "1.1":
            self.hidden, self.out = _linear(width, LEARNER_WIDTH), _linear(LEARNER_WIDTH, number)
        else:
            widths = [width, number, number, number]
            self.convolutions = nn.ModuleList(nn.Conv2d(size, number, 3, padding=1, bias=False) for size in widths)
            for convolution in self.convolutions:
                convolution.initial_std = (9 * convolution.in_channels) ** -0.5

    def forward(self, patches: Tensor, grid: tuple) -> tuple[Tensor, Tensor]:
        """Tokens and weights of patches on a grid (rows, columns)."""
        normed = self.norm(patches)
        if self.convolutions is None:
            weights = self.out(gelu(self.hidden(normed))).transpose(1, 2).softmax(dim=-1)  # [B, P, S] -> [B, S, P]
        else:
            maps = normed.transpose(1, 2).unflatten(2, grid)
            for number, convolution in enumerate(self.convolutions):
                maps = convolution(gelu(maps) if number else maps)
            weights = maps.flatten(2).sigmoid()
        return weights.to(patches.dtype) @ patches, weights


class TokenFuser(nn.Module):
    """What learned tokens (B, S, D) give back to patches (B, P, D); zero at the start of training.

    mixed = norm2(mix(norm1(tokens) over the token axis))
    update = sigmoid(out(gelu(hidden(norm3(patches))))) @ mixed
    """

    def __init__(self, config: ViTWithRegistersConfig):
        super().__init__()
        width, number = config.hidden_size, config.reduction["num_tokens"]
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, eps=LEARNER_EPS) for _ in range(3))
        self.mix = nn.Linear(number, number)
        self.mix.is_zero_initialized = True
        self.hidden, self.out = _linear(width, LEARNER_WIDTH), _linear(LEARNER_WIDTH, number)

    def forward(self, tokens: Tensor, patches: Tensor) -> Tensor:
        """The update (B, P, D) of the patches."""
        mixed = self.norm2(self.mix(self.norm1(tokens).transpose(1, 2)).transpose(1, 2))
        return self.out(gelu(self.hidden(self.norm3(patches)))).sigmoid() @ mixed


def _linear(width: int, size: int) -> nn.Linear:
    layer = nn.Linear(width, size)
    layer.initial_std = (2 / (width + size)) ** 0.5
    return layer


class TokenSelection:
    """The learned tokens of one pass. Layer n writes entries n and reads entries n - 1, so it may run twice."""

    def __init__(self, config: ViTWithRegistersConfig, angles: Tensor | None, grid: tuple):
        self.grid, self.num_prefix = grid, config.num_prefix_tokens
        self.last_whole, self.has_fuser = config.reduction["layer"], config.reduction["has_fuser"]
        self.maps: dict[int, Tensor] = {}  # (B, S, P) that layer n worked with
        self.tokens: dict[int, Tensor] = {}  # (B, S, D) behind layer n
        self.tables = [None, None]
        if angles is not None:
            # Learned tokens have no place in the image: they are not rotated.
            short = F.pad(angles[: self.num_prefix], (0, 0, 0, config.reduction["num_tokens"]))
            self.tables = [turn(angles), turn(short)]

    @property
    def output(self) -> LearnedTokens | None:
        """The last entries by name; None if no layer worked on learned tokens."""
        if not self.maps:
            return None
        last = max(self.maps)
        return LearnedTokens(self.maps[last].unflatten(2, self.grid), None if self.has_fuser else self.tokens[last])

    def rotary(self, number: int) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines for the tokens in layer `number`."""
        return self.tables[number > self.last_whole]

    def expand(self, tokens: Tensor, number: int) -> Tensor:
        """Means over the tokens of layer `number` that read a patch: (B, Q + S, D) to (B, N, D)."""
        if number not in self.maps:
            return tokens
        prefix, learned = tokens[:, : self.num_prefix], tokens[:, self.num_prefix :]
        return torch.cat([prefix, self._shares(number, 1).transpose(1, 2).to(tokens.dtype) @ learned], dim=1)

    def expand_keys(self, probabilities: Tensor, number: int) -> Tensor:
        """Share what is attended to tokens among the patches that they read: (B, H, n, Q + S) to (B, H, n, N)."""
        if number not in self.maps:
            return probabilities
        prefix, learned = probabilities[..., : self.num_prefix], probabilities[..., self.num_prefix :]
        return torch.cat([prefix, learned @ self._shares(number, 2)[:, None].to(learned.dtype)], dim=-1)

    def expand_queries(self, probabilities: Tensor, number: int) -> Tensor:
        """Give each patch the mean of what the tokens attend to that read it: (B, H, Q + S, n) to (B, H, N, n)."""
        rows = self.expand(probabilities.transpose(1, 2).flatten(2), number)
        return rows.unflatten(2, probabilities.shape[1::2]).transpose(1, 2)

    def _shares(self, number: int, axis: int) -> Tensor:
        return F.normalize(self.maps[number], p=1, dim=axis)


class LearningAttention(nn.Module):
    """What attention does in a model with learned tokens. It is mixed into the attention of the family."""

    def __init__(self, config: ViTWithRegistersConfig, number: int = 1):
        super().__init__(config, number)
        self.number = number

    def split_heads(self, packed: Tensor, rotary: TokenSelection) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; learned tokens are not rotated."""
        return super().split_heads(packed, rotary.rotary(self.number))

    def prefix_probabilities(self, packed: Tensor, rotary: TokenSelection, num_queries: int | None) -> Tensor:
        """Probabilities (B, H, Q, N) from queries, keys and values of the tokens inside the layer."""
        probabilities = rotary.expand_keys(super().prefix_probabilities(packed, rotary, num_queries), self.number)
        return rotary.expand_queries(probabilities, self.number) if num_queries is None else probabilities

    def expand(self, tokens: Tensor, selection: TokenSelection) -> Tensor:
        """Give each patch what its tokens have inside the layer: (B, Q + S, D) to (B, N, D)."""
        return selection.expand(tokens, self.number)


class LearningLayer(nn.Module):
    """A layer that works on learned tokens, if all patches lie behind it. It is mixed into the layer of the family."""

    def __init__(self, config: ViTWithRegistersConfig, drop_path_rate: float, *others, number: int):
        super().__init__(config, drop_path_rate, *others, number=number)
        self.number, (first, has_fuser) = number, (config.reduction[name] for name in ("layer", "has_fuser"))
        self.is_short = number > first
        self.token_learner = TokenLearner(config) if number == first + 1 or (has_fuser and self.is_short) else None
        self.token_fuser = TokenFuser(config) if has_fuser and self.is_short else None

    def forward(
        self, hidden_states: Tensor, rotary: TokenSelection, groups: tuple | None = None, reads=None
    ) -> Tensor:
        """Tokens (B, N, D) to tokens. `groups` and `reads` belong to objectives that need all patches: refused."""
        if groups is not None:
            raise ValueError(WHOLE_IMAGES)
        tokens = super().forward(self._compact(hidden_states, rotary), rotary)
        return self._give_back(tokens, hidden_states, rotary)

    def forward_with_attentions(self, hidden_states: Tensor, rotary: TokenSelection) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D) to tokens, and the attention probabilities (B, H, N, N), computed eagerly."""
        tokens, probabilities = super().forward_with_attentions(self._compact(hidden_states, rotary), rotary)
        probabilities = rotary.expand_queries(rotary.expand_keys(probabilities, self.number), self.number)
        return self._give_back(tokens, hidden_states, rotary), probabilities

    def prefix_attention(self, hidden_states: Tensor, rotary: TokenSelection, num_queries: int) -> Tensor:
        """Attention probabilities (B, H, Q, N) of the first Q tokens (B, N, D)."""
        return super().prefix_attention(self._compact(hidden_states, rotary), rotary, num_queries)

    def _compact(self, hidden_states: Tensor, selection: TokenSelection) -> Tensor:
        """(B, N, D) to the tokens (B, Q + S, D) inside this layer."""
        if not self.is_short:
            return hidden_states
        prefix, patches = hidden_states.tensor_split((selection.num_prefix,), dim=1)
        if self.token_learner is None:
            tokens, maps = selection.tokens[self.number - 1], selection.maps[self.number - 1]
        else:
            tokens, maps = self.token_learner(patches, selection.grid)
        selection.maps[self.number] = maps
        return torch.cat([prefix, tokens], dim=1)

    def _give_back(self, tokens: Tensor, hidden_states: Tensor, selection: TokenSelection) -> Tensor:
        """(B, Q + S, D) of this layer to (B, N, D)."""
        if not self.is_short:
            return tokens
        learned = selection.tokens[self.number] = tokens[:, selection.num_prefix :]
        if self.token_fuser is None:
            return selection.expand(tokens, self.number)
        patches = hidden_states[:, selection.num_prefix :]
        fused = patches + self.token_fuser(learned, patches)
        return torch.cat([tokens[:, : selection.num_prefix], fused], dim=1)


# Halting -------------------------------------------------------------------------------------------------------------


def halting_prior(num_layers: int, target_layer: int) -> Tensor:
    """The scores (L,) that layers should have: a Gaussian around one, of deviation 1. As in the original its sum is
    not 1: the layers in front of `target_layer` have 0.98."""
    density = torch.exp(-0.5 * (torch.arange(1, num_layers + 1) - target_layer) ** 2)
    return density * 0.98 / density[: target_layer - 1].sum()


@dataclass
class Running:
    """The tokens that enter a layer, T in all, and what they have gathered so far.

    Args:
        size: (B, M), with the longest sequence of running tokens; all N where nothing is removed.
        sums: (T,), sums of their scores, in float32 or more.
        output: (T, D), sums of their states, weighted by the scores.
        depth: (B N,), the last layer that each token of the images ran.
        rows: (T,), their places among all B N tokens, rising; None: T = B N.
        numbers: (B, M), the number of the token at each place; None: 0 to N - 1.
        places: (T,), where they lie in the B M places; None: T = B M.
        is_running: (B, M), false at places without a token, and where a token is masked; None: all are true.
        score: mean of the scores in the layer before, over all tokens that may halt.
        cost: mean of what that layer adds to layers and remainders, over the same.
    """

    size: tuple
    sums: Tensor
    output: Tensor
    depth: Tensor
    rows: Tensor | None = None
    numbers: Tensor | None = None
    places: Tensor | None = None
    is_running: Tensor | None = None
    score: Tensor | None = None
    cost: Tensor | None = None


class TokenHalts:
    """Which tokens run in one pass. Layer n writes entry n and reads entry n - 1, so that it may run twice.

    for each layer and running token x:
        score = sigmoid(scale * x[0] - center), or 0 for a token that never halts; 1 in the last layer
        the token halts if score + sum of its scores before >= 1 - eps
        output of the token += (score if it runs on, else 1 - sum of its scores before) * x

    Running tokens of all images lie in one sequence (1, T, D) without padding; only attention pads them to (B, M, D).
    While a graph is recorded, or without `has_removal`, T = B N, and halted tokens are masked.
    Source: NVlabs/A-ViT, whose halted tokens are all masked.
    """

    def __init__(self, config: ViTWithRegistersConfig, angles: Tensor | None, grid: tuple):
        self.grid, self.num_prefix, self.num_layers = grid, config.num_prefix_tokens, config.num_hidden_layers
        self.settings = config.reduction
        # Tokens from the first of these numbers to the end of the prefix never halt.
        self.first_fixed = config.token_slices["registers"].start if self.settings["has_halting_cls_token"] else 0
        self.tables = None if angles is None else turn(angles)
        self.entries: dict[int, Running] = {}

    @property
    def output(self) -> HaltedTokens | None:
        """Depths and losses; None if no layer ran."""
        last = max(self.entries, default=0)
        if not last:
            return None
        prefix, patches = self.entries[last].depth.view(-1, self._num_tokens).tensor_split((self.num_prefix,), dim=1)
        if last < self.num_layers:
            return HaltedTokens(patches.unflatten(1, self.grid), prefix)
        layers = [self.entries[number] for number in range(1, last + 1)]
        ponder, scores = sum(layer.cost for layer in layers), torch.stack([layer.score for layer in layers])
        shares = (scores / scores.sum().clamp(min=torch.finfo(scores.dtype).tiny)).clamp(0.01, 0.99)
        prior = halting_prior(last, self.settings["target_layer"]).to(shares.device)
        divergence = ((torch.xlogy(prior, prior) - prior * shares.log()).sum() / last).clamp(min=0)
        loss = self.settings["ponder_weight"] * ponder + self.settings["distribution_weight"] * divergence
        return HaltedTokens(patches.unflatten(1, self.grid), prefix, ponder, divergence, loss)

    @property
    def _num_tokens(self) -> int:
        return self.num_prefix + self.grid[0] * self.grid[1]

    def rotary(self, number: int) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines for the tokens in layer `number`."""
        numbers = self.entries[number - 1].numbers
        if self.tables is None or numbers is None:
            return self.tables
        return tuple(table[numbers].unsqueeze(1) for table in self.tables)  # [N, d] -> [B, 1, M, d]

    def compact(self, hidden_states: Tensor, number: int) -> Tensor:
        """The tokens that run in layer `number`: (B, N, D) to (1, T, D)."""
        tokens = hidden_states.flatten(0, 1)
        if number == 1:
            sums = torch.zeros_like(tokens[:, 0], dtype=torch.promote_types(tokens.dtype, torch.float32))
            depth = torch.zeros_like(sums, dtype=torch.long)
            self.entries[0] = Running(tuple(hidden_states.shape[:2]), sums, torch.zeros_like(tokens), depth)
        rows = self.entries[number - 1].rows
        return (tokens if rows is None else tokens.index_select(0, rows)).unsqueeze(0)

    def pad(self, tokens: Tensor, number: int) -> Tensor:
        """Running tokens by image, with zeros at places without a token: (1, T, C) to (B, M, C)."""
        running = self.entries[number - 1]
        if running.places is not None:
            padded = tokens.new_zeros(running.size[0] * running.size[1], tokens.shape[-1])
            tokens = padded.index_copy_(0, running.places, tokens[0])
        return tokens.reshape(*running.size, tokens.shape[-1])

    def pack(self, tokens: Tensor, number: int) -> Tensor:
        """The reverse of `pad`: (B, M, C) to (1, T, C)."""
        places, tokens = self.entries[number - 1].places, tokens.flatten(0, 1)
        return (tokens if places is None else tokens.index_select(0, places)).unsqueeze(0)

    def expand(self, tokens: Tensor, number: int) -> Tensor:
        """Running tokens where they lie in the image, and zeros for the others: (1, T, C) to (B, N, C)."""
        running, tokens = self.entries[number - 1], tokens[0]
        if running.rows is None:
            is_running = running.is_running
            tokens = tokens if is_running is None else tokens * is_running.view(-1, 1)
        else:
            tokens = tokens.new_zeros(len(running.depth), tokens.shape[-1]).index_copy_(0, running.rows, tokens)
        return tokens.view(running.size[0], -1, tokens.shape[-1])

    def expand_maps(self, probabilities: Tensor, number: int, *, axis: int) -> Tensor:
        """Zeros for the tokens that do not run: (B, H, M, n) to (B, H, N, n) for axis 2, the same of keys for 3."""
        running, shape = self.entries[number - 1], [1, 1, 1, 1]
        shape[0], shape[axis] = running.size
        if running.is_running is not None:
            probabilities = probabilities * running.is_running.view(shape)
        if running.numbers is None:
            return probabilities
        size = [*probabilities.shape[:axis], self._num_tokens, *probabilities.shape[axis + 1 :]]
        index = running.numbers.view(shape).expand_as(probabilities)
        return probabilities.new_zeros(size).scatter_add_(axis, index, probabilities)

    def spread(self, choice: tuple | None, number: int) -> tuple | None:
        """Factors of images (B, 1, 1), for stochastic depth, as factors of their tokens (T, 1)."""
        if choice is None:
            return None
        factors, rows = choice[1].flatten().repeat_interleave(self._num_tokens), self.entries[number - 1].rows
        return None, (factors if rows is None else factors[rows]).unsqueeze(1)

    def halt(self, hidden_states: Tensor, tokens: Tensor, number: int) -> Tensor:
        """Let tokens halt behind layer `number`.

        Args:
            hidden_states: (B, N, D), the input of the layer.
            tokens: (1, T, D), what the layer made of the running tokens.
            number: from 1 on.

        Returns:
            (B, N, D), the states of running tokens and the outputs of halted ones.
        """
        before, state, num_tokens = self.entries[number - 1], tokens[0], self._num_tokens
        whole = hidden_states.flatten(0, 1)
        rows = torch.arange(len(whole), device=whole.device) if before.rows is None else before.rows
        may_halt = (rows % num_tokens < self.first_fixed) | (rows % num_tokens >= self.num_prefix)
        was_running = torch.ones_like(may_halt)
        if before.rows is None and before.is_running is not None:
            was_running = before.is_running.flatten()
        score = (
            self.settings["scale"] * state[:, 0].to(before.sums.dtype) - self.settings["center"]
        ).sigmoid() * may_halt
        sums = before.sums + (score if number < self.num_layers else 1.0)
        runs_on = was_running & (sums < 1 - self.settings["eps"])
        remainder = 1 - before.sums
        weight = torch.where(runs_on, score, remainder).to(state.dtype)
        output = before.output + weight.unsqueeze(1) * state
        value = torch.where(runs_on.unsqueeze(1), state, output).to(whole.dtype)
        if before.rows is not None:
            after = whole.index_copy(0, rows, value)
        else:
            after = value if before.is_running is None else torch.where(was_running.unsqueeze(1), value, whole)
        count = len(hidden_states) * (num_tokens - self.num_prefix + self.first_fixed)
        cost = was_running + remainder * ~runs_on
        entry = Running(
            size=before.size,
            sums=sums,
            output=output,
            depth=before.depth.index_copy(0, rows, torch.where(was_running, number, before.depth[rows])),
            rows=before.rows,
            numbers=before.numbers,
            places=before.places,
            is_running=before.is_running,
            score=(score * was_running).sum() / count,
            cost=(cost * (was_running & may_halt)).sum() / count,
        )
        if not (self.settings["has_removal"] and has_values(hidden_states)):
            entry.is_running = runs_on.view(before.size)
        elif len(kept := runs_on.nonzero().squeeze(1)) < len(rows):
            self._leave_out(entry, kept, rows)
        self.entries[number] = entry
        return after.view_as(hidden_states)

    def _leave_out(self, entry: Running, kept: Tensor, rows: Tensor) -> None:
        """Leave only some of the tokens at `rows` in an entry."""
        num_tokens, num_images = self._num_tokens, entry.size[0]
        entry.rows, entry.sums, entry.output = rows[kept], entry.sums[kept], entry.output.index_select(0, kept)
        images = entry.rows // num_tokens
        counts = torch.bincount(images, minlength=num_images)
        longest = int(counts.max())
        order = torch.arange(len(kept), device=kept.device) - (counts.cumsum(0) - counts)[images]
        entry.size, entry.places = (num_images, longest), images * longest + order
        numbers = entry.rows.new_zeros(num_images * longest).index_copy_(0, entry.places, entry.rows % num_tokens)
        entry.numbers = numbers.view(entry.size)
        entry.is_running = torch.arange(longest, device=kept.device) < counts[:, None]
        if len(kept) == num_images * longest:
            entry.places = entry.is_running = None


class KeyMask(nn.Module):
    """The bias (B, 1, 1, M) of the scores in layer `number`, which hides places without a running token; or None."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def forward(self, halts: TokenHalts) -> Tensor | None:
        """`HIDDEN` for keys that no token reads, else 0."""
        is_running = halts.entries[self.number - 1].is_running
        return None if is_running is None else torch.where(is_running, 0.0, HIDDEN)[:, None, None]


class HaltingAttention(nn.Module):
    """What attention does in a model whose tokens halt. It is mixed into the attention of the family."""

    bias_field = "token_reduction"

    def __init__(self, config: ViTWithRegistersConfig, number: int = 1):
        super().__init__(config, number)
        self.number, self.position_bias = number, KeyMask(number)
        self.has_whole_prefix = not config.reduction["has_halting_cls_token"]

    def split_heads(self, packed: Tensor, rotary: TokenHalts) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of (B, M, D + 2 K d)."""
        return super().split_heads(packed, rotary.rotary(self.number))

    def attend(
        self, packed: Tensor, rotary: TokenHalts, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Concatenated heads (1, T, D) from queries, keys and values of running tokens (1, T, D + 2 K d)."""
        attended, probabilities = super().attend(rotary.pad(packed, self.number), rotary, output_attentions)
        return rotary.pack(attended, self.number), probabilities

    def prefix_probabilities(self, packed: Tensor, rotary: TokenHalts, num_queries: int | None) -> Tensor:
        """Probabilities (B, H, Q, N) from queries, keys and values of running tokens (1, T, D + 2 K d)."""
        first = num_queries if self.has_whole_prefix else None
        probabilities = super().prefix_probabilities(rotary.pad(packed, self.number), rotary, first)
        probabilities = rotary.expand_maps(probabilities, self.number, axis=3)
        if first is None:
            probabilities = rotary.expand_maps(probabilities, self.number, axis=2)
        return probabilities[:, :, :num_queries]

    def expand(self, tokens: Tensor, halts: TokenHalts) -> Tensor:
        """Running tokens where they lie in the image, and zeros for the others: (1, T, D) to (B, N, D)."""
        return halts.expand(tokens, self.number)


class HaltingLayer(nn.Module):
    """A layer behind which tokens may halt. It is mixed into the layer of the family."""

    def __init__(self, config: ViTWithRegistersConfig, drop_path_rate: float, *others, number: int):
        super().__init__(config, drop_path_rate, *others, number=number)
        self.number = number

    def forward(self, hidden_states: Tensor, rotary: TokenHalts, groups: tuple | None = None, reads=None) -> Tensor:
        """Tokens (B, N, D) to tokens. `groups` and `reads` belong to objectives that need all patches: refused."""
        if groups is not None:
            raise ValueError(WHOLE_IMAGES)
        return self._run(hidden_states, rotary)[0]

    def forward_with_attentions(self, hidden_states: Tensor, rotary: TokenHalts) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D) to tokens, and the attention probabilities (B, H, N, N), computed eagerly."""
        hidden_states, probabilities = self._run(hidden_states, rotary, wants_attentions=True)
        for axis in (3, 2):
            probabilities = rotary.expand_maps(probabilities, self.number, axis=axis)
        return hidden_states, probabilities

    def prefix_attention(self, hidden_states: Tensor, rotary: TokenHalts, num_queries: int) -> Tensor:
        """Attention probabilities (B, H, Q, N) of the first Q tokens (B, N, D)."""
        return super().prefix_attention(rotary.compact(hidden_states, self.number), rotary, num_queries)

    def _run(self, hidden_states: Tensor, halts: TokenHalts, wants_attentions: bool = False) -> tuple:
        tokens, probabilities = halts.compact(hidden_states, self.number), None
        if wants_attentions:
            branch, probabilities = self.attention_branch_with_probabilities(tokens, halts)
        else:
            branch = self.attention_branch(tokens, halts)
        # Factors in every mode: the tokens of the images lie in one sequence.
        choices = [self.drop_path.choose(hidden_states, needs_all=True) for _ in range(2)]
        choices = [halts.spread(choice, self.number) for choice in choices]
        tokens = self.drop_path.add(tokens, lambda _: branch, choices[0])
        tokens = self.drop_path.add(tokens, self.mlp_branch, choices[1])
        return halts.halt(hidden_states, tokens, self.number), probabilities


TRACKERS = {"merge": TokenMerges, "learn": TokenSelection, "halt": TokenHalts}

__all__ = [
    "HaltedTokens",
    "HaltingAttention",
    "HaltingLayer",
    "LearnedTokens",
    "LearningAttention",
    "LearningLayer",
    "MergingAttention",
    "MergingLayer",
    "TokenFuser",
    "TokenHalts",
    "TokenLearner",
    "TokenMerges",
    "TokenReduction",
    "halting_prior",
    "make_tracker",
    "match",
    "take",
]
