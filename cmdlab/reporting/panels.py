"""Small SVG panels drawn by matplotlib, one unit to a CSS pixel, as elements of the page.

A panel is as wide as a phone, and the page sets as many side by side as there is room for. Colours
are CSS variables of the page, so a figure follows its light, dark and printed form; a marker, a
dash or a label always says the same as a colour. Text stays text.
"""

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

WIDTH = 310
# Stand-ins that matplotlib can parse; the page's style says what they look like.
COLOURS = {
    "#1b1f24": "var(--ink)",
    "#565d68": "var(--muted)",
    "#e4e6e8": "var(--grid)",
    "#30363d": "var(--series-0)",
    "#0072b2": "var(--series-1)",
    "#b84d00": "var(--series-2)",
    "#fdfdfc": "var(--paper)",
}
INK, MUTED, GRID, BASELINE, ARM, SEED, PAPER = COLOURS


class Panel:
    """One set of axes in the page's style, measured in CSS pixels, and its way to SVG."""

    def __init__(
        self,
        identifier: str,
        height: int,
        *,
        width: int = WIDTH,
        margins: tuple[int, int, int, int] = (34, 6, 46, 40),  # left, right, top, bottom
    ) -> None:
        from matplotlib.figure import Figure as Canvas

        self.identifier = identifier
        left, right, top, bottom = margins
        with _style(identifier):
            self.figure = Canvas(figsize=(width / 72, height / 72))
            self.axes = self.figure.add_axes(
                (
                    left / width,
                    bottom / height,
                    (width - left - right) / width,
                    (height - top - bottom) / height,
                )
            )

    def line(
        self,
        steps: Sequence[float],
        values: Sequence[float],
        *,
        colour: str,
        faint: bool = False,
        dashed: bool = False,
        label: str = "",
    ) -> None:
        self.axes.plot(
            steps,
            values,
            color=colour,
            linewidth=1 if faint else 2.2,
            alpha=0.35 if faint else 1,
            dashes=(4, 2.5) if dashed else (None, None),
            label=label or "_",
            marker="o" if len(steps) == 1 else "",
        )

    def labels(self, title: str, below: str, beside: str) -> None:
        """Titles; the vertical axis' own stands level above it, where it reads without turning."""
        self.axes.grid(axis="y" if beside else "x", color=GRID, linewidth=0.8, zorder=0)
        self.axes.set_axisbelow(True)
        self.axes.set_xlabel(below, color=MUTED)
        height = self.figure.get_figheight() * 72
        width = self.figure.get_figwidth() * 72
        self.figure.text(
            4 / width, 1 - 11 / height, title, color=INK, fontsize=13, weight="bold", va="center"
        )
        if beside:
            self.figure.text(
                4 / width, 1 - 29 / height, beside, color=MUTED, fontsize=11, va="center"
            )

    def legend(self) -> None:
        self.axes.legend(frameon=False, labelcolor=INK, fontsize=11, handlelength=2.2)

    def svg(self, title: str, description: str) -> Markup:
        """Inline SVG, named by `title` and told in words by `description`."""
        written = io.StringIO()
        with _style(self.identifier):
            self.figure.savefig(
                written,
                format="svg",
                transparent=True,
                metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
            )
        return _inline(written.getvalue(), self.identifier, title, description)


def _style(salt: str) -> Any:
    """matplotlib's own defaults, whatever the user's are, and the page's style on top."""
    import matplotlib.style

    return matplotlib.style.context(
        [
            "default",
            {
                "axes.edgecolor": MUTED,
                "axes.labelsize": 11,
                "axes.spines.right": False,
                "axes.spines.top": False,
                "figure.dpi": 72,
                "font.family": "sans-serif",
                "font.sans-serif": ["DejaVu Sans"],
                "svg.fonttype": "none",
                "svg.hashsalt": salt,
                "text.parse_math": False,
                "xtick.color": MUTED,
                "xtick.labelsize": 11,
                "ytick.color": MUTED,
                "ytick.labelsize": 11,
            },
        ]
    )


def _inline(svg: str, identifier: str, title: str, description: str) -> Markup:
    """matplotlib's document as an element of the page: own ids, named, in the page's colours."""
    xlink = "{http://www.w3.org/1999/xlink}href"
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        parent.tag = parent.tag.rpartition("}")[2]
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
        for name, value in list(parent.attrib.items()):
            if name == "id":
                parent.set("id", f"{identifier}-{value}")
            elif name == xlink:
                del parent.attrib[xlink]
                whole = "".join(value.split())
                parent.set("href", f"#{identifier}-{whole[1:]}" if whole[0] == "#" else whole)
            elif "url(#" in value:
                parent.set(name, value.replace("url(#", f"url(#{identifier}-"))
            elif name == "style":
                parent.set(name, _restyle(value))
        if parent.tag == "g" and not parent.get("clip-path"):
            parent.attrib.pop("id", None)
        if parent.tag == "path" and "d" in parent.attrib:
            parent.set("d", " ".join(parent.attrib["d"].split()))
        if parent.text and not parent.text.strip():
            parent.text = None
        if parent.tail and not parent.tail.strip():
            parent.tail = None
    root.attrib.pop("version", None)
    width, height = root.get("viewBox", "0 0 0 0").split()[2:]
    root.attrib |= {
        "width": width,
        "height": height,
        "role": "img",
        "aria-labelledby": f"{identifier}-title {identifier}-description",
    }
    for position, (tag, text) in enumerate({"title": title, "desc": description}.items()):
        element = ElementTree.Element(tag)
        element.set("id", f"{identifier}-{'title' if tag == 'title' else 'description'}")
        element.text = text
        root.insert(position, element)
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))


def _restyle(style: str) -> str:
    style = re.sub(r"font-family: [^;]*;?", "", style)
    return re.sub("#[0-9a-f]{6}", lambda found: COLOURS.get(found[0], found[0]), style)
