"""CR-SAM on scikit-learn's handwritten digits: a complete training loop, which takes a few seconds on a CPU."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

from crsam_ext import CRSAM

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, x_test, y, y_test = map(torch.tensor, train_test_split(images / 16, labels, test_size=0.2, random_state=0))
x, x_test = x.float(), x_test.float()

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = CRSAM(model.parameters(), torch.optim.SGD, rho=0.1, alpha=0.1, beta=0.01, lr=0.1, momentum=0.9)
epochs = 20
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

for _ in range(epochs):
    for batch in torch.randperm(len(x)).split(64):

        def closure(batch=batch):
            """Run forward and backward on the batch; CRSAM calls this at w, w + e and w - e."""
            loss = F.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            return loss

        optimizer.step(closure)
    schedule.step()

with torch.no_grad():
    accuracy = (model(x_test).argmax(1) == y_test).float().mean()
print(f"test accuracy {accuracy:.2%}")
