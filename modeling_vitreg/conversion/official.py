"""Download, check and convert official files by name. The programs in `convert/` are lists of names for it."""

from __future__ import annotations

import argparse
import pathlib
from urllib.parse import urlsplit

import torch

from .pipeline import convert
from .plan import ConversionSettings
from .rules import ConversionError


def run(files: dict[str, str], *, title: str) -> None:
    """Convert one of a list of files, named on the command line.

    Args:
        files: addresses by name; an address may end in #sha256=... if the name carries no hash.
        title: description of the files.
    """
    parser = argparse.ArgumentParser(
        description=f"{title}. Downloads an official file into the cache of torch.hub, converts and verifies it.",
        epilog="Known: " + ", ".join(files),
    )
    parser.add_argument("name", choices=list(files), metavar="NAME", help="one of the names below")
    parser.add_argument("output", type=pathlib.Path, help="folder to make")
    parser.add_argument("--code", type=pathlib.Path, help="clone of the repository to compare with; its code runs")
    arguments = parser.parse_args()
    try:
        path = download(files[arguments.name])
        report = convert(path, arguments.output, settings=ConversionSettings(code=arguments.code))
    except ConversionError as error:
        parser.exit(1, f"{error}\n")
    found = report.verification.get("largest_relative_error")
    print(report.ledger["coverage"])
    print(f"verified: {found:.1e}" if found is not None else f"NOT VERIFIED: {report.verification['why']}")
    print(f"wrote {arguments.output}")


def download(address: str) -> pathlib.Path:
    """The file at an address, from the cache or the network.

    Raises:
        ConversionError: the network fails, or the content does not match the hash in the address.
    """
    address, _, digest = address.partition("#sha256=")
    path = pathlib.Path(torch.hub.get_dir()) / "checkpoints" / pathlib.PurePosixPath(urlsplit(address).path).name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        try:
            torch.hub.download_url_to_file(address, str(path), hash_prefix=digest or None)
        except (OSError, RuntimeError) as error:
            raise ConversionError(
                f"{address}: {error}: download it yourself to {path} and run this command again"
            ) from error
    return path
