"""Folders of images as people have them: what is the data, and what is said of the rest."""

import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from contextlib import nullcontext
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image

from crsam_ext.training import images
from crsam_ext.training.data import load
from crsam_ext.training.errors import TrainingError
from crsam_ext.training.options import parse

pytestmark = pytest.mark.slow

RUN = "--model test_resnet --image-size 32 --batch-size 8 --epochs 1"


def load_data(folder, more=""):
    options = parse(f"--data folder:{folder} --image-size 32 --batch-size 8 --workers 0 {more}".split())
    return load(options, torch.device("cpu"))


def picture(path, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(256, size=(40, 48, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(pixels[..., 0].astype(np.float32))
    elif mode == "I":
        image = Image.fromarray(pixels[..., 0].astype(np.int32) * 257)
    elif mode != "RGB":
        image = image.convert(mode)
    image.save(path, **options)


# Which files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stray", [".ipynb_checkpoints/0.png", "preview.png", "__MACOSX/0.png", "notes.txt",
                                   "ape/.hidden.png", "ape/notes.txt", "ape/.thumbnails/0.png"])  # fmt: skip
@pytest.mark.parametrize("split", ["train", "val"])
def test_what_is_no_data_is_left_out_and_named(stray, split, image_folder, capsys):
    shutil.copytree(image_folder / "train" / "ape", image_folder / "val" / "ape")
    expected = load_data(image_folder)
    path = image_folder / split / stray
    if path.suffix == ".png":
        picture(path)
    else:
        path.write_text("nothing")
    capsys.readouterr()
    data = load_data(image_folder)
    name = stray if stray.startswith("ape/.h") or "/" not in stray else stray.removesuffix("/0.png")
    assert capsys.readouterr().err == f"crsam-train: left out of {image_folder / split}: {name}\n"
    assert (data.classes, data.steps) == (expected.classes, expected.steps)
    assert sum(len(y) for _, y in data.test()) == sum(len(y) for _, y in expected.test())


def test_many_files_that_are_left_out_are_counted(image_folder, capsys):
    for index in range(12):
        (image_folder / "train" / f"notes{index}.txt").write_text("nothing")
    load_data(image_folder)
    names = ", ".join(f"notes{index}.txt" for index in range(5))
    assert f": {names} and 7 more\n" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["webp", "WEBP", "JPG", "jpeg", "bmp", "gif", "tif", "ppm"])
def test_endings(ending, image_folder):
    for index in range(8):
        picture(image_folder / "train" / "dog" / f"{index}.{ending}")
    picture(image_folder / "val" / "dog" / f"0.{ending}")
    data = load_data(image_folder)
    assert data.classes == 4
    assert data.steps == 4
    assert sorted(y for _, labels in data.test() for y in labels.tolist()) == [1, 1, 2, 2, 2, 3]


def test_classes_are_numbered_in_natural_order(tmp_path):
    for name in ("10", "9", "1"):
        for split in ("train", "val"):
            picture(tmp_path / split / name / "0.png")
    train, val, count = images.find(tmp_path, "--data")
    assert [(path.parent.name, label) for path, label in train] == [("1", 0), ("9", 1), ("10", 2)]
    assert [label for _, label in val] == [0, 1, 2]
    assert count == 3


@pytest.mark.parametrize("names", [("01", "1"), ("5", "5²"), ("b", "①")])
def test_the_order_is_a_function_of_the_names(names, tmp_path, monkeypatch):
    """Whatever the order in which the file system lists them; digits that int() does not take are letters."""
    for name in names:
        for split in ("train", "val"):
            picture(tmp_path / split / name / "0.png")
    numbered = []
    for backwards in (False, True):

        def scan(folder, scandir=os.scandir, backwards=backwards):
            with scandir(folder) as entries:
                return nullcontext(sorted(entries, key=lambda entry: entry.name, reverse=backwards))

        with monkeypatch.context() as patch:
            patch.setattr(images.os, "scandir", scan)
            train, _, _ = images.find(tmp_path, "--data")
        numbered.append([path.parent.name for path, _ in train])
    assert numbered == [list(names)] * 2


