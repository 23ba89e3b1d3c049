"""Pages in one file, from the templates beside this module: they need no network and no script."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kempnerforge.report.html import picture, text
from kempnerforge.util.errors import visible
from kempnerforge.util.files import write_text


class Tile(NamedTuple):
    """A number with its label, what is said below it, and further CSS classes."""

    label: str
    value: str
    more: str
    unit: str = ""
    kind: str = ""


def _printed(value: Any) -> Any:
    """What a template prints: ``Markup`` as it is; any other value as text with visible escapes for control
    characters, which Jinja then escapes for HTML.
    """
    return value if isinstance(value, Markup) else visible(str(value), keep="\u00a0")


TEMPLATES = Environment(
    loader=PackageLoader("kempnerforge.report"),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_printed,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["picture"] = picture
TEMPLATES.filters["lines"] = lambda value: Markup(text(value, keep="\n\t"))  # text with its line breaks


def render(template: str, **values: Any) -> Markup:
    """The HTML of ``templates/TEMPLATE``. ``values`` are escaped, except for ``Markup``."""
    return Markup(TEMPLATES.get_template(template).render(values))


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Writes a page, see ``render``, and makes its directory; an old page is replaced in one move."""
    return write_text(path, render(template, **values))
