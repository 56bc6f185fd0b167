"""Batches are the same for any number of workers and processes; errors if workers do not answer."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from crsam_ext.training import images, loader
from crsam_ext.training.data import epoch_order, load
from crsam_ext.training.errors import TrainingError
from crsam_ext.training.loader import Images, Pool, Request
from crsam_ext.training.options import parse
from crsam_ext.training.ranks import ALONE, Ranks

from ..ranks import Ranks as Processes

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
AUGMENTED = "--auto-augment rand-m9-mstd0.5 --mixup 0.4 --cutmix 1 --reprob 0.5 --image-size 32,40@0.5 --epochs 2"
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc of Linux")


@pytest.fixture(autouse=True)
def no_workers_left():
    """Kill workers that remain: failed iterations may live as long as their tracebacks."""
    yield
    loader.kill_all()


class Pretended(Ranks):
    """One of several ranks; the others find the same bad files."""

    def first(self, function):
        return function()

    def gather(self, value):
        return [value]


def load_data(command, workers=0, ranks=ALONE):
    return load(parse([*command.split(), "--workers", str(workers)]), CPU, ranks)


def bits(batch):
    return tuple(sha256(tensor.contiguous().numpy()).hexdigest() for tensor in (batch.x, batch.y))


@pytest.fixture
def tar_folder(photograph_crops, tmp_path):
    """Return a folder with the photographs in train.tar and val.tar."""
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            tar.add(photograph_crops / split, ".")
    return tmp_path


@pytest.fixture(params=["folder", "tar", "synthetic-jpeg", "cifar10", "synthetic"])
def command(request, photograph_crops, tar_folder, cifar10):
    """Return options for each kind of images, with all random augmentation."""
    kind = request.param
    path = {"folder": photograph_crops, "tar": tar_folder, "cifar10": cifar10}.get(kind, 2)
    command = f"--data {kind}:{path} --batch-size 16 {AUGMENTED}"
    if kind == "cifar10":
        return command.replace("--image-size 32,40@0.5", "")
    return command.replace("--auto-augment rand-m9-mstd0.5", "") if kind == "synthetic" else command


def epochs(data):
    return [[bits(batch) for batch in data.train(epoch, 0)] for epoch in range(2)]


def test_batches_do_not_depend_on_workers_and_processes(command):
    """There are two epochs; except for CIFAR, the second has larger images."""
    if "synthetic:" in command:
        expected = epochs(load(parse(command.split()), CPU))
        workers_of = [load(parse(command.split()), CPU, Pretended(rank, 2)) for rank in range(2)]
    else:
        expected = epochs(load_data(command))
        assert all(epochs(load_data(command, workers)) == expected for workers in (1, 4))
        workers_of = [load_data(command, workers, Pretended(workers, 2)) for workers in range(2)]
    assert len({bits for epoch in expected for bits in epoch}) == sum(map(len, expected)) > 5
    for epoch in range(2):
        parts = zip(*(data.train(epoch, 0) for data in workers_of), strict=True)
        joined = [first._replace(x=torch.cat([first.x, other.x]), y=torch.cat([first.y, other.y]))
                  for first, other in parts]  # fmt: skip
        assert [bits(batch) for batch in joined] == expected[epoch]


def test_an_epoch_that_starts_later_has_the_same_batches(command):
    data = load(parse(command.split()), CPU)
    whole = [bits(batch) for batch in data.train(1, 0)]
    assert len(whole) == data.steps > 1
    for first in range(data.steps + 1):
        assert [bits(batch) for batch in data.train(1, first)] == whole[first:]


def test_no_file_of_earlier_steps_is_opened(photograph_crops, monkeypatch):
    data = load_data(f"--data folder:{photograph_crops} --image-size 32 --batch-size 8")
    opened = []
    read = images.Files._read
    monkeypatch.setattr(images.Files, "_read", lambda self, *place: opened.append(place[1]) or read(self, *place))
    assert len(list(data.train(0, 0))) == 6
    whole = opened.copy()
    assert len(set(whole)) == 48
    opened.clear()
    assert len(list(data.train(0, 4))) == 2
    assert opened == whole[32:]


def test_image_sizes_follow_the_epochs(photograph_crops):
    data = load_data(f"--data folder:{photograph_crops} --image-size 24,32@0.5,40@0.75 --epochs 8 --batch-size 16", 2)
    sides = [next(iter(data.train(epoch, 0))).x.shape[-1] for epoch in range(8)]
    assert sides == [24, 24, 24, 24, 32, 32, 40, 40]
    assert data.shape == (3, 40, 40)
    assert {batch.x.shape[1:] for batch in data.test()} == {(3, 40, 40)}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("kind", ["folder", "digits", "synthetic"])
def test_every_validation_sample_is_on_one_process_and_in_order(kind, size, photograph_crops):
    """There are 15 images in batches of 6, 8 or 16; each rank reads its files in order."""
    batch_size = 6 if size == 3 else max(8, size)
    command = {"folder": f"--data folder:{photograph_crops} --image-size 16 --workers 0", "digits": "--data digits",
               "synthetic": "--data synthetic:3 --image-size 16"}[kind]  # fmt: skip
    options = parse([*command.split(), "--batch-size", str(batch_size)])
    whole = [image for batch in load(options, CPU).test() for image in zip(batch.x, batch.y, strict=True)]
    number = {x.numpy().tobytes(): index for index, (x, _) in enumerate(whole)}
    seen = []
    for rank in range(size):
        batches = list(load(options, CPU, Pretended(rank, size)).test())
        assert all(len(batch.x) for batch in batches)
        own = [number.get(x.numpy().tobytes()) for batch in batches for x in batch.x]
        seen += own
        if kind != "synthetic":
            assert own == sorted(own)
    assert len(seen) == len(whole) == {"folder": 15, "digits": 360, "synthetic": 30}[kind]
    if kind != "synthetic":
        assert set(seen) == set(number.values())


def shared_check(rank, size, folder, more):
    """Return the error message of one rank, or its part of the validation labels."""
    try:
        data = load_data(f"--data folder:{folder} --image-size 16 --batch-size 4 {more}", ranks=Ranks(rank, size))
    except TrainingError as error:
        return str(error)
    return [label for batch in data.test() for label in batch.y.tolist()]


def test_processes_share_the_check_of_validation_images(jpeg_folder):
    """Each rank reads half of the 14 readable images; all know the result, and no image counts twice."""
    path = jpeg_folder / "val" / "flower" / "2.JPEG"
    path.write_bytes(b"")
    processes = Processes(2)
    try:
        refusals = processes(shared_check, str(jpeg_folder), "")
        labels = processes(shared_check, str(jpeg_folder), "--skip-bad-val")
    finally:
        processes.close()
    assert refusals == [f"1 of 15 validation images cannot be read: {path}; use --skip-bad-val to ignore them"] * 2
    assert [len(of_rank) for of_rank in labels] == [7, 7]
    assert sorted(labels[0] + labels[1]) == [0] * 5 + [1] * 4 + [2] * 5


def test_training_drops_the_last_batch_and_every_process_has_samples(photograph_crops):
    command = f"--data folder:{photograph_crops} --image-size 16 --batch-size"
    for batch_size, steps in ((47, 1), (48, 1), (16, 3), (10, 4)):
        data = load_data(f"{command} {batch_size}")
        assert [len(batch.x) for batch in data.train(0, 0)] == [batch_size] * steps
    with pytest.raises(TrainingError, match="--batch-size 49 is larger than the number of training samples"):
        load_data(f"{command} 49")
    with pytest.raises(TrainingError, match="cannot be divided equally among 3 processes"):
        load_data(f"{command} 16", ranks=Pretended(0, 3))
    with pytest.raises(
        TrainingError, match="--mixup pairs samples: the number of samples of each process must be even, but is 3"
    ):
        load_data(f"{command} 6 --mixup 1", ranks=Pretended(0, 2))


def test_no_sample_seeds_all_devices(photograph_crops, monkeypatch):
    """torch.manual_seed takes 240 µs."""
    command = f"--data folder:{photograph_crops} --batch-size 16 {AUGMENTED}"
    data = load_data(command)
    expected = [bits(batch) for batch in data.train(0, 0)]
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("torch.manual_seed"))
    assert [bits(batch) for batch in data.train(0, 0)] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_neither_uses_nor_changes_the_global_generators(workers, photograph_crops):
    data = load_data(f"--data folder:{photograph_crops} --image-size 32 --batch-size 16", workers)
    torch.manual_seed(1)
    expected = [bits(batch) for batch in data.train(0, 0)]
    torch.manual_seed(2)
    before = torch.get_rng_state()
    iterator = iter(data.train(0, 0))
    assert bits(next(iterator)) == expected[0]
    assert workers == 0 or torch.get_rng_state().equal(before)
    torch.rand(5)
    assert [bits(batch) for batch in iterator] == expected[1:]


# Workers -------------------------------------------------------------------------------------------------------------


def workers_now():
    return sorted(process.pid for process in multiprocessing.active_children())


def test_workers_start_once_and_an_epoch_may_be_abandoned(photograph_crops):
    data = load_data(f"--data folder:{photograph_crops} --image-size 32 --batch-size 8", 2)
    expected = [bits(batch) for batch in data.train(0, 0)]
    started = workers_now()
    assert len(started) == 2
    for steps in (1, 3, 6):
        for _, batch in zip(range(steps), data.train(1, 0), strict=False):
            assert len(batch.x) == 8
        assert [bits(batch) for batch in data.train(0, 0)] == expected
        assert sum(len(batch.x) for batch in data.test()) == 15
    assert workers_now() == started


def test_two_iterations_at_once_are_an_error(photograph_crops):
    data = load_data(f"--data folder:{photograph_crops} --image-size 32 --batch-size 8", 2)
    training = iter(data.train(0, 0))
    next(training)
    assert len(list(data.test())) == 2
    with pytest.raises(RuntimeError, match="another iteration"):
        next(training)


def test_workers_ignore_signals_to_the_process_group(photograph_crops):
    data = load_data(f"--data folder:{photograph_crops} --image-size 32 --batch-size 8", 2)
    iterator = iter(data.train(0, 0))
    batches = [next(iterator)]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        for pid in workers_now():
            os.kill(pid, number)
    batches += iterator
    assert len(batches) == data.steps == 6
    assert len(list(data.train(1, 0))) == 6


class Failing(images.Files):
    """Files that call a function when one of them is read."""

    def _read(self, index, name):
        if name.endswith("/7.JPEG") and "/train/" in name:
            self.fail()
        return super()._read(index, name)

    def fail(self):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_reported(photograph_crops, monkeypatch):
    """The signal is that of a system that runs out of memory."""
    monkeypatch.setattr(images, "Files", Failing)
    data = load_data(f"--data folder:{photograph_crops} --image-size 32 --batch-size 8", 2)
    assert len(workers_now()) == 2
    with pytest.raises(TrainingError, match=r"^a worker process died.*use fewer --workers"):
        list(data.train(0, 0))
    assert workers_now() == []


def test_a_worker_killed_while_the_step_computes_is_reported(photograph_crops):
    """PyTorch raises at any point of the program; `explained` translates the error."""
    data = load_data(f"--data folder:{photograph_crops} --image-size 32 --batch-size 8", 2)
    iterator = iter(data.train(0, 0))
    next(iterator)
    with pytest.raises((RuntimeError, TrainingError)) as raised:  # noqa: PT012, which of the lines is not known
        os.kill(workers_now()[0], signal.SIGKILL)
        while True:
            torch.rand(100, 100) @ torch.rand(100, 100)
    assert "a worker process died" in str(loader.explained(raised.value))
    assert loader.explained(RuntimeError("of another kind")) is None


def test_a_file_that_hangs_is_reported(jpeg_folder):
    """The file is a FIFO without a writer. The workers end soon afterwards, although they ignore SIGTERM."""
    path = jpeg_folder / "train" / "china" / "3.JPEG"
    path.unlink()
    os.mkfifo(path)
    data = load_data(f"--data folder:{jpeg_folder} --image-size 32 --batch-size 8 --data-timeout 2", 2)
    start = time.perf_counter()
    with pytest.raises(TrainingError, match=r"^a worker process delivered no images for 2 seconds.*--data-timeout"):
        list(data.train(0, 0))
    assert time.perf_counter() - start < 30
    assert workers_now() == []


@pytest.mark.parametrize("end", ["sys.exit(3)", "os.kill(os.getpid(), signal.SIGINT)"])
def test_the_program_ends_although_a_worker_hangs(end, jpeg_folder):
    path = jpeg_folder / "train" / "china" / "3.JPEG"
    path.unlink()
    os.mkfifo(path)
    script = (
        "import os, signal, sys, torch\n"
        "from crsam_ext.training.data import load\n"
        "from crsam_ext.training.options import parse\n"
        f"data = load(parse('--data folder:{jpeg_folder} --image-size 32 --batch-size 4 --workers 2'.split()),\n"
        "            torch.device('cpu'))\n"
        "batches = data.train(0, 0)\n"
        f"for _ in range({epoch_order(48, 0, 0).tolist().index(3) // 4}):\n"
        "    next(batches)\n"
        f"{end}\n"
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=240, capture_output=True, text=True)
    assert done.returncode in (3, -signal.SIGINT, 1), done.stderr


@pytest.mark.parametrize("workers", [0, 2])
def test_lack_of_file_descriptors_does_not_mean_a_broken_file(workers, photograph_crops, monkeypatch):
    def fail(self):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(images, "Files", Failing)
    monkeypatch.setattr(Failing, "fail", fail)
    data = load_data(f"--data folder:{photograph_crops} --image-size 32 --batch-size 8", workers)
    with pytest.raises(TrainingError, match=r"^cannot read .*/7.JPEG: Too many open files$"):
        list(data.train(0, 0))


# Memory --------------------------------------------------------------------------------------------------------------

CLASSES, PER_CLASS = 1000, 1000


@pytest.fixture(scope="module")
def many():
    """Return a million names, as long as those of ImageNet."""
    entries = [images.Entry(f"n0000_{index:08}.JPEG") for index in range(PER_CLASS)]
    return images.Files(Path("."), ((f"n{label:08}", entries) for label in range(CLASSES)))


def test_a_million_names_are_stored_in_a_few_arrays(many):
    assert len(many) == CLASSES * PER_CLASS
    assert many.name(123_456) == "./n00000123/n0000_00000456.JPEG"
    assert many.label(123_456) == 123
    assert many.nbytes == 1_000_000 * (29 + 8 + 4) + 8
    assert not any(isinstance(value, list | tuple | dict) for value in vars(many).values())


class _Named:
    """Does what a worker does with a name, but opens no file."""

    def __init__(self, files):
        self._files = files

    def __len__(self):
        return len(self._files)

    def label(self, index):
        return self._files.label(index)

    def name(self, index):
        return self._files.name(index)

    def pixels(self, index):
        self.name(index)
        return torch.zeros(1, 1, 3, dtype=torch.uint8)


def private(pid):
    """Return the private memory of a process, in bytes."""
    with open(f"/proc/{pid}/smaps_rollup") as lines:
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty"))


@linux
def test_workers_do_not_copy_the_names(many):
    source = _Named(many)
    pool = Pool(Images(source, source, lambda pixels, size: pixels, lambda pixels, size: pixels, 0), 4, 60)
    order = np.random.default_rng(0).permutation(len(many))

    def use(parts):
        for part in parts:
            for _ in pool.answers([Request(None, 1, part.tolist())] * 4):  # one for each worker
                pass

    use(np.split(order[:4_000], 4))
    before = [private(pid) for pid in workers_now()]
    use(np.split(order, 1000)[::10])  # 100 000 names, so that nearly every page of the arrays is read
    grown = [private(pid) - old for pid, old in zip(workers_now(), before, strict=True)]
    assert len(grown) == 4
    # A million Python strings would take 80 MB in each worker; requests and answers take up to 4 MB.
    assert sum(grown) < 4 * 4e6
