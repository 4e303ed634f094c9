"""A card from facts: the text of `template.md`, and the metadata that the Hub reads.

No argument carries a number or a sentence of the card: a fact that no file records is missing, and the card
says so. External text (names of files, data and models, commands) is escaped.
"""

from __future__ import annotations

import json
import pathlib
import re

import jinja2
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import yaml_dump

from modeling_vitreg.metrics import METRICS
from modeling_vitreg.pretraining.objectives.registry import citation_of, describe_objective
from modeling_vitreg.reports import escape_markdown

from .errors import CardError
from .facts import Facts, find_on_hub
from .licences import Licence


RESULTS_FILE = ".eval_results/vitreg.yaml"
_HOME = pathlib.Path(__file__).parent
# Task of the Hub and Auto class of each class with a head.
_TASKS = {
    "ViTWithRegistersForImageClassification": ("image-classification", "AutoModelForImageClassification"),
    "ViTWithRegistersForSemanticSegmentation": ("image-segmentation", "AutoModelForSemanticSegmentation"),
    "ViTWithRegistersForDepthEstimation": ("depth-estimation", "AutoModelForDepthEstimation"),
    "ViTWithRegistersForMaskedImageModeling": ("image-feature-extraction", "AutoModelForMaskedImageModeling"),
    "ViTWithRegistersDualEncoderModel": ("zero-shot-image-classification", "AutoModel"),
}
# Names that the Hub gives to tasks.
_TASK_IDS = {
    "knn": "image-classification",
    "linear": "image-classification",
    "logistic": "image-classification",
    "zero_shot": "zero-shot-image-classification",
    "segmentation": "image-segmentation",
    "depth": "depth-estimation",
    "discovery": "object-detection",
}
# Keys of papers in citations.bib, by the layout of a conversion or the attribute `citation` of an objective.
_PAPERS = {
    "dino": ["caron2021dino"],
    "dinov2": ["oquab2024dinov2"],
    "dinov3": ["simeoni2025dinov3"],
    "deit": ["touvron2021deit", "touvron2022deit3"],
    "mae": ["he2022mae"],
    "simmim": ["xie2022simmim"],
    "lejepa": ["balestriero2025lejepa"],
    "clip": ["radford2021clip"],
    "capi": ["darcet2025capi"],
    "phreg": ["chen2025phreg"],
    "unirefiner": ["qiu2026unirefiner"],
}
_WORDS = {
    "unreadable": "images that could not be read",
    "patch_consistency": "correlation of the similarities of patches with those of the best step",
    "patch_best_step": "best step of the probe",
}
_NOT_ROWS = ("recipe", "data", "init", "versions", "untrained_chance")
_TITLES = {
    "reports/norms.png": "Norms of the patch tokens after each layer",
    "reports/norm_maps.png": "Images and the norms of their patch tokens",
    "training/curves.png": "Training curves",
    "training/norms.png": "Norms of the patch tokens during training",
    "training/attention.png": "Attention of class token and registers",
    "training/maps.png": "Images, annotations and predictions",
}


