"""How pages look: one column, the system's own type, light or dark as the reader's device says."""

from __future__ import annotations

STEPS = 9
LINES = 6

# (background, text) of each step of a heat map, from little to much: text has a contrast of 4.5 or more
HEAT_LIGHT = (
    ("#f4f7fb", "#16202a"), ("#e3ecf6", "#16202a"), ("#cfdff0", "#16202a"), ("#b5cfe8", "#16202a"),
    ("#93bbdd", "#16202a"), ("#6ea3cf", "#16202a"), ("#3c79ae", "#ffffff"), ("#2b659c", "#ffffff"),
    ("#1b4f85", "#ffffff"),
)  # fmt: skip
HEAT_DARK = (
    ("#1b222b", "#e8edf2"), ("#1f2d3b", "#e8edf2"), ("#23394e", "#e8edf2"), ("#284663", "#e8edf2"),
    ("#2d557b", "#e8edf2"), ("#366895", "#e8edf2"), ("#4d84b4", "#0b0f14"), ("#6f9fca", "#0b0f14"),
    ("#a3c4e2", "#0b0f14"),
)  # fmt: skip
# (background, text, muted text, rules, links and marks)
PAGE_LIGHT = ("#ffffff", "#1d242b", "#56606a", "#d9dfe5", "#1b5288")
PAGE_DARK = ("#14181d", "#e4e8ec", "#a2abb4", "#343c45", "#8fbce8")
LINES_LIGHT = ("#1b5288", "#a8480f", "#2b7248", "#74459a", "#7d6110", "#4f5860")
LINES_DARK = ("#7fb2e5", "#f0a06a", "#7fcf9f", "#c9a0e8", "#d9bf5f", "#b9c0c7")
_DASHES = ("none", "7 3", "2 3", "9 3 2 3", "4 2", "12 4")


def _properties(page: tuple[str, ...], heat: tuple[tuple[str, str], ...], lines: tuple[str, ...]) -> str:
    names = ("bg", "fg", "muted", "rule", "mark")
    pairs = [*zip(names, page, strict=True)]
    pairs += [(f"h{step}", back) for step, (back, _) in enumerate(heat)]
    pairs += [(f"t{step}", front) for step, (_, front) in enumerate(heat)]
    pairs += [(f"l{number}", colour) for number, colour in enumerate(lines)]
    return "".join(f"--{name}:{value};" for name, value in pairs)


CSS = f"""
:root{{color-scheme:light dark;{_properties(PAGE_LIGHT, HEAT_LIGHT, LINES_LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{{_properties(PAGE_DARK, HEAT_DARK, LINES_DARK)}}}}}
*{{box-sizing:border-box}}
body{{margin:0 auto;padding:1.5rem 1rem 3rem;max-width:62rem;background:var(--bg);color:var(--fg);
font:1rem/1.5 system-ui,sans-serif;font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}}
h1{{font-size:1.5rem;font-weight:600;line-height:1.25;margin:0;overflow-wrap:anywhere}}
h2{{font-size:1.125rem;font-weight:600;margin:2.5rem 0 .25rem;overflow-wrap:anywhere}}
h3{{font-size:.9375rem;font-weight:600;margin:1.25rem 0 .25rem;overflow-wrap:anywhere}}
.lead{{margin:.25rem 0 0;color:var(--muted);overflow-wrap:anywhere}}
.note{{margin:0 0 .75rem;max-width:44rem;color:var(--muted);overflow-wrap:anywhere}}
footer{{margin-top:3rem;border-top:1px solid var(--rule);color:var(--muted);font-size:.875rem}}
dl{{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.75rem 1.5rem;margin:.75rem 0}}
dt{{color:var(--muted);font-size:.8125rem;overflow-wrap:anywhere}}
dd{{margin:0;overflow-wrap:anywhere}}
.wide{{overflow-x:auto}}
.wide:focus-visible,summary:focus-visible{{outline:2px solid var(--mark);outline-offset:2px}}
table{{border-collapse:collapse;font-size:.875rem;line-height:1.35}}
caption{{text-align:left;padding:0 0 .35rem;color:var(--muted)}}
th{{font-weight:500;text-align:left}}
thead th{{color:var(--muted);vertical-align:bottom}}
th,td{{padding:.2rem .9rem .2rem 0;border-bottom:1px solid var(--rule)}}
td{{white-space:nowrap}}
.n{{text-align:right;white-space:nowrap}}
tbody th{{min-width:7rem;overflow-wrap:anywhere}}
.b svg{{width:12.5rem}}
.heat{{border-spacing:2px;border-collapse:separate;font-size:.75rem}}
.heat th,.heat td{{border:0;padding:.1rem .25rem}}
.heat th{{font-weight:400;color:var(--muted);white-space:nowrap;min-width:0}}
.heat tbody th{{text-align:right;position:sticky;left:0;background:var(--bg)}}
.heat td{{min-width:2.4rem;text-align:center;border-radius:2px;white-space:nowrap}}
.heat .no{{color:var(--muted)}}
.scale{{display:flex;align-items:center;gap:2px;margin:.4rem 0 0;font-size:.75rem;color:var(--muted)}}
.scale i{{width:1.2rem;height:.7rem;border-radius:2px}}
.scale span{{margin:0 .35rem}}
{"".join(f".q{step}{{background:var(--h{step});color:var(--t{step})}}" for step in range(STEPS))}
.side{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:0 2rem}}
.side>*{{min-width:0}}
svg{{display:block;width:100%;height:auto;max-width:44rem;overflow:visible}}
svg text{{fill:var(--muted);font:11px system-ui,sans-serif;font-variant-numeric:tabular-nums}}
@media (max-width:34rem){{svg text{{font-size:14px}}}}
.axis{{stroke:var(--rule);stroke-width:1}}
.limit{{stroke:var(--fg);stroke-width:1;stroke-dasharray:4 3}}
.area{{fill:var(--h3);stroke:none}}
.bar{{fill:var(--h6)}}
{
    "".join(
        f".s{number}{{fill:none;stroke:var(--l{number});stroke-width:1.75;stroke-dasharray:{dash}}}"
        f".d{number}{{fill:var(--l{number})}}"
        for number, dash in enumerate(_DASHES)
    )
}
.legend{{display:flex;flex-wrap:wrap;gap:.15rem 1.25rem;list-style:none;margin:.25rem 0 .5rem;padding:0;
font-size:.8125rem}}
.legend svg{{display:inline-block;width:2rem;height:.7rem;margin-right:.4rem;vertical-align:baseline}}
details{{margin:.75rem 0}}
summary{{cursor:pointer;color:var(--mark);overflow-wrap:anywhere}}
code{{font:.875em ui-monospace,monospace}}
pre{{overflow-x:auto;font:.8125rem/1.45 ui-monospace,monospace;border-left:2px solid var(--rule);padding-left:.9rem}}
.warn{{border-left:3px solid var(--l1);padding-left:1.5rem;margin:.75rem 0}}
ul{{padding-left:1.2rem;margin:.5rem 0}}
li{{overflow-wrap:anywhere;margin:.2rem 0;max-width:46rem}}
@media print{{details{{display:block}}body{{max-width:none}}}}
"""