def test_links_are_followed(image_folder, tmp_path):
    shutil.move(image_folder / "train" / "cat", tmp_path / "cat")
    (image_folder / "train" / "cat").symlink_to(tmp_path / "cat")
    assert load_data(image_folder).classes == 3


def only_in_val(folder):
    picture(folder / "val" / "cow" / "0.png")
    return r"val has classes that .*train lacks: cow"


def nested(folder):
    picture(folder / "train" / "ape" / "young" / "0.png")
    return "ape/young is a folder within a class"


def nested_in_val(folder):
    picture(folder / "val" / "bee" / "young" / "0.png")
    return "bee/young is a folder within a class"


def empty_class(folder):
    (folder / "train" / "cow").mkdir()
    return "0 images in .*train, class cow"


def empty_val(folder):
    shutil.rmtree(folder / "val")
    (folder / "val" / "bee").mkdir(parents=True)
    return "0 images in .*val"


def empty_train(folder):
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()
    return "0 images in .*train"


def sixteen_bits(folder):
    picture(folder / "val" / "bee" / "0.png", "I;16")
    return r"bee/0.png has more than 8 bits a channel \(mode I;16\)"


def floats(folder):
    picture(folder / "val" / "bee" / "2.tiff", "F")
    return r"bee/2.tiff has more than 8 bits a channel \(mode F\)"


def integers(folder):
    picture(folder / "val" / "bee" / "2.tiff", "I")
    return r"bee/2.tiff has more than 8 bits a channel \(mode I\)"


def bomb(folder):
    Image.new("1", (20_000, 20_000)).save(folder / "val" / "bee" / "huge.png")
    return r"bee/huge.png: Image size \(400000000 pixels\) exceeds limit"


@pytest.mark.parametrize("harm", [only_in_val, nested, nested_in_val, empty_class, empty_val, empty_train, sixteen_bits,
                                  floats, integers, bomb])  # fmt: skip
def test_folders_that_are_refused(harm, image_folder):
    message = harm(image_folder)
    with pytest.raises(TrainingError, match=message):
        load_data(image_folder)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["I;16", "bomb"])
def test_training_images_that_are_refused(mode, workers, image_folder, crsam_train, here, capsys):
    """When they are read: in one line, also from a worker."""
    if mode == "bomb":
        Image.new("1", (20_000, 20_000)).save(image_folder / "train" / "ape" / "0.png")
    else:
        picture(image_folder / "train" / "ape" / "0.png", mode)
    assert crsam_train(f"--data folder:{image_folder} {RUN} --workers {workers} --output out") == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"crsam-train: {image_folder}/train/ape/0.png")
    assert "Traceback" not in line


def test_a_class_that_validation_lacks_is_named(image_folder, capsys):
    load_data(image_folder)
    assert f"{image_folder / 'val'} has no images of ape\n" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_modes_are_made_rgb(mode, tmp_path):
    path = tmp_path / ("0.png" if mode != "CMYK" else "0.tif")
    picture(path, mode)
    image = images.read(path)
    assert image.mode == "RGB"
    assert len(np.unique(np.asarray(image))) > {"1": 1, "P": 4}.get(mode, 50)


# Files that are broken -----------------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


def nothing(path):
    path.write_bytes(b"")


def html(path):
    path.write_text("<html>404</html>")


def no_pixels(path):
    path.write_bytes(path.read_bytes()[:60])


def other_format(path):
    path.write_bytes(b"\xff\xd8\xff\xe0" + bytes(range(256)))


breaks = pytest.mark.parametrize("harm", [cut, nothing, html, no_pixels, other_format], ids=lambda f: f.__name__)


@breaks
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_training_files(harm, workers, image_folder, crsam_train, here, capsys, read_log):
    for index in (0, 3):
        harm(image_folder / "train" / "bee" / f"{index}.png")
    assert crsam_train(f"--data folder:{image_folder} {RUN} --workers {workers} --output out") == 0
    files = ", ".join(str(image_folder / "train" / "bee" / f"{index}.png") for index in (0, 3))
    said = f"crsam-train: 2 training images cannot be read, others took their place: {files}\n"
    assert said in capsys.readouterr().err
    assert [row["bad_files"] for row in read_log(here / "out")] == ["2"]


