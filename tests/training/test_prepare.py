"""``crsam-train prepare``: the prepared images, the bytes of the result, resuming, and errors."""

import csv
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import ExifTags, Image, ImageOps
from sklearn.datasets import load_sample_image

from crsam_ext.training import prepare
from crsam_ext.training.__main__ import main
from crsam_ext.training.errors import TrainingError
from crsam_ext.training.images import find

pytestmark = pytest.mark.slow

FLOWER = Image.fromarray(load_sample_image("flower.jpg")).resize((150, 100), Image.Resampling.LANCZOS)


def jpeg(**options):
    content = io.BytesIO()
    FLOWER.save(content, "JPEG", **{"quality": 95, **options})
    return content.getvalue()


@pytest.fixture
def source(tmp_path):
    """Return a folder with two classes; one training file is small and one is broken."""
    root = tmp_path / "source"
    for split, label, count in (("train", "bee", 7), ("train", "rose", 6), ("val", "bee", 2), ("val", "rose", 1)):
        folder = root / split / label
        folder.mkdir(parents=True)
        for index in range(count):
            image = FLOWER.crop((index, 0, index + 120 - 5 * index, 90 + index))
            image.save(folder / f"{index}.JPEG", quality=95)
    FLOWER.resize((30, 20)).save(root / "train" / "rose" / "7.JPEG")
    (root / "train" / "bee" / "3.JPEG").write_bytes(jpeg()[:2000])
    return root


def run(source, target, *more):
    return main(["prepare", str(source), str(target), "--size", "40", "--workers", "0", *map(str, more)])


def forked(change, source, target, *more):
    """Return the exit code and stderr of a run in a process that first calls ``change``.

    The process is forked, because a new interpreter would take seconds to import PyTorch.
    """

    def child():
        with open(f"{target}.err", "w") as sys.stderr:
            change()
            code = run(source, target, *more)
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    with open(f"{target}.err") as err:
        return process.exitcode, err.read()


