"""Image folders as found in practice: which files are the data, and which messages the others cause."""

import os
import shutil
import subprocess
import sys
import tarfile
from contextlib import nullcontext
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image

from crsam_ext.training import images
from crsam_ext.training.data import epoch_order, load
from crsam_ext.training.errors import TrainingError
from crsam_ext.training.loader import Images, Request
from crsam_ext.training.options import parse

pytestmark = pytest.mark.slow


def load_data(folder, more="", workers=0, kind="folder"):
    options = parse(f"--data {kind}:{folder} --image-size 32 --batch-size 8 --workers {workers} {more}".split())
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
def test_files_that_are_not_data_are_ignored_with_a_warning(stray, split, image_folder, capsys):
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
    assert capsys.readouterr().err == f"crsam-train: ignored in {image_folder / split}: {name}\n"
    assert (data.classes, data.steps) == (expected.classes, expected.steps)
    assert sum(len(batch.y) for batch in data.test()) == sum(len(batch.y) for batch in expected.test())


def test_the_warning_counts_further_ignored_files(image_folder, capsys):
    for index in range(12):
        (image_folder / "train" / f"notes{index}.txt").write_text("nothing")
    load_data(image_folder)
    names = ", ".join(f"notes{index}.txt" for index in range(5))
    assert f": {names} and 7 more\n" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["webp", "WEBP", "JPG", "jpeg", "bmp", "gif", "tif", "ppm"])
def test_images_of_all_file_extensions_are_found(ending, image_folder):
    for index in range(8):
        picture(image_folder / "train" / "dog" / f"{index}.{ending}")
    picture(image_folder / "val" / "dog" / f"0.{ending}")
    data = load_data(image_folder)
    assert data.classes == 4
    assert data.steps == 4
    assert sorted(label for batch in data.test() for label in batch.y.tolist()) == [1, 1, 2, 2, 2, 3]


def test_classes_are_numbered_in_natural_order(tmp_path):
    for name in ("10", "9", "1"):
        for split in ("train", "val"):
            picture(tmp_path / split / name / "0.png")
    train, val, count = images.find(tmp_path, "--data")
    names = [str(tmp_path / split / name / "0.png") for split in ("train", "val") for name in ("1", "9", "10")]
    assert [files.name(index) for files in (train, val) for index in range(3)] == names
    assert [files.label(index) for files in (train, val) for index in range(3)] == [0, 1, 2, 0, 1, 2]
    assert count == 3


@pytest.mark.parametrize("names", [("01", "1"), ("5", "5²"), ("b", "①")])
def test_the_order_depends_only_on_the_names(names, tmp_path, monkeypatch):
    """The order in which the file system lists them has no effect. Digits that int() does not accept count as
    letters."""
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
        numbered.append([train.name(index).split("/")[-2] for index in range(2)])
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
    return "ape/young is a folder inside a class folder"


def nested_in_val(folder):
    picture(folder / "val" / "bee" / "young" / "0.png")
    return "bee/young is a folder inside a class folder"


def empty_class(folder):
    (folder / "train" / "cow").mkdir()
    return "no images in .*train, class cow"


def empty_val(folder):
    shutil.rmtree(folder / "val")
    (folder / "val" / "bee").mkdir(parents=True)
    return "no images in .*val"


def empty_train(folder):
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()
    return "no images in .*train"


def sixteen_bits(folder):
    picture(folder / "val" / "bee" / "0.png", "I;16")
    return r"bee/0.png has more than 8 bits per channel \(mode I;16\)"


def floats(folder):
    picture(folder / "val" / "bee" / "2.tiff", "F")
    return r"bee/2.tiff has more than 8 bits per channel \(mode F\)"


def integers(folder):
    picture(folder / "val" / "bee" / "2.tiff", "I")
    return r"bee/2.tiff has more than 8 bits per channel \(mode I\)"


def bomb(folder):
    Image.new("1", (20_000, 20_000)).save(folder / "val" / "bee" / "huge.png")
    return r"bee/huge.png: Image size \(400000000 pixels\) exceeds limit"


@pytest.mark.parametrize("harm", [only_in_val, nested, nested_in_val, empty_class, empty_val, empty_train, sixteen_bits,
                                  floats, integers, bomb])  # fmt: skip
def test_invalid_folders_are_refused(harm, image_folder):
    message = harm(image_folder)
    with pytest.raises(TrainingError, match=message):
        load_data(image_folder)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["I;16", "bomb"])
