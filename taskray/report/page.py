"""The frame of a report: one HTML file with style and script inline, which loads nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from taskray.report.tables import Entry, Table, grid

STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#171a21;--soft:#5d6575;--line:#e6e7ea;
--good:#0b7a55;--goodbg:#e4f5ed;--bad:#b3261e;--badbg:#fdeceb;--base:#9aa1ad;--hi:#f2f4f7;
--c0:#2f5fd0;--c1:#d9622b;--c2:#0f8f83;--c3:#8a4fc9;--c4:#b58900;--c5:#c2357a}
@media(prefers-color-scheme:dark){:root{--bg:#101216;--card:#171a20;--ink:#e9ebef;--soft:#9aa3b2;
--line:#2a2e37;--good:#5cd3a4;--goodbg:#12332a;--bad:#ff8f86;--badbg:#3c1a19;--base:#6f7786;
--hi:#1f232b;--c0:#84a9ff;--c1:#ff9d6b;--c2:#4fd1c3;--c3:#c79bff;--c4:#e6c34a;--c5:#ff86bb}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 Inter,ui-sans-serif,system-ui,
-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:48px 24px 72px}
h1{font-size:clamp(28px,5vw,40px);line-height:1.15;letter-spacing:-.022em;margin:0 0 8px}
h2{font-size:21px;letter-spacing:-.012em;margin:52px 0 6px}
h3{font-size:15px;margin:26px 0 10px;font-weight:600}h3 .soft{font-weight:400;margin-left:6px}
p{margin:0 0 12px;max-width:68ch}.soft,.lead{color:var(--soft)}.lead{font-size:18px}
a{color:var(--c0)}code{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.status{display:inline-block;padding:2px 11px;border-radius:99px;font-size:13px;font-weight:600;
background:var(--hi);color:var(--soft);vertical-align:middle;margin-bottom:14px}
.status.finished{background:var(--goodbg);color:var(--good)}
.status.failed{background:var(--badbg);color:var(--bad)}
dl.facts{display:flex;flex-wrap:wrap;gap:14px 36px;margin:22px 0 0}
dl.facts dt{font-size:12.5px;color:var(--soft)}dl.facts dd{margin:0;font-weight:500;
overflow-wrap:anywhere}
.error{border-left:4px solid var(--bad);background:var(--badbg);padding:12px 16px;margin:20px 0;
border-radius:0 8px 8px 0;overflow-wrap:anywhere}
.cards,.charts,.tiles{display:grid;gap:16px}
.cards{grid-template-columns:repeat(auto-fit,minmax(min(100%,215px),1fr));margin-top:28px}
.card,figure{background:var(--card);border:1px solid var(--line);border-radius:12px;margin:0}
.card{padding:16px 18px}.card b{display:block;font-size:32px;letter-spacing:-.025em;font-weight:600;
line-height:1.25;font-variant-numeric:tabular-nums}.card .unit{font-size:17px;margin-left:3px;
font-weight:500;color:var(--soft)}
.card small{display:block;color:var(--soft);font-size:13px;line-height:1.45}
.change{font-weight:600;white-space:nowrap;color:var(--soft)}
.change.good{color:var(--good)}.change.bad{color:var(--bad)}
.charts{grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr))}
.charts figure{padding:14px 14px 10px;min-width:0;position:relative}
figcaption{font-size:14px;font-weight:600;margin:0 0 6px}
figcaption .note{color:var(--soft);font-weight:400;margin-left:8px}
svg.chart{display:block;width:100%;height:auto;overflow:visible;touch-action:pan-y}
svg text{font-size:11px;fill:var(--soft);font-variant-numeric:tabular-nums}
svg .ty{text-anchor:end}svg .tx{text-anchor:middle}svg .te{text-anchor:end}
svg .name{fill:var(--ink);font-size:12px}
.grid{stroke:var(--line);stroke-width:1}.cursor{stroke:var(--soft);stroke-width:1;opacity:.55}
.line{fill:none;stroke:var(--k);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.dot{fill:var(--k)}.faint{opacity:.32}.line.faint{stroke-width:1.3}
.c0{--k:var(--c0)}.c1{--k:var(--c1)}.c2{--k:var(--c2)}.c3{--k:var(--c3)}.c4{--k:var(--c4)}
.c5{--k:var(--c5)}.base{--k:var(--base)}polyline.base{stroke-dasharray:5 4}
ul.legend{list-style:none;display:flex;flex-wrap:wrap;gap:3px 15px;margin:7px 0 0;padding:0;
font-size:12.5px;color:var(--soft)}
ul.legend li:before{content:"";display:inline-block;width:14px;height:3px;border-radius:2px;
background:var(--k);margin-right:6px;vertical-align:middle}ul.legend li.faint{opacity:.6}
ul.legend li.base:before{background:repeating-linear-gradient(90deg,var(--k) 0 4px,#0000 4px 7px)}
.tip{position:absolute;top:40px;pointer-events:none;background:var(--ink);color:var(--bg);
font-size:12px;line-height:1.4;padding:5px 9px;border-radius:7px;white-space:pre;z-index:2;
font-variant-numeric:tabular-nums}
.switch{position:absolute;opacity:0;pointer-events:none}
.tabs{display:inline-flex;background:var(--hi);border-radius:9px;padding:3px;margin:4px 0 0}
.tabs label{padding:4px 14px;font-size:13.5px;border-radius:7px;cursor:pointer;color:var(--soft)}
.by-seconds{display:none}
#seconds:checked~.plots .by-steps{display:none}#seconds:checked~.plots .by-seconds{display:block}
#steps:checked~.tabs [for=steps],#seconds:checked~.tabs [for=seconds]{background:var(--card);
color:var(--ink);box-shadow:0 1px 3px #0002;font-weight:600}
.switch:focus-visible~.tabs{outline:2px solid var(--c0);outline-offset:2px}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:12px;
margin:12px 0 10px}
table{border-collapse:collapse;width:100%;font-size:14.5px;font-variant-numeric:tabular-nums}
th,td{padding:8px 16px;text-align:right;white-space:nowrap;border-top:1px solid var(--line)}
thead th{font-size:12.5px;font-weight:500;color:var(--soft);border-top:0;vertical-align:bottom}
th:first-child,td.head,th.head{text-align:left}tbody th{font-weight:500}
tr.group th{padding:20px 16px 6px;font-weight:600;border-top:0}
tr.group+tr>*{border-color:var(--base)}
th.head{font-weight:500}p.table-note{font-size:13px;margin:2px 0}
td.best{font-weight:700}
.tiles{overflow-x:auto;gap:8px;padding-bottom:6px;align-items:end}
.tiles span{font-size:13px;line-height:1.3;color:var(--soft)}
.tiles img{display:block;width:100%;height:auto;border-radius:7px}
.fold{margin-top:16px}.fold summary{font-size:14.5px}.fold .charts{padding:4px 16px 18px}
ol.events{list-style:none;margin:12px 0;padding:0}
ol.events li{display:grid;grid-template-columns:104px 1fr;gap:14px;padding:8px 0;font-size:14.5px;
border-top:1px solid var(--line);overflow-wrap:anywhere}
ol.events time{color:var(--soft);font-variant-numeric:tabular-nums}
details{margin-top:52px;border:1px solid var(--line);border-radius:12px;background:var(--card)}
summary{padding:13px 18px;cursor:pointer;font-weight:600}
pre{margin:0;padding:4px 18px 18px;overflow-x:auto;font:13px/1.55 ui-monospace,SFMono-Regular,Menlo,
Consolas,monospace}
footer{margin-top:36px;color:var(--soft);font-size:13px}
@media(max-width:560px){main{padding:28px 16px 48px}h2{margin-top:42px}
th,td,tr.group th{padding-left:6px;padding-right:6px}
table{font-size:12.5px}thead th{white-space:normal;font-size:11.5px}
.cards{grid-template-columns:1fr 1fr;gap:10px}.card{padding:13px 14px}.card b{font-size:26px}
ol.events li{grid-template-columns:1fr;gap:0}}
@media print{.by-seconds{display:block!important}.tabs{display:none}
figure,.card{break-inside:avoid}}
"""

