"""metrics.jsonl is the truth; Weights & Biases mirrors it, from a thread of its own that training never waits for.

W&B's own variables name what has no flag here (WANDB_ENTITY), and what a flag leaves empty: WANDB_TAGS,
WANDB_RUN_GROUP, WANDB_NOTES. WANDB_LOG_MODEL=false keeps checkpoints here.
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distcnn.config import RunConfig
from distcnn.data.decode import Pixels
from distcnn.outcome import Case, Outcome
from distcnn.runfolder import METRICS, RowFile, cut_rows
from distcnn.state import Position
from distcnn.tensorboard import TensorBoardMirror
from distcnn.text import shown
from distcnn.world import (
    keep_wandb_files_in,
    tensorboard_wanted,
    wandb_key_present,
    wandb_run_id,
    wandb_takes_models,
    wandb_url,
)

FINISH_SECONDS = 60.0
INIT_SECONDS = 30.0
PROBE_SECONDS = 5.0
STAGING = "wandb_files"  # in the run folder: what an offline run's tables and artifacts consist of
MAX_CONFUSION = 100  # classes up to which W&B gets the confusion matrix: its table has a row for each cell


@dataclass(frozen=True)
class Ending:
    """What a finished run hands to W&B besides its rows. `pictures` reads images of the evaluated split by id."""

    outcome: Outcome
    pictures: Callable[[Iterable[int]], Mapping[int, Pixels]] = lambda ids: {}
    checkpoints: Mapping[str, Path] = field(default_factory=dict)  # by what they are: best, latest
    dataset: Mapping[str, Any] = field(default_factory=dict)  # name, fingerprint, ...


class Tracker:
    """Where rank 0 writes its rows. A resumed run continues the same files and the same W&B run."""

    def __init__(
        self,
        run: Path,
        config: RunConfig,
        settings: Mapping[str, Any],
        position: Position,
        wandb_id: str,
        warn: Callable[[str], None],
    ) -> None:
        self._rows = RowFile(run / METRICS, warn)
        # Rows without a place are by somebody else: they stay.
        cut_rows(
            run / METRICS, lambda row: (row.get("epoch", 0), row.get("step", 0)) <= (position.epoch, position.total)
        )
        self._board = TensorBoardMirror(run, settings, position, warn) if tensorboard_wanted() else None
        self._wandb = None
        if config.wandb_mode != "disabled":
            self._wandb = WandbMirror(run, config, settings, wandb_id, warn)

    @property
    def wandb_id(self) -> str:
        return self._wandb.id if self._wandb else ""

    def log(self, row: Mapping[str, Any]) -> None:
        """Add a row; it has `step` and `samples_seen`."""
        self._rows.add(row)
        if self._board:
            self._board.add(row)
        if self._wandb:
            self._wandb.put(dict(row))

    def close(self, summary: Mapping[str, Any] | None = None, ending: Ending | None = None) -> None:
        """Hand the last rows, and of a finished run its ending, to the mirrors; wait for W&B, but not for long."""
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.close(dict(summary or {}), ending)


class WandbMirror:
    """Repeats rows to W&B. Whatever fails there becomes one warning, and training goes on."""

    def __init__(
        self, run: Path, config: RunConfig, settings: Mapping[str, Any], wandb_id: str, warn: Callable[[str], None]
    ) -> None:
        self.id = wandb_id or wandb_run_id() or _new_id()
        self._run, self._config, self._settings, self._warn = run, config, dict(settings), warn
        self._rows: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._summary: dict[str, Any] = {}
        self._ending: Ending | None = None
        self._left = False  # nobody waits for it any more
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def put(self, row: dict[str, Any]) -> None:
        self._rows.put(row)

    def close(self, summary: dict[str, Any], ending: Ending | None = None) -> None:
        self._summary, self._ending = summary, ending
        self._rows.put(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._left = True
            self._warn(f"W&B did not finish within {FINISH_SECONDS:.0f} s; {self._how_to_sync()} uploads the rest")

    def _how_to_sync(self) -> str:
        return f"'wandb sync --include-online {self._run / 'wandb' / '*run-*'}'"

    def _say(self, text: str) -> None:
        """A warning, unless the last one has been given: what comes after it follows from it."""
        if not self._left:
            self._warn(text)

    def _work(self) -> None:
        try:
            tracked = self._begin()
            while (row := self._rows.get()) is not None:
                tracked.log(row)
            if self._ending:
                self._end(tracked, self._ending)
            tracked.summary.update(self._summary)
            tracked.finish()
        except Exception as error:  # W&B is a mirror: nothing that happens there may end a training run
            self._say(f"W&B stopped ({_in_a_line(error)})")

    def _end(self, tracked: Any, ending: Ending) -> None:
        """Evaluation, samples worth a look, data set, checkpoints. What fails here takes nothing else with it."""
        import wandb

        for part in (_log_evaluation, _log_samples, _log_dataset, _log_models):
            try:
                part(wandb, tracked, ending)
            except Exception as error:
                self._say(f"W&B has not all of the run's end ({part.__name__}: {_in_a_line(error)})")

    def _begin(self) -> Any:
        """The W&B run; offline where online cannot be had, with a warning if there was reason to expect it."""
        keep_wandb_files_in(self._run / STAGING)
        import wandb

        trouble = ""
        if self._config.wandb_mode == "online" and wandb_key_present():
            trouble = unreachable(wandb_url())
            if not trouble:
                try:
                    return self._init(wandb, "online")
                except wandb.errors.Error as error:
                    trouble = _in_a_line(error)
                    wandb.teardown()  # its service still holds the id of the run that failed
        if trouble:
            self._say(f"W&B does not answer ({trouble}): offline; {self._how_to_sync()} uploads it later")
        return self._init(wandb, "offline")

    def _init(self, wandb: Any, mode: str) -> Any:
        tracked = wandb.init(
            project=self._config.wandb_project,
            name=self._config.wandb_name or self._run.name,
            tags=list(self._config.wandb_tags) or None,  # None: what W&B's variables say
            group=self._config.wandb_group or None,
            notes=self._config.wandb_notes or None,
            id=self.id,
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=str(self._run),
            config=self._settings,
            settings=wandb.Settings(
                console="off", silent=True, init_timeout=INIT_SECONDS, x_disable_stats=mode != "online"
            ),
        )
        tracked.define_metric("samples_seen")
        tracked.define_metric("*", step_metric="samples_seen")
        return tracked


def _log_evaluation(wandb: Any, tracked: Any, ending: Ending) -> None:
    """Confusion matrix, a table of the classes, reliability diagram, as W&B's own charts."""
    found = ending.outcome
    names = [shown(name) for name in found.classes]
    scores = found.class_scores()
    columns = ["class", "samples", "recall", "recall_low", "recall_high", "precision", "f1"]
    rows = [
        [name, score.samples, score.recall, *score.interval, score.precision, score.f1]
        for name, score in zip(names, scores, strict=True)
    ]
    media = {"evaluation/classes": wandb.Table(columns=columns, data=rows)}
    if found.bins:
        bins = [[total / n, right / n, n] for n, total, right in found.bins if n]
        table = wandb.Table(columns=["confidence", "right", "samples"], data=bins)
        media["evaluation/reliability"] = wandb.plot.line(table, "confidence", "right", title="Reliability")
    if len(names) <= MAX_CONFUSION:
        pairs = [(label, predicted) for label, predicted, count in found.counts for _ in range(count)]
        true, guessed = [label for label, _ in pairs], [predicted for _, predicted in pairs]
        matrix = wandb.plot.confusion_matrix(y_true=true, preds=guessed, class_names=names, title="Confusion matrix")
        media["evaluation/confusion"] = matrix
    tracked.log({"samples_seen": found.samples_seen, **media})