def test_unsupported_training_images_are_refused(mode, workers, image_folder):
    """The error is raised when they are read, in one line, also from a worker."""
    path = image_folder / "train" / "ape" / "0.png"
    if mode == "bomb":
        Image.new("1", (20_000, 20_000)).save(path)
    else:
        picture(path, mode)
    data = load_data(image_folder, workers=workers)
    with pytest.raises(TrainingError, match=f"^{path}.*") as refusal:
        list(data.train(0, 0))
    assert "\n" not in str(refusal.value)


def test_a_class_without_validation_images_is_a_warning(image_folder, capsys):
    load_data(image_folder)
    assert f"{image_folder / 'val'} has no images of ape\n" in capsys.readouterr().err


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


def bad_files(data, epoch=0):
    return [name for batch in data.train(epoch, 0) for name in batch.bad]


@breaks
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_training_files_are_replaced_and_reported(harm, workers, image_folder):
    """Each is reported in the batch to which it belongs."""
    paths = [image_folder / "train" / "bee" / f"{index}.png" for index in (0, 3)]
    for path in paths:
        harm(path)
    data = load_data(image_folder, workers=workers)
    order = epoch_order(24, 0, 0).tolist()
    expected = [[str(path) for index, path in zip((8, 11), paths, strict=True) if index in order[start : start + 8]]
                for start in (0, 8, 16)]  # fmt: skip
    assert [sorted(batch.bad) for batch in data.train(0, 0)] == expected
    assert [sorted(batch.bad) for batch in data.train(0, 1)] == expected[1:]
    assert sorted(bad_files(data, 1)) == sorted(map(str, paths))


def test_a_missing_file_is_broken(image_folder):
    data = load_data(image_folder)
    path = image_folder / "train" / "bee" / "3.png"
    path.unlink()
    assert bad_files(data) == [str(path)]


def test_broken_files_are_replaced_by_the_next_readable_ones(image_folder):
    for index in (6, 7):
        html(image_folder / "train" / "cat" / f"{index}.png")
    train, val, _ = images.find(image_folder, "--data")
    data_set = Images(train, val, lambda pixels, size: pixels, lambda pixels, size: pixels, seed=0)
    answer = data_set[Request(0, 32, list(range(24)))]
    assert answer.pixels[23].equal(answer.pixels[22])
    assert answer.pixels[23].equal(answer.pixels[0])  # after the last image comes the first
    assert len({pixels.numpy().tobytes() for pixels in answer.pixels}) == 22
    assert answer.labels.tolist() == 8 * [0] + 8 * [1] + 6 * [2] + [0, 0]
    assert answer.bad == [str(image_folder / "train" / "cat" / f"{index}.png") for index in (6, 7)]


@pytest.mark.parametrize("workers", [0, 2])
def test_no_readable_training_file_is_an_error(workers, image_folder):
    for path in (image_folder / "train").rglob("*.png"):
        html(path)
    data = load_data(image_folder, workers=workers)
    with pytest.raises(TrainingError, match=r"^none of the 24 training images can be read$"):
        bad_files(data)


@breaks
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_validation_files_are_an_error_before_the_training(harm, workers, image_folder):
    path = image_folder / "val" / "cat" / "1.png"
    harm(path)
    message = f"^1 of 5 validation images cannot be read: {path}; use --skip-bad-val to ignore them$"
    with pytest.raises(TrainingError, match=message):
        load_data(image_folder, workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_validation_files_are_ignored_with_skip_bad_val(workers, image_folder, capsys):
    """They count neither as correct nor as wrong, and no other image counts twice."""
    html(image_folder / "val" / "cat" / "1.png")
    (one,) = load_data(image_folder, "--skip-bad-val", workers).test()
    assert "1 of 5 validation images cannot be read and are ignored" in capsys.readouterr().err
    (image_folder / "val" / "cat" / "1.png").unlink()
    (other,) = load_data(image_folder, "--skip-bad-val", workers).test()
    assert one.x.equal(other.x)
    assert one.y.tolist() == other.y.tolist() == [1, 1, 2, 2]


def test_only_broken_validation_files_are_an_error(image_folder):
    for path in (image_folder / "val").rglob("*.png"):
        html(path)
    for more, advice in (("", True), ("--skip-bad-val", False)):
        with pytest.raises(TrainingError, match="5 of 5 validation images cannot be read") as refusal:
            load_data(image_folder, more)
        assert ("--skip-bad-val" in str(refusal.value)) == advice


def test_a_validation_file_that_breaks_later_is_an_error(image_folder):
    data = load_data(image_folder)
    assert len(list(data.test())) == 1
    html(image_folder / "val" / "cat" / "1.png")
    with pytest.raises(TrainingError, match="1 of 5 validation images cannot be read"):
        list(data.test())


def test_names_may_be_other_than_utf8(image_folder):
    path = os.fsencode(image_folder / "train" / "ape") + b"/\xe4\xff.png"
    os.rename(image_folder / "train" / "ape" / "0.png", path)
    data = load_data(image_folder)
    assert bad_files(data) == []
    os.unlink(path)
    assert bad_files(data) == [os.fsdecode(path)]


# Tar files -----------------------------------------------------------------------------------------------------------


def packed(folder, around=".", **options):
    """Put both splits of a folder in tar files next to them."""
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}.tar", "w", **options) as tar:
            if around:
                tar.add(folder / split, around.format(split))
            else:  # members that begin with neither ./ nor a folder
                for inside in (folder / split).iterdir():
                    tar.add(inside, inside.name)
    return folder


