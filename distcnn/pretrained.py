"""Weights to begin with: of a run of distcnn, of torchvision or timm, or of whoever uses the same names.

Files are read as safetensors, or by torch.load with weights_only, so nothing in them is ever run.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from distcnn.checkpoint import find_checkpoint, load, load_tensors
from distcnn.errors import UserError
from distcnn.models import head_of

_INSIDE = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")  # where others keep the weights
_PREFIXES = ("module.", "_orig_mod.", "model.")  # what wrappers put before every name
_COUNTER = "num_batches_tracked"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Loaded:
    """What came of it, by name. `fresh`: the head's tensors, which stay as they were drawn."""

    loaded: int
    fresh: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{self.loaded} tensors loaded"
        for what, names in (
            ("drawn anew, since the classes are others", self.fresh),
            ("not in the file", self.missing),
            ("in the file but not in the network", self.unexpected),
        ):
            text += f"; {what}: {', '.join(names)}" if names else ""
        return text


def read_weights(path: Path) -> Tensors:
    """name -> tensor of a checkpoint or run folder (averaged weights where it has any), .safetensors or torch file.

    Raises UserError that names the file.
    """
    if path.is_dir():
        saved = load(find_checkpoint(path))
        return dict(saved.ema or saved.model)
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        found = load_tensors(path)
    except OSError as error:
        raise UserError(f"--pretrained {path} cannot be read: {error.strerror or error}") from error
    except (pickle.UnpicklingError, RuntimeError, safetensors.SafetensorError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--pretrained {path} holds no plain weights: {reason}") from error
    return _weights_in(found, path)


def _weights_in(found: Any, path: Path) -> Tensors:
    """The weights in what a torch file holds: itself, or under one of the usual names, without wrappers' prefixes."""
    for name in _INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
            break
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"--pretrained {path} holds no weights, but a {type(found).__name__}")
    odd = [name for name, value in found.items() if not isinstance(value, torch.Tensor)]
    if odd:
        raise UserError(f"--pretrained {path} holds no weights: {odd[0]!r} is a {type(found[odd[0]]).__name__}")
    weights = dict(found)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


@torch.no_grad()
def begin_with(model: nn.Module, weights: Tensors, where: str) -> Loaded:
    """Copy `weights` into `model` by name; the last layer stays as it is where its shape is another.

    Raises UserError, with the model unchanged, where another tensor has another shape or nothing but the head fits.
    """
    own = model.state_dict()
    head = head_of(model) + "."
    other = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    wrong = next((name for name in other if not name.startswith(head)), None)
    if wrong:
        raise UserError(
            f"--pretrained {where}: {wrong} has the shape {tuple(weights[wrong].shape)}, and {tuple(own[wrong].shape)}"
            " here: give its --model, --stem and --channels"
        )
    fits = [name for name in own if name in weights and name not in other]
    if not any(not name.startswith(head) for name in fits):
        raise UserError(f"--pretrained {where} has none of the network's names, such as {next(iter(own))}")
    for name in fits:
        own[name].copy_(weights[name])
    return Loaded(
        loaded=len(fits),
        fresh=tuple(other),
        missing=tuple(name for name in own if name not in weights and not name.endswith(_COUNTER)),
        unexpected=tuple(name for name in weights if name not in own),
    )


def normalisation_of(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, std) that the weights in a run folder or checkpoint were trained with; None for a file of weights."""
    if not path.is_dir():
        return None
    facts = json.loads((find_checkpoint(path) / "state.json").read_text(encoding="utf-8"))["preprocessing"]
    return tuple(facts["mean"]), tuple(facts["std"])
