"""Option files and the shipped recipes."""

import json
import re
from pathlib import Path

import pytest

from crsam_ext.training.__main__ import main
from crsam_ext.training.options import MACHINE_OPTIONS, full_config, parse
from crsam_ext.training.recipes import FOLDER, names, read

DOCUMENT = Path(__file__).parents[2] / "docs" / "recipes.md"

# These values are typed from the sources, not from the recipe files. GSAM: arXiv 2203.08065, Table 4; big_vision:
# configs/proj/gsam/vit_i1k_gsam_no_aug.py and pp/ops_image.py; Sassha: image_classification/config/imagenet/vit_small/
# sam_adamw.sh, whose --wd is divided by the rate in optimizers/__init__.py; ffcv: rn50_configs/*.yaml,
# train_imagenet.py.
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "crop_pct": 224 / 256, "scale": [0.08, 1.0]}
NOT_TUNED = {"regularizer": "linear", "alpha": 0.1, "beta": 0.01}  # values of the released CR-SAM for CIFAR
GSAM_RESNET = {
    **IMAGENET, **NOT_TUNED, "epochs": 90, "batch_size": 16 * 256, "image_size": "224", "val_image_size": 224,
    "optimizer": "crsam", "base": "sgd", "lr": 1.6, "min_lr": 1.6 / 100, "momentum": 0.9, "weight_decay": 1e-4,
    "decay_of": "matrices", "schedule": "linear", "warmup_steps": 5000, "warmup_epochs": 0.0,
    "rho": 0.04, "min_rho": 0.02, "rho_schedule": "proportional",
}  # fmt: skip
GSAM_VIT = {
    **IMAGENET, **NOT_TUNED, "scale": [0.05, 1.0], "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3,
    "epochs": 300, "batch_size": 4096, "image_size": "224", "val_image_size": 224, "bce_loss": True,
    "head_init_bias": -10.0, "model_kwargs": ["global_pool=avg", "class_token=false", "fc_norm=false"],
    "optimizer": "crsam", "base": "adamw", "lr": 3e-3, "min_lr": 3e-3 / 100,
    "weight_decay": 0.3, "decay_of": "matrices", "max_grad_norm": 1.0, "schedule": "linear", "warmup_steps": 10_000,
    "warmup_epochs": 0.0, "rho": 0.6, "rho_schedule": "proportional",
}  # fmt: skip
FFCV = {
    **IMAGENET, **NOT_TUNED, "model": "resnetblur50", "batch_size": 8 * 512, "val_image_size": 256,
    "label_smoothing": 0.1, "amp": True, "channels_last": True, "optimizer": "crsam", "base": "sgd", "lr": 1.7,
    "min_lr": 0.0, "momentum": 0.9, "weight_decay": 1e-4, "decay_of": "matrices", "schedule": "linear",
    "warmup_epochs": 2.0, "warmup_steps": 0, "rho": 0.05, "min_rho": 0.0, "rho_schedule": "constant",
}  # fmt: skip
RECIPES = {
    "resnet50-gsam-90": {**GSAM_RESNET, "model": "resnet50"},
    "resnet101-gsam-90": {**GSAM_RESNET, "model": "resnet101"},
    "vit-s32-gsam-300": {**GSAM_VIT, "model": "vit_small_patch32_224", "min_rho": 0.0},
    "vit-b32-gsam-300": {**GSAM_VIT, "model": "vit_base_patch32_224", "min_rho": 0.1},
    "vit-s32-sam-90": {
        **IMAGENET, **NOT_TUNED, "model": "vit_small_patch32_224", "interpolation": "bilinear", "epochs": 90,
        "batch_size": 1024, "image_size": "224", "val_image_size": 224, "optimizer": "sam", "base": "adamw",
        "lr": 1e-3, "min_lr": 0.0, "weight_decay": 1e-4 / 1e-3, "decay_of": "all", "max_grad_norm": 1.0,
        "schedule": "cosine", "warmup_epochs": 8.0, "warmup_steps": 0, "rho": 0.2, "min_rho": 0.0,
        "rho_schedule": "constant", "sync_perturbation": True, "label_smoothing": 0.0, "amp": False,
    },
    "resnet50-fast-16": {**FFCV, "epochs": 16, "image_size": "160,192@0.75"},
    "resnet50-fast-40": {**FFCV, "epochs": 40, "image_size": "160,192@0.8"},
    "resnet50-fast-88": {**FFCV, "epochs": 88, "image_size": "160,192@0.8"},
}  # fmt: skip
CHEAP = {"interval": 5, "reuse": True, "curvature_interval": 10}
OPTIMIZERS = ("sgd", "adamw", "sam", "crsam")


def options_of(*files, more=""):
    return parse(["--config", *map(str, files), "--data", "folder:images", *more.split()])


