"""The page's style sheet."""

# Series colours follow Okabe and Ito's palette, which people with any kind of colour blindness can tell
# apart; each has a lighter twin for dark paper.
STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfcf9; --ink: #1c1e21; --soft: #5d636b; --faint: #e6e3db; --wash: #f4f1ea;
  --accent: #0b5fa5; --better: #0b5fa50d; --warm: #b4531a;
  --heat: #0b5fa5; --on-heat: #ffffff; --on-middle: #1c1e21;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b45a92; --c4: #3a9bd9; --c5: #c98500; --c6: #6a51a3;
    --c7: #7f6a2e;
  --serif: "Charter", "Bitstream Charter", "Iowan Old Style", "Sitka Text", "Source Serif 4", Georgia,
    serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --ink: #e8e6e1; --soft: #a0a6ad; --faint: #2f3338; --wash: #1d2024;
    --accent: #6db6f2; --better: #6db6f214; --warm: #f0965a;
    --heat: #6db6f2; --on-heat: #0c1116; --on-middle: #0c1116;
    --c0: #56a8e0; --c1: #f08a45; --c2: #3cc79a; --c3: #e19ac1; --c4: #8fd0f5; --c5: #e6b23c;
      --c6: #ab98e0; --c7: #c4b078;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--sans); }
main, header, footer { max-width: 1008px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 56px; }
h1, h2, h3, .lead { font-family: var(--serif); font-weight: 600; line-height: 1.2; text-wrap: balance; }
.eyebrow { margin: 0 0 10px; color: var(--soft); font-size: 13px; letter-spacing: .02em; }
h1 { margin: 0; font-size: 40px; overflow-wrap: anywhere; letter-spacing: -.01em; }
.lead { margin: 18px 0 34px; max-width: 34em; font-size: 23px; line-height: 1.4; font-weight: 400;
  text-wrap: pretty; }
h2 { margin: 0 0 22px; font-size: 28px; }
h3 { margin: 0 0 12px; font: 600 15px/1.3 var(--sans); }
section { padding: 40px 0 0; border-top: 1px solid var(--faint); margin-top: 40px; }
figure { margin: 0 0 36px; } section > :last-child { margin-bottom: 0; }
figcaption, .note { max-width: 46em; margin: 12px 0 0; color: var(--soft); font-size: 14.5px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(270px, 1fr)); gap: 18px 36px;
  margin: 0;
  padding: 22px 0 0; border-top: 1px solid var(--faint); }
.facts dt { color: var(--soft); font-size: 13px; }
.facts dd { margin: 2px 0 0; font-size: 15px; overflow-wrap: anywhere; }

.scroll { overflow-x: auto; scrollbar-width: thin; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
.roomy :is(th, td):not(:first-child) { min-width: 88px; } .roomy .ratio { min-width: 150px; }
.roomy th:first-child { padding-right: 36px; }
caption { text-align: left; font-weight: 600; font-size: 15px; padding: 0 0 10px; position: sticky;
  left: 0; width: max-content; }
th, td { padding: 5px 9px; text-align: right; white-space: nowrap; font-weight: 400; }
thead th { vertical-align: bottom; color: var(--soft); border-bottom: 1px solid var(--ink);
  line-height: 1.25; }
thead th span { display: block; max-width: 12em; overflow: hidden; text-overflow: ellipsis;
  margin-left: auto; }
th.turned { padding-bottom: 8px; }
th.turned span { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 10.5em;
  max-width: none; margin: 0 0 0 auto; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); padding-left: 0;
  z-index: 1;
  max-width: 15em; overflow: hidden; text-overflow: ellipsis; }
tr.kind th { padding-top: 15px; color: var(--soft); font-size: 12.5px; max-width: none; overflow: visible; }
tbody tr:not(.kind) :is(th, td) { border-bottom: 1px solid var(--faint); }
tr.headline :is(th, td) { background: var(--wash); }
tr.headline th { font-weight: 600; }
td b { font-weight: 700; color: var(--accent); }
td.mean { font-weight: 500; }
.mean.novel { border-left: 1px solid var(--faint); padding-left: 14px; }
td.ratio { padding-right: 16px; }
abbr { text-decoration: none; cursor: help; }
.spark { display: inline-block; vertical-align: -1px; margin-right: 8px; }
.spark .down { fill: var(--accent); } .spark .up { fill: var(--warm); }
details { margin: 22px 0 0; } summary { cursor: pointer; color: var(--accent); font-size: 14.5px; }
details .scroll { margin-top: 18px; }
.glossary { columns: 2 320px; column-gap: 40px; margin: 26px 0 0; font-size: 14px; }
.glossary div { break-inside: avoid; margin-bottom: 10px; }
.glossary dt { font-weight: 600; } .glossary dd { margin: 0; color: var(--soft); }

svg { display: block; overflow: visible; font-family: var(--sans); font-size: 12px;
  font-variant-numeric: tabular-nums; }