def same(one, other):
    assert (one.shape, one.classes, one.steps) == (other.shape, other.classes, other.steps)
    for batches in zip((*one.train(0, 0), *one.test()), (*other.train(0, 0), *other.test()), strict=True):
        assert batches[0].x.equal(batches[1].x)
        assert batches[0].y.equal(batches[1].y)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("around", [".", "{}", "./{}", ""])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_tar_file_gives_the_data_of_its_folder(workers, around, format, image_folder):
    if format != tarfile.USTAR_FORMAT:
        long = image_folder / "train" / "ape" / f"{'long' * 60}.png"
        (image_folder / "train" / "ape" / "0.png").rename(long)
    expected = load_data(image_folder)
    packed(image_folder, around, format=format)
    same(load_data(image_folder, workers=workers, kind="tar"), expected)


@pytest.mark.parametrize("stray", [".ipynb_checkpoints/0.png", "preview.png", "__MACOSX/0.png", "notes.txt",
                                   "ape/.hidden.png", "ape/notes.txt", "ape/.thumbnails/0.png"])  # fmt: skip
@pytest.mark.parametrize("around", [".", "{}"])
def test_members_that_are_not_data_are_ignored_with_a_warning(around, stray, image_folder, capsys):
    path = image_folder / "train" / stray
    if path.suffix == ".png":
        picture(path)
    else:
        path.write_text("nothing")
    expected = load_data(image_folder)
    before = capsys.readouterr().err
    same(load_data(packed(image_folder, around), kind="tar"), expected)
    assert capsys.readouterr().err == before.replace("/train:", "/train.tar:").replace("/val has", "/val.tar has")


def test_links_in_a_tar_file_are_ignored_with_a_warning(image_folder, capsys):
    (image_folder / "train" / "ape" / "9.png").symlink_to("0.png")
    data = load_data(packed(image_folder), kind="tar")
    assert f"ignored in {image_folder}/train.tar (links and special files): ./ape/9.png\n" in capsys.readouterr().err
    assert data.steps == 3


def test_broken_files_in_a_tar_file_are_reported(image_folder):
    for split in ("train", "val"):
        html(image_folder / split / "bee" / "1.png")
    packed(image_folder)
    with pytest.raises(TrainingError, match=f"1 of 5 .*: {image_folder}/val.tar/bee/1.png; use --skip-bad-val"):
        load_data(image_folder, kind="tar")
    data = load_data(image_folder, "--skip-bad-val", kind="tar")
    assert bad_files(data) == [f"{image_folder}/train.tar/bee/1.png"]
    assert sum(len(batch.y) for batch in data.test()) == 4


def no_tar(folder):
    (folder / "train.tar").unlink()
    return f"there is no file {folder}/train.tar"


def compressed(kind):
    def compress(folder):
        with tarfile.open(folder / "train.tar", f"w:{kind}") as tar:
            tar.add(folder / "train", ".")
        return f"{folder}/train.tar is compressed, but images are read in place: decompress it"

    return compress


def no_archive(folder):
    html(folder / "val.tar")
    return f"{folder}/val.tar is not a tar file or is damaged"


def shortened(folder):
    with (folder / "train.tar").open("r+b") as file:
        file.truncate(50_000)  # within a file
    return f"{folder}/train.tar is not a tar file or is damaged: "


def without_classes(folder):
    with tarfile.open(folder / "train.tar", "w") as tar:
        tar.add(folder / "train" / "ape" / "0.png", "0.png")
    return f"no images in {folder}/train.tar: it has no class folders"


