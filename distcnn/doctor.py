"""Is this machine ready? Checks that take seconds, each with what to do about it. See commands/doctor.py."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from distcnn import slurm
from distcnn.errors import UserError
from distcnn.network import address_towards, interface_of

MIB = 1 << 20
PROBE_BYTES = 64 * MIB  # written and read to measure a disk
SLOW_DISK = 100 * MIB  # a second
SLOW_SYNC_SECONDS = 0.2
MOST_SKEW_SECONDS = 2.0
SHM_BYTES = 64 * MIB  # a process: NCCL's buffers
OPEN_FILES = 1024


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and (unless all is well) what to do."""

    level: Literal["ok", "warn", "fail"]
    what: str
    found: str
    advice: str = ""

    def __post_init__(self) -> None:
        if (self.level == "ok") == bool(self.advice):
            raise ValueError(f"{self}: advice belongs to what is not ok, and only to that")

    def line(self) -> str:
        return f"{self.level:<4}  {self.what:<12} {self.found}" + (f": {self.advice}" if self.advice else "")


@dataclass(frozen=True)
class Question:
    """What is asked. `processes`: of this machine; `host`: NAME or NAME:PORT where the ranks shall meet, or ""."""

    data: Path
    output: Path
    processes: int = 1
    host: str = ""


def examine(question: Question) -> Iterator[Finding]:
    """All checks; one that breaks is a finding, too."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        check_versions,
        check_numba,
        check_turbojpeg,
        check_gpus,
        lambda: check_cores(question.processes, len(os.sched_getaffinity(0))),
        lambda: check_shared_memory(question.processes, Path("/dev/shm")),
        lambda: check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)),
        lambda: check_data(question.data),
        lambda: check_output(question.output),
        check_wandb,
        check_slurm,
        lambda: check_host(question.host),
    ]
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # a check that breaks must not hide the others
            yield Finding("fail", "doctor", f"a check broke ({type(error).__name__}: {error})", "please report it")


def check_versions() -> Iterator[Finding]:
    """torch, and a torchvision that fits it."""
    import torch

    from distcnn.models import torchvision_models

    found = f"{torch.__version__}, Python {platform.python_version()}"
    yield Finding("ok", "torch", found)
    try:
        torchvision_models()
    except UserError as error:
        yield Finding("fail", "torchvision", "does not fit torch", str(error))
    else:
        import torchvision

        yield Finding("ok", "torchvision", str(torchvision.__version__))


def check_numba() -> Iterator[Finding]:
    """Whether the kernels that Numba compiles can be used."""
    from distcnn.data.resize import upscale_kernel
    from distcnn.pixels import finish_kernel

    try:
        found = version("numba")
    except PackageNotFoundError:
        advice = "install distcnn[fast]: small images are cropped in half the time, the pixels are the same"
        yield Finding("warn", "numba", "is not installed", advice)
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        usable = [kernel() is not None for kernel in (upscale_kernel, finish_kernel)]
    if all(usable):
        yield Finding("ok", "numba", f"{found}, its kernels give the bits of torch")
    else:
        why = str(said[-1].message) if said else "NUMBA_DISABLE_JIT is set"
        yield Finding("warn", "numba", f"{found}: {why}", "nothing is wrong but speed: try its newest version")


def check_turbojpeg() -> Iterator[Finding]:
    """Whether JPEG files can be decoded without the interpreter."""
    from distcnn.data import turbojpeg

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found, usable = turbojpeg.libturbojpeg(), turbojpeg.make_decoder() is not None
    if usable:
        yield Finding("ok", "libturbojpeg", "its pixels are those of simplejpeg")
    elif found is None:
        advice = "apt-get install libturbojpeg0: small images load up to twice as fast, the pixels are the same"
        yield Finding("warn", "libturbojpeg", f"there is no {turbojpeg.SONAME}", advice)
    else:
        why = str(said[-1].message) if said else "is there, but Numba is not"
        yield Finding("warn", "libturbojpeg", why, "nothing is wrong but speed: see numba above")


def check_gpus() -> Iterator[Finding]:
    """Driver, CUDA, NCCL, each GPU, bf16, and how the GPUs reach each other."""
    import torch

    driver = _said(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]).splitlines()
    if not torch.cuda.is_available():
        if driver:
            what = "this torch is built without CUDA" if torch.version.cuda is None else "CUDA does not start"
            advice = "install torch from PyPI's CUDA wheels, and check CUDA_VISIBLE_DEVICES and the driver's version"
            yield Finding("fail", "GPU", f"the driver sees {len(driver)}, but {what}", advice)
        else:
            yield Finding("ok", "GPU", "none: training runs on the CPU")
        yield _cpu_bf16(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace"))
        return
    count = torch.cuda.device_count()
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    yield Finding("ok", "GPU", f"{count}, CUDA {torch.version.cuda}, NCCL {nccl}")
    for number in range(count):
        facts = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        text = f"{facts.name}, {total / 2**30:.0f} GiB, {free / 2**30:.0f} GiB free"
        if free < 0.9 * total:
            yield Finding("warn", f"GPU {number}", text, "another process uses it: nvidia-smi names it")
        else:
            yield Finding("ok", f"GPU {number}", text)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("ok", "bf16", "--mixed-precision bf16 is fast here")
    else:
        yield Finding("warn", "bf16", "these GPUs do not compute in bf16", "use --mixed-precision fp16, or no")
    if count > 1:
        yield _topology(count, _said(["nvidia-smi", "topo", "--matrix"]))


def _topology(count: int, matrix: str) -> Finding:
    import torch

    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    direct = sum(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
    links = sorted(set(re.findall(r"\b(NV\d+|PIX|PXB|PHB|NODE|SYS)\b", matrix.split("Legend")[0])))
    text = f"{direct} of {len(pairs)} pairs of GPUs reach each other directly ({', '.join(links) or 'links unknown'})"
    if direct < len(pairs):
        return Finding("warn", "topology", text, "the others go through the host: check IOMMU/ACS, or expect less")
    return Finding("ok", "topology", text)


def _cpu_bf16(cpuinfo: str) -> Finding:
    if re.search(r"\b(amx_bf16|avx512_bf16)\b", cpuinfo):
        return Finding("ok", "bf16", "this CPU computes in bf16")
    return Finding("warn", "bf16", "this CPU does not compute in bf16", "leave --mixed-precision at no")


def check_cores(processes: int, cores: int) -> Iterator[Finding]:
    """Compute and decode threads need cores of their own."""
    text = f"{cores} for {processes} process{'es' * (processes > 1)}"
    if cores < processes:
        yield Finding("warn", "cores", text, "processes will wait for each other: fewer of them, or --cpus-per-rank")
    else:
        yield Finding("ok", "cores", f"{text}, {cores // processes} each")


def check_shared_memory(processes: int, folder: Path) -> Iterator[Finding]:
    """NCCL's processes on one machine talk through /dev/shm."""
    if not folder.is_dir():
        yield Finding("warn", "/dev/shm", "is missing", "mount it (containers: --shm-size or --ipc=host)")
        return
    free = shutil.disk_usage(folder).free
    if free < processes * SHM_BYTES:
        advice = f"{processes * SHM_BYTES // MIB} MiB would do (containers: --shm-size=1g or --ipc=host)"
        yield Finding("warn", "/dev/shm", f"{free // MIB} MiB free", advice)
    else:
        yield Finding("ok", "/dev/shm", f"{free / 2**30:.1f} GiB free")