def render_card(facts: Facts, repo_id: str, *, licence: Licence | None = None) -> str:
    """The text of README.md.

    Args:
        facts: of `facts.collect_facts`.
        repo_id: USER/NAME that the model has or will have on the Hub.
        licence: result of `licences.decide_licence`.

    Raises:
        CardError: a report lacks a fact, or has one of another type.
    """
    try:
        body = _environment().get_template("template.md").render(_content(facts, repo_id, licence))
        return f"---\n{make_metadata(facts, repo_id, licence=licence).to_yaml()}\n---\n\n{body}"
    except (jinja2.UndefinedError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise CardError(
            f"a value that the card needs is missing from a report, or has the wrong type ({error}): make the "
            f"report again"
        ) from error


def _content(facts: Facts, repo_id: str, licence: Licence | None) -> dict:
    """What the template reads."""
    folder = facts.folder
    task, auto_class = _task(folder.class_name)
    source = facts.conversion.source if facts.conversion else {}
    return {
        "facts": facts,
        "folder": folder,
        "config": {} if folder.is_adapter else folder.architecture,
        "repo_id": repo_id,
        "task": task,
        "auto_class": auto_class,
        "num_labels": [shape[0] for name, shape in folder.shapes.items() if name.endswith("classifier.weight")],
        "ways": _group_ways(facts.results),
        "evaluation_files": sorted(path for path in facts.files if path.startswith("reports/evaluation")),
        "figures": {path: title for path, title in _TITLES.items() if path in facts.files},
        "training_rows": _training_rows(facts),
        "recipe": json.dumps((facts.training or {}).get("recipe", {}), indent=1),
        "licence": licence,
        "citations": citations_of(
            source.get("layout"), source.get("path"), citation_of(facts.recipe.get("objective"))
        ),
    }


def make_metadata(facts: Facts, repo_id: str, *, licence: Licence | None = None) -> ModelCardData:
    """The front matter of the card, in the class of huggingface_hub that checks it; arguments as in `render_card`."""
    parent, fields = facts.parent, {}
    if parent is not None and parent.hub_name is not None:
        fields["base_model"] = parent.hub_name
        fields |= {"base_model_relation": parent.relation} if parent.relation else {}
    return ModelCardData(
        library_name="peft" if facts.folder.is_adapter else "transformers",
        pipeline_tag=_task(facts.folder.class_name)[0],
        tags=_tags(facts),
        datasets=_hub_datasets(facts) or None,
        metrics=list(dict.fromkeys(_metric_id(result["metric"]) for result in facts.results)) or None,
        model_name=repo_id.split("/")[-1],
        eval_results=[_index_entry(result) for result in facts.results] or None,
        **fields,
        **(licence.metadata if licence else {}),
    )


def render_results(facts: Facts) -> str | None:
    """The text of `.eval_results/vitreg.yaml`: results on datasets of the Hub; None where there are none.

    Source: the specification eval_results.yaml in huggingface/hub-docs.
    """
    entries = [
        {
            "dataset": {"id": found[0], "task_id": result["task"], "revision": result["revision"]},
            "value": result["value"],
            "notes": f"{result['metric']}, n = {result['n']}, seed {result['seed']}: {result['command']}",
        }
        for result in facts.results
        if (found := find_on_hub(result["dataset"], result["revision"]))
    ]
    return yaml_dump(entries) if entries else None


def code_span(value: object) -> str:
    """External text as code inside a line."""
    text = " ".join(str(value).split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def code_block(value: object, language: str = "text", indent: int = 0) -> str:
    """External text as a block of code that none of its lines can end."""
    text = str(value).replace("\r", "\n")
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return "\n".join(" " * indent + line for line in [f"{ticks}{language}", *text.split("\n"), ticks])


def citations_of(*families: str | None) -> list[str]:
    """BibTeX entries: the paper of registers, then those of layout, source and objective.

    Args:
        families: BibTeX, or texts in which the longest known family is looked up.
    """
    keys, others = ["darcet2024registers"], []
    for family in families:
        known = [name for name in _PAPERS if name in str(family or "").lower()]
        if str(family or "").startswith("@"):
            others.append(family)
        elif known:
            keys += _PAPERS[max(known, key=len)]
    entries = (_HOME / "citations.bib").read_text(encoding="utf-8").strip().split("\n\n")
    by_key = {entry.partition("{")[2].partition(",")[0]: entry for entry in entries}
    return [by_key[key] for key in dict.fromkeys(keys)] + others


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HOME),
        undefined=jinja2.StrictUndefined,  # a missing fact is an error, and not an empty place
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "text": escape_markdown,
        "code": code_span,
        "block": code_block,
        "count": _count,
        "sides": lambda side: "{} x {}".format(*([side] * 2 if isinstance(side, int) else side)),
        "number": lambda value: f"{value:.4g}",
        "error": lambda value: f"{value:.1e}" if value else "0",
        "interval": lambda pair: f"{pair[0]:.4g} to {pair[1]:.4g}" if pair else "none",
    }
    return environment


def _task(class_name: str) -> tuple[str, str]:
    return _TASKS.get(class_name, ("image-feature-extraction", "AutoModel"))


