"""n ranks against one process on the same global batch: the same gradients, tensor by tensor."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpipar.comm import Communicator
from mpipar.model import ModelConfig, Transformer, initialise
from mpipar.parallel import DataParallel


class Net(nn.Module):
    """Small, with all that is awkward: a tied weight, a frozen one, a branch that not every input takes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 6)
        self.sometimes = nn.Linear(6, 6)
        self.never = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.offset: Tensor
        self.register_buffer("offset", torch.randn(6))

    def loss(self, tokens: Tensor, branch: bool) -> Tensor:
        x = torch.tanh(self.frozen(self.inner(self.embedding(tokens[:, :-1])))) + self.offset
        if branch:
            x = x + self.sometimes(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def build(seed: int, dtype: torch.dtype) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def microbatch(i: int) -> tuple[Tensor, bool]:
    """The i-th of the step: sizes differ, and only two take the branch."""
    generator = torch.Generator().manual_seed(i)
    return torch.randint(0, 11, (1 + i % 3, 5), generator=generator), i in (3, 4)


def reference(dtype: torch.dtype, count: int, seed: int = 0) -> Net:
    """One process computes every microbatch."""
    net = build(seed, dtype)
    for i in range(count):
        net.loss(*microbatch(i)).backward()
    return net


def backward(replicas: DataParallel, net: Net, mine: list[int], *, overlap: bool) -> None:
    for i in mine[:-1] if overlap else mine:
        net.loss(*microbatch(i)).backward()
    if overlap and mine:
        with replicas.final_backward():
            net.loss(*microbatch(mine[-1])).backward()


def assert_same_gradients(net: Net, expected: Net, tolerance: float) -> None:
    for (name, p), q in zip(net.named_parameters(), expected.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, f"{name} has a gradient that no rank computed"
            continue
        assert p.grad is not None, f"{name} lost its gradient"
        difference = ((p.grad - q.grad).norm() / q.grad.norm().clamp_min(1e-30)).item()
        assert difference <= tolerance, f"{name}: {difference:.1e}"


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("bucket_bytes", [1, 400, 1 << 20])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("share", [True, False])
def test_gradients_equal_one_process(
    comm: Communicator, overlap: bool, dtype: torch.dtype, tolerance: float, bucket_bytes: int, count: int, share: bool
) -> None:
    """Also where ranks have different numbers of microbatches, or none; in shared memory and over the ring."""
    net = build(0, dtype)
    replicas = DataParallel(net, comm, bucket_bytes=bucket_bytes, share=share)
    assert (replicas.unshared is None) == (share and comm.size > 1), replicas.unshared
    expected = reference(dtype, count)
    mine = list(range(comm.rank, count, comm.size))
    for _ in range(2):  # the second time buckets hold what the first left in them
        backward(replicas, net, mine, overlap=overlap)
        totals = replicas.reduce(np.array([float(len(mine)), 1.0]))
        assert totals.tolist() == [count, comm.size]
        assert_same_gradients(net, expected, tolerance)
        norm = torch.stack([p.grad.norm() for p in expected.parameters() if p.grad is not None]).norm()
        assert abs(replicas.gradient_norm() - norm.item()) <= 1e-4 * norm.item()
        net.zero_grad(set_to_none=True)
    replicas.close()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_gradients_of_the_model_equal_one_process(
    comm: Communicator, family: Literal["llama", "gpt2"], dtype: torch.dtype, tolerance: float
) -> None:
    """The key biases of GPT-2 are left out in float32: their gradient is zero but for rounding."""

    def model() -> Transformer:
        config = ModelConfig(family=family, layers=2, dim=32, heads=4, kv_heads=2, max_seq_len=16)
        transformer = Transformer(config, vocab_size=64)
        initialise(transformer, seed=3)
        return transformer.to(dtype)

    def tokens(i: int) -> Tensor:
        return torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(i))

    mine, alone = model(), model()
    replicas = DataParallel(mine, comm, bucket_bytes=1 << 13)
    indices = range(comm.rank, 8, comm.size)
    for i in indices:
        with replicas.final_backward() if i == indices[-1] else nullcontext():
            mine.loss(tokens(i))[0].backward()
    replicas.reduce(np.zeros(0))
    for i in range(8):
        alone.loss(tokens(i))[0].backward()
    for (name, p), q in zip(mine.named_parameters(), alone.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        if dtype == torch.float64 or not name.endswith("attention.wk.bias"):
            assert (p.grad - q.grad).norm() <= tolerance * q.grad.norm() + 1e-14, name
    replicas.close()


def test_zeroed_in_place_or_set_to_none(comm: Communicator) -> None:
    """Both ways of clearing gradients, in turn; and one step without clearing adds up, as torch does."""
    net = build(0, torch.float64)
    replicas = DataParallel(net, comm)
    expected = reference(torch.float64, 8)
    mine = list(range(comm.rank, 8, comm.size))
    for set_to_none in (False, True, False):
        backward(replicas, net, mine, overlap=True)
        replicas.reduce(np.zeros(0))
        assert_same_gradients(net, expected, 1e-10)
        net.zero_grad(set_to_none=set_to_none)
        expected.never.zero_grad(set_to_none=True)
    replicas.close()


def test_a_gradient_of_one_rank_is_everybodys(comm: Communicator) -> None:
    """Microbatch 3 alone takes the branch: its parameters have a gradient on all ranks, or autograd's None on all."""
    net = build(0, torch.float64)
    replicas = DataParallel(net, comm)
    mine = [i for i in (2, 3) if i % comm.size == comm.rank]
    backward(replicas, net, mine, overlap=True)
    replicas.reduce(np.zeros(0))
    assert net.sometimes.weight.grad is not None
    assert net.never.weight.grad is None and net.frozen.weight.grad is None
    net.zero_grad(set_to_none=True)
    backward(replicas, net, [i for i in (0, 1) if i % comm.size == comm.rank], overlap=True)
    replicas.reduce(np.zeros(0))
    assert net.sometimes.weight.grad is None
    replicas.close()


def test_state_becomes_that_of_rank_0(comm: Communicator) -> None:
    net = build(comm.rank, torch.float32)
    DataParallel(net, comm).close()
    expected = build(0, torch.float32)
    for (name, tensor), other in zip(net.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    assert net.head.weight is net.embedding.weight


def test_training_equals_one_process(comm: Communicator) -> None:
    """Ten steps of AdamW in float64: the same weights."""

    def run(net: Net, replicas: DataParallel | None, mine: list[int]) -> None:
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        for _ in range(10):
            if replicas is None:
                for i in mine:
                    net.loss(*microbatch(i)).backward()
            else:
                backward(replicas, net, mine, overlap=True)
                replicas.reduce(np.zeros(0))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    net, alone = build(0, torch.float64), build(0, torch.float64)
    replicas = DataParallel(net, comm, bucket_bytes=300)
    run(net, replicas, list(range(comm.rank, 6, comm.size)))
    run(alone, None, list(range(6)))
    for (name, p), q in zip(net.named_parameters(), alone.named_parameters(), strict=True):
        assert torch.allclose(p, q[1], rtol=1e-9, atol=1e-12), name
    replicas.close()


def test_mixed_dtypes_have_buckets_of_their_own(comm: Communicator) -> None:
    net = build(0, torch.float32)
    net.inner.to(torch.bfloat16)
    replicas = DataParallel(net, comm)
    assert {bucket.flat.dtype for bucket in replicas.buckets} == {torch.float32, torch.bfloat16}
    for p in net.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, comm.rank + 1)
    replicas.reduce(np.zeros(0))
    expected = comm.size * (comm.size + 1) / 2
    assert all(p.grad is not None and bool((p.grad == expected).all()) for p in net.parameters() if p.requires_grad)
    replicas.close()


def test_a_second_backward_after_the_final_one_is_an_error(comm: Communicator) -> None:
    net = build(0, torch.float32)
    replicas = DataParallel(net, comm)
    with replicas.final_backward():
        loss = net.loss(*microbatch(3)) + 0 * sum(p.sum() for p in net.never.parameters())
        loss.backward()
    with pytest.raises(RuntimeError, match="while it was being reduced"):
        net.loss(*microbatch(3)).backward()
    replicas.reduce(np.zeros(0))
    replicas.close()


def test_gradients_are_views_of_the_buckets(comm: Communicator) -> None:
    net = copy.deepcopy(build(0, torch.float32))
    replicas = DataParallel(net, comm)
    backward(replicas, net, [3], overlap=True)
    replicas.reduce(np.zeros(0))
    memory = [(b.flat.data_ptr(), b.flat.data_ptr() + b.flat.numel() * 4) for b in replicas.buckets]
    for name, p in net.named_parameters():
        if p.grad is not None:
            assert any(start <= p.grad.data_ptr() < end for start, end in memory), name
    gradient = net.inner.weight.grad
    assert gradient is not None
    before = gradient.clone()
    replicas.scale_gradients(0.5)
    assert torch.equal(gradient, before * 0.5)
    replicas.close()
