"""distcnn submit without a cluster: what is refused before the queue, what is printed. See also launch/ and slurm/."""

from __future__ import annotations

from pathlib import Path

import pytest

from distcnn.errors import UserError
from distcnn.site import Site, load_site
from tests.support import ROOT, Outcome, command, python


def submit(folder: Path, *words: str | Path) -> Outcome:
    return command(python("-m", "distcnn", "submit", *words), folder)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--", "--epoch", "3"], "--epochs"),
        (["--node", "2"], "--nodes"),
        (["--", "--resume", "never"], "--resume never: a requeued job would begin anew"),
        (["--time", "1h"], "--time '1h'"),
        (["--array", "seed"], "--array 'seed'"),
        (["--array", "lr=0.1,-1"], "lr-1: --lr -1.0: must be positive"),
        (["--", "--data", "nowhere"], "no dataset.json in nowhere"),
        (["--prepare", "folder"], "distcnn submit: error"),
        (["--prepare", "folder 'x"], "No closing quotation"),
        (["--site", "none.toml"], "cannot read none.toml"),
    ],
)
def test_what_is_wrong_is_one_line_before_the_queue(tmp_path: Path, words: list[str], said: str) -> None:
    done = submit(tmp_path, *words)
    assert done.code == 2 and len(done.errors) == 1 and said in done.errors[0], done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "9"], "9 processes, but only 8 lanes"),
        (["--", "--model", "resnet19"], "did you mean"),
        (["--", "--train-split", "trian"], "did you mean 'train'"),
    ],
)
def test_what_would_fail_on_the_nodes_fails_here(tmp_path: Path, digits_set: Path, words: list[str], said: str) -> None:
    words = words if "--" in words else [*words, "--"]
    done = submit(tmp_path, *words, "--data", digits_set)
    assert done.code == 2 and len(done.errors) == 1 and said in done.errors[0], done.err
    assert list(tmp_path.iterdir()) == []


def test_another_run_in_the_folder_is_refused(tmp_path: Path, digits_set: Path) -> None:
    from distcnn.config import from_flat, to_toml

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(to_toml(from_flat({"data": str(digits_set), "epochs": 7})))
    done = submit(tmp_path, "--dry-run", "--", "--data", digits_set, "--output", "run", "--epochs", "8")
    assert done.code == 2 and "epochs was 7, now 8" in done.err
    assert submit(tmp_path, "--dry-run", "--", "--data", digits_set, "--output", "run", "--epochs", "7").code == 0


def test_a_dry_run_prints_and_leaves_nothing(tmp_path: Path, digits_set: Path) -> None:
    (tmp_path / "site.toml").write_text('partition = "gpu"\ncpus_per_gpu = 4\n')
    ask = ("--nodes", "2", "--gpus-per-node", "2", "--time", "4:00:00", "--dry-run")
    done = submit(tmp_path, *ask, "--", "--data", digits_set)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    wanted = ["--partition=gpu", "--gpus-per-node=2", "--cpus-per-task=8", "--time=4:00:00", f"--chdir={tmp_path}"]
    assert all(f"#SBATCH {flag}" in lines for flag in wanted), done.out
    assert lines[-2] == f"set -- --data {digits_set}"
    assert "tiles of 8 images leave a GPU idle" in done.err  # what would hurt is said, and does not stop it
    assert [path.name for path in tmp_path.iterdir()] == ["site.toml"]


def test_where_prints_the_run_folder(tmp_path: Path) -> None:
    done = submit(tmp_path, "--where", "--", "--output", "a b")
    assert (done.code, done.out) == (0, f"{tmp_path}/a b\n")


def test_a_site_with_every_setting(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    text = (ROOT / "launch" / "site.example.toml").read_text()
    file.write_text(text.replace("# ", "", 2) and "\n".join(uncommented(text)))
    site = load_site(file)
    assert (site.partition, site.modules, site.container[0]) == ("gpu", ("cuda/12.8",), "apptainer")
    assert {name for name, value in vars(site).items() if value == vars(Site())[name]} <= {"cpus_per_gpu"}
    assert load_site(None) == Site()


def uncommented(text: str) -> list[str]:
    """The settings that the example has as comments."""
    lines = [line[2:] for line in text.splitlines() if line.startswith("# ") and " = " in line]
    assert len(lines) == len(vars(Site()))
    return lines


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partion = 'x'", "did you mean 'partition'"),
        ("partition = 1", "must be a string"),
        ("modules = 'cuda'", "list of strings"),
        ("modules = [1]", "list of strings"),
        ("partition = 'a b'", "no spaces"),
        ("gpus = '--gres=gpu:2'", "{n} must stand"),
        ("sbatch = ['exclusive']", "is no flag"),
        ("setup = ['a\\nb']", "line break"),
        ("cpus_per_gpu = 0", "at least 1"),
        ("partition = ", "not valid TOML"),
    ],
)
def test_a_wrong_site_names_file_and_key(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "site.toml"
    file.write_text(text.replace("'", '"'))
    with pytest.raises(UserError) as caught:
        load_site(file)
    assert str(file) in str(caught.value) and said in str(caught.value)
