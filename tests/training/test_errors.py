"""User errors: one line on stderr, exit code 2, and no change on the disk."""

import shutil
import sys

import pytest
import torch

from crsam_ext.training.__main__ import main

pytestmark = pytest.mark.slow


@pytest.fixture
def refuse(crsam_train, here, capsys):
    """Return a function that runs a command that must be refused and returns its error message."""

    def contents():
        return {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} | {
            path: None for path in here.rglob("*") if path.is_dir()
        }

    def run(command):
        before = contents()
        capsys.readouterr()
        assert crsam_train(command) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("crsam-train: ")
        assert err.count("\n") == 1
        assert contents() == before
        return err

    return run


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--data nothing", "--data nothing is not valid: use digits, mnist1d, cifar10:PATH"),
        ("--data cifar10", "--data cifar10 is not valid: use digits"),
        ("--data digits:path", "--data digits:path is not valid: use digits"),
        ("--data cifar10:missing", "folder missing/cifar-10-batches-py is missing"),
        ("--data cifar100:missing", "folder missing/cifar-100-python is missing"),
        ("--data folder:missing", "there is no folder missing/train"),
        ("--model resnt18", "--model resnt18 is unknown; did you mean resnet18"),
        ("--lr nan", "--lr: nan is not a number"),
        ("--rho inf", "--rho: inf is not a number"),
        ("--alpha -1", "--alpha: -1 is not a number of at least 0"),
        ("--beta one", "--beta: invalid number value: 'one'"),
        ("--momentum 2", "--momentum: 2 is not a number of at least 0 and at most 1"),
        ("--epochs 0", "--epochs: 0 is not an integer"),
        ("--mixup 1 --batch-size 2000", "--batch-size 2000 is larger than"),
        ("--warmup-epochs 20", "--warmup-epochs 20 must be less than --epochs 20"),
        ("--mixup 1 --batch-size 63", "--batch-size 63 must be even"),
        ("--optimizer sgd --rho 0.1", "--rho is only for --optimizer sam or crsam"),
        ("--optimizer sam --alpha 0.1", "--alpha is only for --optimizer crsam"),
        ("--optimizer adamw --nesterov", "--nesterov is only for --base sgd"),
        ("--auto-augment rand-m9", "--auto-augment is only for --data cifar10 or cifar100 or folder"),
        ("--workers 2", "--workers is only for --data cifar10 or cifar100 or folder"),
        ("--data cifar10:missing --image-size 32", "--image-size is only for --data folder"),
        ("--nesterov --momentum 0", "Nesterov"),
        ("--optimizer adam", "--optimizer: invalid choice"),
        ("--frobnicate", "unrecognized arguments: --frobnicate"),
        ("--device nonsense", "--device nonsense: "),
        ("--output /dev/null/run", "--output /dev/null/run: Not a directory"),
        ("--resume", "there is no checkpoint runs/digits-cnn-crsam-seed0/last.pt"),
        ("--warmup-epochs 1 --warmup-steps 10", "use --warmup-epochs or --warmup-steps, not both"),
        ("--cuda-graph", "--cuda-graph: the step cannot be captured: the parameters are on cpu"),
        ("--cuda-graph --compile", "use --cuda-graph or --compile, not both"),
        ("--drop-path 0.1", "--drop-path and --model-kwargs need a timm model, not cnn"),
        ("--evaluate missing.pt", "there is no checkpoint missing.pt"),
        ("--resume --overwrite", "not allowed with"),
    ],
)
def test_invalid_options_are_refused(refuse, command, message):
    assert message in refuse(command)


def test_output_that_is_a_file_is_refused(refuse, here):
    (here / "out").write_text("mine")

    assert "--output out: " in refuse("--output out")


@pytest.mark.parametrize("option", ["", "--overwrite"])
def test_invalid_options_leave_an_existing_run_unchanged(refuse, here, finished, option):
    shutil.copytree(finished, here / "out")

    assert "unknown" in refuse(f"--model nonsense --output out {option}")


