"""Upload of a model with its card: the only place that writes to the Hub.

Checks come first: every file is there, the uploaded files load in a process without this package and give the recorded
outputs, the licence allows it, the token may write. Large files are sent before the one commit that shows all files,
so readers see the old state or the new one; after a failure the same command sends only what is missing. A new
repository is private, and is made public last, behind the gate of its licence if that has one.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from .card import RESULTS_FILE, render_card, render_results
from .errors import CardError, PublishError, in_words
from .facts import Facts, collect_facts
from .isolation import compare_outputs, describe_outputs, read_outputs, run_apart, run_here
from .licences import Licence, decide_licence
from .model_folder import EXPECTED_OUTPUTS, OLD_EXPECTED_OUTPUTS, ModelFolder


# Files of an earlier upload that this one would leave behind: other shards, reports of other weights.
_REPLACED = (".safetensors", ".safetensors.index.json", ".bin", RESULTS_FILE, OLD_EXPECTED_OUTPUTS)
_REPLACED_FOLDERS = ("reports/", "training/")


@dataclass(frozen=True)
class UploadPlan:
    """What would be uploaded.

    Args:
        repo_id: USER/NAME.
        facts: facts of the card.
        files: by their path on the Hub: a file, or the content itself.
        skipped_files: files that are not uploaded, with the reason.
        licence: licence of the weights, or None.
    """

    repo_id: str
    facts: Facts
    files: dict[str, pathlib.Path | bytes]
    skipped_files: dict[str, str]
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
        """The list of files with their sizes, and the files that are skipped."""
        sizes = self.sizes()
        lines = [f"{size:>15,}  {path}" for path, size in sizes.items()]
        lines.append(f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files for {self.repo_id}")
        return "\n".join(lines + [f"{'skipped':>15}  {path!r}: {why}" for path, why in self.skipped_files.items()])


@dataclass(frozen=True)
class Published:
    """Where a plan was uploaded; for a dry run `url` and `commit` are None."""

    plan: UploadPlan
    url: str | None = None
    commit: str | None = None


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    revision: str | None = None,
    is_public: bool = False,
    token: str | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
    **choices,
) -> Published:
    """Upload a model, an adapter or a training run to the Hub, with a card made from its reports.

    Args:
        folder: folder of the model, the adapter or the run.
        repo_id: USER/NAME.
        revision: branch to write to, made if it does not exist; default main.
        is_public: make the repository public once everything is there; a new one is private.
        token: to write with; default the one that `hf auth login` stored, or HF_TOKEN.
        dry_run: check, and send nothing.
        say: receives each line about what was checked and sent.
        choices: reports and licence; see `make_plan`.

    Raises:
        CardError: the folder is incomplete, cannot be loaded, gives other outputs than recorded, or its licence does
            not allow it; a report cannot be read.
        PublishError: the Hub cannot be reached or refused.
    """
    plan = make_plan(folder, repo_id, **choices)
    api = HfApi(token=token)
    if not dry_run:
        with in_words(repo_id):
            _check_owner(api, repo_id)
    plan = check_plan(plan, token=token, say=say)
    if dry_run:
        return Published(plan)
    with in_words(repo_id):
        return _send(api, plan, revision=revision, is_public=is_public, say=say)


def make_plan(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    reports: Sequence[str | os.PathLike] = (),
    licence: str | None = None,
    licence_name: str | None = None,
    licence_link: str | None = None,
    accepts_licence: str | None = None,
) -> UploadPlan:
    """Everything that would be uploaded, with the card; nothing is loaded, written or sent.

    Args:
        folder: folder of the model, the adapter or the run.
        repo_id: USER/NAME.
        reports: files of reports, or folders with them, outside of the folder.
        licence: identifier that the author chooses for weights that inherit none, or that was not on record.
        licence_name, licence_link: name and link of a licence "other"; see `licences.decide_licence`.
        accepts_licence: name of the inherited licence, if that has conditions.

    Raises:
        CardError: the folder is incomplete, a report cannot be read or is of another model, or the licence does not
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
    if OLD_EXPECTED_OUTPUTS in files:
        files.setdefault(EXPECTED_OUTPUTS, files.pop(OLD_EXPECTED_OUTPUTS))
    files["README.md"] = render_card(facts, repo_id, licence=decided).encode()
    results = render_results(facts)
    if results is not None:
        files[RESULTS_FILE] = results.encode()
    uploaded = set(facts.files.values())
    uploaded |= {file.parent for file in uploaded}
    skipped = {name: why for name, why in facts.folder.skipped.items() if facts.folder.path / name not in uploaded}
    return UploadPlan(repo_id, facts, files, skipped, decided)


