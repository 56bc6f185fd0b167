"""CR-SAM with tensor parallelism and fully_shard on scikit-learn's digits.

torchrun --nproc-per-node 4 examples/tensor_parallel_digits.py
"""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, random_split

from crsam_ext import CRSAM

BATCH = 64  # global batch size, over all processes


class Network(nn.Module):
    """A network with one residual block: input (N, 64), output (N, 10)."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)
        self.out = nn.Linear(64, 10)

    def forward(self, x):
        return self.out(x + self.down(torch.relu(self.up(self.norm(x)))))


def main(epochs=10):
    """Train, with two layers split over pairs of processes. Return the accuracy."""
    if torch.cuda.is_available():
        device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    mesh = init_device_mesh(device.type, (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    model = Network().to(device)
    parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    optimizer = CRSAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.05, momentum=0.9)

    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16).float(), torch.tensor(labels))
    data, test = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    # The two processes of a pair take the same batch.
    sampler = DistributedSampler(data, mesh["data"].size(), mesh["data"].get_local_rank())
    loader = DataLoader(data, BATCH // mesh["data"].size(), sampler=sampler, drop_last=True)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            x, y = x.to(device), y.to(device)

            def closure(x=x, y=y):
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
    optimizer.check_replicas()

    x, y = (column.to(device) for column in next(iter(DataLoader(test, len(test)))))
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == y).float().mean().item()
    if dist.get_rank() == 0:
        print(f"test accuracy {accuracy:.2%}")
    return accuracy


if __name__ == "__main__":
    dist.init_process_group()
    main()
    dist.barrier()
    dist.destroy_process_group()
