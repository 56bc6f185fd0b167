"""DistributedDataParallel on GPUs: one process per GPU with NCCL, and two processes that share a GPU with gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.require_cuda

PROGRAM = Path(__file__).with_name("replicas.py")


@pytest.mark.parametrize("communication", ["nccl", "gloo"])
def test_steps_equal_those_on_a_cpu(communication):
    processes = torch.cuda.device_count() if communication == "nccl" else 2
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, PROGRAM, communication],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-5000:]