def test_an_existing_run_is_not_overwritten(refuse, here, finished):
    shutil.copytree(finished, here / "out")

    assert "out is not empty: use --resume, --overwrite or another --output" in refuse("--output out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--lr 0.3", "cannot resume with --lr 0.3: out was started with --lr 0.05"),
        ("--epochs 2", "cannot resume with --epochs 2: out was started with --epochs 1"),
        ("--optimizer sam", "cannot resume with --optimizer sam: out was started with --optimizer crsam"),
        ("--ema 0.9", "cannot resume with --ema 0.9: out was started with --ema None"),
    ],
)
def test_resume_with_other_options_is_refused(refuse, here, finished, change, message):
    shutil.copytree(finished, here / "out")
    assert message in refuse(f"--model mlp --epochs 1 --output out --resume {change}")


def save_foreign(path):
    torch.save({"model": torch.zeros(3)}, path)


def save_tensor(path):
    torch.save(torch.zeros(3), path)


def save_code(path):
    torch.save(torch.nn.Linear(2, 2), path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path):
    path.write_bytes(b"")


def write_text(path):
    path.write_text("not a checkpoint")


def drop_a_weight(path):
    state = torch.load(path, weights_only=True)
    del state["model"]["1.weight"]
    torch.save(state, path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (save_foreign, "is not a checkpoint of this version of crsam-train"),
        (save_tensor, "is not a checkpoint of this version of crsam-train"),
        (save_code, "is damaged or not a checkpoint"),
        (truncate, "is damaged or not a checkpoint"),
        (empty, "is damaged or not a checkpoint"),
        (write_text, "is damaged or not a checkpoint"),
        (drop_a_weight, "does not fit this model and optimizer"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_resume_from_a_bad_checkpoint_is_refused(refuse, here, finished, harm, message):
    shutil.copytree(finished, here / "out")
    harm(here / "out" / "last.pt")

    assert f"out/last.pt {message}" in refuse("--model mlp --epochs 1 --output out --resume")


def test_unknown_policy_is_refused(refuse, image_folder):
    shutil.copytree(image_folder / "train" / "ape", image_folder / "val" / "ape")
    command = f"--data folder:{image_folder} --batch-size 4 --model test_resnet --image-size 32"

    assert "--auto-augment nonsense: timm has no such policy" in refuse(f"{command} --auto-augment nonsense")


def test_empty_image_folder_is_refused(refuse, tmp_path):
    (tmp_path / "images" / "train" / "ape").mkdir(parents=True)
    (tmp_path / "images" / "val" / "ape").mkdir(parents=True)

    assert "no images" in refuse(f"--data folder:{tmp_path / 'images'}")


def test_divergence_keeps_the_last_good_epoch(crsam_train, here, capsys, read_log):
    assert crsam_train("--model mlp --lr 1e30 --epochs 3 --log-interval 1 --output out") == 2
    assert "diverged" in capsys.readouterr().err
    assert len(read_log(here / "out")) == 1


@pytest.mark.parametrize(
    ("module", "package"), [("mnist1d.data", "mnist1d"), ("timm.utils.model_ema", "timm"), ("rich.console", "rich")]
)
def test_missing_package_is_named(refuse, monkeypatch, module, package):
    for name in ("loop", "progress"):
        monkeypatch.delitem(sys.modules, f"crsam_ext.training.{name}", raising=False)
        # Otherwise later tests would patch the module imported here, which is no longer in use.
        monkeypatch.delattr(f"crsam_ext.training.{name}", raising=False)
    monkeypatch.setitem(sys.modules, module, None)

    assert f"the package {package} is missing: pip install 'crsam_ext[train]'" in refuse("--data mnist1d")


def test_help_needs_no_other_package(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "crsam_ext.training.loop", None)

    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    assert "--regularizer" in capsys.readouterr().out
