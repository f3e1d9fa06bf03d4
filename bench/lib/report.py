"""The table on the terminal and `RESULTS.md`."""

from statistics import median

from measure import LOAD_STREAMS, REQUESTS, SMALL
from results import PEER, PLAIN, goals
from underlay import NAMES

# Title and value of each column, the digits after the point; a ratio has its other row instead.
THROUGHPUT = [
    ("TCP 1", "tcp1", 2), ("TCP 5", "tcp5", 2), ("TCP 10", "tcp10", 2), ("TCP 20", "tcp20", 2), ("to plain", PLAIN, None),
    ("to wg-go", PEER, None), ("CPU s/GB", "cpu", 2), ("kernel", "kcpu", 2), ("UDP", "udp", 2), ("400M s/GB", "cpu400", 2),
    ("64 B kpps", "pps64", 0),
]
REST = [
    ("p50 us", "p50", 0), ("p99 us", "p99", 0), ("loaded p50 us", "load50", 0), ("loaded p99 us", "load99", 0),
    ("MB idle", "idle", 1), ("MB loaded", "loaded", 1), ("first byte ms", "first", 1),
]
METHOD = f"""\
TCP and UDP in Gbit/s at iperf3's receiver, from namespace a to namespace b of one machine; TCP with so many streams, cubic on
both sides; UDP with datagrams of 1,200 bytes (8,000 at MTU 9000) at `-b 0`. The ratios are those of the median over 1, 5 and
10 streams. Tencrypt is reached by its Service's address (another port, DNAT), strict. Every row is set up at its turn and
taken down after it; rounds are interleaved, each begun with another row. Values are medians over the rounds.

*CPU s/GB*: user and system time of the tunnel's processes at both ends (Tencrypt: agents and launchers) per 10^9 bytes received,
over all TCP runs; *kernel*: the same of the machine's kernel threads, whatever they worked for: compare it with plain's. What the
kernel does in interrupts is charged to whoever was interrupted, in no column. *400M*: of the tunnel's processes, UDP at 400 Mbit/s.
*64 B*: thousand datagrams of {SMALL} bytes received per second, of as many as one thread can send (`probe.py flood`: sendmmsg). Round trips: TCP, 64 bytes, one connection, {REQUESTS} of them, in us;
*loaded*: the same on a flow of its own while iperf3 sends {LOAD_STREAMS} streams. Memory: Private_* of smaps_rollup in MB, the larger end
(Tencrypt: the agent): before any load, and the most that was seen under it. *First*: from the line `protected` to the first byte
of an answer.
"""


def number(value, digits):
    return "-" if value is None else f"{value:.{digits}f}"


def cells(results, underlay, columns, notes):
    """The rows of a table, as texts; a value that failed, or a row, has the number of its footnote."""
    for row, data in results.rows(underlay).items():
        texts = []
        for _, name, digits in columns:
            if digits is None:
                texts.append(number(results.ratio(underlay, "tcp", row, name), 2))
                continue
            text = number(results.median(underlay, row, name), digits)
            if name in data["failures"]:
                text += f"[{notes.number(row, data['failures'][name])}]"
            texts.append(text)
        marks = [f" [{notes.number(row, data['failures'][what])}]" for what in ("unavailable", "row", "end") if what in data["failures"]]
        if marks or any(text != "-" for text in texts):
            yield data["title"] + "".join(marks), texts


def titles(columns):
    return [title for title, _, _ in columns]


class Notes:
    """Footnotes, each reason of a row once."""

    def __init__(self):
        self.lines = []

    def number(self, row, reason):
        line = f"{row}: {reason}"
        if line not in self.lines:
            self.lines.append(line)
        return self.lines.index(line) + 1


