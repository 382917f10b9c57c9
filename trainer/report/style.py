"""How the page looks: by day and by night, on paper, and on a telephone."""

CSS = """
:root {
  color-scheme: light dark;
  --ink: #1d1d1f; --quiet: #5f5f64; --ground: #fff; --raised: #f6f6f8; --line: #dcdce1;
  --first: #4f46e5; --second: #b45309; --third: #0f766e; --fourth: #be185d; --faint: #b4b8c5;
  --good: #1a7f37; --bad: #b42318; --care: #92600a;
}
@media (prefers-color-scheme: dark) { :root {
  --ink: #ececf0; --quiet: #a3a3ad; --ground: #16161a; --raised: #1f1f25; --line: #35353e;
  --first: #a5b4fc; --second: #fbbf24; --third: #5eead4; --fourth: #f9a8d4; --faint: #565b6b;
  --good: #4ade80; --bad: #fca5a5; --care: #fbbf24;
} }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 0 auto;
  padding: 2rem clamp(1rem, 4vw, 3rem); max-width: 76rem; overflow-wrap: anywhere; }
h1 { font-size: clamp(1.6rem, 5vw, 2.4rem); line-height: 1.2; margin: 0.2rem 0 0.6rem; }
h2 { font-size: 1.35rem; margin: 0 0 1rem; } h3 { font-size: 1rem; margin: 1.6rem 0 0.6rem; }
p { margin: 0.6rem 0; max-width: 48rem; }
a { color: var(--first); }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 0.86em; }
pre { background: var(--raised); border: 1px solid var(--line); border-radius: 6px; padding: 0.8rem; margin: 0.6rem 0;
  white-space: pre-wrap; }
section { border-top: 1px solid var(--line); margin-top: 2.5rem; padding-top: 1.5rem; }
.over { color: var(--quiet); margin: 0; font-size: 0.9rem; }
.lead { font-size: 1.1rem; }
.quiet { color: var(--quiet); font-size: 0.88rem; }
.missing { color: var(--quiet); border: 1px dashed var(--line); border-radius: 6px; padding: 0.6rem 0.8rem; }
.chip { display: inline-block; font-size: 0.9rem; font-weight: 500; border: 1px solid currentColor;
  color: var(--quiet);
  border-radius: 1rem; padding: 0.05rem 0.7rem; vertical-align: middle; white-space: nowrap; }
.chip.done { color: var(--good); } .chip.failed { color: var(--bad); }
.chip.stopped, .chip.interrupted { color: var(--care); }
.notice { border: 1px solid var(--line); border-left: 4px solid var(--quiet); border-radius: 4px;
  padding: 0.5rem 0.8rem; }
.notice.bad { border-left-color: var(--bad); } .notice.care { border-left-color: var(--care); }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; padding: 0; margin: 1.5rem 0 0; }
nav a { display: inline-block; padding: 0.3rem 0; }
dl { margin: 0; display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr));
  gap: 0.7rem 1.5rem; }
dt { color: var(--quiet); font-size: 0.85rem; } dd { margin: 0; }
.scroll { overflow-x: auto; margin: 0.6rem 0; }
table { border-collapse: collapse; font-size: 0.92rem; }
th, td { padding: 0.35rem 0.8rem 0.35rem 0; text-align: left; vertical-align: top; font-weight: 400;
  min-width: 5rem; }
th { overflow-wrap: break-word; }
thead th { color: var(--quiet); font-size: 0.85rem; border-bottom: 1px solid var(--line); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
th code { overflow-wrap: normal; white-space: nowrap; }
table.settings { min-width: 46rem; }
table.settings td:nth-child(2) { min-width: 8rem; max-width: 16rem; }
table.settings td:last-child { color: var(--quiet); max-width: 34rem; }
table.numbers td { font-variant-numeric: tabular-nums; }
td img { width: 128px; max-width: 128px; height: auto; display: block; border-radius: 3px; }
table.pictures tbody th { color: var(--quiet); font-variant-numeric: tabular-nums; }
table.pictures thead th { max-width: 128px; vertical-align: bottom; }
table.pictures td, table.pictures tr + tr > * { border: 0; padding-bottom: 0.2rem; }
td.recommended { outline: 3px solid var(--good); outline-offset: -1px; padding: 0.35rem; }
td.recommended strong { color: var(--good); display: block; white-space: nowrap; }
#wall h2:not(:first-child) { font-size: 1rem; margin: 1.6rem 0 0.4rem; }
.scores { font-size: 0.82rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
.above { color: var(--bad); }
.meanings dl { display: block; } .meanings dt { font-weight: 600; margin-top: 0.4rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(8.5rem, 45%), 1fr)); gap: 1rem 0.8rem; }
.gallery figure, .strip figure { margin: 0; break-inside: avoid; }
.gallery img { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--raised); border-radius: 6px; }
figcaption { font-size: 0.82rem; line-height: 1.35; }
.gallery figcaption .quiet { display: block; font-size: 0.78rem; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); gap: 1rem;
  margin-top: 1.5rem; }
.strip img { width: calc(50% - 2px); aspect-ratio: 1; object-fit: cover; border-radius: 4px; }
.strip img + img { margin-left: 4px; }
.words { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 0.4rem; }
.words li { border: 1px solid var(--line); border-radius: 1rem; padding: 0.05rem 0.6rem; font-size: 0.88rem; }
details { margin: 0.8rem 0; } summary { cursor: pointer; padding: 0.3rem 0; color: var(--first); }
.chart { margin: 1.2rem 0 0.4rem; break-inside: avoid; max-width: 60rem; }
.chart figcaption { font-size: 0.88rem; color: var(--quiet); margin-bottom: 0.6rem; }
.plot { height: 15rem; padding: 0.5rem 1.2rem 1.5rem 4.2rem; }
.plot svg { display: block; overflow: visible; }
.plot text { font-size: 12px; fill: var(--quiet); font-variant-numeric: tabular-nums; }
.plot .grid { stroke: var(--line); } .plot .edge { stroke: var(--quiet); }
.plot path { fill: none; stroke-width: 2px; vector-effect: non-scaling-stroke; stroke-linejoin: round;
  stroke-linecap: round; }
.plot path.faint { stroke-width: 1px; }
.axis { text-align: center; font-size: 0.82rem; color: var(--quiet); margin: 0; max-width: none; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; padding: 0; margin: 0.3rem 0;
  font-size: 0.85rem; }
.key { display: inline-block; width: 1.2rem; border-top: 3px solid; margin-right: 0.4rem; vertical-align: middle; }
path.first { stroke: var(--first); } path.second { stroke: var(--second); } path.third { stroke: var(--third); }
path.fourth { stroke: var(--fourth); } path.faint { stroke: var(--faint); }
.key.first { color: var(--first); } .key.second { color: var(--second); } .key.third { color: var(--third); }
.key.fourth { color: var(--fourth); } .key.faint { color: var(--faint); }
footer { border-top: 1px solid var(--line); margin-top: 2.5rem; color: var(--quiet); font-size: 0.88rem; }
:focus-visible { outline: 2px solid var(--first); outline-offset: 2px; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
@media (max-width: 40rem) {
  dl { grid-template-columns: 1fr 1fr; gap: 0.6rem 1rem; }
  td img { width: 96px; } table.pictures thead th { max-width: 96px; } .plot { padding-left: 3.4rem; }
  table.settings { min-width: 0; } table.settings thead { display: none; }
  table.settings tr, table.settings th, table.settings td { display: block; border: 0; padding: 0; }
  table.settings tr { border-top: 1px solid var(--line); padding: 0.6rem 0; }
  table.settings tr > td:nth-child(n) { max-width: none; border: 0; }
  table.settings td:nth-child(3) { color: var(--quiet); font-size: 0.85rem; }
  table.settings td:nth-child(3)::before { content: "default: "; }
  .meanings dl { display: block; }
}
@media print {
  :root { --ink: #000; --quiet: #444; --ground: #fff; --raised: #fff; --line: #bbb; --first: #3730a3;
  --second: #92400e;
    --third: #115e59; --fourth: #9d174d; --faint: #999; --good: #14532d; --bad: #7f1d1d; --care: #713f12; }
  body { max-width: none; padding: 0; font-size: 10.5pt; } nav { display: none; }
  .scroll { overflow: visible; } table.settings { min-width: 0; width: 100%; font-size: 8.5pt; }
  tr, .notice { break-inside: avoid; }
  table.settings td:nth-child(2) { min-width: 0; max-width: 10rem; } table.settings td:last-child { max-width: none; }
  h2, h3 { break-after: avoid; } td img { width: 80px; } img { print-color-adjust: exact; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
