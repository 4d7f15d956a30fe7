"""Prove on your own config, data and model that training is the same run on any number of processes.

Takes the flags of train. Short runs of the real trainer are started as real processes, on the CPU and on a sample of
your images, and compared with each other and with plain loops. Leaves verify.json and certificate.html in --output
(runs/verify-...). Exit code 1 if a check fails. Your run folders are not touched.

  order         every sample once, in the order and the ledger; the same tiles on any number of processes
  pixels        the same augmented pixels, whichever process or thread makes them
  gradients     N processes against 1 (to the bit with --reduction tree), and against a plain loop
  batchnorm     running statistics: the mean over all tiles of all processes
  accumulation  the ragged last step: the gradient of the mean over its samples
  schedule      the learning rate of each step
  resume        kill -9 in the middle of an epoch, then resume: the bits of the run that was not stopped
  evaluation    every sample once, and the counts of a plain loop
  precision     bf16 against float32
  overfit       one small batch trained to a loss near zero
  finite        no loss, gradient or weight that is not finite

Begin with: distcnn verify     One check on two processes: distcnn verify --only gradients --processes 1,2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from distcnn.config import TrainConfig, load_toml, take_config
from distcnn.errors import EXIT_FAILED, UserError
from distcnn.flags import parse as parse_flags
from distcnn.verify.plan import CheckName
from distcnn.world import read_world


@dataclass(frozen=True)
class Options:
    """What to verify, and the flags of train."""

    only: tuple[CheckName, ...] = ()
    """Make these checks only (default: all)"""
    processes: str = ""
    """Numbers of processes to compare, with commas (default: 1,2,4 as far as there are lanes)"""
    steps: int = 4
    """Steps of an epoch of the short runs; the last is ragged. Each run has two epochs"""
    config: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"--steps {self.steps}: must be >= 1")


def parse(argv: Sequence[str]) -> Options:
    """The options of the flags, over --config FILE.toml."""
    rest, file = take_config(list(argv))
    base = Options(config=load_toml(file) if file else TrainConfig())
    options: Options = parse_flags(Options, rest, "distcnn verify", __doc__, default=base)
    return options


def run(options: Options) -> int:
    """Verify; 0 if nothing failed, 1 if a check did."""
    if read_world().size > 1:
        raise UserError("start verify once, without torchrun or srun: it starts the processes itself")

    from distcnn.console import Console, duration
    from distcnn.verify.plan import CHECKS
    from distcnn.verify.report import CERTIFICATE, print_table
    from distcnn.verify.verify import Request, output_of, verify

    chosen = tuple(name for name in CHECKS if not options.only or name in options.only)
    console = Console(True, options.config.run.quiet)
    report = verify(Request(options.config, chosen, options.processes, options.steps), console)
    if not options.config.run.quiet or not report.passed:
        print_table(report)
    console.say(f"{output_of(options.config) / CERTIFICATE}  ({duration(report.seconds)})")
    return 0 if report.passed else EXIT_FAILED
