"""report.html: runs side by side, then what is known of each. Every name on it passes `text`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from PIL import Image

from distcnn.config import flatten
from distcnn.console import duration, percent
from distcnn.outcome import Case, Outcome
from distcnn.page import document, figure, section, table, text, tiles
from distcnn.pictures import uri
from distcnn.plotting import Plot
from distcnn.report.curves import PART_NAMES, PARTS_SHOWN
from distcnn.report.gather import RunFacts, differences, spoken
from distcnn.report.plots import Drawn, draw
from distcnn.report.samples import case_pictures, training_batch
from distcnn.report.summary import advice, commit_of, summary
from distcnn.text import counted
from distcnn.times import LOADING

CONFUSED_SHOWN = 20
CASES_SHOWN = 16
MAX_CLASS_ROWS = 1000


def page(runs: Sequence[RunFacts], drawn: Drawn | None = None) -> str:
    """The whole page as text, with the plots of these runs."""
    drawn = drawn or draw(runs)
    sections = [
        section("In short", _advice(runs) + _summary(runs)),
        section("Settings that differ", _differences(runs)),
        section("Curves", _plots(drawn.curves)),
        section("Speed", _plots(drawn.speed) + _shares(runs)),
    ]
    for run, evaluation, layers in zip(runs, drawn.evaluations, drawn.networks, strict=True):
        where = f" - {text(run.name)}" if len(runs) > 1 else ""
        sections += [
            section(f"Evaluation{where}", _evaluation(run, evaluation)),
            section(f"Samples worth a look{where}", _cases(run)),
            section(f"Network{where}", _network(layers)),
            section(f"A training batch as the network sees it{where}", _batch(run)),
            section(f"Starts{where}", _sessions(run) + _ranks(run)),
            section(f"Settings and environment{where}", _settings(run)),
        ]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return document(title, "report", _head(runs), sections)


def _head(runs: Sequence[RunFacts]) -> str:
    if len(runs) > 1:
        return ""
    (run,) = runs
    top1, loss, wall, pace = run.last_value("val/top1"), run.last_value("val/loss"), run.wall_seconds, run.speed()
    values = [
        (percent(top1) if top1 is not None else "-", "top-1"),
        (f"{loss:.4f}" if loss is not None else "-", "validation loss"),
        (duration(wall) if wall is not None else "-", "wall time"),
        (f"{pace:,.0f}" if pace else "-", "images/s"),
        (run.status.state, "state"),
    ]
    return tiles(values)


def _advice(runs: Sequence[RunFacts]) -> str:
    """What a person should know before the figures."""
    several = len(runs) > 1
    items = [
        f'<li class="{level}">{text(f"{run.name}: {words}" if several else words)}</li>'
        for run in runs
        for level, words in advice(run)
    ]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _summary(runs: Sequence[RunFacts]) -> str:
    columns = [summary(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, *(text(column.get(name, "-")) for column in columns)) for name in names]
    head = [text(run.name) for run in runs] if len(runs) > 1 else [""]
    return _words(("", *head), rows)


def _words(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of words: they break where they have to."""
    return f'<div class="words">{table(headers, rows, words=4)}</div>'


def _differences(runs: Sequence[RunFacts]) -> str:
    if len(runs) < 2:
        return ""
    rows = [(text(name), *map(text, values)) for name, values in differences(runs)]
    if not rows:
        return "<p>None: the runs have the same settings.</p>"
    return _words(("", *(text(run.name) for run in runs)), rows)


def _plots(plots: Iterable[Plot], more: str = "") -> str:
    """`more`: a further class of the style sheet."""
    drawn = "".join(map(figure, plots))
    return f'<div class="plots{more}">{drawn}</div>' if drawn else ""


def _shares(runs: Sequence[RunFacts]) -> str:
    """Mean time shares of the loading, a row a run."""
    shares = [run.shares() for run in runs]
    parts = [part for part in PARTS_SHOWN if any(part in mine for mine in shares)]
    if not parts:
        return ""
    rows = [
        (text(run.name), *(percent(mine[part]) if part in mine else "-" for part in parts))
        for run, mine in zip(runs, shares, strict=True)
    ]
    return (
        table(("loading, in the mean", *parts), rows)
        + "".join(map(_slowest, runs))
        + "".join(map(_rank_times, runs))
        + "<p>wait: the training loop waited for data. read, decode and resize are summed over the threads that do them"
        " and lie within wait where nothing is loaded ahead; what is left of the time is the network and the sums over"
        " processes.</p>"
    )


