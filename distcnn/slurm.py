"""SLURM's own commands, called and read: sbatch, scontrol, squeue."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from distcnn.errors import UserError

SECONDS = 30  # for an answer of SLURM


def present() -> bool:
    """Whether this machine can submit jobs."""
    return shutil.which("sbatch") is not None


def sbatch(script: Path, after: Sequence[str] = ()) -> str:
    """Submit a script; returns the job id. `after`: ids of jobs that must succeed first. Raises UserError."""
    if not present():
        raise UserError("sbatch is not here: submit on a login node of the cluster, or look with --dry-run")
    depends = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    code, out, err = _call(["sbatch", "--parsable", *depends, str(script)])
    number = out.strip().split(";")[0]  # "123;cluster" on federated ones
    if code or not number.isdigit():
        raise UserError(f"sbatch refused {script}: {' '.join(err.split()) or out.strip() or f'exit code {code}'}")
    return number


def job_facts(job: str) -> dict[str, str]:
    """What `scontrol show job` says of a job (the last start of it), {} if SLURM has forgotten it or is not here."""
    if not present():
        return {}
    code, out, _ = _call(["scontrol", "show", "job", "--oneliner", job])
    return {} if code else dict(re.findall(r"(?:^|\s)([A-Z][A-Za-z/:]*)=(\S*)", out.splitlines()[0] if out else ""))


def _call(words: list[str]) -> tuple[int, str, str]:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, "", f"{words[0]} does not answer ({type(error).__name__})"
    return done.returncode, done.stdout, done.stderr
