"""What is left of a verification: a table for the person, verify.json, and a one-page certificate. No torch."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text

from distcnn.files import write_atomically
from distcnn.verify.result import Result, among, plural

REPORT, CERTIFICATE = "verify.json", "certificate.html"
REPORT_VERSION = 1
SAMENESS = {"order", "pixels", "gradients", "accumulation", "schedule"}  # what a run consists of
_MARKS = {"pass": ("✓", "green"), "fail": ("✗", "red"), "skip": ("○", "yellow")}


@dataclass(frozen=True)
class Report:
    """All that was found. `facts`: what was verified, as words, in the order in which they are shown."""

    results: Sequence[Result]
    processes: Sequence[int]
    facts: Mapping[str, str]
    config: Mapping[str, Any]
    runs: Sequence[Mapping[str, Any]]
    seconds: float
    exact: bool = True  # whether equal bits were demanded of all numbers of processes
    made: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M %Z"))

    @property
    def passed(self) -> bool:
        return not any(result.problems for result in self.results)

    @property
    def headline(self) -> str:
        """The verdict in a sentence."""
        checks = [result for result in self.results if result.name != "runs"]
        failed = [result.title for result in checks if result.problems]
        if failed:
            return f"{plural(len(failed), 'check')} of {len(checks)} failed: {', '.join(failed)}"
        if not self.passed:
            return "a run failed"
        made = sum(not result.skipped for result in checks)
        passed = "1 check passed" if made == 1 else f"all {made} checks passed"
        return f"{passed}, on {among(self.processes)} process{'' if self.processes == (1,) else 'es'}"

    @property
    def verdict(self) -> str:
        """What that means: "The same run" only if all was compared that makes it one."""
        names = {result.name for result in self.results if not result.skipped}
        bad = {result.name for result in self.results if result.problems}
        if bad:
            return "A check failed" if bad <= {"precision", "overfit", "finite"} else "Not the same run"
        if names >= SAMENESS and len(self.processes) > 1:
            return "The same run" if self.exact else "The same run, up to rounding"
        return "Passed"


def print_table(report: Report) -> None:
    """The checks with their figures; below, what is wrong and why."""
    console = RichConsole(highlight=False)
    table = Table(title=f"distcnn verify: {report.headline}", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("check", style="cyan")
    table.add_column("measured", overflow="fold")
    table.add_column("demanded", overflow="fold", style="dim")
    for result in report.results:
        mark, colour = _MARKS[result.verdict]
        measured = result.measured or result.skipped
        table.add_row(Text(mark, style=f"bold {colour}"), result.name, Text(measured), Text(result.demanded))
    console.print(table)
    for result in report.results:
        for problem in result.problems:
            console.print(Text(f"✗ {result.name}: {problem}", style="red"), soft_wrap=True)
        if result.skipped:
            console.print(Text(f"○ {result.name}: not checked: {result.skipped}"), soft_wrap=True)


def write_report(report: Report, folder: Path) -> None:
    """verify.json and certificate.html. Raises OSError."""
    document = {
        "version": REPORT_VERSION,
        "passed": report.passed,
        "verdict": report.verdict,
        "headline": report.headline,
        "made": report.made,
        "wall_seconds": round(report.seconds, 1),
        "processes": list(report.processes),
        "checks": [asdict(result) | {"verdict": result.verdict} for result in report.results],
        "facts": dict(report.facts),
        "config": dict(report.config),
        "runs": list(report.runs),
    }
    text = json.dumps(_finite(document), indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / REPORT, text.encode("utf-8", "backslashreplace"))
    write_atomically(folder / CERTIFICATE, render(report).encode("utf-8", "xmlcharrefreplace"))


def _finite(value: Any) -> Any:
    """The same with NaN and infinities, which JSON has not, as text."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value


def render(report: Report) -> str:
    """The certificate: one HTML page that needs nothing else."""
    rows = "\n".join(_row(result) for result in report.results)
    facts = "\n".join(f"<dt>{_safe(name)}</dt><dd>{_safe(value)}</dd>" for name, value in report.facts.items())
    state = "pass" if report.passed else "fail"
    return _PAGE.format(
        state=state,
        style=_STYLE,
        verdict=_safe(report.verdict),
        headline=_safe(report.headline[0].upper() + report.headline[1:]),
        made=_safe(report.made),
        rows=rows,
        facts=facts,
    )