def test_broken_files_are_replaced_by_the_next_readable_ones(image_folder):
    for index in (6, 7):
        html(image_folder / "train" / "cat" / f"{index}.png")
    train, _, _ = images.find(image_folder, "--data")
    data_set = images.ImageFiles(train, replaces=True)
    data_set.transform = lambda image: image.tobytes()
    expected = [data_set[index] for index in range(len(data_set))]
    assert expected[-1] == expected[-2] == expected[0]  # the next one after the last is the first
    assert data_set.broken() == [image_folder / "train" / "cat" / f"{index}.png" for index in (6, 7)]
    data_set.forget()
    assert data_set.broken() == []


def test_the_same_files_are_bad_for_any_number_of_workers(image_folder, crsam_train, here, read_log, read_state):
    html(image_folder / "train" / "cat" / "5.png")
    for workers in (1, 2):
        command = f"--data folder:{image_folder} {RUN} --epochs 2 --workers {workers} --output {workers}"
        assert crsam_train(command) == 0
    first, second = (read_log(here / name) for name in ("1", "2"))
    assert [row["bad_files"] for row in first] == [row["bad_files"] for row in second] == ["1", "1"]


@pytest.mark.parametrize(
    "error", [RuntimeError, NotImplementedError, AttributeError, KeyError, struct.error, zlib.error]
)
def test_whatever_pillow_raises_the_file_is_broken(error, tmp_path, monkeypatch):
    """AVIF raises RuntimeError, BLP NotImplementedError, SPIDER AttributeError, and so on."""
    picture(tmp_path / "0.png")

    def fails(*_):
        raise error

    monkeypatch.setattr(Image.Image, "convert", fails)
    assert images.read(tmp_path / "0.png") is None


def test_memory_that_is_short_is_no_broken_file(tmp_path, monkeypatch):
    picture(tmp_path / "0.png")

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", fails)
    with pytest.raises(MemoryError):
        images.read(tmp_path / "0.png")


@pytest.mark.parametrize("workers", [0, 2])
def test_no_training_file_can_be_read(workers, image_folder, crsam_train, here, capsys):
    for path in (image_folder / "train").rglob("*.png"):
        html(path)
    assert crsam_train(f"--data folder:{image_folder} {RUN} --workers {workers} --output out") == 2
    assert capsys.readouterr().err.endswith("crsam-train: none of the 24 training images can be read\n")


@breaks
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_validation_files_are_refused_before_the_training(
    harm, workers, image_folder, crsam_train, here, capsys
):
    path = image_folder / "val" / "cat" / "1.png"
    harm(path)
    assert crsam_train(f"--data folder:{image_folder} {RUN} --workers {workers} --output out") == 2
    message = f"1 of 5 validation images cannot be read: {path}; --skip-bad-val leaves them out\n"
    assert capsys.readouterr().err.endswith(f"crsam-train: {message}")
    assert not (here / "out").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_validation_files_are_left_out_when_asked(workers, image_folder, crsam_train, here, capsys, read_log):
    """They count neither as right nor as wrong, and no other image counts twice."""
    command = f"--data folder:{image_folder} {RUN} --workers {workers} --skip-bad-val --output"
    html(image_folder / "val" / "cat" / "1.png")
    assert crsam_train(f"{command} one") == 0
    assert "1 of 5 validation images cannot be read and are left out" in capsys.readouterr().err
    (image_folder / "val" / "cat" / "1.png").unlink()
    assert crsam_train(f"{command} other") == 0
    one, other = (read_log(here / name)[0] for name in ("one", "other"))
    assert (one["test_loss"], one["test_accuracy"]) == (other["test_loss"], other["test_accuracy"])


def test_all_validation_files_are_broken(image_folder):
    for path in (image_folder / "val").rglob("*.png"):
        html(path)
    for more, advice in (("", True), ("--skip-bad-val", False)):
        with pytest.raises(TrainingError, match="5 of 5 validation images cannot be read") as refusal:
            load_data(image_folder, more)
        assert ("--skip-bad-val" in str(refusal.value)) == advice


def test_a_validation_file_that_breaks_later(image_folder):
    data = load_data(image_folder)
    assert len(list(data.test())) == 1
    html(image_folder / "val" / "cat" / "1.png")
    with pytest.raises(TrainingError, match="1 of 5 validation images cannot be read"):
        list(data.test())