:is(.wide, .narrow) > svg { width: 100%; height: auto; } svg svg { overflow: hidden; }
.narrow { display: none; }
svg text { fill: var(--ink); } svg .hint, svg .tick { fill: var(--soft); } svg .label { font-size: 13px; }
svg .figure { font-size: 12.5px; }
svg .strong { font-weight: 650; }
.rule, .grid { stroke: var(--faint); stroke-width: 1; } .axis { stroke: var(--soft); stroke-width: 1; }
.boundary { stroke: var(--soft); stroke-dasharray: 3 3; }
.better { fill: var(--better); }
.mark { stroke: var(--paper); stroke-width: 1.2; }
.mark.dot { fill: var(--accent); }
.mark.ring { fill: none; stroke: var(--c1); stroke-width: 2.4; }
.mark.diamond { fill: var(--c2); }
.mark.square { fill: var(--soft); }
.mark.triangle { fill: var(--c3); }
.mark.cross { fill: none; stroke: var(--c3); stroke-width: 2.6; }
svg .beyond { font-size: 11px; fill: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 22px; list-style: none; margin: 0 0 14px; padding: 0;
  font-size: 13.5px; }
.legend li, .scale { display: flex; align-items: center; gap: 8px; }
.scale { font-size: 13px; color: var(--soft); margin-bottom: 12px; }
.heat { fill: var(--heat); } .no-heat { fill: var(--wash); }
svg text.on-heat { fill: var(--on-heat); } svg text.on-middle { fill: var(--on-middle); }
.frame { fill: none; stroke: var(--ink); stroke-width: 1.6; }
.curve, .raw, .leader { fill: none; stroke: var(--soft); stroke-linejoin: round; stroke-linecap: round; }
.curve { stroke-width: 1.9; } .raw { stroke-width: 1; opacity: .16; } .leader { stroke-width: 1.9; }
.curve.seed { stroke-width: 2.4; } .dense { stroke: var(--ink); } .curve.dense { stroke-width: 2.4; }
svg .end.dense { font-weight: 650; stroke: none; }
.random { stroke-dasharray: 1 4; } svg .end { stroke: none; }
.branch { fill: none; stroke: var(--soft); } .branch.dense { stroke: var(--ink); }
.branch.ensemble { stroke: var(--accent); }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); } .c3 { stroke: var(--c3); }
.c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); } .c6 { stroke: var(--c6); } .c7 { stroke: var(--c7); }
.curve.dashed, .leader.dashed { stroke-dasharray: 6 4; }
.curve:hover { stroke-width: 4; }
.bar { fill: var(--soft); } .bar.headline { fill: var(--accent); } .bar.before { opacity: .45; }
svg .on-line { font-size: 12.5px; stroke: var(--paper); stroke-width: 9px; stroke-linejoin: round;
  paint-order: stroke; }
.tree { margin: 0 0 36px; }
footer { margin-top: 48px; padding-top: 20px; padding-bottom: 48px; color: var(--soft); font-size: 13px; }

@media (max-width: 640px) {
  main, header, footer { padding-left: 16px; padding-right: 16px; }
  header { padding-top: 32px; }
  h1 { font-size: 31px; } .lead { font-size: 19.5px; margin-bottom: 26px; }
  h2 { font-size: 24px; margin-bottom: 16px; }
  section { padding-top: 30px; margin-top: 26px; }
  .wide { display: none; } .narrow { display: block; }
  th:first-child { max-width: 12em; } .roomy :is(th, td):not(:first-child), .roomy .ratio { min-width: 0; }
  .roomy th:first-child { padding-right: 9px; } td.ratio { padding-right: 9px; }
  .facts { gap: 14px; }
}
@media print {
  :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --faint: #ccc; --wash: #f2f2f2;
    --accent: #0b5fa5;
    --better: #0b5fa50d; --warm: #b4531a; --heat: #0b5fa5; --on-heat: #fff; --on-middle: #000;
      --c0: #0072b2; --c1: #d55e00; --c2: #009e73;
    --c3: #b45a92; --c4: #3a9bd9; --c5: #c98500; --c6: #6a51a3; --c7: #7f6a2e; }
  @page { margin: 14mm; }
  body { font-size: 10.5pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main, header, footer { max-width: none; padding-left: 0; padding-right: 0; }
  header { padding-top: 0; }
  .wide { display: block; } .narrow { display: none; }
  .scroll { overflow: visible; } .scroll > svg { max-width: 100%; height: auto; }
  figure, .glossary div, tr { break-inside: avoid; } h2, h3, caption { break-after: avoid; }
  section { margin-top: 18pt; padding-top: 14pt; }
  table { font-size: 7.5pt; min-width: 0; width: 100%; } th, td { padding: 2pt 3pt; }
  td.ratio { padding-right: 3pt; }
  th:first-child, caption { position: static; } .spark { display: none; }
  details:not([open]) { display: none; }
}
"""
