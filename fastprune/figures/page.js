"use strict";

// The table of runs: sorted by a click on a head, or Enter on it; filtered by words that a line must all have.
const table = document.getElementById("table");
const body = table.tBodies[0];
const heads = [...table.tHead.rows[0].cells];
const valueOf = (row, column) => {
  const cell = row.cells[column];
  return cell.dataset.v ?? cell.textContent.trim();
};
heads.forEach((head, column) => {
  head.querySelector("button").addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
    const numeric = head.classList.contains("number");
    const rows = [...body.rows].map((row) => [valueOf(row, column), row]);
    rows.sort(([a], [b]) => {
      // What is not known stands last in both directions.
      if (a === "" || b === "") return (a === "") - (b === "");
      return sign * (numeric ? Number(a) - Number(b) : a.localeCompare(b));
    });
    body.append(...rows.map(([, row]) => row));
  });
});

const filter = document.getElementById("filter");
const count = document.getElementById("count");
const texts = new Map([...body.rows].map((row) => {
  const cells = [...row.cells].map((cell, i) => `${heads[i].textContent} ${cell.textContent}`.toLowerCase());
  return [row, cells.join(" | ")];
}));
filter.addEventListener("input", () => {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const [row, text] of texts) {
    row.hidden = !words.every((word) => text.includes(word));
    shown += !row.hidden;
  }
  count.textContent = shown === texts.size ? `${shown} runs` : `${shown} of ${texts.size} runs`;
});

// Heat maps: from white for a layer that keeps all its weights to dark blue for one that keeps the least of all, on a log
// scale: late in pruning all ratios are near 100 %. One hue, so that a print in grey keeps the order.
const shade = (depth) => {
  const mix = (from, to) => Math.round(from + depth * (to - from));
  return `rgb(${mix(255, 8)}, ${mix(255, 48)}, ${mix(255, 107)})`;
};
for (const element of document.querySelectorAll(".ratios")) {
  const data = JSON.parse(element.querySelector("script").textContent);
  const slider = element.querySelector("input");
  const said = element.querySelector("output");
  const rows = [...element.querySelector("tbody").rows];
  const kept = data.rounds.flatMap(({ ratios }) => ratios.flat()).filter((r) => r !== null && r < 1).map((r) => 1 - r);
  const least = Math.log(Math.min(...kept, 0.5));
  const show = () => {
    const { round, density, ratios } = data.rounds[Number(slider.value)];
    said.textContent = `${round}: density ${density.toPrecision(3)}`;
    slider.setAttribute("aria-valuetext", `round ${round}`);
    rows.forEach((row, layer) => ratios[layer].forEach((ratio, series) => {
      const cell = row.cells[series + 1];
      cell.textContent = ratio === null ? "" : (100 * ratio).toFixed(2);
      const depth = ratio === 1 ? 1 : Math.log(1 - ratio) / least;
      cell.style.background = ratio === null ? "none" : shade(depth);
      cell.style.color = ratio === null ? "" : depth > 0.45 ? "#fff" : "#16191d";
    }));
  };
  slider.addEventListener("input", show);
  show();
}

// A page of a run that goes on loads itself again, if asked; the answer is kept in the address.
const reload = document.getElementById("reload");
if (reload) {
  reload.checked = location.hash === "#live";
  const wait = () => setTimeout(() => (reload.checked ? location.reload() : wait()), 15000);
  reload.addEventListener("change", () => history.replaceState(null, "", reload.checked ? "#live" : "#"));
  wait();
}

window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => (d.open = true)));
