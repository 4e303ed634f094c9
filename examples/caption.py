"""Train a small language model to describe scenes, with the image in few tokens, and compare the ways to get few.

    accelerate launch examples/caption.py                        # minutes on 2 cores
    accelerate launch examples/caption.py --tokens 1 4 16 --steps 1000 --output outputs/caption-long

An image tower with registers and a decoder of transformers (a Llama of four layers) learn together, from scratch, to
write the captions of built-in scenes. Each way runs with the same scenes, steps and seeds:

    patches           all patches are visual tokens
    visual registers  registers of the decoder read the patches in its first layer, which then go (Victor)
    tower registers   the registers of the tower are the only visual tokens
    average pooling   means of neighbouring patches
    TokenLearner      learned tokens of the tower

Measured on scenes that were not trained on: how often the likeliest next word is the right one, for words of colours
and of shapes, given the words before it; and the same with the image of another scene, what language alone gives. The
output folder holds results.json, table.md, and a model with code and processor for each way.
"""

import argparse
import dataclasses
import json
import pathlib
import time

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm
from transformers import AutoImageProcessor, LlamaConfig, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from modeling_vitreg import (
    ViTWithRegistersConfig,
    ViTWithRegistersForConditionalGeneration,
    ViTWithRegistersVisionLanguageConfig,
)
from modeling_vitreg.files import atomic_folder, write_text
from modeling_vitreg.pretraining.objectives.clip import CLIPSettings, find_words, make_tokenizer, save_tokenizer
from modeling_vitreg.scenes import COLOUR_NAMES, FIRST_TEST_SCENE, SHAPE_NAMES, make_scenes_dataset, preset_settings


