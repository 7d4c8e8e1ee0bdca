"""mkdocs hook: publish the committed results under `benchmarks/` with the site, and point links at them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
SUFFIXES = (".json", ".jsonl", ".md", ".png", ".sh")
SITE_FOLDER = "committed"  # where the site has what the repository has under `benchmarks/`
LINK = re.compile(r"(\]\()((?:\.\./)+)benchmarks/")


def on_files(files: Any, config: Any) -> Any:
    """Add every result under `benchmarks/` to the files of the site."""
    for path in sorted((ROOT / "benchmarks").rglob("*")):
        if path.suffix in SUFFIXES:
            name = f"{SITE_FOLDER}/{path.relative_to(ROOT / 'benchmarks').as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links that leave `docs/` for the repository's `benchmarks/` into links within the site."""
    depth = page.file.src_uri.count("/")

    def moved(link: re.Match[str]) -> str:
        inside = link[2].count("../") == depth + 1
        return f"{link[1]}{'../' * depth}{SITE_FOLDER}/" if inside else link[0]

    return LINK.sub(moved, markdown)
