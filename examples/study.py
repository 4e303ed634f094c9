"""Train several kinds of models in several seeds, and compare them with intervals over the seeds.

    python examples/study.py family      # with labels: plain, registers, merged, learned tokens, Mamba-R ...
    python examples/study.py science     # without labels: registers and gates; outliers, sinks, dense features
    python examples/study.py my.yaml --data my_photos --launch "accelerate launch --num_processes 8"

A study is a YAML file; those of examples/studies can be named without their path. Its commands are completed by a
folder, a seed and the options of each variant (see `Study` in this file). Options that this program does not know go
to the training program. After Ctrl-C or a kill the same command continues, and finished runs stay as they are.

    OUTPUT/index.html              the page: means over seeds with 95 % intervals, differences to the first variant
    OUTPUT/study.md, study.json    the tables, and every number of every seed
    OUTPUT/results.png, norms.png  the plots
    OUTPUT/runs/VARIANT-SEED       the runs, see examples/pretrain.py
    OUTPUT/seed-SEED               what `vitreg compare` wrote for the models of a seed
    OUTPUT/sinks/VARIANT-SEED      what `vitreg analyze` wrote, if the study asks for it
"""

import argparse
import json
import pathlib
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass, field

import yaml
from scipy import stats

from modeling_vitreg.comparison import ComparisonReport
from modeling_vitreg.comparison.table import COST_HEADS, describe_cost
from modeling_vitreg.files import make_folder, write_text
from modeling_vitreg.metrics import METRICS
from modeling_vitreg.pages import render_template
from modeling_vitreg.pretraining.monitoring.jsonl import read_jsonl
from modeling_vitreg.reports import command_line, escape_markdown, read_report
from modeling_vitreg.settings import make_settings, suggest_name
from modeling_vitreg.style import COLOURS, add_legend, label_axes, make_panels, plain_text, save_figure


EXAMPLES = pathlib.Path(__file__).parent
STUDIES = EXAMPLES / "studies"


@dataclass(frozen=True)
class Study:
    """What is trained and measured. Options are written as in a shell.

    Args:
        title: of the page.
        train: a program of examples/ with its options, such as "finetune.py --recipe finetune-cpu".
        variants: name of each variant to its options of the training program; or to "VARIANT@REDUCTION", such as
            "plain@merge=2", which measures the models of another variant with fewer tokens.
        seeds: each variant is trained once for each.
        compare: options of `vitreg compare`.
        analyze: options of `vitreg analyze`, for the sinks of attention; None leaves them out.
        note: what the numbers do not show, for the page.
    """

    title: str = ""
    train: str = "finetune.py"
    variants: dict = field(default_factory=dict)
    seeds: list = field(default_factory=list)
    compare: str = ""
    analyze: str | None = None
    note: str = ""

    def __post_init__(self):
        if len(self.variants) < 2 or not self.seeds:
            raise ValueError("expected two variants or more, and one seed or more")
        for name in self.variants:
            trained, reduction = self.split(name)
            if reduction and self.split(trained)[1]:
                raise ValueError(f"variant {name}: expected VARIANT@REDUCTION of a variant that is trained")

    def split(self, name: str) -> tuple[str, str]:
        """The variant whose runs another one measures, and "@REDUCTION" or nothing.

        Raises:
            ValueError: there is no such variant.
        """
        if name not in self.variants:
            raise ValueError(f"there is no variant {name!r}; {suggest_name(name, self.variants)}")
        trained, at, reduction = str(self.variants[name]).partition("@")
        return (trained, f"@{reduction}") if at else (name, "")


