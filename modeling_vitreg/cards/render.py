"""A card from facts: what a reader needs, in the order of `template.md`, and what the Hub reads of it.

No argument carries a number or a sentence of the card: whatever was not recorded in a file is missing, and said to be.
"""

from __future__ import annotations

import json
import pathlib
import re

import jinja2
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import yaml_dump

from modeling_vitreg.pretraining.objectives.registry import citation_of

from .citations import FAMILIES, citations_of
from .errors import CardError
from .facts import Facts
from .licences import Licence
from .results import find_on_hub
from .sentences import describe_limits, describe_model, training_rows
from .snippets import make_snippets, pipeline_tag


RESULTS_FILE = ".eval_results/vitreg.yaml"
# What the Hub calls our tasks and metrics; the others have the same name, or none, there.
_TASK_IDS = {
    "knn": "image-classification",
    "linear": "image-classification",
    "logistic": "image-classification",
    "zero_shot": "zero-shot-image-classification",
    "segmentation": "image-segmentation",
    "depth": "depth-estimation",
    "discovery": "object-detection",
}
_METRIC_IDS = {"top1": "accuracy"}
_NOT_IN_NAMES = re.compile(r"[^\w.-]+")
_TEMPLATES = pathlib.Path(__file__).parent
_TITLES = {
    "reports/norms.png": "Norms of the patches after each layer",
    "reports/norm_maps.png": "Images and the norms of their patches",
    "training/curves.png": "Curves of the training run",
    "training/norms.png": "Norms of the patches during training",
    "training/attention.png": "Where class token and registers look",
    "training/maps.png": "Images, what is true of each pixel, and what the model predicts",
}


def render_card(facts: Facts, repo_id: str, *, licence: Licence | None = None) -> str:
    """The text of README.md.

    Args:
        facts: of `facts.collect_facts`.
        repo_id: USER/NAME that the model has or will have on the Hub.
        licence: of `licences.decide_licence`.

    Raises:
        CardError: a report lacks a fact.
    """
    figures = [(path, title) for path, title in _TITLES.items() if path in facts.files]
    content = {
        "name": repo_id.split("/")[-1],
        "summary": describe_model(facts),
        "requirements": "torch transformers pillow" + (" peft" if facts.folder.is_adapter else ""),
        "snippets": make_snippets(facts.folder, repo_id),
        "results": facts.results,
        "ways": _group_ways(facts.results),
        "evaluation_files": sorted(path for path in facts.files if path.startswith("reports/evaluation")),
        "is_adapter": facts.folder.is_adapter,
        "artifacts": facts.artifacts,
        "artifact_figures": [figure for figure in figures if figure[0].startswith("reports/")],
        "conversion": facts.conversion,
        "parent": facts.parent,
        "training_rows": training_rows(facts.training),
        "recipe": json.dumps((facts.training or {}).get("recipe", {}), indent=1),
        "training_figures": [figure for figure in figures if figure[0].startswith("training/")],
        "limits": describe_limits(facts),
        "licence_text": _describe_licence(facts, licence),
        "citations": citations_of(*_families(facts)),
    }
    try:
        body = _environment().get_template("template.md").render(content)
    except jinja2.UndefinedError as error:
        raise CardError(f"a report lacks what the card tells of it ({error}): make it again") from None
    return f"---\n{make_metadata(facts, repo_id, licence=licence).to_yaml()}\n---\n\n{body}"


def make_metadata(facts: Facts, repo_id: str, *, licence: Licence | None = None) -> ModelCardData:
    """The front of the card, in the class of huggingface_hub that checks it; arguments as in `render_card`."""
    parent, fields = facts.parent, {}
    if parent is not None and parent.hub_name is not None:
        fields["base_model"] = parent.hub_name
        fields |= {"base_model_relation": parent.relation} if parent.relation else {}
    return ModelCardData(
        library_name="peft" if facts.folder.is_adapter else "transformers",
        pipeline_tag=pipeline_tag(facts.folder.class_name),
        tags=_tags(facts),
        datasets=_hub_datasets(facts) or None,
        metrics=list(dict.fromkeys(_METRIC_IDS.get(result["metric"], result["metric"]) for result in facts.results))
        or None,
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


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,  # a fact that is missing is an error, and not an empty place
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = lambda value: str(value).replace("|", "\\|").replace("\n", " ")
    environment.filters["number"] = lambda value: f"{value:.4g}"
    environment.filters["error"] = lambda value: f"{value:.1e}" if value else "0"
    environment.filters["interval"] = lambda pair: f"{pair[0]:.4g} to {pair[1]:.4g}" if pair else "none"
    return environment


def _tags(facts: Facts) -> list[str]:
    tags = ["vision", "vit", "registers", "modeling_vitreg", "custom_code"]
    if facts.folder.is_adapter:
        return ["vision", "vit", "modeling_vitreg", str(facts.folder.settings.get("peft_type", "")).lower(), "adapter"]
    if not facts.folder.architecture["num_register_tokens"]:
        tags.remove("registers")
    names = [facts.conversion.source["layout"] if facts.conversion else None, _objective(facts)]
    return tags + [name for name in dict.fromkeys(names) if name in FAMILIES]


def _index_entry(result: dict) -> EvalResult:
    name = result["dataset"]
    hub_name, configuration = find_on_hub(name, result["revision"]) or (None, None)
    return EvalResult(
        task_type=_TASK_IDS.get(result["task"], result["task"]),
        # The Hub takes names only, also for what does not lie there.
        dataset_type=hub_name or _NOT_IN_NAMES.sub("-", name).strip("-"),
        dataset_config=configuration,
        dataset_name=name,
        dataset_revision=result["revision"],
        metric_type=_METRIC_IDS.get(result["metric"], result["metric"]),
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
    data = (facts.training or {}).get("data")
    pairs = [(str(data.get("name")), data.get("revision"))] if isinstance(data, dict) else []
    pairs += [(result["dataset"], result["revision"]) for result in facts.results]
    found = (find_on_hub(name, revision) for name, revision in pairs)
    return list(dict.fromkeys(name for name, _ in filter(None, found)))


def _families(facts: Facts) -> list[str | None]:
    source = facts.conversion.source if facts.conversion else {}
    return [source.get("layout"), str(source.get("path", "")), citation_of(_objective(facts))]


def _objective(facts: Facts) -> str | None:
    recipe = (facts.training or {}).get("recipe")
    return recipe.get("objective") if isinstance(recipe, dict) else None


def _describe_licence(facts: Facts, licence: Licence | None) -> str:
    if licence is None:
        return "The author has stated none, so nobody else has been given any rights."
    link = licence.metadata.get("license_link")
    name = f"[{licence.name}]({link})" if link else licence.name
    text = f"The weights are under {name}"
    text += f", that of `{facts.parent.name}`, from which they were made" if facts.parent else ""
    text += f": {licence.conditions}." if licence.conditions else "."
    return f"{text} The code of `modeling_vitreg` is under apache-2.0."


__all__ = ["RESULTS_FILE", "make_metadata", "render_card", "render_results"]