def _metric_id(name: str) -> str:
    """The name of a metric on the Hub."""
    return (METRICS[name].hub_id if name in METRICS else None) or name


def _tags(facts: Facts) -> list[str]:
    tags = ["vision", "vit", "registers", "modeling_vitreg", "custom_code"]
    if facts.folder.is_adapter:
        return ["vision", "vit", "modeling_vitreg", str(facts.folder.settings.get("peft_type", "")).lower(), "adapter"]
    if not facts.folder.architecture["num_register_tokens"]:
        tags.remove("registers")
    names = [facts.conversion.source["layout"] if facts.conversion else None, facts.recipe.get("objective")]
    return tags + [name for name in dict.fromkeys(names) if name in _PAPERS]


def _index_entry(result: dict) -> EvalResult:
    name = result["dataset"]
    hub_name, configuration = find_on_hub(name, result["revision"]) or (None, None)
    return EvalResult(
        task_type=_TASK_IDS.get(result["task"], result["task"]),
        # The Hub takes names only, also for data that lie elsewhere.
        dataset_type=hub_name or re.sub(r"[^\w.-]+", "-", name).strip("-"),
        dataset_config=configuration,
        dataset_name=name,
        dataset_revision=result["revision"],
        metric_type=_metric_id(result["metric"]),
        metric_name=f"{result['task']} {result['metric']}",
        metric_value=result["value"],
        metric_args={name: result[name] for name in ("n", "interval", "interval_method", "seed")},
    )


def _group_ways(results: list[dict]) -> list[dict]:
    """Results that were measured in the same way, each group once, with the names of its tasks."""
    names = ("dataset", "revision", "dataset_hash", "commit", "seed", "interval_method", "command")
    groups: dict[str, dict] = {}
    for result in results:
        way = {name: result[name] for name in names}
        group = groups.setdefault(json.dumps(way), {**way, "tasks": []})
        group["tasks"] += [result["task"]] if result["task"] not in group["tasks"] else []
    return [{**group, "tasks": ", ".join(group["tasks"])} for group in groups.values()]


def _hub_datasets(facts: Facts) -> list[str]:
    pairs = [(str(facts.data.get("name")), facts.data.get("revision"))]
    pairs += [(result["dataset"], result["revision"]) for result in facts.results]
    found = (find_on_hub(name, revision) for name, revision in pairs)
    return list(dict.fromkeys(name for name, _ in filter(None, found)))


def _training_rows(facts: Facts) -> list[tuple[str, object]]:
    """The table of a training run, from its record."""
    training, recipe, data = facts.training or {}, facts.recipe, facts.data
    rows: list[tuple[str, object]] = []
    if "objective" in recipe:
        rows.append(("objective", describe_objective(recipe["objective"])))
    if "name" in data:
        details = "".join(f", {name} {data[name]}" for name in ("split", "revision") if data.get(name))
        rows.append(("images", _without_folders(data["name"]) + details))
    if training.get("init"):
        rows.append(("started from", _without_folders(training["init"])))
    if "batch_size" in recipe and "steps" in training:
        rows.append(("images seen, counting repetitions", training["steps"] * recipe["batch_size"]))
    for name, value in training.items():
        if name not in _NOT_ROWS and isinstance(value, (str, int, float)):
            rows.append((_name_fact(name, training), f"{value:.4g}" if isinstance(value, float) else value))
    if isinstance(versions := training.get("versions"), dict):
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return rows


def _without_folders(name: str) -> str:
    """The name of a file without its folders, which are private."""
    path = pathlib.PurePath(str(name))
    return path.name if path.is_absolute() else str(name)


def _name_fact(name: str, training: dict) -> str:
    """A fact in words; one that was measured before training, too, says when."""
    plain = name.removeprefix("untrained_")
    words = METRICS[plain].label if plain in METRICS else _WORDS.get(plain, plain)
    if f"untrained_{plain}" not in training or plain == "chance":
        return words
    return f"{words} {'before the first step' if name != plain else 'after the last step'}"


def _count(number: int) -> str:
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return str(number)