def check_open_files(limits: tuple[int, int]) -> Iterator[Finding]:
    """Shards, sockets and libraries are open files."""
    soft, hard = limits
    if 0 <= soft < OPEN_FILES:
        advice = f"ulimit -n {OPEN_FILES if hard < 0 else min(hard, OPEN_FILES)} (the hard limit is {hard})"
        yield Finding("warn", "open files", f"at most {soft}", advice)
    else:
        yield Finding("ok", "open files", "no limit" if soft < 0 else f"at most {soft:,}")


def check_data(root: Path) -> Iterator[Finding]:
    """The data set can be read, and how fast its first shard comes from the disk."""
    from distcnn.data.manifest import load_manifest

    if not root.exists():
        yield Finding("warn", "data", f"{root} is not there", "--data DIR; or make it: distcnn prepare")
        return
    try:
        manifest = load_manifest(root)
    except UserError as error:
        yield Finding("fail", "data", "cannot be read", str(error))
        return
    shards = [shard for split in manifest.splits.values() for shard in split.shards if "://" not in shard.name]
    missing = [shard.name for shard in shards if not (root / shard.name).is_file()]
    if missing:
        yield Finding("fail", "data", f"{len(missing)} shards are missing", f"{root / missing[0]} is the first")
    elif shards:
        largest = max(shards, key=lambda shard: shard.bytes)
        yield _read_speed(root / largest.name)