@dataclass(frozen=True)
class Column:
    """A measured number of each variant, one value for each seed; shares are stored from 0 to 1."""

    label: str
    is_share: bool
    values: dict[str, list[float]]

    def mean(self, name: str) -> str:
        return self._write(self.values[name])

    def difference(self, name: str, first: str) -> str:
        """Mean of the differences to another variant in the same seed; a star if their interval leaves out 0."""
        values = [own - other for own, other in zip(self.values[name], self.values[first])]
        return self._write(values) + (" *" if abs(statistics.fmean(values)) > reach(values) else "")

    def _write(self, values: list[float]) -> str:
        scale, unit = (100, " %") if self.is_share else (1, "")
        mean = f"{scale * statistics.fmean(values):.3g}"
        return f"{mean}{unit}" if len(values) < 2 else f"{mean} ± {scale * reach(values):.2g}{unit}"


def reach(values: list[float]) -> float:
    """Half of the 95 % interval of the mean, by Student's t; 0 for one value."""
    if len(values) < 2:
        return 0.0
    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def main() -> None:
    known = ", ".join(sorted(path.stem for path in STUDIES.glob("*.yaml")))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help=f"a YAML file or one of {known}")
    parser.add_argument("--data", default="scenes:single", help="images to train and to measure on, see pretrain.py")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds (default: those of the study)")
    parser.add_argument("--variants", nargs="+", help="some of the variants (default: all)")
    usual = shlex.join([sys.executable, "-m", "accelerate.commands.launch"])
    parser.add_argument("--launch", default=usual, help="how a run is started (default: accelerate launch)")
    parser.add_argument("--output", type=pathlib.Path, help="output folder (default: outputs/STUDY)")
    options, rest = parser.parse_known_args()
    try:
        study = read_study(options.study)
        names, seeds = options.variants or list(study.variants), options.seeds or study.seeds
        trained = list(dict.fromkeys(study.split(name)[0] for name in names))
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise SystemExit(f"{options.study}: {error}") from None
    folder = options.output or pathlib.Path("outputs") / pathlib.Path(options.study).stem
    runs = [(seed, name) for seed in seeds for name in trained]
    for number, (seed, name) in enumerate(runs, 1):
        print(f"run {number} of {len(runs)}: {name}, seed {seed}", flush=True)
        words = [*shlex.split(f"{study.train} {study.variants[name] or ''}"), *rest, "--data", options.data]
        train(folder / "runs" / f"{name}-{seed}", [*words, "--set", f"seed={seed}"], launch=options.launch)
    found = {seed: measure(study, folder, names, seed, data=options.data) for seed in seeds}
    write(study, folder, names, found)
    print((folder / "study.md").read_text())
    print(f"page: {folder / 'index.html'}")


def read_study(name: str) -> Study:
    """A study by its file or its name.

    Raises:
        ValueError: there is none, or a value of it is wrong.
        OSError, yaml.YAMLError: the file cannot be read.
    """
    path = pathlib.Path(name) if name.endswith((".yaml", ".yml")) else STUDIES / f"{name}.yaml"
    if not path.exists():
        known = suggest_name(path.stem, (known.stem for known in STUDIES.glob("*.yaml")))
        raise ValueError(f"there is no such study: expected a YAML file or a name; {known}")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("expected a mapping of names to values")
    return make_settings(Study, content, of="study")


def train(folder: pathlib.Path, words: list[str], *, launch: str) -> None:
    """Train a model, unless the same command has done so."""
    record = folder.with_name(f"{folder.name}.json")
    if record.exists() and json.loads(record.read_text()) != words:
        raise SystemExit(f"{folder} was trained with other options: give another --output, or delete the folder")
    make_folder(folder.parent)
    write_text(record, json.dumps(words))
    if not (folder / "training.json").exists():
        program, *others = words
        run([*shlex.split(launch), str(EXAMPLES / program), *others, "--output", str(folder)])


