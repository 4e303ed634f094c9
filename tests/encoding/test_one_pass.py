"""The pass: every image reaches every consumer once, whatever the batches, transforms, shards and broken files."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from planted_models import pictures, plain_model

from modeling_vitreg.distributed import DistributedContext
from modeling_vitreg.encoding import Consumer, Crop, Needs, Pad, PassSettings, read_all, run_pass
from modeling_vitreg.encoding.one_pass import _Pass
from modeling_vitreg.features import Encoder, extract_features, load_encoder
from modeling_vitreg.images import open_images
from modeling_vitreg.omissions import Failures


class Kept(Consumer):
    """Keeps the class tokens of the last layer by the number of the image."""

    def __init__(self, *, done=(), **needs):
        self.needs = Needs(**{"features": ((-1, "token"),), **needs})
        self.done, self.tokens, self.facts, self.batches, self.shards = done, {}, {}, [], []

    def update(self, batch):
        self.batches.append(len(batch))
        for image, token in zip(batch.images, batch.tokens().cls_token):
            self.tokens[image.number], self.facts[image.number] = token, image

    def has_shard(self, index):
        return index in self.done

    def end_shard(self, shard):
        self.shards.append(shard)

    def merge(self, others):
        for other in others:
            self.tokens |= other.tokens


def _run(images, *consumers, model=None, failures=None, **settings):
    encoder = load_encoder(model or plain_model(), name="model")
    how = PassSettings(**{"batch_size": 4, "has_progress_bar": False, **settings})
    return encoder, run_pass(encoder, images, consumers, how, failures=failures)


def _folder(path, images):
    for number, image in enumerate(images):
        image.save(path / f"{number:02}.png")
    return str(path)


def test_a_consumer_sees_each_image_once_as_the_encoder_would_prepare_it():
    images, kept = pictures(10)[0], Kept()
    encoder, counts = _run(images, kept)
    assert kept.batches == [4, 4, 2] and counts.num_images == 10 and counts.stopped_by is None
    expected = extract_features(encoder, encoder.prepare(images))[0].cls_token
    torch.testing.assert_close(torch.stack([kept.tokens[n] for n in range(10)]), expected, rtol=0, atol=1e-6)


def test_bytes_that_are_normalised_later_are_the_pixels_of_the_encoder_bit_for_bit(photograph):
    encoder = load_encoder(plain_model())
    images = [photograph, photograph.crop((0, 0, 211, 97)), Image.new("L", (3, 5), 7)]
    group, counts = read_all(images, Crop().make(encoder), PassSettings())
    sides = np.array(encoder.image_size)
    for image, pixels in zip(images, encoder.normalise(group.pixels)):
        rgb = image.convert("RGB")
        scale = max(sides / (rgb.height, rgb.width))
        size = [max(round(side * scale), own) for side, own in zip(rgb.size, sides[::-1])]
        resized = np.asarray(rgb.resize(size, Image.Resampling.BICUBIC), np.float32) / 255
        top, left = (np.array(resized.shape[:2]) - sides) // 2
        slow = resized[top : top + sides[0], left : left + sides[1]] - np.float32(encoder.image_mean)
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), slow / np.float32(encoder.image_std))
    assert counts.num_seen == 3 and group.pixels.dtype == torch.uint8


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("is_streaming", [False, True])
def test_workers_and_streams_give_the_same_features(tmp_path, workers, is_streaming):
    images = pictures(9)[0]
    source = open_images(_folder(tmp_path, images), is_streaming=is_streaming)
    kept, other = Kept(), Kept()
    _run(source, kept, workers=workers)
    _run(images, other)
    assert list(kept.tokens) == list(range(9))
    found = {kept.facts[n].name.rpartition("/")[2]: token for n, token in kept.tokens.items()}
    assert all(torch.equal(found[f"{n:02}.png"], other.tokens[n]) for n in range(9))


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_read_are_named_in_order_and_batches_are_filled_up(tmp_path, workers):
    folder = _folder(tmp_path, pictures(8)[0])
    for name in ("00a.png", "03a.png"):
        (tmp_path / name).write_bytes(b"no picture")
    kept = Kept()
    _, counts = _run(open_images(folder), kept, workers=workers)
    assert kept.batches == [4, 4] and list(kept.tokens) == [0, 2, 3, 4, 6, 7, 8, 9]
    assert list(counts.unreadable) == [1, 5] and "00a.png" in counts.unreadable[1]
    assert counts.describe()["num_unreadable"] == 2 and counts.describe()["num_images"] == 8


def test_the_limit_counts_images_that_cannot_be_read():
    kept = Kept()
    _, counts = _run(itertools.chain(["no image"], pictures(8)[0]), kept, limit=6)
    assert len(kept.tokens) == 5 and counts.unreadable == {0: "image 0: expected a PIL image, got a str"}


def test_consumers_with_different_transforms_share_one_pass(photograph):
    images = [photograph.crop((0, 0, 50, 70)), photograph.crop((0, 0, 64, 40)), photograph.crop((9, 9, 59, 79))]
    cropped, padded = Kept(), Kept(transform=Pad())
    encoder, counts = _run(images, cropped, padded)
    assert counts.num_seen == 3 and cropped.batches == [3] and padded.batches == [2, 1]
    assert padded.facts[0].size == (70, 50) and cropped.facts[0].original_size == (70, 50)
    pixels = encoder.normalise(torch.from_numpy(np.asarray(images[1]).copy()).permute(2, 0, 1)[None])
    expected = extract_features(encoder, pixels)[0].cls_token[0]
    torch.testing.assert_close(padded.tokens[1], expected)
    whole = torch.zeros(1, 3, 72, 56)
    whole[:, :, :70, :50] = encoder.normalise(torch.from_numpy(np.asarray(images[0]).copy()).permute(2, 0, 1)[None])
    torch.testing.assert_close(padded.tokens[0], extract_features(encoder, whole)[0].cls_token[0])


def test_a_shard_ends_after_all_of_its_images_and_is_not_read_again():
    images = ["no image", *pictures(9)[0]]
    first = Kept()
    _run(images, first, shard_size=6)
    assert first.batches == [4, 1, 4]  # no batch reaches over the end of a shard
    assert [(shard.index, shard.numbers) for shard in first.shards] == [(0, range(6)), (1, range(6, 10))]
    lost, none = (shard.counts for shard in first.shards)
    assert lost.unreadable == {0: "image 0: expected a PIL image, got a str"} and lost.num_images == 5
    assert not none.unreadable and none.num_images == 4
    again, other = Kept(done={0}), Kept()
    _run(images, again, shard_size=6)
    assert list(again.tokens) == [6, 7, 8, 9] and [shard.index for shard in again.shards] == [1]
    again = Kept(done={0})
    _run(images, again, other, shard_size=6)
    assert len(other.tokens) == 9 and list(again.tokens) == [6, 7, 8, 9]


def test_images_with_features_that_are_not_finite_reach_no_consumer():
    model, images = plain_model(), pictures(5)[0]
    model.layers[1] = _NotFinite(model.layers[1])
    kept = Kept()
    _, counts = _run([*images, Image.new("RGB", (32, 32))], kept, model=model, shard_size=4)
    assert list(kept.tokens) == list(range(5)) and counts.nonfinite == {5: "image 5"}
    assert kept.shards[1].counts.nonfinite == {5: "image 5"} and counts.num_images == 5 and counts.num_seen == 6


class _NotFinite(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, state, *arguments):
        return torch.where(
            (state[:, -16:, 0] < -1).any(dim=1)[:, None, None], torch.nan, self.layer(state, *arguments)
        )


def test_a_consumer_that_could_not_be_merged_is_refused_before_any_image_is_read():
    class Half(Consumer):
        def update(self, batch):
            pass

    with pytest.raises(TypeError, match="merge"):
        Half()


def test_a_consumer_that_fails_is_dropped_and_the_others_go_on(tmp_path):
    class Broken(Kept):
        name = "broken"

        def update(self, batch):
            self.batches.append(len(batch))
            [][0]

    kept, broken, failures = Kept(), Broken(), Failures()
    _, counts = _run(pictures(8)[0], broken, kept, failures=failures)
    assert len(kept.tokens) == 8 and broken.batches == [4] and counts.stopped_by is None
    assert "IndexError" in broken.skipped and "IndexError" in failures.tracebacks["broken"]
    with pytest.raises(IndexError):
        _run(pictures(8)[0], Broken(), kept)


def test_what_does_not_exist_is_refused_before_an_image_is_read():
    images = iter(pictures(2)[0])
    for needs, words in (
        ({"features": ((9, "token"),)}, "layers from 0 to 4"),
        ({"attention": (0,)}, "layers from 1 to 4"),
        ({"transform": Crop(33)}, "33"),
    ):
        with pytest.raises(ValueError, match=words):
            _run(images, Kept(**needs))
    assert len(list(images)) == 2


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"batch_size": -1}, "expected batch_size of 1 or more, got -1"),
        ({"workers": -1}, "expected workers of 0 or more, got -1"),
        ({"precision": "bf16"}, "expected precision to be one of float32, bfloat16, float16, got 'bf16'"),
    ],
)
def test_settings_out_of_range_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        PassSettings(**changes)


# Precision and compilation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"has_cls_token": False, "position_embedding": "none", "pooling": "mean"}])
def test_half_precision_keeps_the_residual_stream_in_float32(changes, randomise):
    model, images = randomise(plain_model(**changes)), pictures(6)[0]
    layers = tuple((layer, "token") for layer in range(5))
    found = []
    for precision in (None, "bfloat16"):
        kept = Patches(features=layers)
        _, counts = _run(images, kept, model=model, precision=precision)
        assert counts.precision == precision or (precision is None and counts.precision == "float32")
        assert {tokens.dtype for batch in kept.batches for tokens in batch} == {torch.float32}
        found.append(torch.cat([batch[-1] for batch in kept.batches]))
    assert not torch.equal(*found)
    cosine = torch.nn.functional.cosine_similarity(*found, dim=-1)
    assert cosine.min() > 0.999


class Patches(Kept):
    """Keeps the patches of all layers that it asks for."""

    def update(self, batch):
        assert not torch.is_autocast_enabled("cpu")  # what is measured is computed in float32
        self.batches.append([batch.features[pair].patch_tokens for pair in self.needs.features])


def test_weights_in_half_precision_are_run_as_they_are(randomise):
    model = randomise(plain_model()).to(torch.bfloat16)
    _, counts = _run(pictures(2)[0], Kept(), model=model)
    assert counts.precision == "bfloat16"
    with pytest.raises(ValueError, match="expected weights in float32 for the precision float16, got weights in bfl"):
        _run(pictures(2)[0], Kept(), model=model, precision="float16")


def test_compiled_layers_give_the_same_and_are_compiled_twice_at_most(randomise, monkeypatch):
    from torch._dynamo.utils import counters

    images, model = pictures(11)[0], randomise(plain_model())
    eager, compiled = Kept(), Kept(attention=(2,))
    _run(images, eager, model=model)
    monkeypatch.setattr(Encoder.compiled_layers, "__kwdefaults__", {"backend": "eager"})
    torch._dynamo.reset()
    counters.clear()
    encoder, _ = _run(images, compiled, model=model, compile=True)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2  # batches of 4, and the last one of 3
    torch.testing.assert_close(list(compiled.tokens.values()), list(eager.tokens.values()))
    assert not any("forward" in vars(layer) for layer in encoder.layers)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_asks_for_its_own_shards_only(rank):
    # A shard of another process may be written at the same time: whoever takes it over counts its images twice.
    asked, kept = set(), Kept(done=range(5))
    kept.has_shard = lambda index: asked.add(index) or True
    encoder = load_encoder(plain_model(), name="model")
    context = DistributedContext(rank=rank, size=2)
    how = PassSettings(batch_size=2, shard_size=2, workers=0, has_progress_bar=False)
    _Pass(encoder, [kept], how, context, None).read(pictures(10)[0])
    assert asked >= set(range(rank, 5, 2)) and {index % 2 for index in asked} == {rank} and not kept.tokens
