"""The classifier that post-local SGD is tried on: its images, its model, and its control."""

import gzip
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.convergence.pool import Run
from benchmarks.options import choose
from benchmarks.vision import images
from benchmarks.vision.images import Images, Share, augmented, load, read_idx
from benchmarks.vision.resnet import ResNet
from benchmarks.vision.settings import settings
from benchmarks.vision.table import summarize
from benchmarks.vision.training import Classifying, Score, Worker, average_gradients, train
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from postlocal import strategies, virtual
from postlocal.comm.group import Group
from tests.models import equal, values

Ranks = Callable[..., list[Any]]


def write_idx(file: Path, content: Tensor) -> None:
    header = struct.pack(f">HBB{content.dim()}I", 0, 8, content.dim(), *content.shape)
    file.write_bytes(gzip.compress(header + content.numpy().tobytes()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of 64 random images, in the form of Fashion-MNIST's."""
    random = torch.Generator().manual_seed(0)
    for part in ("train", "t10k"):
        pixels = torch.randint(256, (64, 28, 28), dtype=torch.uint8, generator=random)
        labels = torch.randint(10, (64,), dtype=torch.uint8, generator=random)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", pixels)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    return tmp_path


@pytest.fixture
def task(folder: Path) -> Classifying:
    """Four workers, four epochs of two steps each."""
    # With 4, convolutions of torch 2.13 corrupt the heap on processors with AVX2 and no AVX-512.
    return Classifying(
        strategies.ddp(), workers=4, lr=0.4, epochs=4, batch_size=8, train_images=64, channels=8,
        folder=folder,
    )  # fmt: skip


def no_tick() -> None:
    return None


def test_bytes_are_read_as_they_were_written(tmp_path: Path) -> None:
    content = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "some.gz", content)
    assert torch.equal(read_idx(tmp_path / "some.gz"), content)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.gz").write_bytes(gzip.compress(struct.pack(">HBBI", 0, 8, 1, 5) + b"1234"))
    with pytest.raises(ValueError, match="must hold 5 bytes, got 4"):
        read_idx(tmp_path / "short.gz")


def test_another_type_of_values_is_refused(tmp_path: Path) -> None:
    (tmp_path / "floats.gz").write_bytes(gzip.compress(struct.pack(">HBBIf", 0, 13, 1, 1, 0.5)))
    with pytest.raises(ValueError, match="unsigned bytes"):
        read_idx(tmp_path / "floats.gz")


def test_a_missing_file_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        load(tmp_path, "train")


@pytest.mark.skipif(
    not images.FOLDER.exists(), reason=f"the Debian package {images.PACKAGE} is not installed"
)
def test_the_images_of_the_package_are_centred_and_scaled() -> None:
    training = load(images.FOLDER, "train")
    assert training.pixels.shape == (60_000, 1, 28, 28)
    assert training.labels.bincount().tolist() == [6000] * 10
    assert training.pixels.mean().abs() < 0.01
    assert (training.pixels.std() - 1).abs() < 0.01


def test_augmentation_shifts_and_mirrors_and_nothing_else() -> None:
    pixels = torch.arange(1.0, 50.0).reshape(1, 1, 7, 7).expand(200, 1, 7, 7)
    padded = torch.nn.functional.pad(pixels[:1], [2] * 4, value=-images.MEAN / images.DEVIATION)
    windows = [
        padded[0, 0, row : row + 7, column : column + 7].flip(mirror)
        for row in range(5) for column in range(5) for mirror in ([], [1])
    ]  # fmt: skip
    seen = augmented(pixels, torch.Generator().manual_seed(0))
    which = {next(i for i, w in enumerate(windows) if torch.equal(w, image[0])) for image in seen}
    assert len(which) > 40  # of 50


def test_workers_share_an_epoch_among_them() -> None:
    numbered = Images(torch.zeros(30, 1, 4, 4), torch.arange(30))
    shares = [Share(numbered, rank, workers=2, batch_size=5, seed=0) for rank in range(2)]
    first, second = (
        torch.cat([share.batch(step)[1] for step in steps for share in shares]).tolist()
        for steps in (range(3), range(3, 6))
    )
    assert sorted(first) == sorted(second) == list(range(30))
    assert first != second


def test_the_network_has_its_layers_and_normalises_after_each_convolution() -> None:
    network = ResNet(channels=4, blocks=2)
    kinds = [type(module) for module in network.modules()]
    past = 2  # convolutions of the ways past blocks, which do not count as layers
    assert kinds.count(nn.Conv2d) - past + kinds.count(nn.Linear) == 6 * 2 + 2
    assert kinds.count(nn.BatchNorm2d) == kinds.count(nn.Conv2d)
    assert network(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    assert network.blocks(network.stem(torch.zeros(3, 1, 28, 28))).shape == (3, 16, 4, 4)


def test_the_learning_rate_rises_over_an_epoch_and_drops_twice(task: Classifying) -> None:
    lrs = [task.lr_at(step) for step in range(task.steps)]
    assert lrs == pytest.approx([0.1, 0.25, 0.4, 0.4, 0.04, 0.04, 0.004, 0.004])
    assert replace(task, workers=1).lr_at(0) == 0.4


def train_ddp(rank: int, task: Classifying, steps: int) -> list[Tensor]:
    worker = Worker(task, rank)
    module = worker.model
    worker.model = DistributedDataParallel(module)
    for step in range(steps):
        worker.backward(step)
        worker.update(step)
    return [tensor.detach() for tensor in module.state_dict().values()]


def test_the_control_is_what_ddp_computes_batch_norm_too(ranks: Ranks, task: Classifying) -> None:
    pair = replace(task, workers=2, epochs=1, train_images=48)
    ddp = ranks(2, train_ddp, pair, pair.steps)[0]
    control, _ = train(pair, no_tick)
    for ours, theirs in zip(control.state_dict().values(), ddp, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_averaged_gradients_are_those_of_one_process_on_all_batches(task: Classifying) -> None:
    workers = [Worker(task, rank) for rank in range(task.workers)]

    def work(group: Group) -> list[Tensor]:
        model = workers[group.rank].model
        average_gradients(model, group)
        return gradients(model)

    alone = Worker(task, 0)
    for rank, worker in enumerate(workers):
        worker.backward(0)
        other = Worker(task, rank)
        other.model = alone.model
        other.backward(0)  # gradients add up
    for averaged in virtual.run(task.workers, work):
        for ours, total in zip(averaged, gradients(alone.model), strict=True):
            torch.testing.assert_close(ours, total / task.workers)


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_post_local_sgd_that_never_leaves_its_warm_up_is_the_control(task: Classifying) -> None:
    synchronous = strategies.post_local_sgd(task.steps, gradients="rank")
    control, bytes_of_control = train(task, no_tick)
    other, bytes_of_other = train(replace(task, strategy=synchronous), no_tick)
    assert equal(values(control), values(other))
    assert bytes_of_control == bytes_of_other


def test_statistics_kept_for_tests_are_means_over_workers_that_met(task: Classifying) -> None:
    still = replace(task, strategy=strategies.local_sgd(period=task.steps), lr=0.0)
    workers = [Worker(still, rank) for rank in range(still.workers)]
    for worker in workers:
        for step in range(still.steps):
            worker.backward(step)
    model, _ = train(still, no_tick)
    kept = [dict(worker.model.named_buffers()) for worker in workers]
    for name, buffer in model.named_buffers():
        each = torch.stack([buffers[name] for buffers in kept]).double()
        torch.testing.assert_close(buffer.double(), each.mean(0), rtol=1e-5, atol=1e-6)


def test_post_local_sgd_sends_less_than_ddp(task: Classifying) -> None:
    compared = settings(task, small_lr=0.1)
    score = compared["post-local-16"].train(no_tick)
    assert score.ddp_bytes / 2 < score.payload_bytes < score.ddp_bytes
    assert score.key == compared["post-local-16"].key
    assert 0 <= score.accuracy <= 100


def test_all_settings_use_images_equally_often(task: Classifying) -> None:
    compared = settings(task, small_lr=0.1)
    used = {each.steps * each.workers * each.batch_size for each in compared.values()}
    assert used == {4 * 64}
    assert len({each.key for each in compared.values()}) == len(compared)


def test_differences_are_from_the_control_of_the_same_seed(task: Classifying) -> None:
    compared = choose(settings(task, small_lr=0.1), "local-16", "ddp")
    results: dict[Run, Score] = {
        (name, seed): Score("key", "source", 90.0 + seed + (name != "ddp"), 95.0, 0.3, 1, 4, 1.0)
        for seed in range(2)
        for name in compared
    }
    rows = summarize(results, range(2))
    assert rows["local-16"]["differences"] == [1.0, 1.0]
    assert rows["ddp"]["accuracies"] == [90.0, 91.0]
