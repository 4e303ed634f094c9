"""The pages of the site are the Markdown files of the repository where they are: links are the same on both."""

import pathlib


ROOT = pathlib.Path(__file__).parents[1]
SHOWN = ("README.md", "CONTRIBUTING.md", "docs", "examples", "convert", "hub_cards", "benchmarks")


def on_config(config):
    """Take a folder of links to the files of the repository that have pages or pictures as the source of the site."""
    source = ROOT / "build" / "pages"
    source.mkdir(parents=True, exist_ok=True)
    for name in SHOWN:
        link = source / name
        if not link.is_symlink():
            link.symlink_to(ROOT / name)
    config.docs_dir = str(source)
    return config


def on_files(files, config):
    """Leave out what is neither a page nor a picture nor a report nor a notebook."""
    for file in list(files):
        is_ours = file.src_uri.split("/")[0] in SHOWN
        if is_ours and not file.src_uri.endswith((".md", ".png", ".jpg", ".json", ".ipynb")):
            files.remove(file)
    return files


def on_page_markdown(markdown, page, **_):
    """On cards, name a file that lies only in the published model, without a link to it."""
    return markdown.replace("[expected_outputs.json](expected_outputs.json)", "`expected_outputs.json`")
