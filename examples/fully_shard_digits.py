"""CR-SAM with fully_shard on scikit-learn's digits. A checkpoint can be loaded by any number of processes.

torchrun --nproc-per-node 2 examples/fully_shard_digits.py
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, random_split

from crsam_ext import CRSAM

BATCH = 64  # global batch size, over all processes


def make(device):
    """Return a model whose parameters are sharded over all processes, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model, CRSAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=0.002)


def train(model, optimizer, data, device, epochs):
    """Train for some epochs. All processes perturb along the gradient of the global batch."""
    sampler = DistributedSampler(data)
    loader = DataLoader(data, BATCH // dist.get_world_size(), sampler=sampler, drop_last=True)
    for epoch in epochs:
        sampler.set_epoch(epoch)
        for x, y in loader:
            x, y = x.to(device), y.to(device)

            def closure(x=x, y=y):
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)


def main(folder):
    """Train for half of the epochs, save, load into a new model and optimizer, train on. Return the accuracy."""
    if torch.cuda.is_available():
        device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16).float(), torch.tensor(labels))
    data, test = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))

    model, optimizer = make(device)
    train(model, optimizer, data, device, range(5))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)

    model, optimizer = make(device)
    weights, state = get_state_dict(model, optimizer)
    read = {"model": weights, "optimizer": state}
    dcp.load(read, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=read["model"], optim_state_dict=read["optimizer"])
    train(model, optimizer, data, device, range(5, 10))

    x, y = (column.to(device) for column in next(iter(DataLoader(test, len(test)))))
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == y).float().mean().item()
    if dist.get_rank() == 0:
        print(f"test accuracy {accuracy:.2%}")
    return accuracy


if __name__ == "__main__":
    dist.init_process_group()
    shared = [tempfile.mkdtemp()]
    dist.broadcast_object_list(shared)
    main(Path(shared[0]) / "checkpoint")
    dist.barrier()
    dist.destroy_process_group()
