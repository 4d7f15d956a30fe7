from __future__ import annotations

import dataclasses
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distcnn.config import (
    FREE_ON_RESUME,
    TrainConfig,
    flatten,
    from_flat,
    load_toml,
    parse_train,
    to_toml,
)
from distcnn.errors import UserError

# The flags, as a person types them, and their defaults. A line that changes here changes everybody's runs.
FLAGS: dict[str, Any] = {
    "data": "data/digits",
    "train_split": "train",
    "val_split": "val",
    "image_size": 0,
    "progressive": [],
    "crop": "auto",
    "crop_padding": -1,
    "crop_scale": 0.35,
    "flip": "auto",
    "augment": [],
    "cache": "auto",
    "decode": "cpu",
    "loader": "exact",
    "stream_samples": 0,
    "allow_pipe": False,
    "decode_threads": 0,
    "decode_processes": 0,
    "window_shards": 0,
    "model": "cnn",
    "pretrained": "",
    "freeze": "none",
    "channels": [32, 64],
    "kernel_size": 3,
    "activation": "relu",
    "norm": "batch",
    "pooling": "max",
    "hidden": 128,
    "dropout": 0.0,
    "blur_pool": False,
    "stem": "auto",
    "batch_norm": "tile",
    "epochs": 20,
    "global_batch_size": 64,
    "tile_size": 8,
    "optimizer": "adamw",
    "lr": 0.003,
    "layer_decay": 1.0,
    "momentum": 0.9,
    "weight_decay": 0.01,
    "warmup_epochs": 1.0,
    "schedule": "cosine",
    "loss": "ce",
    "balance": "none",
    "distill": "",
    "distill_weight": 0.5,
    "distill_temperature": 2.0,
    "label_smoothing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "ema_decay": 0.0,
    "lookahead": 0,
    "clip_grad_norm": 0.0,
    "patience": 0,
    "tta": "none",
    "output": "",
    "seed": 0,
    "resume": "auto",
    "device": "auto",
    "mixed_precision": "no",
    "compile": False,
    "reduction": "tree",
    "threads": 0,
    "eval_every": 1,
    "log_every": 10,
    "checkpoint_every": 0,
    "checkpoint_minutes": 0.0,
    "keep_checkpoints": 2,
    "wandb_mode": "online",
    "wandb_project": "distcnn",
    "wandb_name": "",
    "wandb_tags": [],
    "wandb_group": "",
    "wandb_notes": "",
    "time_limit": 0.0,
    "stall_timeout": 300.0,
    "quiet": False,
}

# Everything set to something else, in flags, and the flat values they stand for.
ALL_CHANGED = shlex.split(
    "--data /x/y --train-split a --val-split b --image-size 96 --progressive 64 96 --crop random-resized"
    " --crop-padding 4 --crop-scale 0.08 --flip none --augment trivial-augment cutout=8 --cache off --decode"
    " nvjpeg --decode-threads 3 --window-shards 2 --loader stream --stream-samples 9 --allow-pipe --model resnet18"
    " --pretrained w.pth --freeze backbone --blur-pool --channels 3 5 7 --kernel-size 5 --activation silu --norm"
    " none --pooling stride --hidden 0 --dropout 0.25 --stem small --batch-norm frozen --epochs 3"
    " --global-batch-size 96 --tile-size 12 --optimizer sgd --lr 1e-05 --layer-decay 0.75 --momentum 0"
    " --weight-decay 5e-4 --warmup-epochs 2 --schedule step --balance sqrt --label-smoothing 0.1 --mixup 0.2"
    " --distill-weight 0.9 --distill-temperature 4 --decode-processes 2"
    " --cutmix 1 --ema-decay 0.999 --lookahead 5 --loss bce --patience 3 --tta flip --clip-grad-norm 1.5 --output out"
    " --seed 9223372036854775807 --resume never --device cpu --mixed-precision bf16 --compile --reduction ddp"
    " --threads 2 --eval-every 2 --log-every 1 --checkpoint-every 7 --keep-checkpoints 5 --checkpoint-minutes 9"
    " --distill t --time-limit 8 --stall-timeout 60 --wandb-mode disabled --wandb-project p --wandb-name n"
    " --wandb-tags a 'b c' --wandb-group g --wandb-notes 'two words' --quiet"
)


def test_the_flags_and_their_defaults_are_pinned() -> None:
    assert flatten(TrainConfig()) == FLAGS
    assert len(FLAGS) + len(["config", "help"]) <= 78


