"""Bar charts as SVG, written by hand: they bring their own background, in light and in dark."""

from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT = 860, 290, 70
BAR, GAP, GROUP_GAP, TOP, BOTTOM = 12, 2, 12, 74, 44
STYLE = """
  .back { fill: #ffffff; } text { font: 13px system-ui, sans-serif; fill: #1f2328; } .title { font-size: 16px; font-weight: 600; }
  .small { font-size: 11px; fill: #59636e; } .grid { stroke: #d1d9e0; stroke-width: 1; } .axis { stroke: #59636e; stroke-width: 1; }
  .s0 { fill: #0969da; } .s1 { fill: #bc4c00; } .s2 { fill: #1a7f37; } .s3 { fill: #8250df; }
  @media (prefers-color-scheme: dark) {
    .back { fill: #0d1117; } text { fill: #f0f6fc; } .small { fill: #9198a1; } .grid { stroke: #3d444d; } .axis { stroke: #9198a1; }
    .s0 { fill: #4493f8; } .s1 { fill: #f0883e; } .s2 { fill: #3fb950; } .s3 { fill: #ab7df8; }
  }
"""


def ticks(highest):
    """Round steps from 0 to at least the highest value, four to ten of them."""
    step = 1e-3
    while highest / step > 10:
        for factor in (2, 2.5, 2):
            step *= factor
            if highest / step <= 10:
                break
    count = int(-(-highest // step))
    return [step * n for n in range(count + 1)]


def plain(number):
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"


def bars(title, axis, series, rows, note=""):
    """One chart: `series` are names, `rows` (title, value or None per series). None when there is nothing to show."""
    rows = [(name, values) for name, values in rows if any(v is not None for v in values)]
    if not rows:
        return None
    marks = ticks(max(v for _, values in rows for v in values if v is not None) or 1)
    top, scale = marks[-1], WIDTH - LEFT - RIGHT
    group = len(series) * (BAR + GAP) + GROUP_GAP
    bottom = TOP + group * len(rows)
    height = bottom + BOTTOM
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" role="img" '
           f'aria-label="{escape(title)}">', f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>",
           f'<rect class="back" width="{WIDTH}" height="{height}" rx="6"/>', f'<text class="title" x="16" y="26">{escape(title)}</text>']
    x = 16
    for n, name in enumerate(series):
        out.append(f'<rect class="s{n}" x="{x}" y="42" width="12" height="12"/><text x="{x + 17}" y="53">{escape(name)}</text>')
        x += 40 + 8 * len(name)
    if note:
        out.append(f'<text class="small" x="{WIDTH - 16}" y="53" text-anchor="end">{escape(note)}</text>')
    for mark in marks:
        at = LEFT + scale * mark / top
        out.append(f'<line class="grid" x1="{at:.1f}" y1="{TOP - 6}" x2="{at:.1f}" y2="{bottom}"/>')
        out.append(f'<text class="small" x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{plain(mark)}</text>')
    out.append(f'<text class="small" x="{LEFT + scale / 2:.0f}" y="{bottom + 34}" text-anchor="middle">{escape(axis)}</text>')
    for index, (name, values) in enumerate(rows):
        y = TOP + group * index
        middle = y + (group - GROUP_GAP) / 2 + 4
        out.append(f'<text x="{LEFT - 10}" y="{middle:.1f}" text-anchor="end">{escape(name)}</text>')
        for n, value in enumerate(values):
            if value is None:
                continue
            at, long = y + n * (BAR + GAP), scale * value / top
            out.append(f'<rect class="s{n}" x="{LEFT}" y="{at}" width="{max(long, 0.5):.1f}" height="{BAR}"/>')
            out.append(f'<text class="small" x="{LEFT + long + 4:.1f}" y="{at + BAR - 2}">{plain(value)}</text>')
    out.append(f'<line class="axis" x1="{LEFT}" y1="{TOP - 6}" x2="{LEFT}" y2="{bottom}"/>')
    return "\n".join(out + ["</svg>", ""])


# File, title, axis, (legend, value) of each series. Plain traffic would dwarf the rest: it is told in the corner.
CHARTS = [
    ("tcp", "TCP goodput", "Gbit/s at the receiver, median of the rounds; more is better",
     [("1 stream", "tcp1"), ("5 streams", "tcp5"), ("10 streams", "tcp10"), ("20 streams", "tcp20")]),
    ("cpu", "CPU of the tunnel, both ends", "CPU seconds per GB; less is better", [("TCP", "cpu"), ("UDP at 400 Mbit/s", "cpu400")]),
    ("packets", "64-byte datagrams received", "thousand per second; more is better", [("64 bytes", "pps64")]),
    ("latency", "TCP round trip, idle", "microseconds; less is better", [("p50", "p50"), ("p99", "p99")]),
    ("memory", "Private memory of one end", "MB; less is better", [("idle", "idle"), ("loaded", "loaded")]),
]


def charts(results, underlay, where, brief):
    """(file name, alternative text, SVG) of every chart that has something to show; only the first where that is enough."""
    found = []
    for file, title, axis, series in CHARTS[:1] if brief else CHARTS:
        rows = [(data["title"], [results.median(underlay, row, name) for _, name in series])
                for row, data in results.rows(underlay).items() if row != "plain"]
        clear = [results.median(underlay, "plain", name) for _, name in series]
        note = "plain: " + " / ".join(plain(v) for v in clear if v is not None) if any(v is not None for v in clear) else ""
        svg = bars(f"{title}, {where}", axis, [name for name, _ in series], rows, note)
        if svg:
            found.append((f"{file}-{underlay}.svg", f"{title}, {where}", svg))
    return found
