"""Every recipe trains: three steps of its own network on small random images."""

import json
import math

import pytest

from crsam_ext.training.recipes import names, read

pytestmark = pytest.mark.slow

RECIPES = [[recipe] for recipe in names() if recipe != "cheap"]


@pytest.mark.parametrize("files", [*RECIPES, ["vit-s32-gsam-300", "cheap"]], ids=" ".join)
def test_three_steps_with_the_network_of_the_recipe(files, crsam_train, here, read_log, monkeypatch):
    monkeypatch.setattr("crsam_ext.training.synthetic.PER_CLASS", {"train": 12, "val": 2})
    # With bfloat16, so that all four networks have run with it.
    small = "--image-size 32 --val-image-size 32 --epochs 1 --batch-size 8 --warmup-steps 1 --amp"

    assert crsam_train(f"--config {' '.join(files)} --data synthetic:2 {small} --output run") == 0

    config = json.loads((here / "run" / "config.json").read_text())
    recipe = read(files) | {"image_size": "32", "val_image_size": 32, "epochs": 1, "batch_size": 8}
    for name in ("model", "optimizer", "base", "lr", "weight_decay", "rho", "image_size", "batch_size"):
        assert config[name] == recipe[name], name
    assert config.get("reuse") == recipe.get("reuse", False)
    assert math.isfinite(float(read_log(here / "run")[-1]["train_loss"]))