SCRIPT = """
for (const svg of document.querySelectorAll("svg.chart")) {
  const lines = [...svg.querySelectorAll("polyline[data-xs]")].map(el => ({
    name: el.dataset.name, xs: el.dataset.xs.split(" "), ys: el.dataset.ys.split(" "),
    at: el.getAttribute("points").split(" ").map(p => +p.split(",")[0])}));
  if (!lines.length) continue;
  const tip = Object.assign(document.createElement("div"), {className: "tip", hidden: true});
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "path");
  cursor.setAttribute("class", "cursor");
  svg.append(cursor);
  svg.after(tip);
  const nearest = (at, x) =>
    at.reduce((best, v, i) => Math.abs(v - x) < Math.abs(at[best] - x) ? i : best, 0);
  svg.onpointermove = event => {
    const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
    const x = (event.clientX - box.left) * view.width / box.width;
    const first = lines.map(l => ({l, i: nearest(l.at, x)}))
      .reduce((a, b) => Math.abs(a.l.at[a.i] - x) <= Math.abs(b.l.at[b.i] - x) ? a : b);
    const at = first.l.at[first.i];
    cursor.setAttribute("d", `M${at} 10V${view.height - 38}`);
    const rows = lines.map(l => `${l.ys[nearest(l.at, at)]}  ${l.name}`);
    tip.textContent = [`${first.l.xs[first.i]} ${svg.dataset.x}`, ...rows].join("\\n");
    tip.hidden = false;
    const left = 14 + at * box.width / view.width;
    tip.style.left = left < box.width / 2 ? `${left + 10}px` : "auto";
    tip.style.right = left < box.width / 2 ? "auto" : `${box.width + 38 - left}px`;
  };
  svg.onpointerleave = () => { tip.hidden = true; cursor.removeAttribute("d"); };
}
"""


