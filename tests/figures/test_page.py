"""The page of results: its numbers, that it needs nothing else, and that a browser shows it without an error."""

import json
import os
import random
import shutil
import subprocess
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastprune.cli.report import main as report_main
from fastprune.cli.reproduce import main as reproduce_main
from fastprune.errors import InputError
from fastprune.figures import load, reproduce
from fastprune.figures.axes import Drawing, DrawnPanel
from fastprune.figures.claims import judge
from fastprune.figures.figure import points_of
from fastprune.figures.page import (
    NAME,
    Results,
    filled,
    inline,
    page,
    results_in,
    strip,
    used_settings,
    write_page,
)
from fastprune.figures.report import summarize, write_all
from fastprune.figures.results import Row, read_csv
from fastprune.specs import DataSpec
from fastprune.store import RunStore
from fastprune.store.needs import read_needs
from fastprune.study.progress import Live
from fastprune.study.settings import preset
from tests.figures.test_report import DRAWING, fake_rows, summary_of
from tests.small_figure import TINY, folders, results

A2 = load("A2")
BROWSERS = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]


class Cells(HTMLParser):
    """The cells of each table row that has a node, by node: [(data-v, text)]; and all addresses that the page loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str | None]]] = {}
        self.addresses: list[str] = []
        self.row: list[list[str | None]] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        if tag == "tr":
            self.row = self.rows.setdefault(known["data-node"], []) if "data-node" in known else None
        elif tag == "td" and self.row is not None:
            self.row.append([known.get("data-v"), ""])
        for name in ("src", "href", "xlink:href"):
            if tag != "a" and known.get(name):
                self.addresses.append(known[name])

    def handle_data(self, data):
        if self.row:
            self.row[-1][1] += data.strip()


def made(rows, **changes) -> Results:
    summary = summary_of(rows, **changes)
    return Results(rows, json.loads(json.dumps(summary)))


@pytest.fixture(scope="module")
def made_up():
    return made(fake_rows(diverged={("a", "0.8", 1, 30)}))


@pytest.fixture(scope="module")
def text(made_up) -> str:
    return page([made_up], None)


def shown_settings(figure: str, **changes) -> dict:
    settings = preset(load(figure).protocol, "smoke", load(figure).presets).override(**changes)
    summary = {"figure": figure, "settings": asdict(settings), "data": {"name": "synthetic"}}
    return filled(used_settings(json.loads(json.dumps(summary))))


def test_settings_are_those_that_had_an_effect_as_the_run_used_them():
    """At smoke a run has 4 epochs of the protocol's 110: its milestones, 50 75 90, and the prune epochs of A6 scale."""
    shown = shown_settings("A2")
    protocol = load("A2").protocol
    assert list(shown["milestones"]) == [round(m * 4 / protocol.epochs) for m in protocol.milestones]
    assert not {"by_hand", "protocol_epochs", "prune_epochs", "sparsities", "rewind_epoch"} & shown.keys()
    assert "image_size" in shown  # of generated images
    assert list(shown_settings("A2", milestones=(1, 3))["milestones"]) == [1, 3]
    assert shown_settings("A2", rewind="late", rewind_epoch=2)["rewind_epoch"] == 2
    assert not {"milestones", "gamma"} & shown_settings("A2", decay="cosine").keys()
    assert list(shown_settings("A6")["prune_epochs"]) == [1, 2, 3, 4]
    # Of a figure that is not registered here, and of another version's settings, what is known is left out.
    summary = {"figure": "mine", "settings": {"epochs": 3, "older": 1, "by_hand": []}, "data": {"name": "images"}}
    assert used_settings(summary) == {"epochs": 3, "older": 1}


def test_the_page_shows_no_empty_setting(text):
    settings = text[text.index("<dt>Settings</dt>") : text.index("<dt>Data</dt>")]
    assert "<dt>epochs</dt>" in settings
    assert "<dd></dd>" not in settings
    assert "None" not in text[text.index("<dt>Settings</dt>") : text.index("To cite the software")]


