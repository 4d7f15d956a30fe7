"""The command line: parse, build, run, close. No logic lives here, and no torch until a command needs it."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence

from distcnn.errors import EXIT_USAGE, UserError, nearest
from distcnn.world import read_world

# command -> what it does. Each is a module distcnn.commands.<command> (tune-lr: tune_lr) with `Options` (what the flags
# mean; imports nothing heavy) and `run(options) -> exit code`.
COMMANDS = {
    "prepare": "make shards of images: folder, CSV, arrays, digits ...",
    "index": "make a data set of shards that others wrote",
    "inspect": "see a data set: classes, sizes, duplicates, leaks",
    "describe": "see a network: layers, parameters, receptive field",
    "train": "train a CNN (what train.py does)",
    "report": "a page of a run, or of several side by side",
    "evaluate": "exact metrics of a checkpoint; compare two",
    "predict": "classes of new images, as a table",
    "explain": "why an image gets its class: filters, maps, Grad-CAM",
    "export": "a checkpoint as TorchScript, ONNX, exported program or safetensors",
    "verify": "prove on your own config that it is the same run",
    "tune-lr": "find a learning rate by a range test on your config",
    "tune-tile": "measure speed and memory by tile size",
    "plan": "see what a run will be on a cluster: shares, memory, time",
    "doctor": "see whether this machine is ready",
    "status": "see how runs stand: live or dead, how far, until when",
    "replay": "compute a step again that was not finite",
    "submit": "check a training run and hand it to SLURM",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `distcnn COMMAND FLAGS`; returns the exit code. Bad input is one line on stderr and exit code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if words else EXIT_USAGE
    if words[0] == "--version":
        print(f"distcnn {importlib.import_module('distcnn').__version__}")
        return 0
    name, rest = words[0], words[1:]
    try:
        if name not in COMMANDS:
            raise UserError(f"no command {name!r}{nearest(name, COMMANDS)} (distcnn --help lists them)")
        command = importlib.import_module(f"distcnn.commands.{name.replace('-', '_')}")
        flags = importlib.import_module("distcnn.flags")
        parse = getattr(command, "parse", None)  # a command with a way of its own, such as train's --config
        options = parse(rest) if parse else flags.parse(command.Options, rest, f"distcnn {name}", command.__doc__)
        return int(command.run(options))
    except UserError as error:
        if error.speaks or not others_speak():
            print(f"distcnn {name}: error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of a pipe (head, say) has seen enough
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - what is left goes nowhere
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"distcnn {name}: error: cannot write{where}: {error.strerror}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return 130


def others_speak() -> bool:
    """Whether rank 0 says it: of many processes with the same error, one line is enough."""
    try:
        return not read_world().is_main
    except UserError:
        return False


def _overview() -> str:
    rows = "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items())
    return (
        "distcnn: CNN image classifiers on one CPU, many GPUs and SLURM clusters, as the same run\n\n"
        f"usage: distcnn COMMAND [flags]\n\n{rows}\n\n"
        "distcnn COMMAND --help explains one. Begin with: distcnn train"
    )


if __name__ == "__main__":
    sys.exit(main())
