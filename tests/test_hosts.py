"""Two hosts, simulated by connected network namespaces; one is disconnected during a step."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from .hosts_program import train
from .ranks import Ranks

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("hosts_program.py")
STEPS = 8


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True, timeout=20)


class Host:
    """A network namespace with one end of the cable."""

    def __init__(self, name, address):
        self.name, self.address = name, address
        ip("netns", "add", name)

    def plug_in(self, end):
        self.end = end
        ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", end)
        for device in (end, "lo"):
            ip("-n", self.name, "link", "set", device, "up")

    def cable(self, state):
        ip("-n", self.name, "link", "set", self.end, state)

    def start(self, number, folder, pause):
        command = [
            "ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
            "--nproc-per-node=1", f"--node-rank={number}", "--rdzv-backend=c10d", "--rdzv-id=t",
            "--rdzv-endpoint=10.77.0.1:29400", f"--rdzv-conf=is_host={1 - number},timeout=60,read_timeout=10",
            f"--local-addr={self.address}", str(PROGRAM), str(folder), str(STEPS), str(pause),
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.end}
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def remove(self):
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True)


@pytest.fixture
def hosts():
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed")
    names = [f"crsam{os.getpid()}{side}" for side in "ab"]
    made = []
    try:
        try:
            made.extend(Host(name, f"10.77.0.{i + 1}") for i, name in enumerate(names))
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted: {error.stderr.strip()}")
        ends = [f"v{os.getpid()}{side}" for side in "ab"]
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for host, end in zip(made, ends, strict=True):
            host.plug_in(end)
        yield made
    finally:
        for host in made:
            host.remove()


def stop(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate(timeout=20)[0]


def test_training_resumes_after_a_host_is_disconnected(hosts, tmp_path):
    """The other host ends with an error, and both resume from the last checkpoint to the same bits."""
    _, second = hosts
    processes = [host.start(i, tmp_path, 0.2) for i, host in enumerate(hosts)]
    try:
        for _ in range(600):
            if (tmp_path / "last.pt").exists() or any(process.poll() is not None for process in processes):
                break
            time.sleep(0.1)
        second.cable("down")
        processes[0].wait(timeout=90)
    finally:
        told = [stop(process) for process in processes]
    assert processes[0].returncode != 0
    assert "gloo" in told[0], told[0][-3000:]
    begun = torch.load(tmp_path / "last.pt")["steps"]
    assert 0 < begun < STEPS

    second.cable("up")
    processes = [host.start(i, tmp_path, 0.0) for i, host in enumerate(hosts)]
    try:
        codes = [process.wait(timeout=90) for process in processes]
    finally:
        told = [stop(process) for process in processes]
    assert codes == [0, 0], told
    ranks = Ranks(2)
    try:
        (tmp_path / "whole").mkdir()
        expected, _ = ranks(uninterrupted, tmp_path / "whole")
    finally:
        ranks.close()
    saved = torch.load(tmp_path / "last.pt")["model"].values()
    assert all(torch.equal(p, q) for p, q in zip(saved, expected, strict=True))


def uninterrupted(rank, size, folder):
    return train(folder, STEPS, 0.0)
