"""What `distcnn verify` runs: which checks, on which short runs, in how many processes. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from distcnn.config import TrainConfig, from_flat, to_toml
from distcnn.data.order import Geometry
from distcnn.errors import UserError

CheckName = Literal[
    "order",
    "pixels",
    "gradients",
    "batchnorm",
    "accumulation",
    "schedule",
    "resume",
    "evaluation",
    "precision",
    "overfit",
    "finite",
]
CHECKS: tuple[CheckName, ...] = get_args(CheckName)
USUAL_PROCESSES = (1, 2, 4)
EPOCHS = 2
VAL_TILES = 4.5  # of an evaluation: several for each process, the last one not full


@dataclass(frozen=True)
class Run:
    """One short run of the trainer. `keep`: steps before which weights and after which gradients are kept as files.

    kill_at: the step in which every process kills itself with SIGKILL, -1 for none. after: the run that comes before
    it in the same run folder.
    """

    name: str
    processes: int
    config: TrainConfig
    trace: Path
    keep: tuple[int, ...] = ()
    kill_at: int = -1
    after: str = ""
    task: Literal["train", "overfit"] = "train"

    def write(self) -> Path:
        """Write what the worker reads; returns the file."""
        self.trace.mkdir(parents=True)
        toml = self.trace / "config.toml"
        toml.write_text(to_toml(self.config), encoding="utf-8")
        spec = self.trace / "run.json"
        facts = {
            "processes": self.processes,
            "config": str(toml),
            "trace": str(self.trace),
            "keep": list(self.keep),
            "kill_at": self.kill_at,
            "task": self.task,
        }
        spec.write_text(json.dumps(facts) + "\n", encoding="utf-8")
        return spec


def choose_processes(text: str, geometry: Geometry) -> tuple[int, ...]:
    """The numbers of processes in "1,2,4", 1 among them; of "" the usual ones that there are lanes for.

    Raises UserError for what is no list of numbers, or more than there are lanes.
    """
    if not text:
        return tuple(n for n in USUAL_PROCESSES if n <= geometry.lanes)
    try:
        numbers = sorted({1, *(int(word) for word in text.split(","))})
    except ValueError:
        raise UserError(f"--processes {text}: give numbers with commas, such as 1,2,4") from None
    if numbers[0] < 1:
        raise UserError(f"--processes {text}: must be >= 1")
    try:
        geometry.lanes_of(0, numbers[-1])
    except ValueError as error:
        raise UserError(f"--processes {text}: {error}") from None
    return tuple(numbers)


def exact(config: TrainConfig, processes: int) -> bool:
    """Whether this number of processes promises the bits of one: whole subtrees of the lanes for each process."""
    share, rest = divmod(config.geometry.lanes, processes)
    return config.run.reduction == "tree" and not rest and not share & (share - 1)


def short_config(config: TrainConfig, data: Path, output: Path) -> TrainConfig:
    """`config` on the small data set, on the CPU, for EPOCHS epochs, with every step logged and nothing sent away.

    What decides a step's numbers stays: model, batch, tiles, augmentation, optimizer, seed, reduction. fp16 becomes
    no mixed precision, since there is none on a CPU.
    """
    half = config.run.mixed_precision
    changes = {
        "data": str(data),
        "output": str(output),
        "epochs": EPOCHS,
        "warmup_epochs": min(config.optim.warmup_epochs, 1.0),
        "device": "cpu",
        "mixed_precision": "no" if half == "fp16" else half,
        "compile": False,
        "threads": config.run.threads or 1,
        "resume": "auto",
        "eval_every": 1,
        "log_every": 1,
        "checkpoint_every": 0,
        "checkpoint_minutes": 0.0,
        "time_limit": 0.0,
        "keep_checkpoints": 1,
        "wandb_mode": "disabled",
        "quiet": True,
    }
    return from_flat(changes, "verify", base=config)


def plan_runs(
    config: TrainConfig, checks: tuple[CheckName, ...], processes: tuple[int, ...], steps: int, folder: Path
) -> list[Run]:
    """The runs that `checks` need. `config` is a short one with `steps` steps an epoch."""

    def run(name: str, count: int, changes: dict[str, object], **more: object) -> Run:
        changes = {"output": str(folder / "runs" / str(changes.pop("folder", name))), **changes}
        return Run(name, count, from_flat(changes, "verify", base=config), folder / name, **more)  # type: ignore[arg-type]

    keep = tuple(sorted({0, steps - 1}))
    compared = set(checks) - {"overfit", "precision", "resume", "finite"} or set(checks) == {"finite"}
    needed = set(processes) if compared else {1} if "precision" in checks else set()
    runs = []
    if "resume" in checks:
        most = processes[-1]
        back = 1 if exact(config, most) else most
        needed.add(back)
        every = max(steps // 2, 1)
        saved: dict[str, object] = {"folder": "killed", "checkpoint_every": every}
        runs.append(run("killed", most, saved.copy(), kill_at=min(every + 1, max(steps - 1, 1))))
        runs.append(run("resumed", back, saved.copy(), after="killed"))
    runs += [run(str(count), count, {}, keep=keep) for count in sorted(needed)]
    if "precision" in checks:
        other = "no" if config.run.mixed_precision == "bf16" else "bf16"
        runs.append(run("precision", 1, {"mixed_precision": other}))
    if "overfit" in checks:
        plain = ("mixup", "cutmix", "label_smoothing", "dropout", "ema_decay")
        changes: dict[str, object] = {**dict.fromkeys(plain, 0.0), "lookahead": 0, "distill": ""}
        runs.append(run("overfit", 1, changes, task="overfit"))
    return runs