def test_the_table_has_each_run_with_the_values_of_the_rows(made_up, text):
    found = Cells(text).rows
    assert found.keys() == {row.node for row in made_up.rows}
    for row in made_up.rows:
        density, seed, accuracy = found[row.node][5], found[row.node][6], found[row.node][7]
        assert float(density[0]) == row.x
        assert seed[1] == str(row.seed)
        if row.diverged:
            assert accuracy == ["", "diverged"]
        else:
            assert float(accuracy[0]) == row.y
            assert accuracy[1] == f"{100 * row.y:.2f}"


def test_claims_have_their_verdict_effect_and_picture(made_up, text):
    for claim in made_up.summary["claims"]:
        assert f'<span class="verdict {claim["verdict"]}">{claim["verdict"]}</span> {claim["text"]}' in text
        for part in claim["parts"]:
            if part["effect"] is not None:
                assert f'<td class="number">{part["effect"]:+.2f}</td>' in text
                low, high = part["interval"]
                assert f"[{low:+.2f}, {high:+.2f}]" in text
    # One dot for each seed of each comparison that has results.
    dots = sum(len(part["differences"]) for claim in made_up.summary["claims"] for part in claim["parts"])
    assert text.count("<circle") == dots > 0


def test_places_in_the_picture_of_a_claim_are_to_scale():
    part = {
        "text": "a b > c",
        "unit": "points",
        "effect": 1.0,
        "interval": [-9.0, 2.0],
        "differences": {"0": 0.0, "1": 2.0},
        "comparison": {"kind": "not worse"},
    }
    drawn = str(strip(part, 4.0))
    # 220 wide with 6 on each side: 26 a point, and an end outside the axis stands at its end.
    assert 'cx="110.0"' in drawn
    assert 'cx="162.0"' in drawn
    assert 'class="mean" x1="136.0"' in drawn
    assert 'class="interval" x1="6.0" x2="162.0"' in drawn
    assert 'class="margin" x="84.0" y="2" width="130.0"' in drawn
    assert strip(part | {"effect": None}, 4.0) == ""


def test_the_page_is_one_file(text):
    assert all(address.startswith("#") for address in Cells(text).addresses)
    assert "@import" not in text
    assert "url(http" not in text


def test_a_live_page_says_what_runs_and_what_is_left(made_up):
    live = Live(64, 20, 1, 2, 100, 400, 50.0, 6.0, ("cpu: A2 find · epoch 3/4",), ("diverged: <b>",))
    text = page([made_up], None, live)
    for expected in ("20 of 64 trainings", "1 failed", "2 blocked", "50 images/s", "6.0 s left", "A2 find · epoch 3/4"):
        assert expected in text
    assert "diverged: &lt;b&gt;" in text
    assert "Ended early" not in text
    stopped = page([made_up], None, Live(64, 20, 0, 0, 100, 400, 50.0, 6.0, (), (), going=False))
    assert "Ended early" in stopped
    assert "6.0 s left" not in stopped


def test_names_are_text_whatever_they_hold():
    rows = fake_rows(seeds=1, rounds=1)
    nasty = "</script><script>alert(1)</script>"
    results = made(rows, data={"name": nasty, "fingerprint": "f" * 64})
    summary = results.summary | {"drawing": results.summary["drawing"] | {"series": {"0.05": nasty}, "title": nasty}}
    text = page([Results(rows, summary)], None)
    assert "<script>alert" not in text
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in text


def test_equal_results_give_equal_pages_but_for_the_time(made_up, text):
    def without_time(text: str) -> str:
        return "\n".join(line for line in text.splitlines() if 'class="written"' not in line)

    assert without_time(page([made_up], None)) == without_time(text)


