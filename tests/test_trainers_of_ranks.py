"""Lightning, Accelerate and transformers in two processes: the same bits as a hand-written loop."""

import os
import tempfile

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from crsam_ext import CRSAM

from .ranks import Ranks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SAMPLES, BATCH, RANKS = 64, 8, 2
OPTIONS = {"rho": 0.1, "alpha": 0.3, "beta": 0.2, "lr": 0.1, "momentum": 0.9}


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(RANKS)
    yield ranks
    ranks.close()


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLES, 5, generator=generator), torch.randint(3, (SAMPLES,), generator=generator)


def of_rank(rank):
    """Return the batches of a rank."""
    return list(torch.utils.data.DataLoader(dataset_of(rank), BATCH))


def dataset_of(rank):
    return torch.utils.data.TensorDataset(*(column[rank::RANKS] for column in data()))


def by_hand(rank, size, **options):
    model = network()
    ddp = DistributedDataParallel(model)
    optimizer = CRSAM(model.parameters(), model=ddp, **OPTIONS, **options)
    for x, y in of_rank(rank):

        def closure(x=x, y=y):
            loss = torch.nn.functional.cross_entropy(ddp(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    return [p.detach().clone() for p in model.parameters()]


def assert_same(results, wanted):
    for params, others in zip(results, wanted, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def environment(rank, size, port):
    """Set the environment variables that torchrun sets."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}


def test_lightning_gives_the_same_bits(two):
    pytest.importorskip("lightning")
    assert_same(two(with_lightning), two(by_hand))


def with_lightning(rank, size):
    environment(rank, size, 29511)
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    from crsam_ext.integrations.lightning import CRSAMCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()

        def training_step(self, batch, index):
            x, y = batch
            return torch.nn.functional.cross_entropy(self.network(x), y)

        def configure_optimizers(self):
            return CRSAM(self.parameters(), model=self, **OPTIONS)

    module = Module()
    loader = torch.utils.data.DataLoader(dataset_of(rank), BATCH)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=size, callbacks=[CRSAMCallback()], logger=False,
        strategy=DDPStrategy(process_group_backend="gloo", cluster_environment=TorchElasticEnvironment()),
        use_distributed_sampler=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tempfile.mkdtemp(),
    )  # fmt: skip
    trainer.fit(module, loader)
    assert isinstance(trainer.optimizers[0].model, DistributedDataParallel)
    return [p.detach().clone() for p in module.parameters()]


def test_accelerate_gives_the_same_bits(two):
    pytest.importorskip("accelerate")
    assert_same(two(with_accelerate), two(by_hand))


def with_accelerate(rank, size):
    environment(rank, size, 29511)
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), network()
    optimizer = CRSAM(model.parameters(), model=model, **OPTIONS)
    model, optimizer = accelerator.prepare(model, optimizer)
    optimizer.optimizer.follow_wrapper(model)
    for x, y in of_rank(rank):

        def closure(x=x, y=y):
            loss = torch.nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            return loss

        optimizer.step(closure)
    optimizer.optimizer.check_replicas()
    return [p.detach().clone() for p in accelerator.unwrap_model(model).parameters()]


@pytest.mark.parametrize("clipped", [False, True])
def test_transformers_gives_the_same_bits(two, clipped):
    pytest.importorskip("transformers")
    options = {"max_grad_norm": 0.05} if clipped else {}
    wanted = two(by_hand_clipped if clipped else by_hand)
    assert_same(two(with_transformers, options), wanted)


def by_hand_clipped(rank, size):
    """Clip after combine(), as the Trainer does."""
    model = network()
    ddp = DistributedDataParallel(model)
    optimizer = CRSAM(model.parameters(), model=ddp, **OPTIONS)
    for x, y in of_rank(rank):
        for call in (optimizer.first_step, optimizer.second_step, None):
            with optimizer.no_sync():
                torch.nn.functional.cross_entropy(ddp(x), y).backward()
            if call is not None:
                call(zero_grad=True)
        optimizer.combine()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def with_transformers(rank, size, options):
    environment(rank, size, 29511)
    from transformers import TrainingArguments

    from crsam_ext.integrations.transformers import CRSAMTrainer

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, x, labels):
            logits = self.network(x)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    class OfRank(CRSAMTrainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, BATCH, collate_fn=self.data_collator)

    model = Model()
    samples = [{"x": x, "labels": y} for x, y in dataset_of(rank)]
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=BATCH, num_train_epochs=1, use_cpu=True,
        ddp_backend="gloo", report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        max_grad_norm=options.get("max_grad_norm", 0.0), lr_scheduler_type="constant",
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    optimizer = CRSAM(model.parameters(), model=model, **OPTIONS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer = OfRank(model=model, args=arguments, train_dataset=samples, optimizers=(optimizer, schedule))
    trainer.train()
    assert isinstance(optimizer.model, DistributedDataParallel)
    assert optimizer.stats.steps == SAMPLES // BATCH // RANKS
    return [p.detach().clone() for p in model.parameters()]