def contents(folder):
    """Return the bytes of each file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def members(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def shrunk(content, size=40, name="image", **options):
    """Return a function that writes ``content`` to a file and returns the image that `shrink` makes of it."""

    def make(tmp_path):
        path = tmp_path / name
        path.write_bytes(content)
        length, result = prepare.shrink(path, size, **{"quality": 90, **options})
        assert length == len(content)
        return result

    return make


def opened(content):
    image = Image.open(io.BytesIO(content))
    image.load()
    assert (image.format, image.mode) == ("JPEG", "RGB")
    return image


def difference(image, expected, quality=90):
    """Return the mean absolute difference between a prepared image and an expected one, which is also written as JPEG,
    in levels of 255."""
    assert image.size == expected.size
    content = io.BytesIO()
    expected.convert("RGB").save(content, "JPEG", quality=quality)
    return np.abs(np.asarray(image, np.float32) - np.asarray(Image.open(content), np.float32)).mean()


# One image -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "expected"), [(40, (60, 40)), (100, (150, 100)), (256, (150, 100)), (33, (50, 33))])
def test_the_short_side_is_the_size_and_nothing_is_enlarged(size, expected, tmp_path):
    content = io.BytesIO()
    FLOWER.save(content, "PNG")
    image = opened(shrunk(content.getvalue(), size)(tmp_path))
    assert image.size == expected
    assert difference(image, FLOWER.resize(expected, Image.Resampling.LANCZOS)) == 0


@pytest.mark.parametrize("scale", [2, 4.5, 9])
def test_shrinking_in_the_decoder_matches_lanczos(scale, tmp_path):
    """The result is as close to Lanczos as Pillow's bicubic filter, about 1.1 levels; 0.5 of these are JPEG
    rounding."""
    large = Image.fromarray(load_sample_image("china.jpg"))
    content = io.BytesIO()
    large.save(content, "JPEG", quality=100, subsampling=0)
    image = opened(shrunk(content.getvalue(), round(427 / scale), quality=100)(tmp_path))
    assert difference(image, large.resize(image.size, Image.Resampling.LANCZOS), quality=100) < 1.5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("size", [40, 99])
def test_orientation_is_applied(orientation, kind, size, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = io.BytesIO()
    FLOWER.save(content, kind, exif=exif.tobytes(), quality=95)
    image = opened(shrunk(content.getvalue(), size, quality=100)(tmp_path))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content.getvalue()))).convert("RGB")
    assert expected.size == ((150, 100) if orientation < 5 else (100, 150))
    assert difference(image, expected.resize(image.size, Image.Resampling.LANCZOS), quality=100) < 1  # rounding
    assert min(image.size) == size
    assert image.getexif().get(ExifTags.Base.Orientation, 1) == 1


def test_metadata_is_dropped(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "nobody"
    content = jpeg(exif=exif.tobytes(), icc_profile=b"profile" * 100, comment=b"a comment", dpi=(300, 300))
    result = shrunk(content)(tmp_path)
    image = opened(result)
    assert image.applist == [("APP0", b"JFIF\0\1\1\0\0\1\0\1\0\0")]
    for text in (b"nobody", b"profile", b"a comment"):
        assert text in content
        assert text not in result


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"comment": b"a" * 4000}])
def test_a_jpeg_within_the_limit_is_copied(mode, options, tmp_path):
    content = io.BytesIO()
    FLOWER.convert(mode).save(content, "JPEG", quality=30, **options)
    assert shrunk(content.getvalue(), 100)(tmp_path) == content.getvalue()
    assert shrunk(content.getvalue(), 99)(tmp_path) != content.getvalue()


@pytest.mark.parametrize("options", [{"comment": b"a" * 5000}, {"icc_profile": b"a" * 200_000}])
def test_a_small_jpeg_with_much_metadata_is_reencoded(options, tmp_path):
    result = shrunk(jpeg(**options), 100)(tmp_path)
    assert opened(result).size == (150, 100)
    assert len(result) < 30_000


@pytest.mark.parametrize("size", [40, 256])
@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "PNG"), ("L", "JPEG"), ("1", "PNG"), ("P", "PNG"), ("P", "GIF"), ("LA", "PNG"), ("RGBA", "PNG"),
     ("CMYK", "TIFF"), ("CMYK", "JPEG"), ("YCbCr", "JPEG")],
)  # fmt: skip
def test_modes_become_rgb(mode, kind, size, tmp_path):
    content = io.BytesIO()
    FLOWER.convert(mode).save(content, kind, quality=95)
    if (mode, kind) == ("CMYK", "JPEG"):
        assert b"Adobe" in content.getvalue()[:100]  # its colors are inverted
    result = shrunk(content.getvalue(), size)(tmp_path)
    if (mode, kind) in (("L", "JPEG"), ("YCbCr", "JPEG")) and size == 256:
        assert result == content.getvalue()
        return
    expected = Image.open(io.BytesIO(content.getvalue())).convert("RGB")
    image = opened(result)
    assert difference(image, expected.resize(image.size, Image.Resampling.LANCZOS)) == 0


def test_progressive_and_png_named_jpeg(tmp_path):
    plain, progressive = opened(shrunk(jpeg())(tmp_path)), opened(shrunk(jpeg(progressive=True))(tmp_path))
    assert plain.tobytes() == progressive.tobytes()
    content = io.BytesIO()
    FLOWER.save(content, "PNG")
    assert opened(shrunk(content.getvalue(), name="image.JPEG")(tmp_path)).size == (60, 40)


def test_images_have_the_given_quality(tmp_path):
    low, high = (opened(shrunk(jpeg(), quality=quality)(tmp_path)) for quality in (30, 90))
    for image, quality in ((low, 30), (high, 90)):
        reference = io.BytesIO()
        FLOWER.save(reference, "JPEG", quality=quality)
        assert image.quantization == Image.open(reference).quantization


def test_damaged_exif_means_no_rotation(tmp_path):
    assert opened(shrunk(jpeg(exif=b"Exif\0\0nonsense" + bytes(50)))(tmp_path)).size == (60, 40)


@pytest.mark.parametrize(("size", "expected"), [(40, (60, 40)), (256, (150, 100))])
@pytest.mark.parametrize("orientation", [0, 9])
def test_an_invalid_orientation_is_dropped(orientation, size, expected, tmp_path):
    """It is also dropped from small files, because readers interpret it differently."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = opened(shrunk(jpeg(exif=exif.tobytes()), size)(tmp_path))
    assert image.size == expected
    assert "exif" not in image.info


@pytest.mark.parametrize("content", [jpeg()[:3000], b"", b"<html>404</html>", jpeg()[:100]])
@pytest.mark.parametrize("size", [40, 256])
def test_broken_files_give_no_image(content, size, tmp_path):
    assert shrunk(content, size)(tmp_path) is None


