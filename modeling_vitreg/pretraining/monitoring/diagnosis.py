"""Warnings about a training run, from its log alone.

`instruments` describes the two kinds of collapse. Steps and values are those of the records of `JsonlLogger`.
"""

from __future__ import annotations

import math
import numbers
import statistics

from .instruments import collapse_line


MIN_RECORDS = 20  # of one value; fewer say too little
MIN_EVALUATIONS = 4


def read_series(records: list[dict], *, key: str) -> tuple[list, list]:
    """Finite values of one key and their steps, in order.

    A run that was killed and resumed writes some steps twice: records after the step that it resumed from are left
    out, and the last value of a step counts.

    Args:
        records: lines of a log, each with `step` and other values by name; absent or None means not measured.
        key: name of the value.

    Returns:
        Steps and values, two lists of one length; both empty if there are none.

    Raises:
        ValueError: a record without a step.
    """
    series = {}
    for record in _kept(records):
        value = record.get(key)
        if _is_number(value) and math.isfinite(value):
            series[record["step"]] = float(value)
    return list(series), list(series.values())


def _kept(records: list[dict]) -> list[dict]:
    kept = []
    for number, record in enumerate(records):
        if not _is_number(record.get("step")):
            raise ValueError(
                f"expected a step in every record, got none in record {number} with {', '.join(record) or 'no keys'}: "
                "write each record as {'step': ..., 'total': ...}"
            )
        while kept and kept[-1]["step"] > record["step"]:
            kept.pop()
        kept.append(record)
    return kept


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def diagnose(records: list[dict], *, num_prototypes: int | None) -> list[str]:
    """Sentences about the problems of a run, from its log alone; none for a healthy or a very young run.

    It reads `total` (loss), `dino` (mean cross-entropy of a pair of views), `teacher_entropy` (`entropy` of the
    targets), `mean_entropy` (`entropy_of_mean`), `learning_rate`, and at evaluations `rank` (`effective_rank`) and
    `knn` (accuracy from 0 to 1). Any of them may be missing, in some records or in all; then the checks that
    need it are left out. Other values have to be finite.

    Checks, in this order:
        a value that is not finite
        the median of `dino` within 1 % of ln K in the last quarter of the steps: uniform collapse
        targets that are the same for all images in the last quarter: `teacher_entropy` within 1 % of ln K, or
            `mean_entropy` within 1 % of ln K (0.1 nats without K) of it, or both near 0: constant collapse
        `total` that moved by less than 1 %, beyond its noise, in the last third of the steps; not after a collapse,
            which explains it, nor while k-NN rises, nor where the loss fell and the learning rate has since ended
        `rank` below half of its best, in two evaluations running
        `knn` below its best by more than a tenth of it and 0.02, in two evaluations running
        `segmentation` below its best by as much and `patch_consistency` below 0.95, in two evaluations running, and
            `knn`, where it is known, above that of the best step by more than 0.01 in both

    Args:
        records: as for `read_series`.
        num_prototypes: K of the class-token head; None leaves out checks that need ln K.

    Returns:
        For each problem its values and advice.

    Raises:
        ValueError: a record without a step, or fewer than 2 prototypes.
    """
    line = None if num_prototypes is None else collapse_line(num_prototypes)
    collapses = [_uniform_collapse(records, line), _constant_collapse(records, line)]
    is_collapsed = any(collapses)
    alarms = [
        _not_finite(records),
        *collapses,
        None if is_collapsed else _stuck(records),
        _falling_rank(records),
        _falling_accuracy(records),
        _falling_patches(records),
    ]
    return [alarm for alarm in alarms if alarm]


def _not_finite(records: list[dict]) -> str | None:
    found = [
        (record["step"], key, value)
        for record in _kept(records)
        for key, value in record.items()
        if _is_number(value) and not math.isfinite(value)
    ]
    if not found:
        return None
    step = found[0][0]
    terms = ", ".join(f"{key} = {value}" for at, key, value in found if at == step)
    later = sum(at != step for at, _, _ in found)
    return (
        f"At step {step} {terms}, and {later} later values are not finite either. Go back to a checkpoint before step "
        f"{step} and lower the learning rate or the limit on the gradient norm; keep heads and losses in float32."
    )


