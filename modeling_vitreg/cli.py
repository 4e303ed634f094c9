"""`vitreg`: the verbs of the package. Each imports what it needs when it is called."""

from __future__ import annotations

import ast
import contextlib
import pathlib
import shlex
import sys
from collections.abc import Iterator
from typing import Annotated

import typer


app = typer.Typer(
    name="vitreg",
    help="Vision Transformers with registers: convert checkpoints, find artifacts, discover objects.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    add_completion=False,
)
Path = pathlib.Path
ARTIFACTS, DISCOVERY, EVALUATION = Path("artifacts"), Path("discovery"), Path("evaluation")
FROM = "Folder, Hub name, or timm/NAME; any supported Vision Transformer."


@app.command(no_args_is_help=True)
def convert(
    source: Annotated[str, typer.Argument(help="File, folder, or timm:NAME; with --to, a folder of this family.")],
    output: Annotated[Path, typer.Argument(help="Folder to make; with --to dinov2, a file ending in .pth.")],
    to: Annotated[str | None, typer.Option(help="Write another layout: dinov2, timm or transformers.")] = None,
    family: Annotated[str | None, typer.Option(help="Layout of the source, if it is taken for another.")] = None,
    part: Annotated[str | None, typer.Option(help="State in a file of several, such as student.")] = None,
    head: Annotated[Path | None, typer.Option(help="Linear head of DINOv2 for this backbone, a file.")] = None,
    code: Annotated[Path | None, typer.Option(help="Clone of the original repository, which runs as proof.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="FIELD=VALUE of the configuration that no tensor shows.")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Largest error, in units of the largest value.")] = 1e-5,
    unverified: Annotated[bool, typer.Option("--unverified", help="Skip the proof, and record that.")] = False,
) -> None:
    """Convert an official checkpoint, and prove it: every tensor accounted for, every token compared.

    Known: facebookresearch/dinov2 (backbones, training checkpoints, linear heads), dino, deit (DeiT-III too), mae,
    dinov3, capi; OpenCLIP and OpenAI's CLIP; timm; transformers (ViT, DeiT, Dinov2, Dinov2WithRegisters, DINOv3ViT,
    CLIPVision, ViTMAE, IJepa). Which one it is, and its sizes, are read from the file.

    * vitreg convert dinov2_vits14_reg4_pretrain.pth dinov2-small-registers

    * vitreg convert dinov2_vits14_pretrain.pth classifier --head dinov2_vits14_linear_head.pth

    * vitreg convert timm:vit_small_patch16_dinov3 dinov3-small

    * vitreg convert outputs/demo-cpu/model demo.pth --to dinov2

    The folder has config.json, model.safetensors, preprocessor_config.json, the code of the family, and
    conversion.json with the proof. Nothing is written if the ledger does not balance or the numbers differ.
    """
    from modeling_vitreg.conversion import ConversionError, ConversionSettings
    from modeling_vitreg.conversion import convert as run_convert
    from modeling_vitreg.conversion import export as run_export

    with _plain_errors(ConversionError):
        known = ConversionSettings(
            family=family,
            container=part,
            head=head,
            stated=_stated(settings or []),
            code=code,
            tolerance=tolerance,
            skips_proof=unverified,
        )
        if to is None:
            report = run_convert(source, output, settings=known)
        else:
            report = run_export(source, output, to=to, settings=known)
        if to is None:
            from modeling_vitreg.cards import record_fingerprint

            record_fingerprint(output)
    typer.echo(report.ledger["coverage"])
    for reason in sorted(set(report.ledger["dropped"].values())):
        count = sum(why == reason for why in report.ledger["dropped"].values())
        typer.echo(f"  dropped {count}: {reason}")
    typer.echo(_describe_proof(report.proof))
    typer.echo(f"wrote {output}")
    if to is None:
        typer.echo(f'next: AutoModel.from_pretrained("{output}", trust_remote_code=True)')


