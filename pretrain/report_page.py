"""How a report looks: the page around it, and numbers as people read them."""

from collections.abc import Mapping
from html import escape


def spoken(name: str) -> str:
    return name.replace("heldout", "held-out").replace("_", " ")


def percent(value: float) -> str:
    return f"{value:.1f} %"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def facts_table(facts: Mapping[str, str]) -> str:
    rows = "".join(
        f'<tr><th>{escape(key)}</th><td class="text">{escape(value)}</td></tr>'
        for key, value in facts.items()
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def preformatted(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def page(title: str, body: str) -> str:
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
</body>
</html>
"""


STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff;
  max-width: 68rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .6rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #d8dee6; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
.note { color: #46505e; max-width: 54rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; }
.tile { flex: 1 1 10rem; border: 1px solid #d8dee6; border-radius: 6px; padding: .7rem .9rem; }
.what { font-size: .82rem; color: #46505e; }
.value { font-size: 1.5rem; font-weight: 600; }
table { border-collapse: collapse; margin: .4rem 0 .8rem; font-size: .92rem; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #e6eaf0;
  font-variant-numeric: tabular-nums; vertical-align: top; }
thead th, tfoot th { color: #46505e; font-weight: 600; }
tbody th { font-weight: 500; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; }
code, pre { font: .85em/1.45 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { background: #f5f7fa; padding: .8rem; white-space: pre-wrap; }
figure { margin: 0; }
figure svg, figure img { max-width: 100%; height: auto; }
.bar { position: relative; width: 14rem; height: .7rem; margin-top: .4rem; background: #eef1f5; }
.bar i { display: block; height: 100%; background: #1f6f8b; }
.bar b { position: absolute; top: .25rem; height: .2rem; background: #0d2b36; opacity: .6; }
@media print {
  body { margin: 0; max-width: none; font-size: 11pt; }
  h2, h3 { break-after: avoid; }
  table, figure, .tiles { break-inside: avoid; }
  .bar, .bar i, .bar b { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
