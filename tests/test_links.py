"""Links of the documents name files that are there, and lead to every page."""

from __future__ import annotations

import re
from pathlib import Path

from tests.framework import sources

_LINK = re.compile(r"\[[^]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def _links(page: Path) -> set[Path]:
    found = (target for target in _LINK.findall(page.read_text()) if "://" not in target)
    return {(page.parent / target).resolve() for target in found}


def _pages() -> list[Path]:
    return [sources.ROOT / "README.md", *sorted((sources.ROOT / "docs").rglob("*.md"))]


def test_links_lead_somewhere() -> None:
    """No page names a file that is not there."""
    broken = [
        f"{sources.relative(page)}: {target}"
        for page in _pages()
        for target in _links(page)
        if not target.exists()
    ]
    assert broken == []


def test_every_page_can_be_found_from_the_readme() -> None:
    """A page that nothing leads to has no reader; a link to a directory leads to all in it."""
    seen: set[Path] = set()
    open_pages = [sources.ROOT / "README.md"]
    while open_pages:
        page = open_pages.pop()
        seen.add(page)
        for target in _links(page):
            inside = list(target.rglob("*.md")) if target.is_dir() else [target]
            open_pages += [one for one in inside if one.suffix == ".md" and one not in seen]
    assert [sources.relative(page) for page in _pages() if page not in seen] == []