def _log_samples(wandb: Any, tracked: Any, ending: Ending) -> None:
    """The most wrong and the least certain samples with their images."""
    found = ending.outcome
    pictures = ending.pictures([case.id for case in (*found.wrong, *found.unsure)])

    def row(kind: str, case: Case) -> list[Any]:
        image = wandb.Image(pictures[case.id]) if case.id in pictures else None
        names = [
            shown(text) for text in (case.shard, case.key, found.classes[case.label], found.classes[case.predicted])
        ]
        return [kind, image, *names, case.confidence, case.loss]

    columns = ["kind", "image", "shard", "key", "label", "predicted", "confidence", "loss"]
    rows = [row("most wrong", case) for case in found.wrong] + [row("least certain", case) for case in found.unsure]
    if rows:
        table = wandb.Table(columns=columns, data=rows, allow_mixed_types=True)
        tracked.log({"samples_seen": found.samples_seen, "evaluation/samples": table})


def _log_dataset(wandb: Any, tracked: Any, ending: Ending) -> None:
    """The data set by its fingerprint: no image leaves this machine for it."""
    facts = {name: value for name, value in ending.dataset.items() if name != "name"}
    name = _artifact_name(str(ending.dataset.get("name", "data")))
    data = wandb.Artifact(name, type="dataset", metadata=facts)
    with data.new_file("fingerprint.txt") as file:
        file.write(f"{facts.get('fingerprint', '')}\n")
    # Of an offline run W&B takes no inputs: there the data set stands among what it logged.
    tracked.log_artifact(data) if tracked.offline else tracked.use_artifact(data)


def _log_models(wandb: Any, tracked: Any, ending: Ending) -> None:
    """The checkpoints, each once, with what they are as aliases."""
    if not wandb_takes_models():
        return
    aliases: dict[Path, list[str]] = {}
    for alias, folder in sorted(ending.checkpoints.items()):  # best before latest: W&B calls the last one latest
        aliases.setdefault(folder.resolve(), []).append(alias)
    for folder, names in aliases.items():
        about: dict[str, Any] = {"dataset": _artifact_name(str(ending.dataset.get("name", "data")))}
        about |= {"fingerprint": ending.dataset.get("fingerprint"), "checkpoint": folder.name}
        model = wandb.Artifact(f"model-{tracked.id}", type="model", metadata=about)
        for path in sorted(folder.iterdir()):
            model.add_file(str(path), policy="immutable", skip_cache=True)
        tracked.log_artifact(model, aliases=names)


def _artifact_name(name: str) -> str:
    """A name as W&B allows it."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)[:100] or "data"


def unreachable(url: str) -> str:
    """Why a server cannot be used, "" if it answers. W&B itself would try for minutes, even at the end of the run."""
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(url, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError as error:
        return f"{url}: {error}" if error.code >= 500 else ""  # any other answer is one
    except (OSError, ValueError) as error:
        return f"{url}: {getattr(error, 'reason', error)}"
    return ""


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _new_id() -> str:
    import secrets

    return secrets.token_hex(4)
