"""One self-contained HTML page: sections of prose, tables and figures, written whole or not at all.

Every string that is not `Markup` is escaped. The page's own policy forbids requests, and scripts
but for the one that the page is written with.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from markupsafe import Markup

from cmdlab.errors import InputError
from cmdlab.outputs import write_file

LARGEST_PAGE = 5_000_000  # bytes
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Column:
    """A table's column; columns side by side with the same `group` share a heading above."""

    label: str
    group: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Row:
    """Cells from left to right, the first one the row's heading; `kind` is a CSS class."""

    cells: Sequence[str]
    kind: str = ""
    id: str = ""


@dataclass(frozen=True)
class Table:
    """A table with its number, caption, and a note below it; ids are unique on a page."""

    id: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    note: str = ""

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Headings above the columns with the number of columns that each spans."""
        spans: list[tuple[str, int]] = []
        for column in self.columns[1:]:
            if spans and column.group and spans[-1][0] == column.group:
                spans[-1] = (column.group, spans[-1][1] + 1)
            else:
                spans.append((column.group, 1))
        return spans if any(name for name, _ in spans) else []


@dataclass(frozen=True)
class Figure:
    """SVG panels of one size, side by side where there is room, under one caption."""

    id: str
    caption: str
    panels: Sequence[Markup]
    wide: bool = False  # one panel, wider than a phone, scrolls by itself


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it: `Markup` of whole elements, tables and figures."""

    id: str
    heading: str
    blocks: Sequence[Markup | Table | Figure] = field(default_factory=tuple)


def paragraph(text: str, *values: object) -> Markup:
    """A paragraph of `text`, trusted, with `values` escaped into its braces."""
    return Markup("<p>{}</p>").format(Markup(text).format(*values))


def bullets(items: Sequence[str]) -> Markup:
    """A list; each item is escaped unless it is Markup."""
    inside = Markup("").join(Markup("<li>{}</li>").format(item) for item in items)
    return Markup("<ul>{}</ul>").format(inside)


def template(name: str) -> jinja2.Template:
    """A template of this folder, with escaping on."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def write_page(
    output: Path,
    *,
    title: str,
    kicker: str,
    lead: str,
    sections: Sequence[Section],
    footer: str,
    script: str = "",
) -> None:
    """Render a page and put it in place of `output` in one step.

    kicker: a few words above the title. lead: the line below it. script: run when the page is
    there; trusted. The same arguments give the same bytes.
    Raises InputError for a page of LARGEST_PAGE bytes or more.
    """
    html = template("template.html").render(
        title=title,
        kicker=kicker,
        lead=lead,
        sections=sections,
        footer=footer,
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    content = html.encode(errors="backslashreplace")  # text of a data set may be no UTF-8
    if len(content) >= LARGEST_PAGE:
        raise InputError(
            f"{output}: the page would have {len(content):,} bytes, and {LARGEST_PAGE:,} is too "
            "many; give fewer runs or record smaller examples"
        )
    write_file(output, content)
