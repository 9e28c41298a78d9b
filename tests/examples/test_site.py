"""docs/conf.py: what it makes of sources and docstrings, and what it finds in built pages."""

import json
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import fastprune
from fastprune import kernels, loaders, sparse
from fastprune.cli.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/reference").glob("*.md"))


@pytest.fixture(scope="module")
def conf() -> ModuleType:
    spec = spec_from_file_location("docs_conf", ROOT / "docs/conf.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("package", [fastprune, loaders, kernels, sparse])
def test_the_reference_has_every_public_name(package):
    modules = {"criteria", "schedules", "sparse", "__version__"}  # listed name by name; named in a sentence
    listed = set(re.findall(rf"^\.\. auto\w+:: {re.escape(package.__name__)}\.(\w+)$", PAGES, re.MULTILINE))
    assert set(package.__all__) - modules <= listed


def test_every_command_has_its_flags_on_the_site():
    assert re.findall(r"<!-- flags of (\w+) -->", PAGES) == list(COMMANDS)


def test_a_line_that_ends_with_a_comment_becomes_a_table(conf):
    app, content = SimpleNamespace(env=SimpleNamespace(doc2path=lambda page: f"{page}.md")), [""]
    content[0] = "# Commands\n\nLook at --help. <!-- flags of doctor -->\n\nElsewhere. <!-- claims -->\n\nThe end."
    conf.read(app, "page", content)
    assert content[0] == f"# Commands\n\n{conf.flags('doctor')}\n\n{conf.claims()}\n\nThe end."


def test_flags_are_those_of_the_parser(conf):
    table = conf.flags("compile")
    assert "| `--half` | store kept weights in 16 bits (.fastprune) |" in table
    assert "| `NETWORK` |" in table
    store = conf.flags("store")
    assert "### store merge" in store
    assert "`--executor {local, ray}`" in conf.flags("reproduce")


def test_claims_are_those_of_the_figures(conf):
    lines = conf.claims().splitlines()
    assert len(lines) == 2 + sum(
        len(figure.claims_of(figure.protocol)) for figure in map(conf.FIGURES.get, (*conf.PAPER, *conf.EXTRA))
    )


def test_a_notebook_becomes_markdown(conf):
    printed = {"output_type": "stream", "text": ["1\n", "2\n"]}
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": ["print(1)\n", "print(2)"], "outputs": [printed]},
    ]
    content = [json.dumps({"cells": cells})]
    app = SimpleNamespace(env=SimpleNamespace(doc2path=lambda page: f"{page}.ipynb"))
    conf.read(app, "page", content)
    assert content == ["# Title\ntext\n\n```python\nprint(1)\nprint(2)\n```\n\n```text\n1\n2\n```"]


def test_arguments_in_docstrings_begin_paragraphs(conf):
    def function(weights, mask, *, block=3): ...

    lines = ["Does *this* to `weights` in n|m.", "", "weights, mask: float [n]; see", "there. block: a number.", ""]
    conf.prose(None, "function", "function", function, None, lines)
    assert lines == [
        r"Does \*this\* to ``weights`` in n\|m.",
        "",
        "``weights``, ``mask``: float [n]; see",
        "there.",
        "",
        "``block``: a number.",
    ]


PAGE = '<link rel="stylesheet" href="{style}"><h1 id="top">x</h1><a href="{link}">x</a>'


@pytest.mark.parametrize(
    ("style", "link", "found"),
    [
        ("style.css", "other.html#top", None),
        ("style.css", "#top", None),
        ("style.css", "https://example.org/#gone", None),
        ("style.css", "other.html#gone", "index.html links to other.html#gone, which is not there"),
        ("style.css", "gone.html", "index.html links to gone.html, which is not there"),
        ("gone.css", "#top", "index.html links to gone.css, which is not there"),
        ("//example.org/a.css", "#top", "index.html fetches //example.org/a.css: the site is read without a network"),
    ],
)
def test_built_pages_are_checked(conf, tmp_path, monkeypatch, style, link, found):
    warnings: list[str] = []
    monkeypatch.setattr(conf.log, "warning", warnings.append)
    (tmp_path / "style.css").touch()
    (tmp_path / "index.html").write_text(PAGE.format(style=style, link=link))
    (tmp_path / "other.html").write_text(PAGE.format(style="style.css", link="index.html"))
    conf.check(SimpleNamespace(outdir=tmp_path), None)
    assert warnings == ([] if found is None else [found])