def check_plan(plan: UploadPlan, *, token: str | None = None, say: Callable[[str], None] = print) -> UploadPlan:
    """Load the uploaded files in a process without the package, and compare its outputs with the recorded ones.

    Args:
        plan: of `make_plan`.
        token: for the model of an adapter, if that is private.
        say: receives what was found.

    Returns:
        The plan; with recorded outputs, if the folder had none.

    Raises:
        CardError: the files cannot be loaded, or give other outputs.
    """
    model, title = plan.facts.folder, str(plan.facts.folder.path)
    with tempfile.TemporaryDirectory() as scratch:
        staged = pathlib.Path(scratch) / plan.repo_id.split("/")[1]
        _stage(model.files, staged)
        taken = run_apart(staged, model, token=token)
        recorded = plan.files.get(EXPECTED_OUTPUTS)
        before = run_here(staged) if recorded is None else read_outputs(recorded)
    difference = compare_outputs(taken, before, title=title)
    if recorded is not None:
        say(f"loads without the package, with the recorded outputs (largest difference {difference:.1e})")
        return plan
    say(f"loads without the package, with the same outputs, which were recorded in {EXPECTED_OUTPUTS}")
    return dataclasses.replace(plan, files={**plan.files, EXPECTED_OUTPUTS: describe_outputs(before).encode()})


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise CardError(f"expected a name that the Hub allows, got {repo_id!r}: {error}") from None
    if repo_id.count("/") != 1:
        raise CardError(f"expected USER/NAME, got {repo_id!r}: the card contains the full name")


def _check_text(licence: Licence | None, folder: ModelFolder) -> None:
    """The text of a licence that the Hub does not know must be somewhere."""
    link = licence.metadata.get("license_link", "") if licence else ""
    if link and "://" not in link and link not in folder.files:
        raise CardError(
            f"{folder.path}: the licence {licence.metadata['license_name']} needs its text: save it as {link} beside "
            f"the weights, or give an address (licence_link=..., --license-link)"
        )


def _stage(files: dict[str, pathlib.Path], folder: pathlib.Path) -> None:
    """The uploaded files and no others, so that one that is skipped is missed here and not on the Hub."""
    folder.mkdir()
    for name, file in files.items():
        try:
            os.symlink(file.resolve(), folder / name)
        except OSError:  # a system that lets only administrators link
            shutil.copy(file, folder / name)


def _send(
    api: HfApi, plan: UploadPlan, *, revision: str | None, is_public: bool, say: Callable[[str], None]
) -> Published:
    repo_id, branch = plan.repo_id, revision or constants.DEFAULT_REVISION
    _open_repository(api, repo_id, is_public=is_public)
    if branch != constants.DEFAULT_REVISION:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    existing = api.list_repo_files(repo_id, revision=branch)
    stale = [path for path in existing if _is_replaced(path) and path not in plan.files]
    additions = [CommitOperationAdd(path, file) for path, file in sorted(plan.files.items())]
    info = api.create_commit(
        repo_id,
        operations=[*additions, *(CommitOperationDelete(path) for path in stale)],
        commit_message=f"Publish {repo_id.split('/')[1]} with modeling_vitreg",
        revision=branch,
    )
    if is_public:
        gate = {"gated": "auto"} if plan.licence and plan.licence.is_gated else {}
        api.update_repo_settings(repo_id, private=False, **gate)
    url = f"{api.endpoint}/{repo_id}"
    say(f"published {len(plan.files)} files, {sum(plan.sizes().values()):,} bytes, as commit {info.oid}: {url}")
    return Published(plan, url, info.oid)


def _check_owner(api: HfApi, repo_id: str) -> None:
    """Check before anything slow that the token is valid and may write to the name."""
    me, owner = api.whoami(), repo_id.split("/")[0]
    names = [me["name"], *(group["name"] for group in me.get("orgs", ()))]
    if owner not in names:
        raise PublishError(
            f"{repo_id} belongs to {owner}, but the token belongs to {me['name']}: publish as {me['name']}/"
            f"{repo_id.split('/')[1]}, or with a token of {owner}"
        )


def _open_repository(api: HfApi, repo_id: str, *, is_public: bool) -> None:
    """Make it, private, or find it; weights that were meant to be private never go into a public one."""
    try:
        api.create_repo(repo_id, private=True)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        if not is_public and not api.repo_info(repo_id).private:
            raise PublishError(
                f"{repo_id} exists and is public: confirm that you want to publish there (is_public=True, --public), "
                "or choose another name"
            ) from None


def _is_replaced(path: str) -> bool:
    return path.endswith(_REPLACED) or path.startswith(_REPLACED_FOLDERS)