WAYS = ("patches", "visual registers", "tower registers", "average pooling", "TokenLearner")
SIDE, WIDTH, HEADS, BATCH, LENGTH = 48, 96, 3, 32, 40
KINDS = {"colours": {word for name in COLOUR_NAMES for word in name.split(" and ")}, "shapes": set(SHAPE_NAMES)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="what to compare")
    parser.add_argument("--tokens", nargs="+", type=int, default=[4], help="numbers of tokens of all ways but patches")
    parser.add_argument("--steps", type=int, default=400, help=f"steps of {BATCH} scenes, for each row")
    parser.add_argument("--scenes", type=int, default=4096, help="scenes to train on")
    parser.add_argument("--held-out", type=int, default=500, help="scenes to measure on")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="each a run of its own")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("outputs/caption"), help="folder to write")
    options = parser.parse_args()
    if min(*options.tokens, options.steps, options.scenes // BATCH, options.held_out - 1) < 1:
        parser.error(f"expected positive numbers, and at least {BATCH} scenes")
    transformers.utils.logging.disable_progress_bar()
    accelerator = Accelerator()
    with accelerator.main_process_first():  # renders once
        train, held_out = make_scenes(options.scenes), make_scenes(options.held_out, start=FIRST_TEST_SCENE)
    tokenizer = make_tokenizer(CLIPSettings(words=find_words(train["caption"]), num_tokens=10**6))
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    rows = []
    for way in options.ways:
        for count in [0] if way == "patches" else options.tokens:
            runs = []
            for seed in options.seeds:
                set_seed(seed)
                model = ViTWithRegistersForConditionalGeneration(make_config(way, count, tokenizer))
                start = time.perf_counter()
                model = fit(
                    accelerator, model, encode(train, model, tokenizer), steps=options.steps, name=f"{way} {count}"
                )
                seconds = time.perf_counter() - start
                runs.append(measure(model, encode(held_out, model, tokenizer), tokenizer) | {"seconds": seconds})
            rows.append({"way": way, "tokens": count or model.config.num_image_tokens, "runs": runs})
            if accelerator.is_main_process:
                print(json.dumps(rows[-1]), flush=True)
                save(model, tokenizer, options.output / f"{way.replace(' ', '-')}-{rows[-1]['tokens']}")
    if accelerator.is_main_process:
        write_text(options.output / "results.json", json.dumps({"options": vars(options), "rows": rows}, default=str))
        write_text(options.output / "table.md", make_table(rows))
        print(make_table(rows))
        show(model, held_out, encode(held_out, model, tokenizer), tokenizer)


def make_scenes(count: int, *, start: int = 0):
    """Scenes of one object that fills the image, of as many pixels as the tower reads."""
    settings = dataclasses.replace(preset_settings("scenes:single", side=SIDE), image_size=SIDE)
    return make_scenes_dataset(count, settings=settings, start=start)


def make_config(way: str, count: int, tokenizer: PreTrainedTokenizerFast) -> ViTWithRegistersVisionLanguageConfig:
    """The same towers for all ways; `count` is the number of tokens."""
    reduction = {"kind": "learn", "layer": 2, "num_tokens": count} if way == "TokenLearner" else None
    tower = ViTWithRegistersConfig(
        hidden_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        image_size=SIDE,
        patch_size=8,
        initializer_range=0.1,
        num_register_tokens=count if way == "tower registers" else 4,
        token_reduction=reduction,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    rows = max(side for side in range(1, max(count, 1) + 1) if count % side == 0 and side**2 <= max(count, 1))
    options = {
        "visual registers": {"num_visual_registers": count, "drop_layer": 1},
        "tower registers": {"visual_tokens": "registers"},
        "average pooling": {"visual_tokens": "pooled", "pooled_grid": (rows, count // rows)},
        "TokenLearner": {"visual_tokens": "learned"},
    }
    image = tokenizer.convert_tokens_to_ids("<image>")
    return ViTWithRegistersVisionLanguageConfig(tower, text, image_token_id=image, **options.get(way, {}))


def encode(
    scenes, model: ViTWithRegistersForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> TensorDataset:
    """Pixels (B, 3, h, w), words (B, N) with the placeholders in front, and their mask (B, N)."""
    statistics = model.vision_model.image_processor_settings()
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in scenes["image"]]).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(statistics[name])[:, None, None] for name in ("image_mean", "image_std"))
    placeholders = "<image>" * model.config.num_image_tokens
    texts = tokenizer([placeholders + caption for caption in scenes["caption"]], padding=True, return_tensors="pt")
    return TensorDataset((pixels - mean) / std, texts["input_ids"], texts["attention_mask"])


def fit(
    accelerator: Accelerator,
    model: ViTWithRegistersForConditionalGeneration,
    data: TensorDataset,
    *,
    steps: int,
    name: str,
) -> ViTWithRegistersForConditionalGeneration:
    """Train both towers, the projector and the registers on the next word."""
    model.train()
    kept = model.no_weight_decay()
    groups = [
        {"params": [each for name, each in model.named_parameters() if name not in kept], "weight_decay": 0.1},
        {"params": [each for name, each in model.named_parameters() if name in kept], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.98))
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, drop_last=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    network, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    batches = iter(())
    for _ in tqdm(range(steps), desc=name, disable=not accelerator.is_main_process):
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            batch = next(batches)
        pixels, words, mask = batch
        labels = words.masked_fill(mask == 0, -100)
        loss = network(words, pixel_values=pixels, attention_mask=mask, labels=labels).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return accelerator.unwrap_model(network).eval()


@torch.no_grad()
def measure(model: ViTWithRegistersForConditionalGeneration, data: TensorDataset, tokenizer) -> dict[str, float]:
    """Share of words of a kind that are the likeliest, with the right image, and with that of the next scene."""
    numbers = {kind: torch.tensor(tokenizer.convert_tokens_to_ids(sorted(words))) for kind, words in KINDS.items()}
    pixels, words, mask = (each.to(model.device) for each in data.tensors)
    scores = {}
    for suffix, images in (("", pixels), (", other image", pixels.roll(1, dims=0))):
        parts = zip(images.split(BATCH), words.split(BATCH), mask.split(BATCH))
        found = torch.cat([predict_next(model, *part) for part in parts])
        for kind, those in numbers.items():
            is_kind = torch.isin(words[:, 1:], those.to(words.device))
            scores[kind + suffix] = (found == words[:, 1:])[is_kind].float().mean().item()
    return scores


def predict_next(
    model: ViTWithRegistersForConditionalGeneration, pixels: Tensor, words: Tensor, mask: Tensor
) -> Tensor:
    """The likeliest word behind each token but the last (B, N - 1); 0 behind tokens that are dropped."""
    output = model(words, pixel_values=pixels, attention_mask=mask, use_cache=False)
    found = output.logits.argmax(dim=-1)
    if output.kept_tokens is not None:
        found = torch.zeros_like(words).scatter(1, output.kept_tokens, found)
    return found[:, :-1]


def make_table(rows: list[dict]) -> str:
    """Accuracies in percent, the mean over the seeds and its deviation."""
    names = list(rows[0]["runs"][0])
    lines = [["way", "tokens", *names], ["---"] * (2 + len(names))]
    for row in rows:
        cells = []
        for name in names:
            values = np.array([run[name] for run in row["runs"]]) * (1 if name == "seconds" else 100)
            spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.0f}" if name == "seconds" else f"{values.mean():.1f}{spread} %")
        lines.append([row["way"], str(row["tokens"]), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def save(
    model: ViTWithRegistersForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: pathlib.Path
) -> None:
    """A folder that loads without this package, with its processor."""
    with atomic_folder(folder) as part:
        model.save_pretrained(part)
        model.make_processor(AutoImageProcessor.from_pretrained(part), tokenizer).save_pretrained(part)
        save_tokenizer(tokenizer, part)


def show(model: ViTWithRegistersForConditionalGeneration, scenes, data: TensorDataset, tokenizer) -> None:
    """Write three captions word by word."""
    num_prompt = 1 + model.config.num_image_tokens  # the start and the image
    pixels, words, mask = (each[:3].to(model.device) for each in data.tensors)
    options = {"max_new_tokens": LENGTH, "do_sample": False}
    found = model.generate(words[:, :num_prompt], pixel_values=pixels, attention_mask=mask[:, :num_prompt], **options)
    for caption, text in zip(
        scenes["caption"], tokenizer.batch_decode(found[:, num_prompt:], skip_special_tokens=True)
    ):
        print(f"{caption}\n    {text}")


if __name__ == "__main__":
    main()
