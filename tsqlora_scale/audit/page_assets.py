"""Style and script of the audit's page, which loads nothing from elsewhere."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --dim: #667085; --line: #d9dee7; --back: #fff; --card: #f6f8fb;
  --bad: #c2410c; --good: #15803d; --mark: #2563eb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --dim: #98a2b3; --line: #333b4a; --back: #12161e;
  --card: #1a202b; --bad: #fb923c; --good: #4ade80; --mark: #7aa2ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; color: var(--ink); background: var(--back);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem 1rem; }
.tile b { display: block; font-size: 1.5rem; }
.tile span, .dim { color: var(--dim); font-size: .87rem; }
.warning { border-left: 4px solid var(--bad); background: var(--card); padding: .6rem 1rem; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: start; padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--dim); font-weight: 600; font-size: .85rem; }
td.number, th.number { text-align: end; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
td.text { overflow-wrap: anywhere; white-space: pre-wrap; min-width: 16rem; }
.label { border: 1px solid var(--line); border-radius: 1rem; padding: 0 .55rem; overflow-wrap: anywhere; }
.suggested { border-color: var(--mark); color: var(--mark); }
.reason { display: block; color: var(--dim); font-size: .82rem; overflow-wrap: anywhere; }
.bar { display: block; height: .3rem; min-width: 4rem; border-radius: .2rem; background: var(--line);
  overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--bad); }
.filters { position: sticky; top: 0; background: var(--back); border-bottom: 1px solid var(--line); padding: .6rem 0;
  display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; z-index: 1; }
select, input, button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: .35rem; padding: .2rem .5rem; max-width: 16rem; }
button { cursor: pointer; }
tr[data-choice=relabel] .relabel, tr[data-choice=drop] .drop, tr[data-choice=keep] .keep { background: var(--mark);
  color: #fff; border-color: var(--mark); }
tr[data-choice] td.text { opacity: .55; }
tr.here { outline: 2px solid var(--mark); outline-offset: -2px; }
.choices { white-space: nowrap; }
.scripted { display: none; }
body.live .scripted { display: revert; }
body.live .filters.scripted { display: flex; }
svg { display: block; max-width: 40rem; width: 100%; height: auto; }
svg rect { fill: var(--mark); } svg text { fill: var(--dim); font-size: 11px; }
"""

SCRIPT = """
"use strict";
(() => {
  const rows = [...document.querySelectorAll("#suspects tr[data-id]")];
  const find = id => document.getElementById(id);
  const key = "audit " + document.body.dataset.key;
  let choices = {};
  try { choices = JSON.parse(localStorage.getItem(key) || "{}"); } catch (_) { choices = {}; }
  let here = -1;
  const visible = () => rows.filter(row => !row.hidden);
  function mark(row) {
    const choice = Object.hasOwn(choices, row.dataset.id) ? choices[row.dataset.id] : null;
    if (choice) row.dataset.choice = choice; else delete row.dataset.choice;
  }
  function count() {
    const decided = rows.filter(row => row.dataset.choice);
    const of = name => decided.filter(row => row.dataset.choice === name).length;
    find("count").textContent = visible().length + " shown, " + decided.length + " decided (" + of("relabel") +
      " relabel, " + of("drop") + " drop, " + of("keep") + " keep)";
  }
  function filter() {
    const label = find("label").value, suggested = find("suggested").value, least = Number(find("least").value) / 100;
    const words = find("search").value.toLocaleLowerCase(), open = find("open").checked;
    for (const row of rows) row.hidden = !((!label || row.dataset.label === label.slice(1)) &&
      (!suggested || row.dataset.suggested === suggested.slice(1)) &&
      (row.dataset.p === "" || Number(row.dataset.p) >= least) &&
      (!open || !row.dataset.choice) && (!words || row.textContent.toLocaleLowerCase().includes(words)));
    find("leastshown").textContent = find("least").value + " %";
    count();
  }
  function choose(row, choice) {
    if (row.dataset.choice === choice) delete choices[row.dataset.id]; else choices[row.dataset.id] = choice;
    try { localStorage.setItem(key, JSON.stringify(choices)); } catch (_) { /* kept until the page is closed */ }
    mark(row);
    count();
  }
  function sort() {
    const by = find("sort").value, body = rows[0] && rows[0].parentNode;
    const number = row => Number(row.dataset[by]);
    const ordered = [...rows].sort((a, b) => by === "text" ?
      a.querySelector(".text").textContent.localeCompare(b.querySelector(".text").textContent) : number(a) - number(b));
    for (const row of ordered) body.append(row);
    rows.splice(0, rows.length, ...ordered);
  }
  function go(step) {
    const shown = visible();
    if (!shown.length) return;
    if (rows[here]) rows[here].classList.remove("here");
    const at = Math.min(Math.max(shown.indexOf(rows[here]) + step, 0), shown.length - 1);
    here = rows.indexOf(shown[at]);
    rows[here].classList.add("here");
    rows[here].scrollIntoView({block: "center"});
  }
  function save(name, text, type) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type}));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
  const cell = value => '"' + value.replaceAll('"', '""') + '"';
  function table() {
    const lines = [["id", "text", "label", "suggested_label", "reason", "probability"]];
    for (const row of rows) if (row.dataset.choice === "relabel" || row.dataset.choice === "drop")
      lines.push([row.dataset.id, row.querySelector(".whole").textContent, row.dataset.label,
        row.dataset.choice === "relabel" ? row.dataset.suggested : "", row.dataset.choice, row.dataset.p]);
    return lines.map(line => line.map(cell).join(",")).join("\\r\\n") + "\\r\\n";
  }
  rows.forEach(mark);
  document.body.classList.add("live");
  for (const id of ["label", "suggested", "least", "search", "open"]) find(id).addEventListener("input", filter);
  find("sort").addEventListener("input", sort);
  find("save").addEventListener("click", () => save("decisions.csv", table(), "text/csv;charset=utf-8"));
  find("suspects").addEventListener("click", event => {
    const button = event.target.closest("button");
    if (button) choose(button.closest("tr"), button.className);
  });
  document.addEventListener("keydown", event => {
    if (event.target.closest("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    const choice = {r: "relabel", d: "drop", k: "keep"}[event.key];
    if (event.key === "j") go(1); else if (event.key === "l") go(-1);
    else if (choice && rows[here]) { choose(rows[here], choice); go(1); }
  });
  filter();
})();
"""