def test_every_value_survives_flags_to_toml_to_flags(tmp_path: Path) -> None:
    config = parse_train(ALL_CHANGED)
    before = flatten(config)
    unchanged = {name for name, value in before.items() if value == FLAGS[name]}
    assert not unchanged, "this test must change every flag"
    file = tmp_path / "c.toml"
    file.write_text(to_toml(config))
    assert load_toml(file) == config
    assert parse_train(["--config", str(file)]) == config
    assert flatten(parse_train([f"--config={file}", "--lr", "2", "--no-quiet"])) == {
        **before,
        "lr": 2.0,
        "quiet": False,
    }


def test_toml_of_the_defaults_is_pinned() -> None:
    text = to_toml(TrainConfig())
    assert tomllib.loads(text) == FLAGS
    assert 'output = ""\nseed = 0\nresume = "auto"' in text and "channels = [32, 64]" in text


# Lone surrogates are not text; they stand for bytes of a file name that is not UTF-8, and are refused below.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(project=TEXT, name=TEXT, lr=st.floats(1e-300, 1e300), seed=st.integers(0, 2**63 - 1), smooth=st.floats(0, 0.99))
def test_any_text_and_number_survives_toml(
    tmp_path: Path, project: str, name: str, lr: float, seed: int, smooth: float
) -> None:
    values = {"wandb_project": project, "wandb_name": name, "lr": lr, "seed": seed, "label_smoothing": smooth}
    config = from_flat(values)
    file = tmp_path / "c.toml"
    file.write_bytes(to_toml(config).encode())
    assert load_toml(file) == config


BAD_TOML = [
    ("lerning_rate = 1", "no setting 'lerning_rate'; valid: "),
    ("epoch = 1", "no setting 'epoch'; did you mean 'epochs'?"),
    ("lr_ = 1", "no setting 'lr_'; did you mean 'lr'?"),
    ("[optim]\nlr = 1.0", "no setting 'optim'"),
    ("epochs = '3'", "epochs = '3' must be of type int"),
    ("epochs = 3.0", "epochs = 3.0 must be of type int"),
    ("epochs = true", "epochs = True must be of type int"),
    ("lr = true", "lr = True must be of type float"),
    ("quiet = 1", "quiet = 1 must be of type bool"),
    ("channels = 3", "channels = 3 must be a list such as [32, 64]"),
    ("channels = [3, 'x']", "channels = 'x' must be of type int"),
    ("channels = []", "--channels : one or more positive numbers"),
    ("data = 3", "data = 3 must be of type Path"),
    ("optimizer = 'adam'", "optimizer = 'adam'; did you mean 'adamw'?"),
    ("optimizer = ['sgd']", "optimizer = ['sgd']; did you mean 'sgd'?"),
    ("epochs = 0", "--epochs 0: must be >= 1"),
    ("lr = nan", "--lr nan: must be positive"),
    ("lr = inf", "--lr inf: must be positive"),
    ("mixup = inf", "--mixup inf: 0 (off), or 0.01 to 4.0"),
    ("clip_grad_norm = inf", "--clip-grad-norm inf: must be >= 0"),
    ("global_batch_size = 60", "--global-batch-size 60: must be a multiple of --tile-size 8, 56 for example"),
    ("warmup_epochs = 21", "--warmup-epochs 21.0: must be between 0 and --epochs 20"),
    ("seed = -1", "--seed -1: must be in [0, 2**63)"),
    ("seed = 9223372036854775808", "--seed 9223372036854775808: must be in [0, 2**63)"),
    ("lr = ", "is not valid TOML: Invalid value (at line 1, column 6)"),
    ("lr = 1.0\nlr = 2.0", "is not valid TOML: Cannot overwrite a value (at line 2, column 9)"),
    ("\xff", "is not valid TOML: 'utf-8' codec can't decode"),
]


