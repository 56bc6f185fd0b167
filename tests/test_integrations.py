"""Trainers and file formats of other libraries: they make the same steps as a hand-written loop, and save
everything."""

import copy
import io
import logging
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from crsam_ext import CRSAM

from .reference import assert_close

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # other libraries' warnings are not errors
]
OPTIONS = {"base_optimizer": torch.optim.AdamW, "rho": 0.1, "lr": 0.01}
STEPS = 6


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def batches(steps=STEPS):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator)) for _ in range(steps)
    ]


def scheduled(model):
    optimizer = CRSAM(model.parameters(), model=model, **OPTIONS)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def seeded(index):
    """Seed the dropout of batch ``index``, whatever random numbers the trainer itself draws."""
    torch.manual_seed(100 + index)


@pytest.fixture
def plain():
    """Return the state after the same batches in a hand-written loop."""
    model = network()
    optimizer, schedule = scheduled(model)
    for index, (x, y) in enumerate(batches()):

        def closure(x=x, y=y):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        seeded(index)
        optimizer.step(closure)
        schedule.step()
    return model.state_dict()


def assert_equal(model, expected):
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


# Saving --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained():
    model = network()
    optimizer = CRSAM(model.parameters(), **OPTIONS)
    x, y = batches(1)[0]
    optimizer.step(lambda: F.cross_entropy(model(x), y).backward())
    return model


def test_safetensors_saves_all_parameters(trained, tmp_path):
    """save_model refuses or drops tensors that it considers parts of one tensor."""
    library = pytest.importorskip("safetensors.torch")
    library.save_model(trained, str(tmp_path / "model"))
    library.save_file(trained.state_dict(), str(tmp_path / "file"))
    for name in ("model", "file"):
        other = network()
        library.load_model(other, str(tmp_path / name))
        assert_equal(other, trained.state_dict())


def test_part_of_a_model_is_saved_without_the_rest():
    model = nn.Sequential(nn.Linear(500, 500), nn.Linear(500, 3))
    optimizer = CRSAM(model.parameters(), **OPTIONS)
    optimizer.step(lambda: model(torch.ones(1, 500)).sum().backward())
    for part in (model[1].state_dict(), optimizer.state[model[1].weight]):
        file = io.BytesIO()
        torch.save(part, file)
        assert file.tell() < 40_000  # bytes, of a million


def test_flat_memory_outlives_the_optimizer(trained):
    """Each storage keeps its flat buffer alive."""
    parameters = copy.deepcopy(trained.state_dict())
    torch.randn(10_000)
    assert_equal(trained, parameters)


# Lightning -----------------------------------------------------------------------------------------------------------


def lightning_run(epochs, trainer_options=None, checkpoint=None, with_callback=True, callbacks=(), callback_first=True):
    """Return a Trainer after ``epochs`` epochs of two of the batches, and its model."""
    L = pytest.importorskip("lightning")
    from crsam_ext.integrations.lightning import CRSAMCallback

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.calls = network(), 0

        def training_step(self, batch, batch_idx):
            self.calls += 1
            x, y = batch
            logits = self.net(x)
            if self.optimizers().pass_index == 0:
                self.log("x_mean", x.mean(), on_step=False, on_epoch=True)
            return F.cross_entropy(logits, y)

        def on_train_batch_start(self, batch, batch_idx):
            seeded(self.trainer.global_step)

        def train_dataloader(self):
            epoch = self.trainer.current_epoch
            return torch.utils.data.DataLoader(batches()[2 * epoch : 2 * epoch + 2], batch_size=None)

        def configure_optimizers(self):
            optimizer, schedule = scheduled(self.net)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    model, ours = Module(), [CRSAMCallback()] if with_callback else []
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, reload_dataloaders_every_n_epochs=1, log_every_n_steps=1,
        callbacks=[*ours, *callbacks] if callback_first else [*callbacks, *ours], **(trainer_options or {}),
    )  # fmt: skip
    trainer.fit(model, ckpt_path=checkpoint)
    return trainer, model


def test_lightning_makes_the_same_steps(plain):
    trainer, model = lightning_run(3)
    assert_equal(model.net, plain)
    assert trainer.global_step == model.optimizers().stats.steps == STEPS
    assert model.calls == 3 * STEPS
    assert model.optimizers().param_groups[0]["lr"] == pytest.approx(0.01 * 0.9**STEPS)
    last_two = batches()[4:]
    assert_close(trainer.callback_metrics["x_mean"], sum(x.mean() for x, _ in last_two) / 2, 1e-6)
    assert trainer.callback_metrics["crsam/steps"] == STEPS
    assert trainer.callback_metrics["crsam/loss"] == model.optimizers().stats.loss


