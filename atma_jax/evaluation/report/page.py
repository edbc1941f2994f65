"""The frame of the report: style and script, around ``{{links}}`` and ``{{body}}``."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>atma_jax evaluation</title>
<style>
:root { color-scheme: light; --line: #e5e7eb; --soft: #6b7280; --ink: #111827; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink); font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
header { background: #fff; border-bottom: 1px solid var(--line); padding: 18px 28px 10px; position: sticky; top: 0; z-index: 2; }
h1 { font-size: 20px; margin: 0 0 6px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; }
nav a { color: #0b63a5; text-decoration: none; }
nav a:hover { text-decoration: underline; }
main { max-width: 1180px; margin: 0 auto; padding: 20px 28px 60px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 18px 22px 22px; margin-bottom: 20px;
  scroll-margin-top: 110px; }
h2 { font-size: 17px; margin: 0 0 12px; }
h3 { font-size: 14px; margin: 18px 0 8px; }
p { margin: 8px 0; color: var(--soft); font-size: 13.5px; }
img { max-width: 100%; height: auto; display: block; margin: 0 auto 10px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; }
.numbers td, .numbers th { font-variant-numeric: tabular-nums; white-space: nowrap; }
.path { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 12px; overflow-wrap: anywhere; min-width: 180px; }
.bad { color: #b91c1c; background: #fef2f2; }
.cards { display: flex; flex-wrap: wrap; gap: 18px 28px; }
.heat { border-spacing: 2px; border-collapse: separate; margin: 4px 0; }
.heat caption { text-align: left; font-size: 12.5px; color: var(--soft); padding-bottom: 3px; }
.heat th { border: 0; padding: 2px 8px 2px 0; color: var(--soft); font-weight: 500; white-space: nowrap; }
.heat thead th { text-align: center; padding: 2px; }
.heat td { border: 0; min-width: 46px; height: 28px; padding: 2px 5px; text-align: center; vertical-align: middle;
  border-radius: 3px; font-variant-numeric: tabular-nums; }
.heat td.bad { font-size: 11px; line-height: 1.1; }
.heat td.none { background: #f3f4f6; }
.tabs { margin: 8px 0 2px; }
button { font: inherit; font-size: 13px; padding: 4px 12px; border: 1px solid var(--line); background: #fff; border-radius: 6px;
  cursor: pointer; margin-right: 6px; }
button.on { background: #0b63a5; border-color: #0b63a5; color: #fff; }
summary { cursor: pointer; color: #0b63a5; }
input { font: inherit; font-size: 13px; padding: 5px 10px; margin: 12px 0 6px; width: min(480px, 100%);
  border: 1px solid #d1d5db; border-radius: 6px; }
@media print { header { position: static; } section { break-inside: avoid; } }
</style>
</head>
<body>
<header><h1>atma_jax evaluation</h1><nav>{{links}}</nav></header>
<main>{{body}}</main>
<script>
for (const button of document.querySelectorAll(".tabs button")) {
  button.addEventListener("click", () => {
    const section = button.closest("section");
    section.querySelectorAll(".tabs button").forEach(other => other.classList.toggle("on", other === button));
    section.querySelectorAll(".pane").forEach((pane, i) => { pane.hidden = String(i) !== button.dataset.pane; });
  });
}
const filter = document.getElementById("filter");
if (filter) filter.addEventListener("input", () => {
  const words = filter.value.toLowerCase().split(/\\s+/).filter(Boolean);
  for (const row of document.querySelectorAll("table.all tbody tr")) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every(word => text.includes(word));
  }
});
</script>
</body>
</html>
"""
