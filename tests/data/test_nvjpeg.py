"""The loader that decodes on its device, with libjpeg-turbo in nvJPEG's place: what comes out, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import encode, jpg, picture
from split_files import add_shard, make_reader, split_of

from distcnn.build import make_training_loader, open_dataset
from distcnn.config import from_flat
from distcnn.data.loader import Loader, Tile, TileRequest, training_requests
from distcnn.data.nvjpeg import NvjpegLoader, check_decoder, cut_and_scaled
from distcnn.data.order import EpochOrder, Geometry
from distcnn.data.shards import SplitReader
from distcnn.data.upload import CPU
from distcnn.data.views import View
from distcnn.errors import UserError
from distcnn.world import World

COUNTS = (13, 1, 9)
SIZES = ((12, 12), (20, 9), (7, 31), (90, 120), (64, 64))
GEOMETRY = Geometry(8, 4)


def epoch_of(loader: Loader) -> list[Tile]:
    """The tiles of an epoch, apart from the loader's buffers."""
    order = EpochOrder(loader.reader.counts, GEOMETRY, 5, 1)
    made = [
        Tile(tile.request, tile.images.clone(), tile.labels.clone(), tile.weights.clone())
        for tiles in loader.steps(training_requests(order, range(GEOMETRY.lanes)))
        for tile in tiles
    ]
    loader.close()
    return made


@pytest.mark.parametrize("kind", ["none", "center", "random-resized"])
def test_images_are_nearly_those_of_the_cpus_way(kind: str, tmp_path: Path) -> None:
    """The same samples, labels and crops, of pixels that differ by a few of 256 steps."""
    reader = make_reader(tmp_path, COUNTS, SIZES)
    view = View(10, kind)  # type: ignore[arg-type]
    expected = epoch_of(Loader(reader, view, 5))
    made = epoch_of(NvjpegLoader(reader, view, 5, 1, 0, CPU))
    assert len(made) == len(expected)
    for one, other in zip(made, expected, strict=True):
        assert np.array_equal(one.request.ids, other.request.ids) and torch.equal(one.labels, other.labels)
        assert one.images.shape == other.images.shape and one.images.dtype == torch.uint8
        assert one.images.is_contiguous() and bool(one.weights.all())
        difference = (one.images.int() - other.images.int()).abs()
        assert difference.float().mean() < 4 and difference.max() < 50, "other samples differ by 60 in the mean"


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 0), (3, 2)])
def test_the_same_pixels_whatever_the_threads(threads: int, prefetch: int, tmp_path: Path) -> None:
    reader = make_reader(tmp_path, COUNTS, SIZES)
    view = View(10, "random-resized")
    expected = epoch_of(NvjpegLoader(reader, view, 5, 1, 1, CPU))
    made = epoch_of(NvjpegLoader(reader, view, 5, threads, prefetch, CPU))
    assert all(torch.equal(one.images, other.images) for one, other in zip(made, expected, strict=True))


def cmyk(seed: int) -> bytes:
    return encode(Image.fromarray(picture(seed, 12, 12)).convert("CMYK"), "JPEG")


def test_what_is_no_plain_jpeg_is_decoded_on_the_host_and_what_is_nothing_is_named(tmp_path: Path) -> None:
    files = {
        "good": jpg(0, 12, 12),
        "gray": encode(picture(1, 12, 12)[:, :, 0], "JPEG"),
        "cmyk": cmyk(2),
        "png": encode(picture(3, 12, 12)),
        "empty": b"",
        "text": b"not an image",
        "header": jpg(6, 12, 12)[:300],
        "progressive": encode(picture(7, 12, 12), "JPEG", progressive=True),
    }
    members = [pair for key, data in files.items() for pair in ((f"{key}.cls", b"0"), (f"{key}.jpg", data))]
    reader = SplitReader(tmp_path, split_of([add_shard(tmp_path, "train-000000", members, 0, len(files))]))
    loaders = (Loader(reader, View(12, "none"), 0), NvjpegLoader(reader, View(12, "none"), 0, 1, 0, CPU))
    request = [[TileRequest(0, 0, 0, np.arange(len(files)))]]
    ((cpu,),), ((made,),) = (list(loader.steps(request)) for loader in loaders)
    names, told = list(files), [{bad.key for bad in loader.stats.bad} for loader in loaders]
    assert told[0] == told[1] >= {"empty", "text"}
    assert made.weights.tolist() == cpu.weights.tolist() == [float(name not in told[0]) for name in names]
    assert all(bad.reason for bad in loaders[1].stats.bad)
    assert (made.images.int() - cpu.images.int()).abs().max() <= 4
    assert all(not made.images[names.index(name)].any() for name in told[0])


def test_a_tile_without_samples(tmp_path: Path) -> None:
    reader = make_reader(tmp_path, (2,))
    for prefetch in (0, 2):
        loader = NvjpegLoader(reader, View(12, "none"), 0, 1, prefetch, CPU)
        ((tile,),) = loader.steps([[TileRequest(0, 0, 0, np.arange(0))]])
        assert tile.images.shape == (0, 12, 12, 3) and tile.labels.shape == (0,)


def test_a_box_is_cut_before_it_is_scaled() -> None:
    image_CHW = torch.zeros((3, 40, 60), dtype=torch.uint8)
    image_CHW[:, 10:26, 20:36] = 200
    for size in (16, 8, 3):
        made = cut_and_scaled(image_CHW, (10, 20, 16, 16), size)
        assert made.shape == (1, 3, size, size) and torch.allclose(made, torch.tensor(200.0))
    assert cut_and_scaled(image_CHW, (0, 0, 40, 40), 20).mean() == pytest.approx(200 * 16 * 16 / 1600, rel=0.05)


def test_it_is_refused_without_a_gpu(stripes_set: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--decode nvjpeg needs a GPU, and this run has none"):
        check_decoder(CPU)
    for values, said in (({}, "needs a GPU"), ({"loader": "stream"}, "needs --loader exact")):
        config = from_flat({"data": str(stripes_set), "output": str(tmp_path), "decode": "nvjpeg", **values})
        with pytest.raises(UserError, match=said):
            make_training_loader(config, open_dataset(config, World()), World(), 1, CPU)
    with pytest.raises(UserError, match="--decode nvjpeg: keeps no pixels in memory"):
        from_flat({"decode": "nvjpeg", "cache": "host"})
