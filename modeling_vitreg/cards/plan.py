"""What would be published: files, card and licence, and the proof that a stranger can use it. Nothing is sent."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .errors import CardError
from .facts import Facts, collect_facts
from .fingerprint import compare_fingerprints, read_fingerprint, run_apart, take_here, write_fingerprint
from .licences import Licence, decide_licence
from .model_folder import FINGERPRINT_FILE, ModelFolder
from .render import RESULTS_FILE, render_card, render_results


@dataclass(frozen=True)
class Plan:
    """What would be published.

    Args:
        repo_id: USER/NAME.
        facts: behind the card.
        files: by their path on the Hub: a file, or the content itself.
        left: what stays at home, each with the reason.
        licence: of the weights, or None.
    """

    repo_id: str
    facts: Facts
    files: dict[str, pathlib.Path | bytes]
    left: dict[str, str]
    licence: Licence | None

    @property
    def card(self) -> str:
        """The text of README.md."""
        return self.files["README.md"].decode()

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            path: len(file) if isinstance(file, bytes) else file.stat().st_size
            for path, file in sorted(self.files.items())
        }

    def describe(self) -> str:
        """The list of files with their sizes, and what stays at home."""
        sizes = self.sizes()
        lines = [f"{size:>15,}  {path}" for path, size in sizes.items()]
        lines.append(f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files for {self.repo_id}")
        return "\n".join(lines + [f"{'stays':>15}  {path}: {why}" for path, why in self.left.items()])


def make_plan(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    reports: Sequence[str | os.PathLike] = (),
    licence: str | None = None,
    licence_name: str | None = None,
    licence_link: str | None = None,
    accepts_licence: str | None = None,
) -> Plan:
    """Everything that would be published, with the card; nothing is loaded, written or sent.

    Args:
        folder: of the model, the adapter or the run.
        repo_id: USER/NAME.
        reports: files of reports, or folders with them, that do not lie in the folder.
        licence: that the author gives to weights that inherit none, or that was found where no record has it.
        licence_name, licence_link: of a licence "other"; see `licences.decide_licence`.
        accepts_licence: name of the inherited licence, if that has conditions.

    Raises:
        CardError: the folder is not whole, a report cannot be read or is of another model, or the licence does not
            allow it.
    """
    _check_name(repo_id)
    facts = collect_facts(folder, reports=reports)
    parent = facts.parent
    decided = decide_licence(
        parent.licence if parent else None,
        parent=parent.name if parent else None,
        stated=licence,
        accepted=accepts_licence,
        name=licence_name,
        link=licence_link,
    )
    _check_text(decided, facts.folder)
    files: dict[str, pathlib.Path | bytes] = {**facts.folder.files, **facts.files}
    files["README.md"] = render_card(facts, repo_id, licence=decided).encode()
    results = render_results(facts)
    if results is not None:
        files[RESULTS_FILE] = results.encode()
    return Plan(repo_id, facts, files, _left(facts), decided)


def check_plan(plan: Plan, *, token: str | None = None, say: Callable[[str], None] = print) -> Plan:
    """Load what would travel in a process without the package, and compare its outputs with the recorded ones.

    Args:
        plan: of `make_plan`.
        token: for the model of an adapter, if that is private.
        say: is told what was found.

    Returns:
        The plan; with a fingerprint, if the folder had none.

    Raises:
        CardError: the files do not load, or give other outputs.
    """
    title = str(plan.facts.folder.path)
    with tempfile.TemporaryDirectory() as scratch:
        staged = pathlib.Path(scratch) / plan.repo_id.split("/")[1]
        _stage(plan.facts.folder.files, staged)
        taken = run_apart(staged, title=title, needs_network=plan.facts.folder.is_adapter, token=token)
        recorded = plan.files.get(FINGERPRINT_FILE)
        before = take_here(staged) if recorded is None else read_fingerprint(recorded)
    difference = compare_fingerprints(taken, before, title=title)
    if recorded is not None:
        say(f"loads without the package, and gives the recorded outputs (largest difference {difference:.1e})")
        return plan
    say(f"loads without the package, with the same outputs; none were recorded before, so {FINGERPRINT_FILE} has them")
    files = {**plan.files, FINGERPRINT_FILE: write_fingerprint(before).encode()}
    return dataclasses.replace(plan, files=files)


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise CardError(f"expected a name as the Hub allows it, got {repo_id!r}: {error}") from None
    if repo_id.count("/") != 1:
        raise CardError(f"expected USER/NAME, got {repo_id!r}: the card holds the whole name")


def _check_text(licence: Licence | None, folder: ModelFolder) -> None:
    """The text of a licence that the Hub does not know must be somewhere."""
    link = licence.metadata.get("license_link", "") if licence else ""
    if link and "://" not in link and link not in folder.files:
        raise CardError(
            f"{folder.path}: the licence {licence.metadata['license_name']} needs its text: put it into the file "
            f"{link} beside the weights, or give an address (licence_link=..., --license-link)"
        )


def _left(facts: Facts) -> dict[str, str]:
    """What stays at home, without pictures and folders of reports that do travel."""
    root, travelling = facts.folder.path, set(facts.files.values())
    travelling |= {file.parent for file in travelling}
    return {name: why for name, why in facts.folder.left.items() if root / name not in travelling}


def _stage(files: dict[str, pathlib.Path], folder: pathlib.Path) -> None:
    """The files that travel, and no others, so that one that is left at home is missed here and not on the Hub."""
    folder.mkdir()
    for name, file in files.items():
        try:
            os.symlink(file.resolve(), folder / name)
        except OSError:  # a system that lets only administrators link
            shutil.copy(file, folder / name)


__all__ = ["Plan", "check_plan", "make_plan"]