def test_lightning_resumes(plain, tmp_path):
    trainer, _ = lightning_run(2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer, model = lightning_run(3, checkpoint=tmp_path / "last.ckpt")
    assert_equal(model.net, plain)
    assert model.calls == 3 * 2


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"gradient_clip_val": 1.0}, r"use CRSAM\(max_grad_norm=...\)"),
        ({"accumulate_grad_batches": 2}, "last batch only"),
        ("16-mixed", "use 'bf16-mixed'"),
    ],
    ids=["clip", "accumulate", "16-mixed"],
)
def test_invalid_lightning_settings_are_refused(options, match):
    pytest.importorskip("lightning")
    from lightning.pytorch.plugins import MixedPrecision

    if options == "16-mixed":  # on a CPU, the Trainer uses bfloat16 unless told otherwise
        options = {"plugins": [MixedPrecision("16-mixed", "cpu")]}
    with pytest.raises(ValueError, match=match):
        lightning_run(1, options)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("setting", ["scheduler", "accumulate_grad_batches", "gradient_clip_val"])
def test_lightning_settings_of_a_callback_are_checked(setting, first):
    """The callback changes them after the training has started, before or after CRSAMCallback runs."""
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    class Sets(lightning.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            setattr(trainer, setting, 2)

    callback = GradientAccumulationScheduler({0: 2}) if setting == "scheduler" else Sets()
    with pytest.raises(ValueError, match=r"last batch only|use CRSAM\(max_grad_norm=...\)"):
        lightning_run(1, callbacks=[callback], callback_first=first)


def test_lightning_trains_in_float16():
    """The plugin's scaler accepts closures: it scales the losses, but not the update."""
    pytest.importorskip("lightning")
    from crsam_ext.integrations.lightning import CRSAMMixedPrecision

    plugin = CRSAMMixedPrecision("cpu")
    half, full = (lightning_run(1, options)[1] for options in ({"plugins": [plugin]}, {}))
    assert plugin.scaler.get_scale() == 2.0**16
    stats = half.optimizers().stats.as_dict()
    assert (stats["steps"], stats["skipped"]) == (2, 0)
    assert_close(stats["grad_norm"], full.optimizers().stats.grad_norm, 0.05)
    assert half.calls == 6


def test_lightning_16_mixed_without_the_callback_is_refused():
    """Its precision plugin calls the closure itself, and then step() without a closure."""
    pytest.importorskip("lightning")
    from lightning.pytorch.plugins import MixedPrecision

    with pytest.raises(RuntimeError, match=r"call first_step\(\), or step\(closure\)"):
        lightning_run(1, {"plugins": [MixedPrecision("16-mixed", "cpu")]}, with_callback=False)


# Accelerate ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator():
    """Return an Accelerator with the settings of this test: Accelerate keeps its first settings for the whole
    process."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def accelerated(accelerator, steps, resume=None):
    model = network()
    model, optimizer, schedule = accelerator.prepare(model, *scheduled(model))
    if resume is not None:
        accelerator.load_state(resume)
    for index, (x, y) in list(enumerate(batches()))[steps]:

        def closure(x=x, y=y):
            loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            return loss

        seeded(index)
        optimizer.step(closure)
        schedule.step()
    return model, optimizer


def test_accelerate_makes_the_same_steps(accelerator, plain):
    model, optimizer = accelerated(accelerator, slice(STEPS))
    assert_equal(model, plain)
    assert not optimizer.step_was_skipped
    optimizer.eval(), optimizer.train()


def test_accelerate_saves_and_resumes(accelerator, plain, tmp_path):
    """The file that save_state writes contains the whole model, and training continues after load_state to the same
    bits."""
    accelerated(accelerator, slice(4))
    accelerator.save_state(tmp_path)
    accelerator.free_memory()
    model, _ = accelerated(accelerator, slice(4, STEPS), resume=tmp_path)
    assert_equal(model, plain)


def test_accelerate_needs_the_scaler_of_this_project(accelerator):
    """torch's scaler refuses a closure, and the error names the replacement, with which the scale has no effect."""
    import crsam_ext

    x, y = batches(1)[0]

    def run(scaler):
        accelerator.scaler = scaler
        model = network()
        model, optimizer = accelerator.prepare(model, CRSAM(model.parameters(), torch.optim.SGD, lr=0.5))

        def closure():
            loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            return loss

        if type(scaler) is torch.amp.GradScaler:
            closure()  # it requires a gradient first
        seeded(0)
        optimizer.step(closure)
        assert optimizer.optimizer.stats.steps == 1
        return model

    with pytest.raises(RuntimeError, match=r"use crsam_ext\.GradScaler"):
        run(torch.amp.GradScaler("cpu"))
    for p, q in zip(run(crsam_ext.GradScaler("cpu")).parameters(), run(None).parameters(), strict=True):
        assert_close(p, q, 1e-5)


# transformers --------------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A model with the Trainer's interface, which records the random numbers of its passes."""

    def __init__(self):
        super().__init__()
        self.net, self.drawn = network(), []

    def forward(self, x, labels):
        self.drawn.append(torch.get_rng_state())
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def hugging_face(tmp_path, optimizer=None, optimizer_cls_and_kwargs=None, model=None, **arguments):
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    from crsam_ext.integrations.transformers import CRSAMTrainer

    class InOrder(CRSAMTrainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args):
            seeded(self.state.global_step)
            return super().training_step(*args)

    x, y = (torch.cat(column) for column in zip(*batches(), strict=True))
    data = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    settings = {
        "per_device_train_batch_size": 16, "num_train_epochs": 1, "max_grad_norm": 0, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 2, **arguments,
    }  # fmt: skip
    return InOrder(
        model, transformers.TrainingArguments(str(tmp_path), **settings), train_dataset=data,
        optimizers=(optimizer, None if optimizer is None else torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
    )  # fmt: skip


def test_transformers_makes_the_same_steps(plain, tmp_path):
    model = Wrapped()
    optimizer = CRSAM(model.parameters(), model=model, **OPTIONS)
    trainer = hugging_face(tmp_path, optimizer, model=model)
    trainer.train()
    assert_equal(model.net, plain)
    assert trainer.state.global_step == optimizer.stats.steps == STEPS
    assert len(model.drawn) == 3 * STEPS
    for first in range(0, 3 * STEPS, 3):
        assert torch.equal(model.drawn[first], model.drawn[first + 1])
        assert torch.equal(model.drawn[first], model.drawn[first + 2])


@pytest.mark.parametrize(
    "options", [{"alpha": 0, "beta": 0}, {"rho": 0.0}, {"regularizer": "log", "estimator": "loss"}]
)
def test_transformers_supports_other_numbers_of_passes(options, tmp_path):
    model = Wrapped()
    options = {**OPTIONS, **options}
    trainer = hugging_face(tmp_path, optimizer_cls_and_kwargs=(CRSAM, options), model=model, weight_decay=0.1)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert len(model.drawn) == optimizer.passes * STEPS
    assert optimizer.stats.steps == STEPS
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_transformers_clips_the_regularized_gradient(tmp_path):
    """The result is the same if the Trainer clips and if CRSAM does."""
    models, optimizers = [], []
    for ours, theirs in ((0.05, 0.0), (None, 0.05)):
        model = Wrapped()
        optimizer = CRSAM(model.parameters(), torch.optim.SGD, lr=0.5, max_grad_norm=ours, model=model)
        hugging_face(tmp_path, optimizer, model=model, max_grad_norm=theirs).train()
        models.append(model), optimizers.append(optimizer)
    assert optimizers[0].stats.clip_factor < 0.5
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert_close(p, q, 1e-5)
    assert [optimizer.stats.steps for optimizer in optimizers] == [STEPS, STEPS]


@pytest.mark.parametrize(
    ("cls", "arguments", "error", "match"),
    [
        (CRSAM, {"gradient_accumulation_steps": 2}, ValueError, "gradient_accumulation_steps must be 1"),
        (torch.optim.AdamW, {}, TypeError, "CRSAMTrainer needs CRSAM as its optimizer, but has AdamW"),
    ],
    ids=["accumulate", "AdamW"],
)
def test_invalid_transformers_settings_are_refused(cls, arguments, error, match, tmp_path):
    trainer = hugging_face(tmp_path, optimizer_cls_and_kwargs=(cls, {"lr": 0.1}), model=Wrapped(), **arguments)
    with pytest.raises(error, match=match):
        trainer.train()


# TensorBoard, and imports --------------------------------------------------------------------------------------------


def test_tensorboard_receives_the_statistics(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from crsam_ext.integrations.tensorboard import SummaryWriter, write_stats

    model = network()
    parameters = list(model.parameters())
    optimizer = CRSAM([{"params": parameters[:2]}, {"params": parameters[2:], "alpha": 0.2}], regularizer="log")
    with SummaryWriter(tmp_path) as writer:
        for x, y in batches(2):
            optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y).backward())
            write_stats(writer, optimizer)
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()["scalars"]
    assert {"crsam/grad_norm", "crsam/kappa", "crsam/a/0", "crsam/a/1", "crsam/skipped"} <= set(tags)
    assert "crsam/loss" not in tags, "the closure returned no loss"
    written = events.Scalars("crsam/kappa")
    assert [event.step for event in written] == [1, 2]
    assert written[-1].value == pytest.approx(optimizer.stats.kappa.item(), rel=1e-6)


def test_libraries_are_only_imported_when_used():
    libraries = "lightning", "transformers", "accelerate", "tensorboard", "torch.utils.tensorboard"
    code = f"import sys, crsam_ext, crsam_ext.integrations; print([m for m in {libraries} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