# Streams and disks ---------------------------------------------------------------------------------------------------

PROGRAM = [sys.executable, "-m", "crsam_ext.training", "--model", "mlp", "--epochs", "1", "--threads", "1"]


@pytest.mark.parametrize("size", [100, 20_000])
def test_a_disk_that_is_full(size, tmp_path):
    """Here: files may not be longer. The first is the configuration, the last a checkpoint."""
    limited = "import resource as r, runpy, sys; r.setrlimit(r.RLIMIT_FSIZE, 2 * (int(sys.argv.pop(1)),)); "
    limited += "runpy.run_module('crsam_ext.training', run_name='__main__')"
    command = [sys.executable, "-c", limited, str(size), *PROGRAM[3:], "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"crsam-train: cannot write {tmp_path}/out/")
    assert done.stderr.endswith(": File too large\n")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("closed", ["stdout", "reader"])
def test_nobody_reads(closed, tmp_path):
    command = " ".join([*PROGRAM, "--output", str(tmp_path / "out")])
    end = {"stdout": ">&-", "reader": "| true; exit ${PIPESTATUS[0]}"}[closed]
    done = subprocess.run(["bash", "-c", f"{command} {end}"], capture_output=True, text=True, check=False)
    assert done.returncode == (1 if closed == "reader" else 0), done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert (tmp_path / "out" / "log.csv").exists()


full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is of Linux")


@full
def test_stdout_is_a_file_on_a_full_disk(tmp_path):
    with open("/dev/full", "w") as stdout:
        command = [*PROGRAM, "--output", str(tmp_path / "out")]
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("crsam-train: [Errno 28] No space left on device")
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "out" / "log.csv").read_text().count("\n") == 2  # the epoch is there


@full
def test_stderr_is_a_file_on_a_full_disk():
    with open("/dev/full", "w") as stderr:
        done = subprocess.run([*PROGRAM, "--nonsense"], stderr=stderr, check=False)
    assert done.returncode == 2


def test_a_terminal_that_knows_ascii_only(tmp_path):
    command = [*PROGRAM, "--output", str(tmp_path / "Läufe")]
    env = {"PYTHONIOENCODING": "ascii", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert r"L\xe4ufe" in done.stdout
    assert (tmp_path / "Läufe" / "log.csv").exists()


@pytest.mark.parametrize(("batch_size", "steps"), [(359, 4), (718, 2), (64, 23), (1437, 1)])
def test_a_last_batch_of_one(batch_size, steps, capsys):
    options = parse(["--data", "digits", "--batch-size", str(batch_size)])
    data = load(options, torch.device("cpu"))
    sizes = [len(y) for _, y in data.train(0)]
    assert len(sizes) == data.steps == steps
    assert 1 not in sizes
    assert ("it is left out" in capsys.readouterr().err) == (1437 % batch_size == 1)


def test_batches_of_one_under_batch_norm(crsam_train, here, capsys):
    assert crsam_train("--model test_resnet --batch-size 1 --output out") == 2
    assert "batch norm takes no batch of one sample: give a larger --batch-size" in capsys.readouterr().err


def test_not_enough_memory(crsam_train, here, capsys, monkeypatch):
    loop = import_module("crsam_ext.training.loop")  # another test has it imported anew
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory."),
                  RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")):  # fmt: skip

        def fails(*_, error=error):
            raise error

        for where in ("load", "create_model", "train_epoch"):
            with monkeypatch.context() as patch:
                patch.setattr(loop, where, fails)
                assert crsam_train("--model mlp --overwrite --output out") == 2
            said = capsys.readouterr().err
            assert said.startswith("crsam-train: there is not enough memory")
            assert said.count("\n") == 1


def test_a_worker_that_is_killed(image_folder, crsam_train, here, capsys, monkeypatch):
    """As a system without memory does it."""

    class Killed(images.ImageFiles):
        def __getitem__(self, index):
            if self._replaces:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    monkeypatch.setattr(images, "ImageFiles", Killed)
    assert crsam_train(f"--data folder:{image_folder} {RUN} --workers 2 --output out") == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("crsam-train: a process that prepares images has died")
    assert "fewer --workers" in line
