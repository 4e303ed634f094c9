"""Folders to the Hub: the only place that writes to it.

Checks come first: every file is there, the files that will travel load in a process without this package and give the
recorded outputs, the licence allows it, the token may write. Large files are sent before the one commit that shows
them all, so whoever looks sees the old state or the new one; run again after a failure, what has arrived is not sent
twice. A new repository is private, and is opened last, behind the gate of its licence if that has one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from .errors import PublishError, in_words
from .plan import Plan, check_plan, make_plan
from .render import RESULTS_FILE


# Of an earlier upload, files that this one would leave behind: other shards, reports of other weights.
_REPLACED = (".safetensors", ".safetensors.index.json", ".bin", RESULTS_FILE)
_REPLACED_FOLDERS = ("reports/", "training/")


@dataclass(frozen=True)
class Published:
    """Where a plan went; of a dry run `url` and `commit` are None."""

    plan: Plan
    url: str | None = None
    commit: str | None = None


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    reports: Sequence[str | os.PathLike] = (),
    revision: str | None = None,
    is_public: bool = False,
    licence: str | None = None,
    licence_name: str | None = None,
    licence_link: str | None = None,
    accepts_licence: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> Published:
    """Put a model, an adapter or a training run on the Hub, with a card made from its reports.

    Args:
        folder: of the model, the adapter or the run.
        repo_id: USER/NAME.
        reports: files of reports or folders with them that do not lie in the folder.
        revision: branch to write to, made if it is not there; default main.
        is_public: open the repository to all once everything is there; a new one is private.
        licence: that the author gives to weights that inherit none, or that was found where no record has it.
        licence_name, licence_link: of a licence "other"; see `licences.decide_licence`.
        accepts_licence: name of the inherited licence, if that has conditions.
        token: to write with; default the one that `hf auth login` stored, or HF_TOKEN.
        dry_run: check, and send nothing.
        say: is told what was checked and sent.

    Raises:
        CardError: the folder is not whole, does not load, gives other outputs than recorded, or its licence does not
            allow it; a report cannot be read.
        PublishError: the Hub cannot be reached or refused.
    """
    plan = make_plan(
        folder,
        repo_id,
        reports=reports,
        licence=licence,
        licence_name=licence_name,
        licence_link=licence_link,
        accepts_licence=accepts_licence,
    )
    api = HfApi(token=token)
    if not dry_run:
        with in_words(repo_id):
            _check_owner(api, repo_id)
    plan = check_plan(plan, token=token, say=say)
    if dry_run:
        return Published(plan)
    with in_words(repo_id):
        return _send(api, plan, revision=revision, is_public=is_public, say=say)


def _send(api: HfApi, plan: Plan, *, revision: str | None, is_public: bool, say: Callable[[str], None]) -> Published:
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
    """Before anything takes long: the token is good, and the name is in its reach."""
    me, owner = api.whoami(), repo_id.split("/")[0]
    names = [me["name"], *(group["name"] for group in me.get("orgs", ()))]
    if owner not in names:
        raise PublishError(
            f"{repo_id} belongs to {owner}, the token to {me['name']}: publish as {me['name']}/"
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
                f"{repo_id} exists, and everybody can see it: to publish there say so (is_public=True, --public), or "
                "choose another name"
            ) from None


def _is_replaced(path: str) -> bool:
    return path.endswith(_REPLACED) or path.startswith(_REPLACED_FOLDERS)


__all__ = ["Published", "publish"]
