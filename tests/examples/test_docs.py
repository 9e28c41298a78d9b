"""The snippets of README and docs run as they stand, those of a page one after the other."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def snippets(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    found = snippets("docs/pruning.md")
    assert len(found) >= 7
    for number, snippet in enumerate(found):
        exec(compile(snippet, f"docs/pruning.md, snippet {number + 1}", "exec"), names)
    out = capsys.readouterr().out
    assert re.search(r"total +11,172,032 +[\d,]+ +0\.5120", out)
    assert (tmp_path / "mask.safetensors").exists()
    sparse = names["sparse"]
    groups = sparse[0].weight.view(-1, 4)
    assert ((groups != 0).sum(1) == 2).all()


def test_the_readmes_snippet_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (snippet,) = snippets("README.md")
    names: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["pruner"].kept == names["pruner"].total - round(0.2 * names["pruner"].total)


@pytest.mark.parametrize("page", ["docs/train.md"])
def test_other_snippets_are_python(page):
    for snippet in snippets(page):
        compile(snippet, page, "exec")


@pytest.mark.slow
def test_the_page_on_sparse_computing_holds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (snippet,) = snippets("docs/sparse.md")
    names: dict[str, Any] = {}
    exec(compile(snippet, "docs/sparse.md", "exec"), names)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = names["model"](images)
    for made in ("fast", "again"):
        assert (names[made](images) - expected).abs().max() <= 1e-5 * expected.abs().max()
    dense = sum(t.numel() * 4 for t in names["model"].state_dict().values())
    assert (tmp_path / "net.fastprune").stat().st_size < 0.08 * dense