def test_every_recipe_is_in_the_table():
    assert names() == sorted([*RECIPES, "cheap"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_hyperparameters_are_those_of_the_sources(recipe):
    options = vars(options_of(recipe, more="--optimizer crsam"))
    expected = RECIPES[recipe] | {"optimizer": "crsam"}

    assert set(read([recipe])) <= set(expected)  # so that every number is compared
    assert {name: options[name] for name in expected} == expected
    assert read([recipe])["optimizer"] == RECIPES[recipe]["optimizer"]


def test_cheap_form_is_three_options():
    assert read(["cheap"]) == CHEAP


# ffcv's rule: linear between two epochs, in multiples of 32. No value is a tie, which Python would round differently.
@pytest.mark.parametrize(("epochs", "start", "end"), [(16, 11, 13), (40, 29, 34), (88, 65, 76)])
def test_fast_recipes_change_the_image_size_in_the_epoch_of_the_source(epochs, start, end):
    source = [160 + 32 * round(min(1, max(0, (epoch - start) / (end - start))) + 1e-9) for epoch in range(epochs)]
    first, then = options_of(f"resnet50-fast-{epochs}").image_size.split(",")
    size, fraction = then.split("@")

    assert source == [int(size) if epoch / epochs >= float(fraction) else int(first) for epoch in range(epochs)]


@pytest.mark.parametrize("form", [(), ("cheap",)], ids=["every step", "cheap"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_option_selects_base_sam_or_crsam(recipe, optimizer, form, tmp_path):
    options = options_of(recipe, *form, more=f"--optimizer {optimizer}")

    assert options.optimizer == optimizer
    assert options.base == (optimizer if optimizer in ("sgd", "adamw") else RECIPES[recipe]["base"])
    assert options.rho == (RECIPES[recipe]["rho"] if optimizer in ("sam", "crsam") else None)
    assert options.alpha == (0.1 if optimizer == "crsam" else None)
    assert options.curvature_interval == ({(): 1, ("cheap",): 10}[form] if optimizer == "crsam" else None)
    assert options.reuse is (bool(form) and optimizer in ("sam", "crsam"))

    # Its config.json gives the same options.
    config = tmp_path / "config.json"
    config.write_text(json.dumps(full_config(options), indent=2))
    assert full_config(parse(["--config", str(config)])) == full_config(options)


@pytest.mark.parametrize("recipe", names())
def test_recipes_set_neither_data_nor_machine_options(recipe):
    assert not set(read([recipe])) & ({"data", "seed", *MACHINE_OPTIONS} - {"channels_last"})


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_start_with_their_description(recipe):
    comments = (FOLDER / f"{recipe}.yaml").read_text(encoding="utf-8").partition("\n\n")[0]

    assert all(line.startswith("#") for line in comments.splitlines())
    for what in ("Sources?: ", "Network: timm's ", "m, the samples that share a perturbation: ", "Our choices:",
                 "not tuned", "Expected top-1 accuracy.*: ", "not measured"):  # fmt: skip
        assert re.search(what, comments), what


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_document_has_the_numbers_of_the_recipe(recipe):
    (row,) = (
        line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{recipe}` | `")
    )
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    options = options_of(recipe)
    warmup = f"{options.warmup_steps:,} steps" if options.warmup_steps else f"{options.warmup_epochs:g} epochs"
    rate = f"{options.lr:g} → {options.min_lr:g}, {options.schedule}, {warmup}"
    rho = f"{options.rho:g}" if options.rho_schedule == "constant" else f"{options.rho:g} → {options.min_rho:g}"

    m = options.batch_size if options.sync_perturbation else options.batch_size // 8
    base = {"sgd": "SGD", "adamw": "AdamW"}[options.base]

    assert cells[1:7] == [f"`{options.model}`", str(options.epochs), f"{options.batch_size} / {m}", base, rate, rho]


def test_hours_in_the_document_match_their_formula():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in DOCUMENT.read_text(encoding="utf-8").splitlines()
        if line.endswith((" h |", " min |"))
    ]
    gradients = [1, 2, 3, 2 + 1 / 5, (4 + 2) / 5, (4 + 2 + 1 / 10) / 5]
    plain = {"90 epochs": 90 * 1_281_167 / 16_621 / 3600, "16 epochs": 14.9, "40 epochs": 35.6, "88 epochs": 77.2}

    assert [row[0].partition(",")[0] for row in rows] == list(plain)
    for row, once in zip(rows, plain.values(), strict=True):
        assert row[1:] == [f"{once * count:.1f} h" if once < 10 else f"{once * count:.0f} min" for count in gradients]


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def test_command_line_overrides_files_and_later_files_override_earlier_ones(here):
    write(here, first="lr: 0.1\nepochs: 3\namp: true\nweight-decay: 1e-5\n", second="lr: 0.2\nrho: 0.5\n")

    options = options_of("first.yaml", "second.yaml", more="--rho 0.7 --no-amp")

    assert (options.epochs, options.lr, options.rho, options.amp, options.weight_decay) == (3, 0.2, 0.7, False, 1e-5)
    assert options_of("second.yaml", "first.yaml").lr == 0.1
    assert options_of("first.yaml").amp is True


def test_a_flag_set_by_a_recipe_can_be_turned_off(here):
    write(here, plain="amp: false\n")

    assert options_of("resnet50-fast-16").amp is True
    assert options_of("resnet50-fast-16", "plain.yaml").amp is False
    assert options_of("resnet50-fast-16", more="--no-amp --no-channels-last").channels_last is False


def test_a_file_can_set_the_data_and_the_optimizer(here):
    write(here, all="data: synthetic:10\noptimizer: sam\nepochs: 2\nlr:\n")

    options = parse(["--config", "all.yaml"])

    assert (options.data, options.optimizer, options.epochs) == ("synthetic:10", "sam", 2)
    assert options.lr == 0.1  # a key without a value is not set


def test_a_file_takes_precedence_over_a_recipe_of_the_same_name(here):
    (here / "cheap").write_text("interval: 7\n")

    assert options_of("cheap").interval == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 0.1", "bad.yaml: learning_rate is not an option"),
        ("epoch: 3", "bad.yaml: epoch is not an option; did you mean epochs?"),
        ("rho-shedule: cosine", "bad.yaml: rho-shedule is not an option; did you mean rho_schedule?"),
        ("7: 3", "bad.yaml: 7 is not an option"),
        ("resume: true", "bad.yaml: resume can only be given on the command line"),
        ("config: other.yaml", "bad.yaml: config can only be given on the command line"),
        ("amp: 1", "bad.yaml: amp must be true or false, got 1"),
        ("amp: 'no'", "bad.yaml: amp must be true or false, got 'no'"),
        ("model: no", "bad.yaml: model must be a number or text, got False"),
        ("epochs: [1, 2]", "bad.yaml: epochs must be a number or text, got [1, 2]"),
        ("lr: {peak: 1}", "bad.yaml: lr must be a number or text, got {'peak': 1}"),
        ("scale: 0.08", "bad.yaml: scale must be a list of 2 values, got 0.08"),
        ("mean: [0.5, 0.5]", "bad.yaml: mean must be a list of 3 values, got [0.5, 0.5]"),
        ("epochs: many", "argument --epochs: invalid integer value: 'many'"),
        ("epochs: 2.5", "argument --epochs: invalid integer value: '2.5'"),
        ("lr: .nan", "argument --lr: nan is not a number"),
        ("optimizer: adam", "argument --optimizer: invalid choice: 'adam'"),
        ("image_size: 160;192", "argument --image-size: invalid list of image sizes"),
        ("lr: [0.1", "bad.yaml is not YAML: while parsing a flow sequence"),
        ("lr: !!python/object:os.system 1", "bad.yaml is not YAML: could not determine a constructor"),
        ("lr: 2026-13-40", "bad.yaml is not YAML: month must be in 1..12"),
        ("\x00", "bad.yaml is not YAML: unacceptable character"),
        ("# nothing", "bad.yaml is not a mapping of options to values"),
        ("- lr", "bad.yaml is not a mapping of options to values"),
        ("just words", "bad.yaml is not a mapping of options to values"),
    ],
)
def test_an_error_in_a_file_is_one_line(here, capsys, text, message):
    write(here, bad=text)

    refused(capsys, "bad.yaml", message)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("resnet50-gsam-9", "no such file or recipe; did you mean resnet50-gsam-90?"),
        ("imagenet", "no such file or recipe; the recipes are cheap, resnet101-gsam-90, resnet50-fast-16, "),
        ("folder", "no such file or recipe"),
        ("latin1.yaml", "latin1.yaml is not YAML: 'utf-8' codec can't decode"),
    ],
)
def test_an_unknown_file_or_recipe_is_an_error(here, capsys, source, message):
    (here / "folder").mkdir()
    (here / "latin1.yaml").write_bytes("# ä".encode("latin-1"))

    refused(capsys, source, message)


def test_an_option_without_effect_is_refused_only_on_the_command_line(here, capsys):
    write(here, crsam="alpha: 0.2\nmomentum: 0.8\n")

    assert options_of("crsam.yaml", more="--optimizer adamw").momentum is None
    assert main(["--config", "crsam.yaml", "--optimizer", "adamw", "--alpha", "0.2"]) == 2
    assert "--alpha is only for --optimizer crsam" in capsys.readouterr().err


def refused(capsys, source, message):
    assert main(["--config", source]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("crsam-train: --config")
    assert err.count("\n") == 1
    assert message in err
