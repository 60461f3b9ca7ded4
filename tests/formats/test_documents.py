"""The documents in docs/formats say what the code does."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from pathlib import Path

from diapause import migrations
from diapause.catalog import Catalog
from diapause.guest import images, tiny
from tests.framework import sources

DOCUMENTS = sources.ROOT / "docs" / "formats"
# Marks at the head of files whose format has no document yet; may only shrink.
UNDOCUMENTED: tuple[str, ...] = ()

_MAGIC = re.compile(r"const \w*MAGIC: &\[u8; \d+\] = b\"([A-Z]+)")
_CONSTANT = re.compile(r"const ([A-Z][A-Z_]+): \w+ = ([\d_]+);")
_STATED = re.compile(r"`([A-Z][A-Z_]+)` (?:=|is) ([\d,]+)")


def _documents() -> str:
    return "\n".join(path.read_text() for path in sorted(DOCUMENTS.glob("*.md")))


def test_every_magic_number_has_a_document() -> None:
    """A file that we write can be read with the document in hand."""
    code = "\n".join(path.read_text() for path in sources.rust_files())
    marks = set(_MAGIC.findall(code))
    assert marks, "the marks were not found"
    lacking = {mark for mark in marks if not re.search(rf"\b{mark}\b", _documents())}
    assert lacking - set(UNDOCUMENTED) == set(), "write their documents"
    assert set(UNDOCUMENTED) - lacking == set(), "documented now: take them out of UNDOCUMENTED"


def test_numbers_in_documents_are_the_codes() -> None:
    """A document that writes `NAME` = 123 means the constant of that name."""
    constants: dict[str, set[int]] = {}
    for path in sources.rust_files():
        for name, value in _CONSTANT.findall(path.read_text()):
            constants.setdefault(name, set()).add(int(value.replace("_", "")))
    wrong = [
        f"{name} = {value}"
        for name, value in _STATED.findall(_documents())
        if int(value.replace(",", "")) not in constants.get(name, {int(value.replace(",", ""))})
    ]
    assert wrong == []


def test_the_image_document_names_every_field() -> None:
    """Fields of the manifest, its version and the words of the command line."""
    text = (DOCUMENTS / "image.md").read_text()
    fields = set(images.Manifest.__struct_fields__) - {"kernel"}
    fields |= {f"kernel.{name}" for name in images.KernelSource.__struct_fields__}
    assert {name for name in fields if f"`{name}`" not in text} == set()
    assert f"Version {images.MANIFEST_VERSION}." in text
    assert {"cryptomgr.notests", "noreplace-smp", "tsc=reliable"} <= set(tiny.COMMAND_LINE.split())


def test_the_catalog_document_names_every_table_and_column(tmp_path: Path) -> None:
    """And its version."""
    text = (DOCUMENTS / "catalog.md").read_text()
    Catalog(tmp_path / "catalog.sqlite3").close()
    columns = "SELECT m.name, t.name FROM sqlite_schema m, pragma_table_info(m.name) t"
    with contextlib.closing(sqlite3.connect(tmp_path / "catalog.sqlite3")) as db:
        tables = "WHERE m.type = 'table' AND m.name NOT LIKE 'sqlite%'"
        found = {name for row in db.execute(f"{columns} {tables}") for name in row}
    assert {name for name in found if f"`{name}`" not in text} == set()
    assert f"Version {migrations.VERSION}." in text