def extra(results, underlay):
    """What one row alone has, as lines."""
    lines = []
    memory, wakeups = (results.median(underlay, "tencrypt-idle", name) for name in ("idle1000", "wakeups"))
    if memory is not None:
        lines.append(f"An agent at rest that knows 1,000 workloads: {memory:.1f} MB private, {number(wakeups, 1)} wake-ups per second.")
    rate, lost, rekeys, sent = (results.median(underlay, "tencrypt-rekey", n) for n in ("rate", "lost", "rekeys", "sent"))
    if rate is not None:
        queues = ", ".join(f"{name} {results.median(underlay, 'tencrypt-rekey', name) or 0:.0f}" for name in ("tenc0", "socket", "backlog"))
        lines.append(f"Numbered UDP stream over {rekeys:.0f} rekeys, {rate:.0f} datagrams per second: lost {lost:.0f} of {sent:.0f}"
                     + (f" (full queues of the kernel: {queues})." if lost else "."))
    return lines


def verdict(goal):
    return "not measured" if goal.met is None else "met" if goal.met else "MISSED"


def terminal(results):
    """Everything as plain text."""
    out = ["Machine"]
    out += [f"  {name:<20} {text}" for name, text in results.document["facts"].items()]
    for underlay in results.underlays():
        notes = Notes()
        for columns in (THROUGHPUT, REST):
            table = list(cells(results, underlay, columns, notes))
            if table:
                out += ["", *aligned(NAMES[underlay], titles(columns), table)]
        out += extra(results, underlay)
        out += [f"  [{n}] {line}" for n, line in enumerate(notes.lines, 1)]
    found = [goal for goal in goals(results) if goal.met is not None]
    left = max((len(goal.text) for goal in found), default=0)
    out += ["", f"Goals ({len(goals(results)) - len(found)} more were not measured in this run)"]
    out += [f"  {verdict(goal):<8}{goal.text:<{left}}  {goal.measured}" for goal in found]
    return "\n".join(out)


def aligned(where, heads, table):
    wide = [max(len(heads[i]), *(len(texts[i]) for _, texts in table)) for i in range(len(heads))]
    left = max(len(where), *(len(title) for title, _ in table))
    return [f"{name:<{left}}" + "".join(f"  {text:>{width}}" for text, width in zip(texts, wide))
            for name, texts in [(where, heads), *table]]


def spread(values, digits):
    """Lowest to highest."""
    return f" ({min(values):.{digits}f}–{max(values):.{digits}f})" if len(values) > 1 else ""


def markdown(results, charts):
    """`RESULTS.md`."""
    settings = results.document["settings"]
    out = ["# Results of the benchmark", "",
           f"Written by `bench/run.sh --write`; {settings['rounds']} interleaved rounds, {settings['seconds']} s per iperf3 run. "
           "Only ratios within one table are fair.", "", "| | |", "|---|---|"]
    out += [f"| {name} | {text} |" for name, text in results.document["facts"].items()]
    for underlay in results.underlays():
        notes = Notes()
        out += ["", f"## {NAMES[underlay]}", ""]
        for file, alt in charts.get(underlay, []):
            out += [f"![{alt}]({file})", ""]
        for columns in (THROUGHPUT, REST):
            out += ["| | " + " | ".join(titles(columns)) + " |", "|---|" + "---:|" * len(columns)]
            out += [f"| {title} | " + " | ".join(texts) + " |" for title, texts in cells(results, underlay, columns, notes)]
            out.append("")
        out += ["", *[f"[{n}] {line}  " for n, line in enumerate(notes.lines, 1)], *[f"{line}  " for line in extra(results, underlay)]]
        out += ["", "Spread of the rounds, median (lowest–highest):", "", "| | TCP 1, Gbit/s | TCP 10, Gbit/s | CPU s/GB | p50, us | p99, us |",
                "|---|---:|---:|---:|---:|---:|"]
        for row, data in results.rows(underlay).items():
            texts = []
            for name, digits in (("tcp1", 2), ("tcp10", 2), ("cpu", 2), ("p50", 1), ("p99", 1)):
                values = results.values(underlay, row, name)
                texts.append(number(median(values), digits) + spread(values, digits) if values else "-")
            out.append(f"| {data['title']} | " + " | ".join(texts) + " |")
    out += ["", "## Goals", "", "| goal | measured | |", "|---|---|---|"]
    out += [f"| {goal.text} | {goal.measured or '-'} | {verdict(goal)} |" for goal in goals(results)]
    out += ["", "## Method", "", METHOD]
    text = "\n".join(out)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text
