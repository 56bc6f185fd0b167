"""CR-SAM with Hugging Face Accelerate on scikit-learn's digits: micro-batches, bfloat16, checkpoints.

torchrun --nproc-per-node 2 examples/accelerate_digits.py    in several processes
"""

import argparse
import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from crsam_ext import CRSAM


def main(mixed_precision="no", micro_batches=2, epochs=10):
    """Train; in the middle, save a checkpoint and load it. Return the model and the optimizer."""
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=True)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16).float(), torch.tensor(labels))
    train, test = random_split(data, [0.8, 0.2])

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))
    options = {"rho": 0.1, "lr": 2e-3, "weight_decay": 0.05, "max_grad_norm": 1.0}
    optimizer = CRSAM(model.parameters(), torch.optim.AdamW, model=model, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    loader = DataLoader(train, 64, shuffle=True)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    optimizer.optimizer.follow_wrapper(model)  # several processes: prepare() made a DDP

    with tempfile.TemporaryDirectory() as own:
        (folder,) = broadcast_object_list([own])
        for epoch in range(epochs):
            model.train()
            for x, y in loader:

                def closure_of(part, target, size):
                    def closure():
                        with accelerator.autocast():
                            loss = F.cross_entropy(model(part), target, reduction="sum") / size
                        accelerator.backward(loss)
                        return loss

                    return closure

                # Every pass needs all micro-batches, so the step accumulates them, not Accelerate.
                parts = zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True)
                optimizer.step([closure_of(part, target, len(x)) for part, target in parts])
            schedule.step()
            if epoch == epochs // 2:
                accelerator.save_state(folder)
                accelerator.wait_for_everyone()
                accelerator.load_state(folder)
        accelerator.wait_for_everyone()
    optimizer.optimizer.check_replicas()

    model.eval()
    with torch.no_grad():
        x, y = (column.to(accelerator.device) for column in next(iter(DataLoader(test, len(test)))))
        accelerator.print(f"test accuracy {(model(x).argmax(1) == y).float().mean():.2%}")
    accelerator.wait_for_everyone()
    return model, optimizer.optimizer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16"])
    main(**vars(parser.parse_args()))
