"""A trained network as the teacher of another: what it says of each training tile is a part of the loss.

Hinton, Vinyals & Dean, "Distilling the knowledge in a neural network", arXiv 1503.02531, 2015. The teacher sees the
very tiles that the student does, cropped, coloured and mixed alike, as Beyer et al., "Knowledge distillation: a good
teacher is patient and consistent", arXiv 2106.05237, 2021, found to be what counts. So its part depends on a tile
alone, like the student's: the run is the same from any number of processes.

N samples of a tile, C channels, H W pixels, K classes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distcnn import checkpoint
from distcnn.augment import Targets
from distcnn.build import Dataset
from distcnn.config import TrainConfig, from_flat
from distcnn.errors import UserError
from distcnn.models import build_plain

AVERAGED, TRAINED = "ema.safetensors", "model.safetensors"


@dataclass(frozen=True)
class Teacher:
    """A network in evaluation mode that is not trained. `sha256`: of its weights' file, by which a run knows it again.

    scale, shift: (C, 1, 1) or None: what makes the student's inputs the teacher's, if they are normalised otherwise.
    """

    model: nn.Module
    path: str
    sha256: str
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    @torch.no_grad()
    def teach(self, x_NCHW: torch.Tensor, targets: Targets) -> Targets:
        """`targets` with the teacher's logits (n, K) for the model's inputs (n, C, H, W)."""
        if self.scale is not None and self.shift is not None:
            x_NCHW = x_NCHW * self.scale + self.shift
        return dataclasses.replace(targets, teacher_logits=self.model(x_NCHW))

    def facts(self) -> dict[str, str]:
        """What a checkpoint of the student says of it."""
        return {"path": self.path, "sha256": self.sha256}


def load_teacher(config: TrainConfig, dataset: Dataset, device: torch.device) -> Teacher | None:
    """The teacher that --distill names, None without it.

    Raises UserError for what is no checkpoint of distcnn, is damaged, or knows other classes or another size of images.
    """
    given = config.optim.distill
    if not given:
        return None
    if config.optim.loss != "ce":
        raise UserError(f"--distill goes with --loss ce, not with {config.optim.loss}")
    if config.data.progressive:
        raise UserError("--distill goes without --progressive: the teacher knows one size of images")
    folder, file = weights_of(given)
    saved = checkpoint.load(folder)
    state, facts = saved.state, saved.state["preprocessing"]
    if problem := _misfit(state["classes"], facts["size"], dataset):
        raise UserError(f"--distill {given} {problem}")
    model = build_plain(from_flat(state["config"], f"{folder}/state.json").model, len(state["classes"]), facts["size"])
    model.load_state_dict(saved.ema if file == AVERAGED and saved.ema is not None else saved.model)
    model = model.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
    if config.run.compile:
        model.compile()
    listing = json.loads((folder / checkpoint.MANIFEST).read_text(encoding="utf-8"))
    return Teacher(model, given, listing["files"][file]["sha256"], *_renormalised(dataset, facts, device))


def weights_of(given: str) -> tuple[Path, str]:
    """(checkpoint folder, weights in it) that --distill names: a run folder, a checkpoint, or a weights file in one."""
    path = Path(given)
    if path.is_file():
        if path.name not in (AVERAGED, TRAINED) or not (path.parent / "state.json").is_file():
            raise UserError(
                f"--distill {given}: a file of weights alone does not say of which network, classes and images it is:"
                " give a run folder or a checkpoint"
            )
        return path.parent, path.name
    try:
        folder = checkpoint.find_checkpoint(path)
    except UserError as error:
        raise UserError(f"--distill: {error}") from error
    return folder, AVERAGED if (folder / AVERAGED).exists() else TRAINED


def _misfit(classes: Sequence[str], size: int, dataset: Dataset) -> str:
    """ "" or why a teacher of these classes and images of `size` pixels cannot teach on the data set."""
    own = list(dataset.classes)
    if list(classes) != own:
        lacking, more = ([c for c in a if c not in b][:3] for a, b in ((own, classes), (classes, own)))
        named = [
            f"{word} {', '.join(map(repr, names))}" for word, names in (("without", lacking), ("with", more)) if names
        ]
        what = " and ".join(named) or "in another order"
        return (
            f"has other classes than {dataset.root} ({len(classes)} for {len(own)}, {what}): give a teacher of the same"
        )
    if size != dataset.size:
        return (
            f"was trained on images of {size} px, this run has {dataset.size}: --image-size {size}, or another teacher"
        )
    return ""


def _renormalised(
    dataset: Dataset, facts: Mapping[str, Any], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """(scale, shift) from the data set's normalisation to the teacher's; None for each where they are the same."""
    theirs, own = (tuple(facts["mean"]), tuple(facts["std"])), (tuple(dataset.mean), tuple(dataset.std))
    if theirs == own:
        return None, None
    (mean, std), (own_mean, own_std) = (torch.tensor(pair, dtype=torch.float64) for pair in (theirs, own))
    scale, shift = own_std / std, (own_mean - mean) / std
    return tuple(part.to(torch.float32).to(device)[:, None, None] for part in (scale, shift))


def check_same_teacher(teacher: Teacher | None, saved: Mapping[str, Any] | None, where: str) -> None:
    """Raises UserError if the run in `where` has learnt from another teacher: one of other weights, or none."""
    mine = teacher.facts() if teacher else None
    if (saved or {}).get("sha256") == (mine or {}).get("sha256"):
        return
    was, now = (f"{one['path']} ({one['sha256'][:12]})" if one else "none" for one in (saved, mine))
    raise UserError(
        f"{where} has learnt from another teacher (--distill was {was}, now {now}): give that one (its checkpoint, if"
        " its run has gone on), a new --output, or --resume never to begin anew"
    )
