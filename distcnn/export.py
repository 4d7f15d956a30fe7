"""`distcnn export`: the network and its normalisation as one file that other programs load."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors.torch
import torch
from torch import nn

from distcnn.classifier import Classifier, load_model
from distcnn.console import Console
from distcnn.data.loader import Loader, TileRequest
from distcnn.data.manifest import load_manifest
from distcnn.data.shards import SplitReader
from distcnn.errors import EXIT_FAILED, DataError, UserError
from distcnn.files import write_atomically

if TYPE_CHECKING:
    from distcnn.commands.export import Options

CHECKED = 16  # images, besides a batch of one: the batch size must be free

Run = Callable[[torch.Tensor], torch.Tensor]


class Deployed(nn.Module):
    """(n, 3, S, S) uint8 RGB -> (n, K) logits: normalisation and network."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.network = model.model
        self.register_buffer("mean", torch.tensor(model.augment.mean).mul(255)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(model.augment.std).mul(255)[:, None, None], persistent=False)

    def forward(self, image_NCHW: torch.Tensor) -> torch.Tensor:
        """Logits of uint8 images."""
        logits_NK: torch.Tensor = self.network((image_NCHW.to(torch.float32) - self.mean) / self.std)
        return logits_NK


def export(options: Options) -> int:
    """Write the file after checking it. Raises UserError for what cannot be read or written."""
    console = Console(speaks=True)
    if not options.output.parent.is_dir():
        raise UserError(f"--output {options.output}: there is no folder {options.output.parent}")
    model = load_model(options.checkpoint, options.ema)
    images_NCHW, where = _images(model, options.data)
    temporary = options.output.with_name(f".{options.output.name}.tmp{options.output.suffix}")
    try:
        loaded = FORMATS[options.format](model, images_NCHW, temporary)
        with torch.inference_mode():
            original = Deployed(model).eval()
            wanted, got = original(images_NCHW), loaded(images_NCHW)
            difference = float((wanted - got).abs().max())
            alone = float((wanted[:1] - loaded(images_NCHW[:1])).abs().max())
        largest = max(difference, alone)
        if not largest <= options.tolerance:
            console.warn(f"{options.format} differs by {largest:.3g} (> {options.tolerance:g}) on {where}: not written")
            return EXIT_FAILED
        temporary.replace(options.output)
    finally:
        temporary.unlink(missing_ok=True)
    facts = {
        "classes": list(model.classes),
        "input": f"(n, 3, {model.view.size}, {model.view.size}) uint8 RGB"
        if options.format != "safetensors"
        else f"(n, 3, {model.view.size}, {model.view.size}) float32, normalised by mean and std of values in [0, 1]",
        "preprocessing": model.state["preprocessing"],
    }
    write_atomically(options.output.parent / "classes.json", (json.dumps(facts, indent=1) + "\n").encode())
    console.say(f"{options.output}: largest difference of a logit {largest:.3g} on {where}; classes.json beside it")
    return 0


def _images(model: Classifier, data: Path | None) -> tuple[torch.Tensor, str]:
    """(n, 3, S, S) uint8 images to check with, and what they are."""
    root = data or Path(model.state["config"]["data"])
    try:
        split = load_manifest(root).split(model.state["config"]["val_split"])
    except DataError:
        if data is not None:
            raise
        size = model.view.size
        noise = np.random.Generator(np.random.Philox(0)).integers(0, 256, (CHECKED, 3, size, size), dtype=np.uint8)
        return torch.from_numpy(noise), f"{CHECKED} images of noise (the training data are not here: --data)"
    loader = Loader(SplitReader(root, split), model.view, 0)
    count = min(CHECKED, split.samples)
    ((tile,),) = list(loader.steps([[TileRequest(0, 0, 0, np.arange(count))]]))
    images = tile.images.permute(0, 3, 1, 2).contiguous()
    loader.close()
    return images, f"{count} images of {root}"


def _torchscript(model: Classifier, images: torch.Tensor, path: Path) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch recommends torch.export, which is a format of its own here
        torch.jit.save(torch.jit.trace(Deployed(model).eval(), images), path)  # type: ignore[no-untyped-call]
        loaded = torch.jit.load(path)  # type: ignore[no-untyped-call]
    return lambda batch: loaded(batch)


def _exported_program(model: Classifier, images: torch.Tensor, path: Path) -> Run:
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(Deployed(model).eval(), (images,), dynamic_shapes=shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the writer about tensors that are not on the CPU; ours are
        with path.open("wb") as file:
            torch.export.save(program, file)
        with path.open("rb") as file:
            loaded = torch.export.load(file).module()
    return lambda batch: loaded(batch)


def _onnx(model: Classifier, images: torch.Tensor, path: Path) -> Run:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format onnx needs more packages ({error}): pip install 'distcnn[onnx]'") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about its own insides
        torch.onnx.export(
            Deployed(model).eval(),
            (images,),
            path,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {"image": batch.numpy()})[0])


def _safetensors(model: Classifier, images: torch.Tensor, path: Path) -> Run:
    state = {name: tensor.contiguous() for name, tensor in model.model.state_dict().items()}
    path.write_bytes(safetensors.torch.save(state))
    fresh = load_model_weights(model, path)
    return lambda batch: fresh(batch)


def load_model_weights(model: Classifier, path: Path) -> Deployed:
    """The same network with the weights of a safetensors file."""
    from distcnn.config import from_flat
    from distcnn.models import build_plain

    config = from_flat(model.state["config"])
    network = build_plain(config.model, len(model.classes), model.view.size)
    network.load_state_dict(safetensors.torch.load_file(path))
    deployed = Deployed(model)
    deployed.network = network.eval()
    return deployed.eval()


FORMATS: dict[str, Callable[[Classifier, torch.Tensor, Path], Run]] = {
    "torchscript": _torchscript,
    "exported-program": _exported_program,
    "onnx": _onnx,
    "safetensors": _safetensors,
}
