"""Training in several processes: what they share, and that it is the training of one process on all their batches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import multiprocessing, nn

from tools.sample_model import ranks
from tools.sample_model.average import MasterWeights

PROCESSES = 2


def _work(rank: int, rendezvous: str, results: multiprocessing.Queue) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": rendezvous, "CUDA_VISIBLE_DEVICES": ""}
    ranks.join()
    torch.manual_seed(rank)
    clock = ranks.Clock(1e-3)
    shares = []
    while not shares or shares[-1] < 1:
        shares.append(clock.share())
    weights = _stepped(nn.Linear(3, 2), torch.full((1, 3), float(rank)))
    results.put((rank, ranks.rank(), shares, [weight.tolist() for weight in weights]))
    results.close()
    results.join_thread()
    ranks.leave()
    assert not _threads("gloo"), "they can abort the process when it ends"


def _threads(word: str) -> list[str]:
    """Names of this process's threads with that word, where the system tells them."""
    names = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").glob("*")]
    return [name for name in names if word in name]


def _stepped(network: nn.Linear, batch: torch.Tensor) -> list[torch.Tensor]:
    """The weights after a few steps towards an output of 1."""
    weights = MasterWeights(network, 0.1, weight_decay=0.0)
    for _ in range(5):
        weights.schedule(0.0)
        weights.step((network(batch) - 1).square().mean())
    return [weight.detach() for weight in weights.live]


def _free_port() -> str:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return str(store.port)


@pytest.fixture(scope="module")
def told():
    """What both processes found, by rank."""
    context = multiprocessing.get_context("spawn")
    results, port = context.Queue(), _free_port()
    started = [context.Process(target=_work, args=(rank, port, results)) for rank in range(PROCESSES)]
    for process in started:
        process.start()
    found = sorted(results.get(timeout=120) for _ in started)
    for process in started:
        process.join(timeout=60)
    assert [process.exitcode for process in started] == [0] * PROCESSES
    return found


def test_each_process_knows_its_number(told):
    assert [(given, known) for given, known, *_ in told] == [(0, 0), (1, 1)]


def test_both_go_by_the_first_ones_clock(told):
    first, second = (shares for _, _, shares, _ in told)
    assert first == second
    assert first == sorted(first)


def test_weights_are_those_of_one_process_with_both_batches(told):
    """The first one's weights to begin with, and the mean of the gradients."""
    first, second = (weights for *_, weights in told)
    assert first == second
    torch.manual_seed(0)
    alone = _stepped(nn.Linear(3, 2), torch.stack([torch.zeros(3), torch.ones(3)]))
    for weight, expected in zip(first, alone, strict=True):
        torch.testing.assert_close(torch.tensor(weight), expected, rtol=1e-4, atol=1e-5)


def test_alone_nothing_is_shared_and_nothing_waited_for():
    gradient = torch.ones(2)
    ranks.take_mean([gradient])
    ranks.share_first([gradient])
    assert gradient.tolist() == [1, 1]
    assert ranks.rank() == 0
    assert ranks.join() == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks.leave()