@pytest.mark.parametrize("harm", [no_tar, compressed("gz"), compressed("bz2"), compressed("xz"), no_archive, shortened,
                                  without_classes])  # fmt: skip
def test_invalid_tar_files_are_refused(harm, image_folder):
    message = harm(packed(image_folder))
    with pytest.raises(TrainingError, match=f"^--data tar:{image_folder}: {message}"):
        load_data(image_folder, kind="tar")


@pytest.mark.parametrize("harm", [only_in_val, nested, nested_in_val, empty_class, empty_val, empty_train,
                                  sixteen_bits, floats, integers, bomb])  # fmt: skip
def test_tar_files_are_refused_for_the_same_reasons_as_folders(harm, image_folder):
    message = harm(image_folder)
    for old, new in (("train lacks", "train.tar lacks"), ("val has", "val.tar has"), ("train,", "train.tar,")):
        message = message.replace(old, new)
    with pytest.raises(TrainingError, match=message):
        load_data(packed(image_folder), kind="tar")


# Streams and disks ---------------------------------------------------------------------------------------------------

PROGRAM = [sys.executable, "-m", "crsam_ext.training", "--model", "mlp", "--epochs", "1", "--threads", "1"]


@pytest.mark.parametrize("size", [100, 20_000])
def test_a_full_disk_is_reported(size, tmp_path):
    """The full disk is simulated by a limit on file sizes. The first file that fails is the configuration, the last a
    checkpoint."""
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
def test_closed_output_streams_cause_no_traceback(closed, tmp_path):
    command = " ".join([*PROGRAM, "--output", str(tmp_path / "out")])
    end = {"stdout": ">&-", "reader": "| true; exit ${PIPESTATUS[0]}"}[closed]
    done = subprocess.run(["bash", "-c", f"{command} {end}"], capture_output=True, text=True, check=False)
    assert done.returncode == (1 if closed == "reader" else 0), done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert (tmp_path / "out" / "log.csv").exists()


full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full exists only on Linux")


@full
def test_stdout_on_a_full_disk_is_reported(tmp_path):
    with open("/dev/full", "w") as stdout:
        command = [*PROGRAM, "--output", str(tmp_path / "out")]
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("crsam-train: [Errno 28] No space left on device")
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "out" / "log.csv").read_text().count("\n") == 2  # the header and the epoch


@full
def test_stderr_on_a_full_disk_keeps_the_exit_code():
    with open("/dev/full", "w") as stderr:
        done = subprocess.run([*PROGRAM, "--nonsense"], stderr=stderr, check=False)
    assert done.returncode == 2


def test_a_terminal_may_support_only_ascii(tmp_path):
    command = [*PROGRAM, "--output", str(tmp_path / "Läufe")]
    env = {"PYTHONIOENCODING": "ascii", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert r"L\xe4ufe" in done.stdout
    assert (tmp_path / "Läufe" / "log.csv").exists()


@pytest.mark.parametrize(("batch_size", "steps"), [(359, 4), (718, 2), (64, 23), (1437, 1)])
def test_a_last_batch_of_one_sample_is_dropped(batch_size, steps, capsys):
    options = parse(["--data", "digits", "--batch-size", str(batch_size)])
    data = load(options, torch.device("cpu"))
    sizes = [len(batch.y) for batch in data.train(0, 0)]
    assert len(sizes) == data.steps == steps
    assert 1 not in sizes
    assert ("is dropped" in capsys.readouterr().err) == (1437 % batch_size == 1)


def test_batches_of_one_sample_with_batch_norm_are_an_error(crsam_train, here, capsys):
    assert crsam_train("--model test_resnet --batch-size 1 --output out") == 2
    assert "batch norm cannot train on a batch of one sample: use a larger --batch-size" in capsys.readouterr().err


def test_lack_of_memory_is_reported(crsam_train, here, capsys, monkeypatch):
    loop = import_module("crsam_ext.training.loop")  # another test reloads it
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory."),
                  RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")):  # fmt: skip

        def fails(*_, error=error, **__):
            raise error

        for where in ("load", "create_model", "evaluate"):
            with monkeypatch.context() as patch:
                patch.setattr(loop, where, fails)
                assert crsam_train("--model mlp --overwrite --output out") == 2
            said = capsys.readouterr().err
            assert said.startswith("crsam-train: out of memory")
            assert said.count("\n") == 1