@pytest.mark.parametrize(("text", "message"), BAD_TOML)
def test_a_bad_file_is_one_line_naming_it(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_bytes(f"{text}\n".encode("latin-1"))
    with pytest.raises(UserError) as caught:
        parse_train(["--config", str(file)])
    said = str(caught.value)
    assert said.startswith(str(file)) and message in said and "\n" not in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config"], "--config needs the name of a TOML file"),
        (["--config", "missing.toml"], "cannot read --config missing.toml: No such file or directory"),
        (["--config", "/"], "cannot read --config /: Is a directory"),
        (["--epoch", "3"], "Unrecognized options: --epoch, 3; perhaps you meant: --epochs INT"),
        (["--no-quite"], "Unrecognized options: --no-quite; perhaps you meant: --quiet, --no-quiet"),
        (["--epochs", "x"], "Error parsing --epochs: invalid literal for int() with base 10: 'x'"),
        (
            ["--optimizer", "adam"],
            "invalid choice 'adam' for argument '--optimizer'. Expected one of ('sgd', 'adamw', 'lamb', 'muon').",
        ),
        (["--model"], "Missing value for argument '--model'"),
        (["stray"], "Unrecognized options: stray"),
        (["--dropout", "1"], "--dropout 1.0: must be in [0, 1)"),
        (["--kernel-size", "4"], "--kernel-size 4: must be odd and positive"),
        (["--channels", "8", "0"], "--channels 8 0: one or more positive numbers"),
        (["--tile-size", "0"], "--tile-size 0: must be >= 1"),
        (["--augment", "erasing=2"], "--augment erasing=2: 'erasing=2' is none of trivial-augment, "),
        (["--augment", "cutout=8", "cutout=9"], "--augment cutout=8 cutout=9: each of them once"),
        (["--wandb-tags", "a", ""], "--wandb-tags a : tags of 1 to 64 characters"),
        (["--wandb-tags", "x" * 65], ": tags of 1 to 64 characters"),
        (["--freeze", "backbone"], "--freeze backbone: only with --pretrained"),
        (["--progressive", "8", "--crop", "pad"], "--progressive 8: goes with --crop random-resized, not with pad"),
        (["--model", ""], "--model : name a model: cnn, resnet18, ..."),
        (["--output", "a\udcff"], "--output a\udcff: must be UTF-8 text"),
    ],
)
def test_a_bad_flag_is_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_train(argv)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 160, "a line, not a page"


def test_every_limit_is_tried_from_both_sides() -> None:
    for name, good, bad in [
        ("crop_scale", [1e-9, 1.0], [0.0, 1.1, float("nan")]),
        ("crop_padding", [-1, 0], [-2]),
        ("lr", [1e-12, 1e6], [0.0, -1.0, float("nan"), float("inf")]),
        ("dropout", [0.0, 0.99], [1.0, -0.1]),
        ("label_smoothing", [0.0, 0.99], [1.0, -0.1]),
        ("ema_decay", [0.0, 0.9999], [1.0, -0.1]),
        ("distill_weight", [1e-9, 1.0], [0.0, 1.1, float("nan")]),
        ("distill_temperature", [0.1, 100.0], [0.0, -1.0, 101.0, float("inf")]),
        ("lookahead", [0, 2, 500], [-1, 1]),
        ("momentum", [0.0, 0.99], [1.0, -0.1]),
        ("mixup", [0.0, 0.01, 4.0], [-0.1, 0.009, 4.1, float("nan")]),
        ("cutmix", [0.0, 0.01, 4.0], [-0.1, 0.009, 4.1]),
        ("weight_decay", [0.0, 10.0], [-1e-9, float("inf"), float("nan")]),
        ("warmup_epochs", [0.0, 20.0], [-0.1, 20.1]),
        ("time_limit", [0.0, 1e-3], [-1.0, float("inf")]),
        ("checkpoint_minutes", [0.0, 1e-3], [-1.0, float("nan"), float("inf")]),
        ("stall_timeout", [0.0, 1.0], [-1.0, 0.5, float("nan"), float("inf")]),
        ("hidden", [0, 1], [-1]),
        ("layer_decay", [1e-3, 1.0], [0.0, 1.1, float("nan")]),
        ("patience", [0, 1], [-1]),
        ("progressive", [[], [1, 8, 4]], [[0], [8, -1]]),
        ("eval_every", [1], [0]),
        ("log_every", [1], [0]),
        ("checkpoint_every", [0, 1], [-1]),
        ("keep_checkpoints", [1], [0]),
        ("window_shards", [0, 1], [-1]),
        ("threads", [0], [-1]),
        ("decode_threads", [0], [-1]),
        ("decode_processes", [0, 4], [-1]),
        ("image_size", [0, 1], [-1]),
    ]:
        for value in good:
            from_flat({name: value})
        for value in bad:
            with pytest.raises(UserError, match=f"--{name.replace('_', '-')} "):
                from_flat({name: value})


def test_where_a_run_goes_and_how_it_is_cut() -> None:
    assert TrainConfig().output == Path("runs/digits-cnn-seed0")
    assert from_flat({"data": "a/..", "seed": 3}).output == Path("runs") / f"{Path.cwd().name}-cnn-seed3"
    assert from_flat({"output": "x"}).output == Path("x")
    assert from_flat({"global_batch_size": 96, "tile_size": 8}).geometry.lanes == 12


def test_what_is_free_on_resume_exists_and_spares_the_trajectory() -> None:
    assert set(FLAGS) > FREE_ON_RESUME
    fixed = set(FLAGS) - FREE_ON_RESUME
    assert {"seed", "lr", "epochs", "global_batch_size", "tile_size", "model", "mixup", "reduction"} <= fixed


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().optim.lr = 1.0  # type: ignore[misc]
