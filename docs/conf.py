"""The documentation site: `make docs` builds it with Sphinx. Sources are the repository's own Markdown files.

They are plain Markdown, to be read on a forge as well, and so the source folder is the repository: README, CONTRIBUTING
and bench/NOTES.md are pages, and every relative link is checked as it stands. A line that ends with a comment such as
`<!-- flags of train -->` tells readers of the source where to look, and becomes a table from the code. Nothing that a
built page needs is fetched from elsewhere.
"""

import argparse
import inspect
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sphinx.application import Sphinx
from sphinx.util import logging

import fastprune
from fastprune.figures import EXTRA, FIGURES, PAPER

log = logging.getLogger(__name__)

project, author, version = "fastprune", "The fastprune authors", fastprune.__version__
project_copyright = author
root_doc = "docs/index"
ROOT = Path(__file__).resolve().parents[1]
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/NOTES.md", "docs/**", "examples/*.ipynb"]
# All other folders, so that Sphinx does not walk through data sets and stores that lie here.
exclude_patterns = [p.name for p in ROOT.iterdir() if p.is_dir() and p.name not in ("bench", "docs", "examples")]
source_suffix = {".md": "markdown", ".ipynb": "markdown"}

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 4
myst_enable_extensions = ["attrs_block"]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_display_short_literal_types = True
python_maximum_signature_line_length = 100
add_module_names = False
toc_object_entries_show_parents = "hide"

smartquotes = False  # quotes stand around values

html_theme = "furo"
html_title = "fastprune"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = html_copy_source = False
# The pages lie in docs/, as their sources do: a reader who opens the folder is led there.
templates_path = ["_templates"]
html_additional_pages = {"index": "forward.html"}


def setup(app: Sphinx) -> None:
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", prose)
    app.connect("build-finished", check)


# ---- sources --------------------------------------------------------------------------------------------------------


def read(app: Sphinx, page: str, content: list[str]) -> None:
    """A page's source as Sphinx is to see it: a notebook as Markdown, comments as tables."""
    if str(app.env.doc2path(page)).endswith(".ipynb"):
        content[0] = "\n\n".join(cells(json.loads(content[0])))
    content[0] = re.sub(r"(?m)^.*<!-- flags of (\w+) -->", lambda found: flags(found[1]), content[0])
    content[0] = re.sub(r"(?m)^.*<!-- claims -->", lambda found: claims(), content[0])


def cells(notebook: dict[str, Any]) -> Iterator[str]:
    """A notebook's cells and what they print, as Markdown."""
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield source
            continue
        yield f"```python\n{source}\n```"
        for output in cell["outputs"]:
            text = "".join(output.get("text") or output["data"]["text/plain"])
            yield f"```text\n{text.rstrip()}\n```"


def flags(command: str) -> str:
    """The flags of a command as tables, from its parser."""
    parser = import_module(f"fastprune.cli.{command}").parser()
    parts = [(parser, cell(parser.description))]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parts += [(part, f"### {command} {name}\n\n{part.description}") for name, part in action.choices.items()]
    return "\n\n".join(f"{text}\n\n" + "\n\n".join(groups(part)) for part, text in parts)


def groups(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A table for each group of arguments."""
    formatter = parser._get_formatter()
    for group in parser._action_groups:
        rows = []
        for action in group._group_actions:
            if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
                continue
            # With spaces, so that a long list of choices breaks within its column.
            values = "" if action.nargs == 0 else formatter._format_args(action, action.dest.upper()).replace(",", ", ")
            name = f"{', '.join(action.option_strings)} {values}".strip().replace("|", "\\|")
            rows.append(f"| `{name}` | {cell(formatter._expand_help(action) if action.help else '')} |")
        if rows:
            if group.title not in ("options", "positional arguments"):
                yield f"**{(group.title or '').capitalize()}**"
            yield "\n".join(["| argument | |", "| --- | --- |", *rows])


def claims() -> str:
    """The claims of all figures at preset paper, as a table."""
    lines = ["| figure | claim |", "| --- | --- |"]
    for name in (*PAPER, *EXTRA):
        for claim in FIGURES[name].claims_of(FIGURES[name].protocol):
            lines.append(f"| `{name}` | {cell(claim.text)} |")
    return "\n".join(lines)


def cell(text: str) -> str:
    """Plain text as the content of a table's cell."""
    return re.sub(r"([|<>*_`\[\]\\$])", r"\\\1", text)


# ---- docstrings -----------------------------------------------------------------------------------------------------


def prose(app: Sphinx, kind: str, name: str, what: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are prose, in which `name: ...` describes an argument: each such name begins a paragraph."""
    text = "\n".join(lines)
    if names := arguments(what):
        one = f"(?:{'|'.join(map(re.escape, names))})"
        # At the start of a line, or after the end of a sentence.
        begins = re.compile(rf"(?:^|(?<=[.;:?!)])\s+|\n)({one}(?:, {one})*): ")
        text = begins.sub(lambda found: "\n\n" + ", ".join(f"`{n}`" for n in found[1].split(", ")) + ": ", text)
    # From `code` to reStructuredText, whose marks have no meaning in the rest.
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_|\\])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [f"``{part}``" for part in parts[1::2]]
    lines[:] = "".join(parts).strip("\n").split("\n")


def arguments(what: Callable[..., Any] | Any) -> list[str]:
    try:
        return [name for name in inspect.signature(what).parameters if name not in ("self", "cls")]
    except (TypeError, ValueError):  # data, or a module
        return []


# ---- built pages ----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """A built page: its ids, where it leads, and what a browser fetches to show it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids, self.links, self.fetched = {""}, set[str](), set[str]()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if "href" in given:
            (self.links if tag == "a" else self.fetched).add(given["href"])
        if "src" in given:
            self.fetched.add(given["src"])


def check(app: Sphinx, error: Exception | None) -> None:
    """Warns of a link within the site that leads nowhere, and of whatever a page would fetch from elsewhere."""
    site = Path(app.outdir)
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        for link in sorted(page.fetched | page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.fetched and parts.scheme != "data":
                    log.warning(f"{path.relative_to(site)} fetches {link}: the site is read without a network")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            ids = pages[target].ids if target in pages else {""}
            if not target.is_file() or unquote(parts.fragment) not in ids:
                log.warning(f"{path.relative_to(site)} links to {link}, which is not there")
