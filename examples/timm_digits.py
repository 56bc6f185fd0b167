"""CR-SAM in a custom loop on scikit-learn's digits, with timm's scheduler and average, torchmetrics and TensorBoard."""

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from crsam_ext import CRSAM
from crsam_ext.integrations.tensorboard import write_stats


def main(epochs=4, folder="runs/timm_digits"):
    """Train. Return the model, its weight average and the optimizer."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16).float().view(-1, 1, 8, 8), torch.tensor(labels)
    train, test = torch.randperm(len(labels)).split([1437, 360])

    model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    optimizer = CRSAM(
        model.parameters(), torch.optim.SGD, regularizer="log", rho=0.1, lr=0.1, momentum=0.9, model=model
    )
    schedule = CosineLRScheduler(optimizer, t_initial=epochs, warmup_t=1, warmup_lr_init=0.01)
    average = ModelEmaV3(model, decay=0.95)
    accuracy = MulticlassAccuracy(10)
    measured = MetricCollection({name: MeanMetric() for name in ("loss", "grad_norm", "kappa")})

    with SummaryWriter(folder) as writer:
        for epoch in range(epochs):
            schedule.step(epoch)
            for batch in train[torch.randperm(len(train))].split(64):

                def closure(batch=batch):
                    """Run forward and backward. This is called once per pass; metrics take the pass at w."""
                    logits = model(images[batch])
                    if optimizer.pass_index == 0:
                        accuracy.update(logits, labels[batch])
                    loss = F.cross_entropy(logits, labels[batch])
                    loss.backward()
                    return loss

                optimizer.step(closure)
                average.update(model)  # after the step, when the weights are not perturbed
                for name, metric in measured.items():
                    metric.update(getattr(optimizer.stats, name))  # stays on the device
            write_stats(writer, optimizer)
            values = {name: f"{value:.3g}" for name, value in measured.compute().items()}
            print(f"epoch {epoch}: training accuracy {accuracy.compute():.2%}, {values}")
            accuracy.reset(), measured.reset()

    average.eval()
    with torch.no_grad():
        print(f"test accuracy {(average(images[test]).argmax(1) == labels[test]).float().mean():.2%}")
    return model, average, optimizer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    main(**vars(parser.parse_args()))