def test_a_drawing_takes_the_pages_colours():
    svg = inline('<?xml?>\n<svg width="9pt" height="9pt" viewBox="0 0 9 9"><path style="stroke: #000000"/></svg>')
    assert svg == (
        '<svg class="plot" role="img" fill="currentColor" viewBox="0 0 9 9"><path style="stroke: currentColor"/></svg>'
    )


def test_a_folder_of_several_figures_is_one_page(tmp_path, made_up):
    for name in ("A10", "A2"):
        summary = dict(made_up.summary) | {"figure": name}
        write_all(tmp_path / name, made_up.rows, DRAWING, summary)
    found = results_in(tmp_path)
    assert list(found) == ["A10", "A2"]
    text = write_page(tmp_path, found.values(), None).read_text()
    for name in found:
        assert f'<section class="figure" id="{name}"' in text
        assert f'href="{name}/results.csv"' in text


def test_a_store_tells_times_rounds_and_ratios(small_figure, tmp_path, capsys):
    """The command that makes the page again, from the store alone."""
    assert report_main(["--store", str(small_figure / "store"), "--out", str(tmp_path)]) == 0
    assert str(tmp_path / NAME) in capsys.readouterr().out
    ours, theirs = tmp_path / "A2", small_figure / "out/A2"
    for name in ("results.csv", "figure.png", "figure.pdf"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    text = (tmp_path / NAME).read_text()
    rows, found = read_csv(ours / "results.csv"), Cells(text).rows
    assert found.keys() == {row.node for row in rows}
    for row in rows:
        about = json.loads((small_figure / f"store/nodes/{row.node[:2]}/{row.node}/node.json").read_text())
        cells = found[row.node]
        assert float(cells[7][0]) == about["result"]["accuracy"] == row.y
        assert float(cells[9][0]) == about["provenance"]["wall_seconds"]
        assert cells[4][1] == str(row.round)
    data = json.loads(text.split('<script type="application/json">')[1].split("</script>")[0])
    assert [r["round"] for r in data["rounds"]] == [1, 2]
    last = next(r for r in rows if (r.panel, r.series, r.round) == ("a", "0.05", 2))
    run = json.loads((small_figure / f"store/nodes/{last.node[:2]}/{last.node}/node.json").read_text())
    key = run["spec"]["mask"]
    mask = json.loads((small_figure / f"store/nodes/{key[:2]}/{key}/node.json").read_text())["result"]
    column = data["series"].index("LR_find = 0.05")
    shown = {n: row[column] for n, row in zip(data["layers"], data["rounds"][1]["ratios"], strict=True)}
    assert shown == {n.removesuffix(".weight"): round(r, 5) for n, r in mask["layerwise_ratios"].items()}


def test_the_run_itself_leaves_the_page(small_figure):
    text = (small_figure / "out" / NAME).read_text()
    assert 'id="live"' not in text
    assert Cells(text).rows.keys() == {row.node for row in read_csv(small_figure / "out/A2/results.csv")}


def test_a_store_without_figures_and_a_figure_that_is_not_there(small_figure, tmp_path, capsys):
    store = tmp_path / "store"
    shutil.copytree(small_figure / "store", store)
    for arguments, expected in (
        (["--store", str(tmp_path / "none")], "no store at"),
        (["--store", str(store), "--fig", "A7"], "no figure 'A7' is recorded in this store (recorded: A2)"),
    ):
        assert report_main([*arguments, "--out", str(tmp_path / "out")]) == 2
        assert expected in capsys.readouterr().err
    [record] = (store / "figures").iterdir()
    content = json.loads(record.read_text())
    for changed, expected in (
        ({"settings": None}, "an older version recorded it"),
        ({"settings": content["settings"] | {"gamma": 0.3}}, "would train other networks"),
    ):
        record.write_text(json.dumps(content | changed))
        assert report_main(["--store", str(store), "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err.strip()
        assert expected in said
        assert len(said.splitlines()) == 1
    record.unlink()
    assert report_main(["--store", str(store), "--out", str(tmp_path / "out")]) == 2
    assert "records no figure" in capsys.readouterr().err


def test_damaged_results_are_one_line(tmp_path, made_up, small_figure, capsys):
    write_all(tmp_path / "A9", made_up.rows, DRAWING, made_up.summary)
    (tmp_path / "A9/summary.json").write_text("{")
    assert report_main(["--store", str(small_figure / "store"), "--out", str(tmp_path)]) == 2
    assert "summary.json is damaged or foreign" in capsys.readouterr().err


ACTIONS = """
<script>{
const say = (name, value) => {
  const line = document.createElement("p");
  line.id = name; line.textContent = value;
  document.body.append(line);
};
const shown = () => [...document.querySelectorAll("#table tbody tr")].filter((row) => !row.hidden);
const column = (i) => shown().map((row) => row.cells[i].dataset.v ?? row.cells[i].textContent.trim());
const button = document.querySelectorAll("#table thead button")[7];
button.click(); say("rising", JSON.stringify(column(7)));
button.click(); say("falling", JSON.stringify(column(7)));
const filter = document.getElementById("filter");
filter.value = "0.05 eval"; filter.dispatchEvent(new Event("input"));
say("filtered", JSON.stringify(column(2))); say("said", document.getElementById("count").textContent);
const slider = document.querySelector(".ratios input");
say("last", document.querySelector(".heat tbody td").textContent);
slider.value = 0; slider.dispatchEvent(new Event("input"));
say("first", document.querySelector(".heat tbody td").textContent);
}</script>
"""


@pytest.mark.skipif(not BROWSERS, reason="no Chromium (Debian's package chromium)")
def test_in_a_browser_it_sorts_filters_and_slides_without_an_error(small_figure, tmp_path):
    text = (small_figure / "out" / NAME).read_text()
    path = tmp_path / "page.html"
    path.write_text(text.replace("</body>", f"{ACTIONS}</body>"))
    dom = in_browser(path, tmp_path)

    def said(name: str) -> str:
        return dom.split(f'<p id="{name}">')[1].split("</p>")[0]

    rows = read_csv(small_figure / "out/A2/results.csv")
    accuracies = sorted({row.node: row.y for row in rows}.values())
    assert [float(v) for v in json.loads(said("rising"))] == accuracies
    assert [float(v) for v in json.loads(said("falling"))] == accuracies[::-1]
    filtered = json.loads(said("filtered"))
    assert filtered
    assert said("said") == f"{len(filtered)} of {len({row.node for row in rows})} runs"
    data = json.loads(text.split('<script type="application/json">')[1].split("</script>")[0])
    assert float(said("last")) == pytest.approx(100 * data["rounds"][-1]["ratios"][0][0], abs=0.006)
    assert float(said("first")) == pytest.approx(100 * data["rounds"][0]["ratios"][0][0], abs=0.006)


def in_browser(path: Path, folder: Path) -> str:
    """The page's elements after its scripts ran. Fails for anything that the browser's console says."""
    command = [BROWSERS[0], "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    ran = subprocess.run(
        [*command, "--enable-logging=stderr", "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert "CONSOLE" not in ran.stderr
    return ran.stdout


def paper_results():
    """A2 at preset paper with made-up accuracies: five seeds, thirty rounds."""
    settings, noise = preset(A2.protocol, "paper"), random.Random(0)
    data = DataSpec("tiny-imagenet-200", "f" * 64, 200, None, None, 100_000, 10_000)
    points = points_of(A2, settings, data)
    rows = []
    for p in points:
        lowered = 0.03 * (p.lr_find is None) + 0.02 * ((p.lr_find or 0) > 0.5)
        y = 0.56 + 0.01 * noise.random() - (0.004 + lowered / 10) * p.round
        at = (p.panel, p.series, p.seed, p.round, 0.8**p.round)
        rows.append(Row("A2", *at, y, p.lr_find, p.lr_eval, False, 0, p.node.key))
    rows = list({(r.panel, r.series, r.seed, r.round): r for r in rows}.values())
    panels = {panel.id: DrawnPanel.of(panel) for panel in A2.panels_of(settings)}
    drawing = Drawing("ResNet-18 on Tiny ImageNet", panels, A2.labels(settings), chance=0.005)
    verdicts = [judge(claim, rows, chance=0.005, decisive=True) for claim in A2.claims_of(settings)]
    about = {"figure": "A2", "preset": "paper", "settings": asdict(settings), "data": asdict(data)}
    summary = summarize(rows, drawing, verdicts, cost={"command": {}}, environment={}, **about)
    return Results(rows, json.loads(json.dumps(summary)))


def test_the_papers_a2_is_a_page_of_at_most_three_megabytes():
    results = paper_results()
    text = page([results], None)
    assert len(Cells(text).rows) == len({row.node for row in results.rows}) > 1000
    assert len(text.encode()) < 3_000_000


def test_while_it_runs_the_page_follows_and_after_an_interrupt_it_says_so(small_figure, tmp_path, monkeypatch):
    store = RunStore(small_figure / "store", read_only=True)
    [record] = read_needs(store.root)
    figure = reproduce._recorded(record, tmp_path)
    live = Live(22, 7, 0, 0, 100, 400, 50.0, 6.0, ("cpu: busy",), ())
    states = iter([live, replace(live, trained=8)])
    now = [0.0]
    monkeypatch.setattr(reproduce.time, "monotonic", lambda: now[0])
    follower = reproduce._LivePage([figure], store, set(), ["cpu"], "reproduce.py --fig A2")

    def text() -> str:
        return (tmp_path / NAME).read_text()

    def run(watch):
        watch(lambda: next(states))
        assert not (tmp_path / NAME).exists()  # too early
        now[0] = 15.0
        watch(lambda: next(states))
        assert "7 of 22 trainings" in text()
        now[0] = 24.0
        watch(lambda: next(states))
        now[0] = 25.0
        watch(lambda: next(states))
        assert "8 of 22 trainings" in text()
        assert '<h2 id="live-title">Running' in text()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follower.follow(run)
    assert '<h2 id="live-title">Ended early' in text()
    assert "8 of 22 trainings" in text()
    assert next(states, None) is None


def test_a_page_that_cannot_be_written_ends_no_run(small_figure, tmp_path, monkeypatch):
    store = RunStore(small_figure / "store", read_only=True)
    figure = reproduce._recorded(read_needs(store.root)[0], tmp_path)
    monkeypatch.setattr(reproduce, "_FIRST_PAGE_SECONDS", 0.0)
    (tmp_path / NAME).mkdir()  # a folder in its place
    follower = reproduce._LivePage([figure], store, set(), ["cpu"], "")
    told = []

    def state() -> Live:
        told.append(1)
        return Live(22, 7, 0, 0, 100, 400, 50.0, 6.0, (), ())

    assert follower.follow(lambda watch: watch(state) or "done") == "done"
    assert told == [1]
    with pytest.raises(InputError, match=r"cannot write .*index\.html"):
        follower.write()


def test_another_figures_damaged_files_cost_the_page_and_not_the_run(small_figure, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    shutil.copytree(small_figure / "store", tmp_path / "store")
    (tmp_path / "out" / "A9").mkdir(parents=True)
    (tmp_path / "out" / "A9" / "summary.json").write_text("{")
    assert reproduce_main([*TINY, "--device", "cpu", *folders(tmp_path)]) == 0
    told = capsys.readouterr()
    assert [line for line in told.err.splitlines() if line.startswith("no page: ")] == [
        f"no page: {tmp_path}/out/A9/summary.json is damaged or foreign: run the figure again"
    ]
    assert "0 trainings run, 22 were in the store" in told.out
    assert results(tmp_path) == results(small_figure)