def measure(study: Study, folder: pathlib.Path, names: list[str], seed: int, *, data: str) -> dict[str, dict]:
    """What was measured of the models of a seed: the entry of each variant in `comparison.json`, and more."""
    models = {}
    for name in names:
        trained, reduction = study.split(name)
        models[name] = str(folder / "runs" / f"{trained}-{seed}" / "model") + reduction
    place = folder / f"seed-{seed}"
    words = ["compare", *models.values(), "--images", data, *shlex.split(study.compare)]
    vitreg(words, place, "comparison.json")
    report = read_report(place / "comparison.json", kind=ComparisonReport)
    found = {}
    for name, entry in zip(names, report.models):
        run_folder = pathlib.Path(models[name].partition("@")[0]).parent
        norms = read_jsonl(run_folder / "norms.jsonl")
        found[name] = {**entry, "report": report, "norms": norms if study.split(name)[0] == name else []}
        if found[name]["norms"]:
            found[name]["training"] = json.loads((run_folder / "training.json").read_text())
        if study.analyze is not None:
            place = folder / "sinks" / f"{name}-{seed}"
            vitreg(["analyze", models[name], data, *shlex.split(study.analyze)], place, "artifacts.json")
            found[name]["sinks"] = read_report(place / "artifacts.json").sinks
    return found


def vitreg(words: list[str], folder: pathlib.Path, report: str) -> None:
    """Run a verb, unless the same command has made its report."""
    record, command = folder.with_name(f"{folder.name}.json"), [sys.executable, "-m", "modeling_vitreg", *words]
    if record.exists() and (folder / report).exists() and json.loads(record.read_text()) == words:
        return
    make_folder(folder.parent)
    run([*command, "--output", str(folder)])
    write_text(record, json.dumps(words))


def run(command: list[str]) -> None:
    status = subprocess.run(command).returncode
    if status:
        raise SystemExit(f"{shlex.join(command)} ended with {status}; the same study continues once it is mended")


def write(study: Study, folder: pathlib.Path, names: list[str], found: dict[int, dict]) -> None:
    """Write tables, plots and page from what `measure` found for each seed."""
    columns, first, measured = collect(names, found), names[0], next(iter(found.values()))[names[0]]["report"]
    costs = [[name, *describe_cost(next(iter(found.values()))[name]["cost"])] for name in names]
    means = [[name, *(column.mean(name) if name in column.values else "-" for column in columns)] for name in names]
    shared = [column for column in columns if first in column.values]
    differences = [
        [name, *(column.difference(name, first) if name in column.values else "-" for column in shared)]
        for name in names[1:]
    ]
    seeds = f"seeds {', '.join(map(str, found))}"
    tables = [
        ("Cost", f"Of one model, measured by vitreg compare; seed {next(iter(found))}.", COST_HEADS, costs),
        ("Results", f"Mean ± half of the 95 % interval over {seeds}.", [c.label for c in columns], means),
        (
            f"Differences to {first}",
            "In the same seed; a star marks those whose 95 % interval leaves out 0.",
            [c.label for c in shared],
            differences,
        ),
    ]
    tables = [(title, note, ["variant", *heads], rows) for title, note, heads, rows in tables]
    if len(found) < 2:  # there is no interval
        tables.pop()
    text = "\n".join(f"## {title}\n\n{note}\n\n{make_table(heads, rows)}\n" for title, note, heads, rows in tables)
    title = study.title or "Study"
    write_text(folder / "study.md", f"# {title}\n\n{study.note}\n\n{text}")
    numbers = {column.label: column.values for column in columns}
    write_text(folder / "study.json", json.dumps({"seeds": list(found), "results": numbers}, indent=2) + "\n")
    figures = {"results": draw_results(columns, names, folder / "results.png")}
    if any(entry["norms"] for models in found.values() for entry in models.values()):
        figures["norms"] = draw_norms(names, found, folder / "norms.png")
    page = render_template(
        STUDIES / "study.html",
        figures=figures,
        captions={
            "results": "A dot for each seed, the mean, and its 95 % interval.",
            "norms": "Largest norm of a patch over the median, in the layer where it is largest, during training: "
            "mean and range over the seeds. Outliers are far above the rest.",
        },
        wide=("results",),
        title=title,
        note=study.note,
        tables=tables,
        command=command_line(),
        reports=[{"model": ", ".join(names), "images": measured.images, "made_with": measured.made_with}],
    )
    write_text(folder / "index.html", page)