def _row(result: Result) -> str:
    mark = _MARKS[result.verdict][0]
    word = {"pass": "passed", "fail": "failed", "skip": "not checked"}[result.verdict]
    notes = [*result.problems, *([result.skipped] if result.skipped else [])]
    below = "".join(f"<p class=why>{_safe(note)}</p>" for note in notes)
    demanded = f"<p class=demanded>{_safe(result.demanded)}</p>" if result.demanded else ""
    return (
        f'<tr class={result.verdict}><td class=mark><span title="{word}" aria-label="{word}">{mark}</span></td>'
        f"<th scope=row>{_safe(result.title)}{demanded}</th><td>{_safe(result.measured)}{below}</td></tr>"
    )


def _safe(text: str) -> str:
    return html.escape(text)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{verdict} · distcnn verify</title><style>{style}</style></head>
<body class="{state}"><main>
<header><p class="over">distcnn verify</p><h1>{verdict}</h1><p class="lead">{headline}.</p></header>
<table><thead><tr><th></th><th>Check and demand</th><th>Measured</th></tr></thead><tbody>
{rows}
</tbody></table>
<h2>What was verified</h2><dl>
{facts}
</dl>
<p class="how">Short runs of the real trainer were started as real processes on a sample of the data. Their samples,
pixels, gradients and weights were compared with each other and with plain loops that share none of the trainer's sums.
Figures such as 4.6e-08 are relative differences. It holds for this config, this machine and these versions. {made}.</p>
</main></body></html>
"""

_STYLE = """
:root{--ink:#1b1f24;--soft:#5b6470;--line:#d9dee4;--paper:#fff;--back:#f4f5f7;--good:#11733b;--bad:#b3261e;--skip:#8a6100}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#a3abb5;--line:#343a42;--paper:#1a1d21;--back:#111316;
--good:#5ecb8c;--bad:#ff8a80;--skip:#e3b341}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:16px/1.5 system-ui,"Segoe UI",Roboto,sans-serif}
main{max-width:58rem;margin:2rem auto;padding:2rem 2.5rem;background:var(--paper);border:1px solid var(--line);
border-top:6px solid var(--good);border-radius:6px}
.fail main{border-top-color:var(--bad)}
.over{margin:0;color:var(--soft);letter-spacing:.04em}
h1{margin:.1rem 0;font-size:2rem;line-height:1.2;color:var(--good)} .fail h1{color:var(--bad)}
h2{margin:2rem 0 .5rem;font-size:1.1rem}
.lead{margin:.2rem 0 1.5rem;font-size:1.1rem}
table{width:100%;border-collapse:collapse}
th,td{padding:.55rem .6rem;text-align:left;vertical-align:top;border-top:1px solid var(--line);overflow-wrap:anywhere}
thead th{border-top:0;font-size:.85rem;font-weight:500;color:var(--soft)}
tbody th{width:38%;font-weight:600}
.mark{width:2rem;font-weight:700;color:var(--good)} .fail .mark{color:var(--bad)}
tr.pass .mark{color:var(--good)} tr.fail .mark{color:var(--bad)} tr.skip .mark{color:var(--skip)}
.demanded{margin:0;font-size:.85rem;font-weight:400;color:var(--soft)}
.why{margin:.3rem 0 0;color:var(--bad)} tr.skip .why{color:var(--skip)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1.2rem;margin:0}
dt{color:var(--soft)} dd{margin:0;overflow-wrap:anywhere}
.how{margin:2rem 0 0;font-size:.9rem;color:var(--soft)}
@media(max-width:40rem){main{margin:0;padding:1.2rem 1rem;border-left:0;border-right:0;border-radius:0}
thead{display:none} tr{display:grid;grid-template-columns:2rem 1fr;border-top:1px solid var(--line)}
th,td{border:0;padding:.5rem .3rem} tbody th{width:auto;padding-bottom:0}
tbody td:last-child{grid-column:2;padding-top:.1rem}
dl{grid-template-columns:1fr;gap:0} dd{margin-bottom:.5rem}}
@media print{body{background:none;font-size:12px} main{border:0;margin:0;padding:0;max-width:none}
h2,.lead{margin:.8rem 0 .3rem}}
"""