def _rank_times(run: RunFacts) -> str:
    """Each rank's time in numbers."""
    rows = [
        (str(rank.rank), duration(rank.whole), *(percent(rank.share(part)) for part in (*PART_NAMES, *LOADING)))
        for rank in run.times
    ]
    headers = ("rank", "steps took", *PART_NAMES.values(), *LOADING)
    words = (
        "<p>sums, steps: the backward pass of the rank's last tile, the sums over the ranks with what it waited for"
        " there, and the optimizer. The columns behind it are of threads that load beside the steps. On a GPU these are"
        " the times that the host waited.</p>"
    )
    return _folded(f"{text(run.name)}: time of each rank in numbers", table(headers, rows) + words) if rows else ""


def _slowest(run: RunFacts) -> str:
    """Which rank the others waited for most often."""
    ranks = run.series("perf/slowest_rank")[1].astype(int).tolist()
    if not ranks:
        return ""
    rank, times = Counter(ranks).most_common(1)[0]
    its, others = (run.series(f"perf/{name}_step_seconds")[1] for name in ("slowest", "other"))
    return (
        f"<p>{text(run.name)}: rank {rank} was the slowest in {percent(times / len(ranks))} of the rows; the slowest"
        f" took {its.mean():.3f} s a step by itself in the mean, the median of the others {others.mean():.3f} s.</p>"
    )


def _evaluation(run: RunFacts, plots: Sequence[Plot]) -> str:
    found = run.last
    if found is None:
        return "<p>No evaluation is kept in the run folder yet.</p>"
    images = counted(sum(count for _, _, count in found.counts), "image")
    what = f"After epoch {found.epoch}, on {images} of {text(found.split)}."
    return f"<p>{what}</p>{_plots(plots, ' flow')}{_confused(found)}{_class_table(found)}"


def _confused(found: Outcome) -> str:
    """The errors made most often, by name."""
    rows = [
        (text(found.classes[label]), text(found.classes[predicted]), f"{count:,}")
        for label, predicted, count in found.confused(CONFUSED_SHOWN)
    ]
    if not rows:
        return ""
    return _folded("errors made most often", table(("is", "taken for", "images"), rows, 2))


def _folded(title: str, content: str, opened: bool = False) -> str:
    """What is shown when it is asked for."""
    return f"<details{' open' if opened else ''}><summary>{title}</summary>{content}</details>"


def _class_table(found: Outcome) -> str:
    rows = []
    for score in found.class_scores()[:MAX_CLASS_ROWS]:
        low, high = score.interval
        recall = (percent(score.recall), f"{percent(low)} - {percent(high)}")
        rows.append((text(score.name), f"{score.samples:,}", *recall, percent(score.precision), percent(score.f1)))
    numbers = table(("class", "images", "recall", "95 % interval", "precision", "F1"), rows)
    return _folded(f"{counted(len(found.classes), 'class', 'classes')} in numbers", numbers)


def _cases(run: RunFacts) -> str:
    found = run.last
    if found is None:
        return ""
    pictures = case_pictures(run)
    parts = []
    if not pictures:
        why = run.missing or "those of remote shards are not fetched for it"
        parts.append(f"<p>Pictures are left out: {text(why)}.</p>")
    kinds = (("Most wrong: the highest losses", found.wrong), ("Least certain: the lowest confidences", found.unsure))
    for title, cases in kinds:
        if not cases:
            parts.append(f"<h3>{title}</h3><p>None.</p>")
            continue
        if pictures:
            shown = [_case(case, found, pictures) for case in cases]
            first, more = ("".join(part) for part in (shown[:CASES_SHOWN], shown[CASES_SHOWN:]))
            folded = (
                _folded(f"{len(cases) - CASES_SHOWN} more", f'<div class="sheets cases">{more}</div>') if more else ""
            )
            parts.append(f'<h3>{title}</h3><div class="sheets cases">{first}</div>{folded}')
        else:
            parts.append(f"<h3>{title}</h3>{_case_table(cases, found)}")
    return "".join(parts)


