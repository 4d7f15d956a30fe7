"""How fast `prepare folder` is, beside a loop that only reads and decodes the same files with as many processes.

    python benchmarks/prepare.py FOLDER [FOLDER ...] [--runs 5] [--workers N] [--copies N] [--scratch DIR]

Each run measures both, one after the other, files warm in the page cache. `prepare` is timed from listing the folder
to the published data set, synced to the disk, with the start of its workers. The loop has its list of files given and
its workers running; the second ratio gives the time that listing takes (in one process) to the loop as well. Imports
are in neither; the whole command, with them, is timed at the end, and there the memory of all its processes together
(proportional set size, sampled) is taken. --copies makes a small set large, by hard links in a train/ folder,
so that what is fixed (starting, splitting) does not hide the rate.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from distcnn.data.decode import DecodeError, decode
from distcnn.data.prepare.build import Settings, build
from distcnn.data.prepare.folders import find_images, from_folder
from distcnn.data.prepare.pool import Pool, usable_cores, warm_up

CHUNK = 256


def read_and_decode(paths: list[str]) -> int:
    """The reference: what any reader of these files has to do."""
    pixels = 0
    for path in paths:
        with open(path, "rb") as file:  # noqa: PTH123 - a Path for each would slow the reference down
            data = file.read()
        try:
            pixels += decode(data).size
        except DecodeError:
            continue
    return pixels


def time_loop(executor: ProcessPoolExecutor, folder: Path) -> tuple[float, float]:
    """Seconds of reading and decoding the images below a folder, and of finding them before."""
    start = time.perf_counter()
    paths = [f"{folder}/{path}" for path in find_images(folder).paths]
    found = time.perf_counter()
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    for _ in executor.map(read_and_decode, chunks):
        pass
    return time.perf_counter() - found, found - start


def time_prepare(folder: Path, scratch: Path, workers: int) -> float:
    output = scratch / "prepared"
    shutil.rmtree(output, ignore_errors=True)
    os.sync()  # the disk has nothing left to do of the run before
    warm_up()
    start = time.perf_counter()
    with Pool(workers) as pool:
        build(from_folder(folder, pool), output, Settings(workers=workers), pool=pool)
    return time.perf_counter() - start


def cpu_times(folder: Path, paths: list[str], scratch: Path) -> tuple[float, float, float]:
    """CPU microseconds an image of the loop, of listing and of prepare, in this process: other load hardly enters."""
    start = time.process_time()
    read_and_decode(paths)
    middle = time.process_time()
    find_images(folder)
    listed = time.process_time()
    output = scratch / "prepared"
    shutil.rmtree(output, ignore_errors=True)
    begin = time.process_time()
    build(from_folder(folder), output, Settings(workers=1))
    seconds = (middle - start, listed - middle, time.process_time() - begin)
    return tuple(each / len(paths) * 1e6 for each in seconds)  # type: ignore[return-value]


def run_command(folder: Path, scratch: Path, workers: int) -> tuple[float, float]:
    """(seconds, MB at the peak) of the whole command, with all its processes."""
    output = scratch / "prepared"
    shutil.rmtree(output, ignore_errors=True)
    words = ["prepare", "folder", str(folder), "--output", str(output), "--workers", str(workers)]
    start = time.perf_counter()
    run = subprocess.Popen([sys.executable, "-m", "distcnn", *words], stdout=subprocess.DEVNULL, start_new_session=True)
    peak = 0.0
    while run.poll() is None:
        peak = max(peak, memory_of(run.pid))
        time.sleep(0.05)
    if run.returncode:
        sys.exit(f"{' '.join(words)} failed")
    return time.perf_counter() - start, peak


def memory_of(session: int) -> float:
    """MB that the processes of a session take together, shared pages counted once."""
    total = 0
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) == session:
                lines = (entry / "smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):
            continue
    return total / 1024


def copied(folder: Path, copies: int, scratch: Path) -> Path:
    """A folder train/ with each image so many times, as hard links where that works."""
    out = scratch / f"{folder.name}_x{copies}"
    for path in find_images(folder).paths:
        source = folder / path
        label = path.split("/")[0] if "/" in path else path.split("_")[0]
        target = out / "train" / label
        target.mkdir(parents=True, exist_ok=True)
        for number in range(copies):
            try:
                os.link(source, target / f"{number}_{source.name}")
            except OSError:
                shutil.copyfile(source, target / f"{number}_{source.name}")
    return out


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} .. {max(values):,.0f})"


def measure(folder: Path, runs: int, workers: int, scratch: Path) -> None:
    found = find_images(folder)
    paths = [f"{folder}/{path}" for path in found.paths]
    loop, listed, prepared, cpu = [], [], [], []
    with ProcessPoolExecutor(workers, get_context("forkserver")) as executor:
        for number in range(runs + 1):
            (one, listing), two = time_loop(executor, folder), time_prepare(folder, scratch, workers)
            if number:  # the first warms caches and workers
                loop.append(len(paths) / one)
                listed.append(len(paths) / (one + listing))
                prepared.append(len(paths) / two)
                cpu.append(cpu_times(folder, paths, scratch))
    seconds, peak = run_command(folder, scratch, workers)
    print(f"{folder.name}: {len(paths):,} images, {found.sizes.sum() / len(paths):,.0f} bytes each")
    print(f"  read and decode: {spread(loop)} images/s")
    print(f"  the same, listing first: {spread(listed)} images/s")
    print(f"  prepare folder:  {spread(prepared)} images/s")
    for what, peer in (("loop", loop), ("loop with listing", listed)):
        ratios = [two / one for one, two in zip(peer, prepared, strict=True)]
        print(f"  prepare / {what}:  {statistics.median(ratios):.0%} ({min(ratios):.0%} .. {max(ratios):.0%})")
    one, listing, two = (statistics.median(column) for column in zip(*cpu, strict=True))
    print(
        f"  CPU an image:    {one:,.1f} us for the loop ({one + listing:,.1f} with listing), {two:,.1f} us for prepare"
        f" ({one / two:.0%}, {(one + listing) / two:.0%}), in one process"
    )
    print(f"  whole command:   {seconds:.2f} s, {peak:,.0f} MB at the peak in all its processes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    print(
        f"{options.workers} processes, {platform.machine()}, Python {platform.python_version()},"
        f" median (least .. most) of {options.runs} runs, load before: {os.getloadavg()[0]:.1f}"
    )
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for folder in options.folders:
            if options.copies > 1:
                folder = copied(folder, options.copies, Path(scratch))
            measure(folder, options.runs, options.workers, Path(scratch))


if __name__ == "__main__":
    main()
