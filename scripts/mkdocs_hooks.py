"""What MkDocs needs to show pages that are written for GitHub: see mkdocs.yml.

Files outside docs/ that a page links to become part of the site, below repository/: pages if they are
Markdown, else as they are. Importing this file does not import MkDocs: tests check links by the same rules
without it.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

REPO = Path(__file__).resolve().parent.parent
DOCS = "docs"
OUTSIDE = "repository"
"""Folder of the site for files that are not in docs/."""
ALWAYS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md")
"""Pages of the site beside those of docs/."""

_CODE_OR_LINK = re.compile(r"^```.*?^```$|(?P<ticks>`+).+?(?P=ticks)|\]\((?P<target>[^)\s]+)\)", re.M | re.S)
_COMMENT = re.compile(r"^<!--.*?-->$", re.M)


def relative_links(text: str) -> Iterator[str]:
    """Targets of a page's links and pictures that name no host; not those within code."""
    for match in _CODE_OR_LINK.finditer(text):
        target = match["target"]
        if target is not None and not re.match(r"[a-z]+:", target):
            yield target


def anchors(text: str) -> set[str]:
    """What links to a page may have after "#": its headings as GitHub writes them."""
    headings = re.findall(r"^#+ +(.*?) *$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def in_repository(page: str, target: str) -> str:
    """The path in the repository that a link of ``page``, a path in the repository, leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def in_site(path: str) -> str:
    """Where the site has a file of the repository."""
    return path.removeprefix(f"{DOCS}/") if path.startswith(f"{DOCS}/") else f"{OUTSIDE}/{path}"


def outside_files() -> list[str]:
    """Files outside docs/ that the site has: ALWAYS, and what any page of the site links to."""
    found = dict.fromkeys(ALWAYS)
    waiting = [*ALWAYS, *(f"{DOCS}/{page.name}" for page in sorted((REPO / DOCS).glob("*.md")))]
    while waiting:
        page = waiting.pop()
        for target in relative_links((REPO / page).read_text(encoding="utf-8")):
            path = in_repository(page, target.partition("#")[0]) if not target.startswith("#") else page
            if not path.startswith(f"{DOCS}/") and path not in found and (REPO / path).is_file():
                found[path] = None
                waiting += [path] if path.endswith(".md") else []
    return list(found)


# What MkDocs calls


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    from pymdownx.slugs import slugify

    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    for path in outside_files():
        files.append(File.generated(config, in_site(path), abs_src_path=str(REPO / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    path = here.removeprefix(f"{OUTSIDE}/") if here.startswith(f"{OUTSIDE}/") else f"{DOCS}/{here}"

    def rewritten(match: re.Match[str]) -> str:
        target = match["target"]
        if target is None or re.match(r"[a-z]+:|#", target):
            return match[0]
        file, mark, anchor = target.partition("#")
        there = os.path.relpath(in_site(in_repository(path, file)), posixpath.dirname(here) or ".")
        return f"]({there}{mark}{anchor})"

    # A comment just above a table or a fence would make them a part of an HTML block.
    return _CODE_OR_LINK.sub(rewritten, _COMMENT.sub("", markdown))