def _case(case: Case, found: Outcome, pictures: Mapping[int, Image.Image]) -> str:
    label, predicted = (text(found.classes[number]) for number in (case.label, case.predicted))
    image = f'<img src="{uri(pictures[case.id])}" alt="{label}">' if case.id in pictures else "<p>unreadable</p>"
    verdict = f"<b>{label}</b>" if case.label == case.predicted else f"<b>{label}</b><br>taken for {predicted}"
    return (
        f"<figure>{image}<figcaption>{verdict}<br>{percent(case.confidence)}, loss {case.loss:.2f}"
        f"<details><summary>name</summary>{text(case.shard)}<br>{text(case.key)}</details></figcaption></figure>"
    )


def _case_table(cases: Sequence[Case], found: Outcome) -> str:
    """The cases by name, where there are no pictures of them."""
    rows = [
        (
            text(found.classes[case.label]),
            text(found.classes[case.predicted]),
            percent(case.confidence),
            f"{case.loss:.2f}",
            f"{text(case.shard)}, {text(case.key)}",
        )
        for case in cases
    ]
    headers = ("is", "taken for", "confidence", "loss", "sample")
    shown, more = (table(headers, part, 2) for part in (rows[:CASES_SHOWN], rows[CASES_SHOWN:]))
    return shown + (_folded(f"{len(rows) - CASES_SHOWN} more", more) if len(rows) > CASES_SHOWN else "")


def _network(found: tuple[Plot, str] | None) -> str:
    return _plots([found[0]]) + found[1] if found else ""


def _batch(run: RunFacts) -> str:
    if run.dataset is None:
        return ""
    classes = run.dataset.classes
    figures = []
    for picture in training_batch(run):
        name = text(classes[picture.label])
        if picture.partner != picture.label and picture.share < 1:
            name = f"{name} {picture.share:.0%}, {text(classes[picture.partner])} {1 - picture.share:.0%}"
        image = f'<img src="{uri(picture.image)}" alt="training input">'
        figures.append(f"<figure>{image}<figcaption>{name}</figcaption></figure>")
    return f'<div class="sheets cases">{"".join(figures)}</div>' if figures else ""


def _sessions(run: RunFacts) -> str:
    """When the run was started, where from, and what was lost in between."""
    rows = []
    for number, session in enumerate(run.sessions):
        lost = session.lost(run.sessions[number + 1]) if number + 1 < len(run.sessions) else 0
        reached = "-" if session.reached is None else f"{session.reached:,}"
        rows.append(
            (
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(session.begin)),
                text(session.host),
                f"{session.step:,}",
                reached,
                "?" if lost is None else f"{lost:,}",
                duration(max(session.end - session.begin, 0)) if session.end else "-",
                f"{session.world_size:,}",
                text(commit_of(session.facts)),
            )
        )
    headers = ("started", "host", "from step", "reached", "steps lost", "lasted", "processes", "commit")
    return table(headers, rows, 2) if rows else ""


def _ranks(run: RunFacts) -> str:
    """What each rank said last."""
    rows = [
        (
            str(beat.rank),
            text(beat.host),
            text(beat.phase),
            f"{beat.total:,}",
            f"{beat.phase_seconds:,.1f} s",
            duration(beat.age_seconds),
            text(beat.error) or "-",
        )
        for beat in run.beats
    ]
    headers = ("rank", "host", "last phase", "step", "in it for", "heard of", "error")
    opened = len(rows) <= 8 and run.status.state in ("running", "dead", "failed")
    return _folded(f"{counted(len(rows), 'rank')}, last signs of life", table(headers, rows, 3), opened) if rows else ""


def _settings(run: RunFacts) -> str:
    machine = run.machine
    facts = {"hardware": machine.get("hardware"), "compute threads": machine.get("compute_threads")}
    facts |= dict(machine.get("versions") or {}) | {"commit": commit_of(machine)}
    known = [(text(str(name)), text(str(value))) for name, value in facts.items() if value is not None]
    settings = [(text(name), text(spoken(value))) for name, value in flatten(run.config).items()]
    return _words(("", ""), known) + _folded(f"all {len(settings)} settings", _words(("", ""), settings))