def _read_speed(path: Path) -> Finding:
    """How fast a file comes from the disk: it is dropped from the page cache first, where the kernel agrees."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begun, size = time.perf_counter(), 0
        while size < PROBE_BYTES and (part := file.read(4 * MIB)):
            size += len(part)
        speed = size / max(time.perf_counter() - begun, 1e-9)
    text = f"{path.name} is read at {speed / MIB:,.0f} MiB/s"
    if speed < SLOW_DISK and size > MIB:
        return Finding("warn", "data", text, "copy the set to a disk of the node, or expect to wait for it")
    return Finding("ok", "data", text)


def check_output(folder: Path) -> Iterator[Finding]:
    """The folder of the runs can be written, how fast, and whether its clock is ours."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".distcnn-doctor-") as file:
            begun = time.perf_counter()
            for _ in range(PROBE_BYTES // (4 * MIB)):
                file.write(bytes(4 * MIB))
            file.flush()
            os.fsync(file.fileno())
            speed = PROBE_BYTES / (time.perf_counter() - begun)
            begun, clock = time.perf_counter(), time.time()
            os.utime(file.fileno())
            os.fsync(file.fileno())
            sync, skew = time.perf_counter() - begun, Path(file.name).stat().st_mtime - clock
    except OSError as error:
        yield Finding(
            "fail", "runs", f"{place} cannot be written ({error.strerror or error})", "--output DIR elsewhere"
        )
        return
    free = shutil.disk_usage(place).free
    text = f"{place} is written at {speed / MIB:,.0f} MiB/s, {free / 2**30:,.0f} GiB free, fsync {sync * 1000:.0f} ms"
    if free < 1 << 30:
        yield Finding("warn", "runs", text, "make room: checkpoints that do not fit are left out")
    elif speed < SLOW_DISK or sync > SLOW_SYNC_SECONDS:
        yield Finding("warn", "runs", text, "save less often (--eval-every, --checkpoint-every)")
    else:
        yield Finding("ok", "runs", text)
    if abs(skew) > MOST_SKEW_SECONDS:
        advice = "start NTP or chrony on both; times in logs will not agree"
        yield Finding("warn", "clock", f"differs by {skew:+.1f} s from that of {place}", advice)
    else:
        yield Finding("ok", "clock", f"agrees with that of {place}")


def check_wandb() -> Iterator[Finding]:
    """Whether W&B would be online."""
    from distcnn.world import wandb_key_present

    if wandb_key_present():
        yield Finding("ok", "W&B", "a key is there: runs are online")
    else:
        yield Finding("warn", "W&B", "no key: runs are kept offline", "'wandb login', or --wandb-mode disabled")


def check_slurm() -> Iterator[Finding]:
    """Whether jobs can be submitted from here."""
    if not slurm.present():
        yield Finding("ok", "SLURM", "not on this machine")
        return
    partitions = _said(["sinfo", "--noheader", "--format=%R %D nodes %G"]).splitlines()
    if partitions:
        text = f"{_said(['sbatch', '--version'])}; {'; '.join(partitions[:4])}"
        yield Finding("ok", "SLURM", text + (" ..." if len(partitions) > 4 else ""))
    else:
        yield Finding(
            "warn", "SLURM", "its commands are here, but it does not answer", "is slurmctld up? scontrol ping"
        )


def check_host(host: str) -> Iterator[Finding]:
    """Whether this machine's name serves other machines, and whether the ranks' meeting place can be reached."""
    name = socket.gethostname()
    try:
        own = socket.gethostbyname(name)
    except OSError:
        yield Finding("warn", "host name", f"{name} has no address", "several nodes: an entry in DNS or /etc/hosts")
    else:
        loop = own.startswith("127.")
        note = " (loopback: launch/node.sh tells gloo and NCCL the interface that leads to the others)" if loop else ""
        yield Finding("ok", "host name", f"{name} is {own}{note}")
    if not host:
        return
    target, _, port = host.partition(":")
    try:
        address = address_towards(target)
        found = f"{target} is reached from {address} by {interface_of(address)}"
        if port:
            with socket.create_connection((target, int(port)), timeout=5):
                found += f", and port {port} answers"
        yield Finding("ok", "rendezvous", found)
    except UserError as error:
        yield Finding("fail", "rendezvous", f"{target} cannot be reached", str(error))
    except (OSError, ValueError) as error:
        advice = "is the run started there? Does a firewall stand between?"
        yield Finding("fail", "rendezvous", f"{target}, port {port}: {error}", advice)


def _said(words: list[str]) -> str:
    """What a command prints; "" if it is not there or fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
