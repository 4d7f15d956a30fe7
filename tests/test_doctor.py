"""Each check on what is well and on what is not; the command as a whole."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numba
import pytest

from distcnn import doctor
from distcnn.data import resize, turbojpeg
from distcnn.doctor import Finding
from tests.support import ROOT, command, python


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def test_advice_belongs_to_what_is_not_ok() -> None:
    with pytest.raises(ValueError, match="advice"):
        Finding("ok", "x", "y", "do z")
    with pytest.raises(ValueError, match="advice"):
        Finding("fail", "x", "y")
    assert Finding("warn", "x", "y", "do z").line() == "warn  x            y: do z"


def test_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = doctor.check_numba()
    assert found.level == "ok" and found.found.startswith(numba.__version__)

    def refused() -> None:
        warnings.warn("a kernel is not used (why)", RuntimeWarning, stacklevel=2)

    monkeypatch.setattr(resize, "upscale_kernel", refused)
    (refusal,) = doctor.check_numba()
    assert refusal.level == "warn" and "not used (why): nothing is wrong but speed" in refusal.line()
    monkeypatch.setattr(resize, "upscale_kernel", lambda: None)
    (silent,) = doctor.check_numba()
    assert silent.level == "warn" and "NUMBA_DISABLE_JIT" in silent.found

    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", version)
    (absent,) = doctor.check_numba()
    assert absent.level == "warn" and "distcnn[fast]" in absent.advice


def test_turbojpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    if turbojpeg.libturbojpeg() is not None:
        (found,) = doctor.check_turbojpeg()
        assert found.level == "ok"
    monkeypatch.setattr(turbojpeg, "libturbojpeg", lambda: None)
    (absent,) = doctor.check_turbojpeg()
    assert absent.level == "warn" and "apt-get install libturbojpeg0" in absent.advice
    monkeypatch.setattr(turbojpeg, "libturbojpeg", lambda: object())
    monkeypatch.setattr(turbojpeg, "make_decoder", lambda: None)
    (silent,) = doctor.check_turbojpeg()
    assert silent.level == "warn" and "Numba is not" in silent.found

    def refused() -> None:
        warnings.warn("a kernel is not used (why)", RuntimeWarning, stacklevel=2)

    monkeypatch.setattr(turbojpeg, "make_decoder", refused)
    (refusal,) = doctor.check_turbojpeg()
    assert "not used (why): nothing is wrong but speed" in refusal.line()


@pytest.mark.parametrize(("processes", "cores", "level"), [(1, 1, "ok"), (8, 64, "ok"), (3, 2, "warn")])
def test_cores(processes: int, cores: int, level: str) -> None:
    assert levels(list(doctor.check_cores(processes, cores))) == [level]


@pytest.mark.parametrize(
    ("limits", "level", "said"),
    [
        ((256, 4096), "warn", "ulimit -n 1024"),
        ((256, 512), "warn", "ulimit -n 512"),
        ((256, -1), "warn", "ulimit -n 1024"),
        ((1024, 4096), "ok", "1,024"),
        ((-1, -1), "ok", "no limit"),
    ],
)
def test_open_files(limits: tuple[int, int], level: str, said: str) -> None:
    (finding,) = doctor.check_open_files(limits)
    assert finding.level == level and said in finding.line()


def test_shared_memory(tmp_path: Path) -> None:
    assert levels(list(doctor.check_shared_memory(1, tmp_path / "none"))) == ["warn"]
    assert levels(list(doctor.check_shared_memory(1, tmp_path))) == ["ok"]
    assert levels(list(doctor.check_shared_memory(1 << 40, tmp_path))) == ["warn"]


def test_data(tmp_path: Path, digits_set: Path) -> None:
    assert levels(list(doctor.check_data(digits_set))) == ["ok"]
    (absent,) = doctor.check_data(tmp_path / "none")
    assert absent.level == "warn" and "distcnn prepare" in absent.advice
    (empty,) = doctor.check_data(tmp_path)
    assert empty.level == "fail" and "no dataset.json" in empty.advice
    for file in digits_set.iterdir():
        if not file.name.startswith("val"):
            (tmp_path / file.name).symlink_to(file)
    (missing,) = doctor.check_data(tmp_path)
    assert missing.level == "fail" and "val-000000.tar" in missing.advice


def test_output(tmp_path: Path) -> None:
    findings = list(doctor.check_output(tmp_path / "runs" / "not" / "yet"))
    assert [finding.what for finding in findings] == ["runs", "clock"]
    assert findings[0].level in ("ok", "warn") and findings[1].level == "ok"
    assert list(tmp_path.iterdir()) == []
    (finding,) = doctor.check_output(Path("/proc"))
    assert finding.level == "fail" and "cannot be written" in finding.found


def test_host() -> None:
    assert levels(list(doctor.check_host("localhost")))[1:] == ["ok"]
    for host in ("localhost:1", "no-such-host.invalid", "localhost:port"):
        finding = list(doctor.check_host(host))[-1]
        assert finding.level == "fail" and finding.what == "rendezvous", host


def test_bf16_of_a_cpu() -> None:
    assert doctor._cpu_bf16("flags : fpu avx512_bf16 x").level == "ok"
    assert doctor._cpu_bf16("flags : fpu avx512bw").level == "warn"


def test_a_check_that_breaks_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> list[Finding]:
        raise RuntimeError("oh")

    monkeypatch.setattr(doctor, "check_wandb", broken)
    findings = list(doctor.examine(doctor.Question(tmp_path / "none", tmp_path)))
    assert [f.found for f in findings if f.what == "doctor"] == ["a check broke (RuntimeError: oh)"]
    assert {"torch", "cores", "/dev/shm", "open files", "data", "runs", "SLURM", "host name"} <= {
        finding.what for finding in findings
    }


@pytest.mark.slow
def test_the_command_measures_processes_and_fails_if_something_does(digits_set: Path, tmp_path: Path) -> None:
    words = ("--data", digits_set, "--output", tmp_path, "--processes", "2")
    done = command(python("-m", "distcnn", "doctor", *words), ROOT)
    assert done.code == 0, done.out + done.err
    last = done.out.splitlines()[-1]
    assert last.startswith("ok    all-reduce   64 MiB over 2 processes with gloo: tree ") and "GiB/s" in last
    assert all(line[:4] in ("ok  ", "warn") for line in done.out.splitlines())
    assert command(python("-m", "distcnn", "doctor", "--host", "localhost:1"), ROOT).code == 1
