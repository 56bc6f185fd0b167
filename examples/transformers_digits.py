"""CR-SAM with Hugging Face's Trainer: a small ResNet, built from a configuration, on scikit-learn's digits."""

import argparse
import tempfile

import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset, random_split
from transformers import ResNetConfig, ResNetForImageClassification, TrainingArguments, set_seed

from crsam_ext import CRSAM
from crsam_ext.integrations.transformers import CRSAMTrainer


class Digits(Dataset):
    def __init__(self):
        images, self.labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images / 16).float().view(-1, 1, 8, 8)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": int(self.labels[index])}


def main(bf16=False, epochs=4, folder=None, resume=False, **options):
    """Train and return the Trainer."""
    set_seed(0)
    train, test = random_split(Digits(), [0.8, 0.2])
    config = ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", num_labels=10
    )
    model = ResNetForImageClassification(config)
    optimizer = CRSAM(model.parameters(), torch.optim.AdamW, rho=0.05, lr=3e-3, max_grad_norm=1.0, model=model)
    with tempfile.TemporaryDirectory() as temporary:
        arguments = TrainingArguments(
            folder or temporary, num_train_epochs=epochs, per_device_train_batch_size=64, lr_scheduler_type="cosine",
            warmup_steps=10, max_grad_norm=0, bf16=bf16, use_cpu=True, report_to="none",
            save_strategy="epoch", logging_steps=20, **options,
        )  # fmt: skip
        trainer = CRSAMTrainer(
            model, arguments, train_dataset=train, eval_dataset=test,
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())},
            optimizers=(optimizer, None),  # the Trainer creates the schedule
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        print(f"test accuracy {trainer.evaluate()['eval_accuracy']:.2%}")
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bf16", action="store_true")
    main(**vars(parser.parse_args()))