def _uniform_collapse(records: list[dict], line: float | None) -> str | None:
    recent = _last_quarter(records, "dino")
    if line is None or recent is None or abs(recent - line) > 0.01 * line:
        return None
    return (
        f"The class-token loss is {recent:.4g} over the last quarter of the steps, near ln K = {line:.4g}, the loss "
        f"of a uniform output: uniform collapse, or the start of the run. Lower the teacher temperature, check that "
        "the targets are centred (or assigned by Sinkhorn) once and not twice, and that the learning rate has passed "
        "its warm-up."
    )


def _constant_collapse(records: list[dict], line: float | None) -> str | None:
    each, mean = _last_quarter(records, "teacher_entropy"), _last_quarter(records, "mean_entropy")
    if each is None:
        return None
    if line is not None and each > 0.99 * line:
        return (
            f"The teacher's targets have an entropy of {each:.4g} over the last quarter of the steps, and uniform "
            f"targets have ln K = {line:.4g}: the student cannot learn from them. Lower the teacher temperature and "
            "check the centring, then raise the weight of KoLeo or the momentum of the teacher."
        )
    if mean is not None and _is_constant(each, mean, line):
        return (
            f"The teacher's targets have an entropy of {each:.4g} and their mean has {mean:.4g} over the last quarter "
            "of the steps: nearly all images have the same target, constant collapse. Raise the momentum of the "
            "teacher and the weight of KoLeo, and check that the targets are centred or assigned by Sinkhorn."
        )
    return None


def _is_constant(each: float, mean: float, line: float | None) -> bool:
    if line is None:
        return mean - each < 0.1
    are_both_near_zero = each < 0.05 * line and mean < 0.1 * line
    return mean - each < 0.01 * line or are_both_near_zero


def _last_quarter(records: list[dict], key: str) -> float | None:
    """Median over the last quarter of the steps, robust against single batches; None with too few records."""
    steps, values = read_series(records, key=key)
    if len(steps) < MIN_RECORDS:
        return None
    start = steps[-1] - (steps[-1] - steps[0]) / 4
    return statistics.median(value for step, value in zip(steps, values) if step >= start)