@app.command(no_args_is_help=True)
def analyze(
    model: Annotated[str, typer.Argument(help=FROM)],
    images: Annotated[str, typer.Argument(help='Folder, WebDataset shards, Hub dataset, or "scenes" (built in).')] = (
        "scenes"
    ),
    report: Annotated[Path, typer.Option(help="Folder to write; open index.html in it.")] = ARTIFACTS,
    compare: Annotated[
        list[str] | None, typer.Option(help="Another model, measured on the same images; may be repeated.")
    ] = None,
    num_images: Annotated[int, typer.Option(help="Most images that are read.")] = 1000,
    image_size: Annotated[int | None, typer.Option(help="Side in pixels; default that of the model.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 32,
    probes: Annotated[int, typer.Option(help="First images whose tokens are probed (position, pixels, class).")] = 0,
    split: Annotated[str, typer.Option(help="Of the images.")] = "train",
    device: Annotated[str | None, typer.Option(help="Such as cuda; default: a GPU if there is one.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that lies beside the weights.")] = False,
) -> None:
    """Find out whether a ViT has artifacts: where, since which layer, what they hold, what registers do.

    Norms of all layers with a threshold that is found, not set; where outliers lie and how redundant they are;
    attention of class token and registers; massive activations; registers ablated with controls. One page with
    pictures and a verdict in words, and artifacts.json with every number, its n and its rule. Ctrl-C keeps what was
    measured.

    * vitreg analyze outputs/demo-cpu/model

    * vitreg analyze facebook/dinov2-large my_photos --report large

    * vitreg analyze outputs/without/model --compare outputs/demo-cpu/model --report pair
    """
    with _plain_errors(ValueError, RuntimeError):
        from modeling_vitreg.analysis.report_dir import analyze as run_analysis
        from modeling_vitreg.analysis.report_dir import compare as run_comparison
        from modeling_vitreg.analysis.survey import SurveySettings
        from modeling_vitreg.features import load_encoder
        from modeling_vitreg.images import open_images

        encoders = [
            load_encoder(name, device=_device(device), trust_remote_code=trust_remote_code)
            for name in (model, *(compare or []))
        ]
        settings = SurveySettings(
            num_images=num_images, image_size=image_size, batch_size=batch_size, num_probe_images=probes
        )
        looks = _looks(image_size or max(encoders[0].image_size))
        words = {"settings": settings, "source": images, "command": _command()}

        def open_source() -> object:
            return open_images(images, split=split, scenes=range(num_images), scene_settings=looks)

        if len(encoders) > 1:
            reports = run_comparison(encoders, open_source, output_folder=report, **words)
        else:
            reports = [run_analysis(encoders[0], open_source(), output_folder=report, **words)]
    for found in reports:
        typer.echo(f"{found.model}: {found.verdict['sentence']}")
    typer.echo(f"wrote {report / 'index.html'}")


@app.command(no_args_is_help=True)
def discover(
    model: Annotated[str, typer.Argument(help=FROM)],
    images: Annotated[str, typer.Argument(help='Folder of images, Hub dataset, or "scenes" (built in).')] = ("scenes"),
    report: Annotated[Path, typer.Option(help="Folder to write.")] = DISCOVERY,
    boxes: Annotated[
        Path | None, typer.Option(help="True boxes of the folder: a COCO .json, or a folder of VOC .xml files.")
    ] = None,
    method: Annotated[str, typer.Option(help="lost, tokencut or dino_seg.")] = "lost",
    feature: Annotated[str, typer.Option(help="query, key, value, token or mlp.")] = "key",
    layer: Annotated[int, typer.Option(help="From 1, or from -1 backwards.")] = -1,
    sweep: Annotated[bool, typer.Option(help="Try LOST with every feature and bias, in the same pass.")] = False,
    num_images: Annotated[int, typer.Option(help="Most images that are read.")] = 200,
    longest_side: Annotated[int | None, typer.Option(help="Pixels to which larger images are shrunk.")] = None,
    split: Annotated[str, typer.Option(help="Of the images.")] = "train",
    device: Annotated[str | None, typer.Option(help="Such as cuda; default: a GPU if there is one.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that lies beside the weights.")] = False,
) -> None:
    """Discover objects without labels by LOST, TokenCut or DINO-seg, and measure it where boxes are known.

    What was fixed before ("as published") and the best of a sweep are kept apart. Writes pictures with boxes and
    discovery.json. Ctrl-C keeps what was measured.

    * vitreg discover outputs/demo-cpu/model --sweep

    * vitreg discover facebook/dino-vits16 VOC2007/JPEGImages --boxes VOC2007/Annotations
    """
    with _plain_errors(ValueError, RuntimeError):
        from modeling_vitreg.discovery import Sweep, figures
        from modeling_vitreg.discovery import discover as run_discovery
        from modeling_vitreg.features import load_encoder
        from modeling_vitreg.reports import write_report

        encoder = load_encoder(model, device=_device(device), trust_remote_code=trust_remote_code)
        annotated = _annotated(images, boxes, split, num_images, _looks(max(encoder.image_size)))
        found = run_discovery(
            encoder,
            annotated,
            settings=_discovery_settings(
                encoder, method=method, feature=feature, layer=layer, longest_side=longest_side
            ),
            sweep=Sweep(layers=(layer,)) if sweep else None,
            source=images,
            command=_command(),
        )
        write_report(found, report / "discovery.json")
        figures.draw_discoveries(annotated, found).savefig(report / "boxes.png", dpi=120)
        if found.best_of_sweep:
            figures.draw_sweep(found).savefig(report / "sweep.png", dpi=120)
    typer.echo(_describe_discovery(found))
    typer.echo(f"wrote {', '.join(str(path) for path in sorted(report.iterdir()) if not path.name.startswith('.'))}")


@app.command(no_args_is_help=True)
def evaluate(
    model: Annotated[str, typer.Argument(help=FROM)],
    data: Annotated[
        str, typer.Argument(help='Folder with class folders, saved dataset, Hub dataset, or "scenes" (built in).')
    ] = "scenes",
    tasks: Annotated[
        str, typer.Option(help="knn, linear, logistic, segmentation, depth, zero_shot, discovery; with commas.")
    ] = "knn,linear",
    report: Annotated[Path, typer.Option(help="Folder to write; what it holds is not measured again.")] = EVALUATION,
    compare: Annotated[list[str] | None, typer.Option(help="Another model, on the same; may be repeated.")] = None,
    num_train: Annotated[int, typer.Option(help="Most images to learn from.")] = 2000,
    num_test: Annotated[int, typer.Option(help="Most images to measure on.")] = 500,
    image_size: Annotated[int | None, typer.Option(help="Side in pixels; default that of the model.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 64,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    device: Annotated[str | None, typer.Option(help="Such as cuda; default: a GPU if there is one.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that lies beside the weights.")] = False,
    split: Annotated[str, _truth("To learn from.")] = "train",
    test_split: Annotated[str | None, _truth("To measure on: test, else validation, else 30 % held out.")] = None,
    image_column: Annotated[str | None, _truth("Default: the only one of type Image.")] = None,
    label_column: Annotated[str | None, _truth("Of classes; of scenes colours (default) or label.")] = None,
    mask_column: Annotated[str | None, _truth("For segmentation: class numbers; 255 does not count.")] = None,
    reduce_labels: Annotated[
        bool, _truth("Masks in which 0 is no class, and others count from 1, as in ADE20k.", "--reduce-labels")
    ] = False,
    depth_column: Annotated[str | None, _truth("For depth: a map as large as its image.")] = None,
    depth_scale: Annotated[float, _truth("Metres of a unit of depth: 0.001 for millimetres.")] = 1.0,
    max_depth: Annotated[float, _truth("Metres, from which on depth does not count.")] = 10.0,
    box_column: Annotated[
        str | None, _truth('For discovery, pixels: {"bbox": [[x, y, width, height], ...]}, or a list of corners.')
    ] = None,
    box_layout: Annotated[str | None, _truth("xywh or xyxy, where that column holds the other.")] = None,
    boxes: Annotated[
        Path | None, _truth("For discovery in a folder of images: a COCO .json, or a folder of VOC .xml.")
    ] = None,
    method: Annotated[str, _finding("lost, tokencut or dino_seg.")] = "lost",
    feature: Annotated[str, _finding("query, key, value, token or mlp.")] = "key",
    longest_side: Annotated[int | None, _finding("Pixels to which larger images are shrunk.")] = None,
) -> None:
    """Measure how good frozen features are: k-NN, probes, segmentation, depth, objects, each with an interval.

    Scenes have labels, masks, depth and boxes; a folder with a folder for each class has labels; of a dataset, name
    the columns. OWNER/NAME@REVISION pins a dataset of the Hub, and the report has its commit. Features are encoded
    once and kept; a task that is done is not done again, and Ctrl-C keeps what was measured. evaluation.json has
    every number with its n, interval, seed, and the fingerprints of model and data.

    * vitreg evaluate outputs/demo-cpu/model --tasks knn,linear,segmentation,depth,discovery

    * vitreg evaluate outputs/without/model my_photos --compare outputs/demo-cpu/model

    * vitreg evaluate facebook/dinov2-small owner/rooms --tasks segmentation,depth --mask-column annotation
      --depth-column depth --depth-scale 0.001

    * vitreg evaluate facebook/dino-vits16 VOC2007/JPEGImages --tasks discovery --boxes VOC2007/Annotations
    """
    with _plain_errors(ValueError, RuntimeError):
        from modeling_vitreg import evaluation
        from modeling_vitreg.features import load_encoder
        from modeling_vitreg.files import write_text
        from modeling_vitreg.images import DataOptions

        names, wanted, found = [model, *(compare or [])], [name.strip() for name in tasks.split(",")], []
        encoders = [load_encoder(name, device=_device(device), trust_remote_code=trust_remote_code) for name in names]
        usual_labels = "colours" if data == "scenes" else None
        layout = {"corners": "xyxy", None: "auto"}.get(box_layout, box_layout)
        options = DataOptions(
            image_column=image_column,
            label_column=label_column or usual_labels,
            mask_column=mask_column,
            depth_column=depth_column,
            box_column=box_column,
            depth_scale=depth_scale,
            reduce_labels=reduce_labels,
            max_depth=max_depth,
            box_format=layout,
        )
        opened = evaluation.open_data(
            data,
            options=options,
            image_size=image_size or max(max(encoder.image_size) for encoder in encoders),  # the same for all
            split=split,
            test_split=test_split,
            num_train=num_train,
            num_test=num_test,
            annotations=boxes,
            seed=seed,
        )
        encoding = evaluation.EncodingSettings(size=image_size, batch_size=batch_size)
        objects = {"method": method, "feature": feature, "longest_side": longest_side}
        objects["batch_size"] = min(8, batch_size)  # of images at full resolution
        for number, encoder in enumerate(encoders, start=1):
            discovery = _discovery_settings(encoder, **objects)
            done = evaluation.evaluate(
                encoder,
                tasks=wanted,
                data=opened,
                output_folder=report / str(number) if len(encoders) > 1 else report,
                settings=evaluation.EvaluationSettings(encoding=encoding, discovery=discovery, seed=seed),
                tokenizer=evaluation.load_tokenizer(encoder) if "zero_shot" in wanted else None,
                command=_command(),
            )
            found.append(done)
        measured = [done for done in found if done.results]
        table = evaluation.compare(measured) if measured else "nothing was measured before it was stopped"
        write_text(report / "table.md", table)
    typer.echo(table)
    for done in found:
        for task, reason in done.skipped.items():
            typer.echo(f"{done.model}: {task} skipped: {reason}")
    typer.echo(f"wrote {report}")


@app.command(no_args_is_help=True)
def card(
    folder: Annotated[Path, typer.Argument(help="Of a model, an adapter, or a training run.")],
    name: Annotated[str, typer.Argument(help="USER/NAME that it has or will have on the Hub.")],
    report: Annotated[list[Path] | None, typer.Option(help="Report or folder of them that lies elsewhere.")] = None,
    licence: Annotated[str | None, typer.Option(help="Of weights that inherit none, such as apache-2.0.")] = None,
    accept_licence: Annotated[str | None, typer.Option(help="Name of an inherited licence with conditions.")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write; default: the screen.")] = None,
) -> None:
    """Show the model card: everything in it was measured, and comes from the reports in the folder.

    conversion.json, artifacts.json, evaluation.json and training.json are read where they lie, or from --report. A
    number without a report cannot get in.

    * vitreg card outputs/demo-cpu me/demo --report artifacts --report evaluation
    """
    with _plain_errors(ValueError, RuntimeError):
        from modeling_vitreg.cards import make_plan
        from modeling_vitreg.files import write_text

        plan = make_plan(folder, name, reports=report or (), licence=licence, accepts_licence=accept_licence)
        if output is None:
            typer.echo(plan.card)
            return
        write_text(output, plan.card)
        typer.echo(f"wrote {output}")


@app.command(no_args_is_help=True)
def publish(
    folder: Annotated[Path, typer.Argument(help="Of a model, an adapter, or a training run.")],
    name: Annotated[str, typer.Argument(help="USER/NAME on the Hub.")],
    report: Annotated[list[Path] | None, typer.Option(help="Report or folder of them that lies elsewhere.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to write to; default main.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Open it to all; a new repository is private.")] = False,
    licence: Annotated[str | None, typer.Option(help="Of weights that inherit none, such as apache-2.0.")] = None,
    accept_licence: Annotated[str | None, typer.Option(help="Name of an inherited licence with conditions.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, show files and card, send nothing.")] = False,
) -> None:
    """Publish to the Hub: checked first, in one commit, with a card made of measurements.

    The folder has to load in a process without this package and give the recorded outputs. Large files go first, one
    commit shows them all; run again after a failure, what arrived is not sent twice. HF_ENDPOINT points elsewhere.

    * vitreg publish outputs/demo-cpu me/demo --report artifacts --licence apache-2.0 --dry-run
    """
    with _plain_errors(ValueError, RuntimeError):
        from modeling_vitreg.cards import publish as run_publish

        done = run_publish(
            folder,
            name,
            reports=report or (),
            revision=revision,
            is_public=public,
            licence=licence,
            accepts_licence=accept_licence,
            dry_run=dry_run,
            say=typer.echo,
        )
        if dry_run:
            typer.echo(done.plan.describe())
            typer.echo(done.plan.card)
            return
    typer.echo(f'next: AutoModel.from_pretrained("{name}", trust_remote_code=True, revision="{done.commit}")')


@app.command()
def doctor(
    checkpoint: Annotated[str | None, typer.Argument(help="Folder or cached name of a model to look at.")] = None,
) -> None:
    """Look for what usually goes wrong: versions, torch and torchvision, accelerator, cache, token, a checkpoint.

    * vitreg doctor

    * vitreg doctor outputs/demo-cpu/model
    """
    from modeling_vitreg.doctor import diagnose, render_findings

    findings = diagnose(checkpoint)
    typer.echo(render_findings(findings))
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)


def _annotated(images: str, boxes: Path | None, split: str, num_images: int, looks) -> list:
    """Images with boxes, where somebody knows them."""
    from modeling_vitreg.discovery import annotations
    from modeling_vitreg.images import ImageSource, open_images

    if images == "scenes":
        return annotations.read_scenes(range(num_images), settings=looks)
    if boxes is not None:
        return annotations.read_annotations(boxes, images)[:num_images]
    source = open_images(images, split=split)
    if not isinstance(source, ImageSource):
        raise ValueError(f"{images}: a stream has no names: give a folder of images or a dataset that can be indexed")
    return annotations.read_source(source)[:num_images]


def _truth(text: str, *names: str):
    """An option about the data, in a panel of its own."""
    return typer.Option(*names, help=text, rich_help_panel="Data, and what is true of them")


def _finding(text: str):
    """An option of discovery, likewise."""
    return typer.Option(help=text, rich_help_panel="Discovery")


def _discovery_settings(encoder, **settings):
    """With the published head of attention, where there are as many."""
    from modeling_vitreg.discovery import DiscoverySettings

    return DiscoverySettings(**settings, head=min(4, encoder.num_heads - 1))


def _describe_discovery(found) -> str:
    published, best = found.as_published, found.best_of_sweep
    num_images = found.images["num_images"]
    if published["corloc"] is None:
        return f"{found.model}: an object in each of {num_images} images; no true boxes to compare with"
    line = f"{found.model}: CorLoc {published['corloc']:.1%} as published, {num_images} images"
    if best:
        line += (
            f"; best of the sweep {best['corloc']:.1%} ({best['feature']}, bias {best['bias']:g}), chosen on the same"
        )
    return line


def _looks(side: int):
    """Scenes of the size that a model sees."""
    from modeling_vitreg.scenes import SceneSettings

    return SceneSettings(image_size=min(max(side, 64), 224))


def _device(name: str | None) -> str:
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def _command() -> str:
    return " ".join(["vitreg", *map(shlex.quote, sys.argv[1:])])


def _describe_proof(proof: dict) -> str:
    if not proof["is_verified"]:
        return f"UNVERIFIED: {proof['why']}"
    sizes = ", ".join("x".join(map(str, size)) for size in proof["sizes"])
    notes = "".join(f"\n  {note}" for note in proof["notes"])
    return (
        f"verified against {proof['reference']}: largest error of any token {proof['largest_relative_error']:.1e} "
        f"(limit {proof['tolerance']:g}) at {sizes}{notes}"
    )


def _stated(settings: list[str]) -> dict:
    """Values as Python reads them, words as they are."""
    stated = {}
    for setting in settings:
        name, is_there, value = setting.partition("=")
        if not is_there:
            raise typer.BadParameter(f"expected FIELD=VALUE, got {setting!r}", param_hint="--set")
        try:
            stated[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            stated[name] = value
    return stated


@contextlib.contextmanager
def _plain_errors(*kinds: type[Exception]) -> Iterator[None]:
    """An error of the caller's is its message, without the path through the code."""
    try:
        yield
    except ModuleNotFoundError as error:
        remedy = "pip install 'modeling-vitreg[analysis]'"
        typer.echo(f"{error.name} is not installed, and this verb needs it: {remedy}", err=True)
        raise typer.Exit(1) from None
    except kinds as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from None


__all__ = ["app"]