def page(title: str, sections: Sequence[str]) -> str:
    """A complete HTML document; empty sections are left out."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(s for s in sections if s)
        + "\n<footer>Written by taskray. This file contains everything it shows.</footer>"
        f"\n</main><script>{SCRIPT}</script></body></html>\n"
    )


def section(title: str, body: str, lead: str = "") -> str:
    """A titled part of the page; empty without a body."""
    if not body:
        return ""
    text = f'<p class="soft">{escape(lead)}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{text}{body}</section>"


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Short facts side by side; pairs without a text are left out."""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in pairs if text
    )
    return f'<dl class="facts">{items}</dl>' if items else ""


def html_table(table: Table) -> str:
    """A :class:`Table`, the best values bold and changes coloured; scrolls on narrow screens."""
    laid = grid(table)
    if not laid.rows:
        return ""
    start = 1 if table.metrics_as_rows else 0  # the first column becomes a heading above its rows
    rows, group = [], None
    for row in laid.rows:
        if start and row[0].text != group:
            group = row[0].text
            span = f"<th class=head colspan={len(row) - 1}>{escape(group)}</th>"
            rows.append(f"<tr class=group>{span}</tr>" if group else "")
        cells = [_cell(entry, i == 0) for i, entry in enumerate(row[start:])]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = [entry.heading for entry in laid.rows[0][start:]]
    notes = [f'<p class="soft table-note">{escape(note)}.</p>' for note in laid.notes]
    return raw_table(laid.header[start:], rows, heads) + "".join(notes)


def raw_table(header: Sequence[str], rows: Sequence[str], heads: Sequence[bool]) -> str:
    """Finished ``<tr>`` rows under a header; ``heads``: which columns are left-aligned."""
    titles = "".join(
        f"<th{' class=head' if left else ''}>{escape(title).replace(chr(10), '<br>')}</th>"
        for title, left in zip(header, heads, strict=True)
    )
    return (
        f'<div class="scroll"><table><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts whose first column contains the headings of the rows; empty without rows."""
    if not rows:
        return ""
    lines = [
        f"<tr>{''.join(_cell(Entry(t, heading=i == 0), i == 0) for i, t in enumerate(row))}</tr>"
        for row in rows
    ]
    return raw_table(header, lines, [i == 0 for i in range(len(header))])


def _cell(entry: Entry, first: bool) -> str:
    text = escape(entry.text)
    if first:
        return f"<th class=head>{text}</th>"
    if entry.good is not None:
        return f'<td class="change {"good" if entry.good else "bad"}">{text}</td>'
    kinds = " ".join(k for k, on in (("head", entry.heading), ("best", entry.best)) if on)
    return f'<td class="{kinds}">{text}</td>' if kinds else f"<td>{text}</td>"


def config_details(text: str, name: str = "config.yaml") -> str:
    """A configuration in a collapsed block."""
    if not text:
        return ""
    return (
        f"<details><summary>Configuration ({escape(name)})</summary>"
        f"<pre>{escape(text)}</pre></details>"
    )
