"""CR-SAM in Lightning on scikit-learn's digits: automatic optimization, a schedule, resuming from a checkpoint."""

import argparse
import tempfile

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from crsam_ext import CRSAM
from crsam_ext.integrations.lightning import CRSAMCallback


class Digits(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        if self.optimizers().pass_index == 0:  # this method runs once per pass; log the pass at w
            self.log("train_accuracy", (logits.argmax(1) == y).float().mean(), on_step=False, on_epoch=True)
        return F.cross_entropy(logits, y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        optimizer = CRSAM(self.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, model=self)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)]


def main(precision="32-true", epochs=10, **options):
    """Train for half of the epochs, then resume from a checkpoint. Return the Trainer and the model."""
    L.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16).float(), torch.tensor(labels))
    train, test = random_split(data, [0.8, 0.2])
    loaders = DataLoader(train, 64, shuffle=True, drop_last=True), DataLoader(test, 512)
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "accelerator": "cpu", "precision": precision, "default_root_dir": folder, "logger": CSVLogger(folder),
            "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 10, **options,
        }  # fmt: skip
        trainer = L.Trainer(max_epochs=epochs // 2, callbacks=[CRSAMCallback()], **options)
        trainer.fit(Digits(), *loaders)
        trainer.save_checkpoint(f"{folder}/half.ckpt")
        trainer, model = L.Trainer(max_epochs=epochs, callbacks=[CRSAMCallback()], **options), Digits()
        trainer.fit(model, *loaders, ckpt_path=f"{folder}/half.ckpt")
    print(f"test accuracy {trainer.callback_metrics['accuracy']:.2%}")
    return trainer, model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="32-true", help="or bf16-mixed, bf16-true, 64-true")
    main(**vars(parser.parse_args()))