def collect(names: list[str], found: dict[int, dict]) -> list[Column]:
    """All numbers that every seed of a variant has."""
    values: dict[tuple[str, bool], dict[str, list[float]]] = {}
    for models in found.values():
        for name in names:
            for key, value in numbers_of(models[name]).items():
                if value is not None:
                    values.setdefault(key, {}).setdefault(name, []).append(float(value))
    columns = [
        Column(*key, {name: list_ for name, list_ in by_name.items() if len(list_) == len(found)})
        for key, by_name in values.items()
    ]
    return [column for column in columns if column.values]


def numbers_of(entry: dict) -> dict[tuple[str, bool], float | None]:
    """Numbers of one model by label and whether they are shares."""
    found = {}
    for metric, description in METRICS.items():
        if metric != "knn" and metric in entry.get("training", {}):
            found[f"end of training, {description.label}", description.unit == "%"] = entry["training"][metric]
    for result in entry["results"]:
        description = METRICS[result["metric"]]
        found[f"{result['task']}, {description.label}", description.unit == "%"] = result["value"]
    found["outliers", True] = entry["verdict"].get("share")
    found["surviving outliers", True] = entry["survivors"].get("share")
    if entry["norms"]:
        found["largest norm / median", False] = largest_norm(entry["norms"][-1])
    for kind, total in entry.get("sinks", {}).get("totals", {}).items():
        found[f"{kind.replace('_', '-')} sinks per image", False] = total["mean"]
    return found


def largest_norm(record: dict) -> float:
    """Largest norm of a patch over the median, in the layer where it is largest, of a record of `norms.jsonl`."""
    return max(layer["max_over_median"] for layer in record["layers"])


def make_table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *[[escape_markdown(row[0]), *row[1:]] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw_results(columns: list[Column], names: list[str], path: pathlib.Path) -> pathlib.Path:
    columns = [column for column in columns if any(map(any, column.values.values()))] or columns  # not 0 everywhere
    figure, axes = make_panels(len(columns), width=4, height=0.8 + 0.3 * len(names), num_columns=3)
    for ax, column in zip(axes, columns):
        scale = 100 if column.is_share else 1
        for place, name in enumerate(names):
            values = [scale * value for value in column.values.get(name, [])]
            if values:
                style = {"color": COLOURS[place % len(COLOURS)]}
                ax.plot(values, [place] * len(values), "o", markersize=3, alpha=0.5, **style)
                ax.errorbar(
                    statistics.fmean(values), place, xerr=reach(values), fmt="|", markersize=9, capsize=2, **style
                )
        label_axes(ax, column.label, x="%" if column.is_share else "")
        ax.set_yticks(range(len(names)), [plain_text(name, max_length=24) for name in names])
        ax.set_ylim(len(names) - 0.5, -0.5)
    return save_figure(figure, path)


def draw_norms(names: list[str], found: dict[int, dict], path: pathlib.Path) -> pathlib.Path:
    figure, (ax,) = make_panels(1)
    for place, name in enumerate(names):
        runs = [models[name]["norms"] for models in found.values() if models[name]["norms"]]
        if runs:
            steps = [record["step"] + 1 for record in runs[0]]
            values = list(zip(*([largest_norm(record) for record in run] for run in runs)))
            style = {"color": COLOURS[place % len(COLOURS)]}
            ax.plot(steps, [statistics.fmean(each) for each in values], label=plain_text(name, max_length=24), **style)
            ax.fill_between(steps, list(map(min, values)), list(map(max, values)), alpha=0.15, linewidth=0, **style)
    label_axes(ax, "Norms of patches", x="step", y="largest / median")
    add_legend(ax)
    return save_figure(figure, path)


if __name__ == "__main__":
    main()
