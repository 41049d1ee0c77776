"""Generated text follows the model's own probabilities."""

from __future__ import annotations

import pytest
import torch

from mpipar.model import ModelConfig, Transformer, generate, initialise


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    model = Transformer(ModelConfig(family=request.param, layers=2, dim=16, heads=2, max_seq_len=8), vocab_size=11)
    initialise(model, 0, std=0.5)
    return model


START = torch.tensor([[1, 2], [3, 4]])


def test_greedy_takes_the_likeliest_token_of_the_last_window(model):
    tokens = generate(model, START, 12, temperature=0)
    assert tokens.shape == (2, 14)
    assert torch.equal(tokens[:, :2], START)
    for end in range(2, 14):
        logits = model(tokens[:, max(0, end - 8) : end])[:, -1]
        assert torch.equal(tokens[:, end], logits.argmax(-1))


def test_one_candidate_is_greedy(model):
    assert torch.equal(generate(model, START, 5, top_k=1), generate(model, START, 5, temperature=0))


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (1.0, 3), (2.0, 100)])
def test_samples_have_the_models_frequencies(model, temperature, top_k):
    start = START[:1].expand(20_000, 2)
    drawn = generate(model, start, 1, temperature=temperature, top_k=top_k, generator=torch.Generator().manual_seed(0))[
        :, 2
    ]
    logits = model(START[:1])[0, -1] / temperature
    if top_k is not None and top_k < 11:
        logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
    torch.testing.assert_close(drawn.bincount(minlength=11) / 20_000, logits.softmax(-1), rtol=0, atol=0.015)


def test_the_generator_is_the_only_source_of_randomness(model):
    one, two = (generate(model, START, 20, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, generate(model, START, 20, generator=torch.Generator().manual_seed(6)))


def test_nothing_to_continue_from_is_refused(model):
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, START[:, :0], 1)
    assert torch.equal(generate(model, START, 0), START)