def _stuck(records: list[dict]) -> str | None:
    steps, values = read_series(records, key="total")
    if len(steps) < MIN_RECORDS:
        return None
    start = steps[-1] - (steps[-1] - steps[0]) / 3
    late = [(step, value) for step, value in zip(steps, values) if step >= start]
    if len(late) < 5:
        return None
    level = statistics.median(value for _, value in late)
    change, doubt = _linear_change(*zip(*late))
    if abs(change) + 2 * doubt > 0.01 * abs(level):
        return None
    early = statistics.median(values[: max(1, len(values) // 10)])
    has_fallen = early - level > 0.02 * abs(early)
    if (has_fallen and _has_rate_ended(records, start)) or _is_accuracy_rising(records, start):
        return None
    return (
        f"The loss moved by {change:+.2g} around {level:.4g} since step {start:.0f}, a third of the run: it is stuck. "
        "If the learning rate has passed its warm-up, change it by a factor of 3 in either direction, and check that "
        "the optimizer holds the parameters of the student."
    )


def _linear_change(steps: tuple, values: tuple) -> tuple[float, float]:
    """Change of a straight line through the values from the first step to the last, and its standard error."""
    middle, level = statistics.fmean(steps), statistics.fmean(values)
    spread = sum((step - middle) ** 2 for step in steps)
    slope = sum((step - middle) * (value - level) for step, value in zip(steps, values)) / spread
    rest = sum((value - level - slope * (step - middle)) ** 2 for step, value in zip(steps, values))
    length = steps[-1] - steps[0]
    return slope * length, math.sqrt(rest / (len(steps) - 2) / spread) * length


def _has_rate_ended(records: list[dict], start: float) -> bool:
    steps, rates = read_series(records, key="learning_rate")
    late = [rate for step, rate in zip(steps, rates) if step >= start]
    return bool(late) and statistics.median(late) < 0.1 * max(rates)


def _is_accuracy_rising(records: list[dict], start: float) -> bool:
    steps, accuracies = read_series(records, key="knn")
    late = [accuracy for step, accuracy in zip(steps, accuracies) if step >= start]
    early = [accuracy for step, accuracy in zip(steps, accuracies) if step < start]
    return bool(late and early) and max(late) > max(early) + 0.01


def _falling_rank(records: list[dict]) -> str | None:
    best_step, best, now = _best_and_now(records, "rank")
    # Labels ask for as few directions as there are classes.
    if best_step is None or now >= best / 2 or _has(records, "classes"):
        return None
    cure = "Raise the weight of KoLeo or lower" if _has(records, "koleo") else "Lower"
    return (
        f"The effective rank of the features fell from {best:.4g} at step {best_step} to {now:.4g}: the features lose "
        f"dimensions. {cure} the learning rate, and go back to the checkpoint of step {best_step}."
    )


def _falling_accuracy(records: list[dict]) -> str | None:
    best_step, best, now = _best_and_now(records, "knn")
    if best_step is None or best - now <= max(0.02, 0.1 * best):
        return None
    cure = " or raise the momentum of the teacher" if _has(records, "momentum") else ""
    return (
        f"The k-NN accuracy fell from {best:.1%} at step {best_step} to {now:.1%}: the features get worse. Keep "
        f"the checkpoint of step {best_step}, and lower the learning rate{cure}."
    )


def _falling_patches(records: list[dict]) -> str | None:
    looks = [record for record in _kept(records) if "patch_best_step" in record]
    if len(looks) < MIN_EVALUATIONS:
        return None
    best_step = looks[-1]["patch_best_step"]
    best = next((look for look in looks if look["step"] == best_step), looks[-1])
    now = max(look["segmentation"] for look in looks[-2:])
    moved = max(look["patch_consistency"] for look in looks[-2:])
    if best["segmentation"] - now <= max(0.02, 0.1 * best["segmentation"]) or moved >= 0.95:
        return None
    rises = risen = ""
    if "knn" in best:
        knn = min(look.get("knn", 0.0) for look in looks[-2:])
        if knn <= best["knn"] + 0.01:
            return None
        rises, risen = " while k-NN rises", f", k-NN rose from {best['knn']:.1%} to {knn:.1%}"
    cure = "raise" if _has(records, "gram") else "switch on" if _has(records, "ibot") else "train with dinov2 and"
    return (
        f"Dense features fall since step {best_step}{rises}: {cure} gram.weight. A segmentation probe fell from "
        f"{best['segmentation']:.1%} to {now:.1%} mean IoU{risen}, and the similarities of patches correlate by "
        f"{moved:.2f} with those of that step; train again from a model that is no later, with --init MODEL --set "
        "settings.gram.weight=2."
    )


def _has(records: list[dict], key: str) -> bool:
    """Whether the objective of a run has such a term or rate."""
    return any(key in record for record in records)


def _best_and_now(records: list[dict], key: str) -> tuple[int | None, float, float]:
    """Step and value of the best evaluation, and the better of the last two, so that one odd evaluation is no fall.

    The first tenth of the steps does not count: features of random weights can beat those of the first steps."""
    steps, values = read_series(records, key=key)
    known = [(step, value) for step, value in zip(steps, values) if step - steps[0] >= (steps[-1] - steps[0]) / 10]
    if len(known) < MIN_EVALUATIONS:
        return None, 0.0, 0.0
    best_step, best = max(known, key=lambda point: point[1])
    return best_step, best, max(known[-1][1], known[-2][1])