@pytest.mark.parametrize(
    ("mode", "kind", "message"), [("I;16", "PNG", r"mode I;16"), ("F", "TIFF", "mode F"), ("1", "PNG", "exceeds limit")]
)
@pytest.mark.parametrize("workers", [0, 2])
def test_unsupported_images_are_refused(mode, kind, message, workers, source, tmp_path, capsys, monkeypatch):
    """The error names the file, in one line, from this process and from workers."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    image = Image.new(mode, (200, 200) if mode == "1" else (50, 50))
    image.save(source / "val" / "rose" / f"5.{kind.lower()}")
    assert run(source, tmp_path / "out", "--workers", workers) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"crsam-train: {source}/val/rose/5.{kind.lower()}")
    assert message in line
    assert not (tmp_path / "out" / "manifest.json").exists()


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("a.JPEG b.png", "a.jpg b.jpg"),
        ("a.png a.gif", "a.png.jpg a.gif.jpg"),
        ("a.jpg a.gif b.jpg", "a.jpg.jpg a.gif.jpg b.jpg"),
        ("a.png a.gif a.png.bmp", "a.png.jpg a.gif.jpg a.png.bmp.jpg"),
        ("a.b.png a.b.c.png", "a.b.jpg a.b.c.jpg"),
    ],
)
def test_no_two_files_share_a_name(names, expected):
    names, expected = names.split(), expected.split()
    assert prepare.member_names(names) == dict(zip(names, expected, strict=True))
    assert prepare.member_names(reversed(names)) == dict(zip(names, expected, strict=True))


@pytest.mark.parametrize("to", ["tar", "folder"])
def test_names_of_all_kinds_survive(to, source, tmp_path):
    names = ["ü ö.JPEG", "雪.png", os.fsdecode(b"\xff\xfe.JPEG"), 'a, "b".JPEG', "a\nb.JPEG", "a\rb.JPEG"]
    names.append("x" * 150 + ".JPEG")
    for label in ("rose", os.fsdecode("möwe ".encode("latin-1"))):
        (source / "train" / label).mkdir(exist_ok=True)
        for name in names:
            shutil.copy(source / "train" / "bee" / "0.JPEG", source / "train" / label / name)
    assert run(source, tmp_path / "out", "--to", to) == 0
    expected = {f"{path.parent.name}/{path.stem}.jpg" for path in (source / "train").rglob("*.*")} - {"bee/3.jpg"}
    out = tmp_path / "out"
    found = members(out / "train.tar") if to == "tar" else contents(out / "train")
    assert set(found) == expected
    with open(out / "manifest-train.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        listed = {row["name"]: row for row in csv.DictReader(file) if row["sha256"]}
    assert set(listed) == expected
    for name, content in found.items():
        assert listed[name]["sha256"] == hashlib.sha256(content).hexdigest()
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["classes"]) == {name.partition("/")[0] for name in expected}
    again = tmp_path / "again"
    assert run(source, again, "--to", to) == 0
    assert contents(again) == contents(out)
    (out / "manifest.json").unlink()  # the list is read as it was written
    (out / "options.json").write_text(json.dumps({key: manifest[key] for key in manifest if key != "splits"}))
    before = contents(out)["manifest-train.csv"]
    assert run(source, out, "--to", to) == 0
    assert contents(out)["manifest-train.csv"] == before
    assert contents(out) == contents(again)


# Whole runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(source, tmp_path):
    """Return the tar files of `source`."""
    assert run(source, tmp_path / "made") == 0
    return tmp_path / "made"


def test_prepared_folder_is_complete(source, made, capsys):
    assert set(contents(made)) == {"train.tar", "val.tar", "manifest.json", "manifest-train.csv", "manifest-val.csv"}
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["classes"] == ["bee", "rose"]
    assert (manifest["size"], manifest["quality"], manifest["to"]) == (40, 90, "tar")
    assert manifest["pillow"] == PIL.__version__
    for split in ("train", "val"):
        listed = (made / f"manifest-{split}.csv").read_bytes()
        about = manifest["splits"][split]
        assert about["sha256"] == hashlib.sha256(listed).hexdigest()
        rows = list(csv.DictReader(io.StringIO(listed.decode())))
        images = members(made / f"{split}.tar")
        good = [row for row in rows if row["sha256"]]
        assert [row["name"] for row in good] == list(images)
        assert [row["sha256"] for row in good] == [hashlib.sha256(image).hexdigest() for image in images.values()]
        assert [int(row["bytes"]) for row in good] == [len(image) for image in images.values()]
        assert about["images"] == len(images)
        assert about["bytes"] == sum(map(len, images.values()))
        sources = [source / split / row["name"].replace("jpg", "JPEG") for row in good]
        assert about["source_bytes"] == sum(path.stat().st_size for path in sources)
        assert about["bad_files"] == [row["name"] for row in rows if not row["sha256"]]
    assert manifest["splits"]["train"]["bad_files"] == ["bee/3.JPEG"]
    assert members(made / "train.tar")["rose/7.jpg"] == (source / "train" / "rose" / "7.JPEG").read_bytes()


def test_tar_files_are_plain(made):
    for split in ("train", "val"):
        assert (made / f"{split}.tar").stat().st_size % tarfile.RECORDSIZE == 0
        with tarfile.open(made / f"{split}.tar", "r:") as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)
        if shutil.which("tar"):
            listed = subprocess.run(["tar", "-tf", made / f"{split}.tar"], capture_output=True, text=True, check=True)
            assert listed.stderr == ""
            assert listed.stdout.split() == list(members(made / f"{split}.tar"))


def test_folders_have_the_content_of_the_tar_files(source, made, tmp_path):
    assert run(source, tmp_path / "folder", "--to", "folder") == 0
    for split in ("train", "val"):
        assert contents(tmp_path / "folder" / split) == members(made / f"{split}.tar")
        name = f"manifest-{split}.csv"
        assert (tmp_path / "folder" / name).read_bytes() == (made / name).read_bytes()
    train, val, classes = find(tmp_path / "folder", "--data")
    assert (len(train), len(val), classes) == (13, 3, 2)


@pytest.mark.parametrize("to", ["tar", "folder"])
@pytest.mark.parametrize("workers", [1, 3])
def test_the_same_bytes_for_any_number_of_workers(to, workers, source, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_BATCH", 2)
    for number in (0, workers):
        assert run(source, tmp_path / str(number), "--to", to, "--workers", number) == 0
    assert contents(tmp_path / "0") == contents(tmp_path / str(workers))


def test_the_source_is_not_changed(source, tmp_path):
    before = contents(source)
    for path in [source, *source.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert run(source, tmp_path / "out") == 0
    assert contents(source) == before
    for path in [source, *source.rglob("*")]:
        path.chmod(0o755)


def test_messages_report_bad_files_and_totals(source, tmp_path, capsys):
    assert run(source, tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert err == f"crsam-train: {source}/train/bee/3.JPEG cannot be read and is left out\n"
    assert out.startswith("16 images, 0.1 MB before, 0.0 MB after, ")
    assert out.endswith(" images/s, 1 bad files\n")
    assert run(source, tmp_path / "out") == 0
    assert capsys.readouterr() == (f"{tmp_path}/out is complete; nothing to do\n", "")


def test_the_summary_warns_about_bad_files_of_val(source, tmp_path, capsys):
    (source / "val" / "bee" / "0.JPEG").write_bytes(b"")
    assert run(source, tmp_path / "out") == 0
    assert capsys.readouterr().out.endswith(" 2 bad files, 1 of them in val, so every evaluation lacks them\n")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]["val"]["bad_files"] == ["bee/0.JPEG"]


def test_too_many_bad_files_are_an_error(source, tmp_path, capsys):
    """The limit is for both splits together; with a higher limit the command continues."""
    (source / "val" / "bee" / "0.JPEG").write_bytes(b"")
    assert run(source, tmp_path / "out", "--max-bad-files", 1) == 2
    assert "2 files cannot be read, more than --max-bad-files 1" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert run(source, tmp_path / "out", "--max-bad-files", 2) == 0
    assert run(source, tmp_path / "other") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "other")


def test_a_class_without_readable_images_is_an_error(source, tmp_path, capsys):
    for path in (source / "train" / "bee").iterdir():
        path.write_bytes(b"")
    assert run(source, tmp_path / "out") == 2
    assert "no training image of class bee can be read" in capsys.readouterr().err
    assert not (tmp_path / "out" / "train.tar").exists()


@pytest.mark.parametrize(
    ("more", "changed"),
    [
        (["--size", 41], "--size"),
        (["--quality", 80], "--quality"),
        (["--to", "folder"], "--to"),
        (["--size", 41, "--quality", 80], "--quality, --size"),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_other_options_are_refused(more, changed, complete, source, made, tmp_path, capsys):
    if not complete:
        os.rename(made / "manifest.json", made / "options.json")
    before = contents(made)
    capsys.readouterr()
    assert run(source, made, *more) == 2
    assert f"{made} was made with a different {changed}: use another TARGET, or --overwrite" in capsys.readouterr().err
    assert contents(made) == before
    assert run(source, made, *more, "--overwrite") == 0
    assert run(source, tmp_path / "other", *more) == 0
    assert contents(made) == contents(tmp_path / "other")


def test_another_source_is_refused(source, made, capsys):
    shutil.copy(source / "val" / "bee" / "0.JPEG", source / "val" / "bee" / "new.JPEG")
    assert run(source, made) == 2
    assert "was made with a different list of source files: use another TARGET" in capsys.readouterr().err


def test_another_pillow_cannot_continue_but_can_use_a_complete_folder(source, made, monkeypatch, capsys):
    monkeypatch.setattr(PIL, "__version__", "0.1")
    assert run(source, made) == 0
    os.rename(made / "manifest.json", made / "options.json")
    assert run(source, made) == 2
    assert "was made with a different version of Pillow: use another TARGET" in capsys.readouterr().err


def test_overwrite_replaces_a_complete_folder(source, made):
    shutil.copy(source / "train" / "bee" / "0.JPEG", source / "train" / "bee" / "3.JPEG")
    assert run(source, made, "--overwrite") == 0
    assert "bee/3.jpg" in members(made / "train.tar")


def test_a_folder_with_other_files_is_refused(source, tmp_path, capsys):
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "thesis.txt").write_text("years of work")
    assert run(source, tmp_path / "out", "--overwrite") == 2
    assert "contains files that prepare did not write" in capsys.readouterr().err
    assert contents(tmp_path / "out") == {"train/thesis.txt": b"years of work"}


@pytest.mark.parametrize("name", ["manifest.json", "options.json"])
@pytest.mark.parametrize("content", ["{}", "[]", "nonsense", '{"format": "of somebody else"}'])
def test_a_folder_with_a_foreign_manifest_is_refused(name, content, source, tmp_path, capsys):
    shutil.copytree(source, tmp_path / "out")
    (tmp_path / "out" / name).write_text(content)
    before = contents(tmp_path / "out")
    assert run(source, tmp_path / "out", "--overwrite", "--to", "folder") == 2
    assert "contains files that prepare did not write" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_a_source_of_links_into_the_target_is_refused(source, tmp_path, capsys):
    assert run(source, tmp_path / "out", "--to", "folder") == 0
    (tmp_path / "links").mkdir()
    for split in ("train", "val"):
        (tmp_path / "links" / split).symlink_to(tmp_path / "out" / split)
    before = contents(tmp_path / "out")
    assert run(tmp_path / "links", tmp_path / "out", "--to", "folder", "--overwrite") == 2
    assert "must not contain each other" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("where", ["source", "source/prepared", "link/prepared", ".", "source/train/bee"])
def test_source_and_target_must_not_contain_each_other(where, source, tmp_path, capsys):
    (tmp_path / "link").symlink_to(source)
    before = contents(source)
    assert run(source, tmp_path / where, "--overwrite") == 2
    assert "must not contain each other" in capsys.readouterr().err
    assert contents(source) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: SOURCE, TARGET"),
        ("missing out", "SOURCE: there is no folder missing/train"),
        ("a b --size 0", "--size: 0 is not an integer from 1"),
        ("a b --quality 101", "--quality: 101 is not an integer from 1 to 100"),
        ("a b --to zip", "--to: invalid choice: 'zip'"),
        ("a b --lr 1", "unrecognized arguments: --lr 1"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message, here, capsys):
    assert main(["prepare", *arguments.split()]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(here.iterdir())


def test_torchrun_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="without torchrun"):
        prepare.main([str(source), str(tmp_path / "out")])


def test_a_command_continues_after_a_full_disk(source, tmp_path):
    """The full disk is simulated by a limit on file sizes. Once there is space, the command continues."""
    resource = pytest.importorskip("resource")
    code, err = forked(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)), source, tmp_path / "out")
    assert code == 2
    assert err.splitlines()[-1] == f"crsam-train: cannot write {tmp_path}/out: File too large"
    assert run(source, tmp_path / "out") == 0
    assert run(source, tmp_path / "whole") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# Interrupted ---------------------------------------------------------------------------------------------------------


def interrupted(owner, name, at, number, source, target, *more):
    """Return the exit code and stderr of a run that gets a signal at the ``at``-th call of a function.

    All output is written by the functions that the tests choose. Entries are made after each image.
    """
    genuine, calls = getattr(owner, name), itertools.count(1)

    def call(*args, **options):
        if next(calls) == at:
            os.kill(os.getpid(), number)
        return genuine(*args, **options)

    def change():
        prepare._COMMIT, prepare._BATCH = 0, 1
        setattr(owner, name, call)

    return forked(change, source, target, *more)


@pytest.mark.parametrize(
    ("to", "owner", "name", "at"),
    [
        *(("tar", prepare._Tar, "add", at) for at in range(1, 17)),
        *(("folder", prepare._Folder, "add", at) for at in range(1, 17)),
        *(("tar", prepare, "_commit", at) for at in range(1, 20)),
        *(("tar", os, "fsync", at) for at in range(1, 43)),
        *((to, os, "replace", at) for to in ("tar", "folder") for at in range(1, 5)),  # options, train, val, manifest
        *((to, os, "unlink", 1) for to in ("tar", "folder")),  # after the manifest
    ],
)
def test_a_killed_command_continues(to, owner, name, at, source, tmp_path):
    code, err = interrupted(owner, name, at, signal.SIGKILL, source, tmp_path / "out", "--to", to)
    assert code == -signal.SIGKILL, err
    assert (tmp_path / "out" / "manifest.json").exists() == (name == "unlink")
    assert run(source, tmp_path / "out", "--to", to) == 0
    assert run(source, tmp_path / "whole", "--to", to) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_listed_images_are_not_read_again(source, tmp_path, monkeypatch, capsys):
    code, _ = interrupted(prepare._Tar, "add", 8, signal.SIGKILL, source, tmp_path / "out")
    assert code == -signal.SIGKILL
    read = []

    def shrink(path, *more, genuine=prepare.shrink):
        read.append(path)
        return genuine(path, *more)

    monkeypatch.setattr(prepare, "shrink", shrink)
    assert run(source, tmp_path / "out") == 0
    train, val, _ = find(source, "SOURCE")
    paths = [Path(files.name(index)) for files in (train, val) for index in range(len(files))]
    assert read == paths[8:]  # the eighth image is in the ninth file


@pytest.mark.parametrize("to", ["tar", "folder"])
def test_truncated_files_are_repaired(to, source, tmp_path):
    """After a power failure, the list or the images may be truncated at any byte."""
    assert run(source, tmp_path / "whole", "--to", to) == 0
    whole, generator = contents(tmp_path / "whole"), np.random.default_rng(0)
    manifest = json.loads(whole["manifest.json"])
    del manifest["splits"]
    cut = ["manifest-train.csv", "manifest-val.csv", "train.tar" if to == "tar" else "train/bee/1.jpg"]
    out = tmp_path / "out"
    for name in cut:
        for _ in range(8):
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(tmp_path / "whole", out)
            (out / "manifest.json").unlink()
            (out / "options.json").write_text(json.dumps(manifest))
            (out / name).write_bytes(whole[name][: generator.integers(len(whole[name]))])
            assert run(source, out, "--to", to) == 0
            assert contents(out) == whole


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("workers", ["0", "2"])
def test_signals_end_the_command(number, code, workers, source, tmp_path):
    exitcode, err = interrupted(prepare._Tar, "add", 9, number, source, tmp_path / "out", "--workers", workers)
    assert exitcode == code, err
    bad, line = err.splitlines()
    assert "3.JPEG cannot be read" in bad
    assert line == "crsam-train: interrupted; run the same command again to continue"
    assert run(source, tmp_path / "out") == 0
    assert run(source, tmp_path / "whole") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_killed_worker_is_reported(source, tmp_path, monkeypatch, capsys):
    """The signal is that of a system that runs out of memory."""
    monkeypatch.setattr(prepare, "shrink", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert run(source, tmp_path / "out", "--workers", 2) == 2
    assert "a worker process died" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_lack_of_memory_is_reported(workers, source, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(prepare, "shrink", fails)
    assert run(source, tmp_path / "out", "--workers", workers) == 2
    line = f"crsam-train: out of memory for {source}/train/bee/0.JPEG: use fewer --workers\n"
    assert capsys.readouterr().err == line


def test_the_signal_handler_is_restored(source, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    assert run(source, tmp_path / "out") == 0
    assert signal.getsignal(signal.SIGTERM) is before
