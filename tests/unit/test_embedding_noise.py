"""NEFTune's noise against transformers' own, and what it depends on: seed and sample, nothing else."""

from types import SimpleNamespace

import pytest
import torch
from recipe_samples import make_recipe
from small_checkpoint import make_model
from transformers.integrations.neftune import neftune_post_forward_hook

from gpt.embedding_noise import embedding_noise, noise_seed
from gpt.recipe import Train

ALPHA, SEED, TOKENS = 5.0, 7, 24
IDS = torch.arange(4 * TOKENS).view(4, TOKENS)


def settings(alpha: float | None = ALPHA, seed: int = SEED) -> Train:
    return make_recipe({"train.neftune_noise_alpha": alpha, "train.seed": seed}).train


def noisy(first_position: int, rows: slice = slice(None), **changes: int) -> torch.Tensor:
    model = make_model()
    with embedding_noise(model, settings(**changes))(first_position):
        return model.get_input_embeddings()(IDS[rows])


def test_a_samples_noise_is_that_of_transformers_drawn_from_its_own_seed() -> None:
    embedding = make_model().get_input_embeddings()
    module = SimpleNamespace(training=True, neftune_noise_alpha=ALPHA)
    found = noisy(100)
    for row in range(4):
        torch.manual_seed(noise_seed(SEED, 100 + row))
        expected = neftune_post_forward_hook(module, None, embedding(IDS[row : row + 1]))
        torch.testing.assert_close(found[row : row + 1], expected, rtol=0, atol=1e-6)
        assert not torch.equal(found[row], embedding(IDS[row]))


def test_a_sample_has_the_same_noise_in_any_forward_and_another_than_other_samples_or_seeds() -> None:
    together = noisy(100)
    assert torch.equal(torch.cat([noisy(100, slice(0, 1)), noisy(101, slice(1, 4))]), together)
    assert not torch.equal(noisy(101)[:1], together[:1])
    assert not torch.equal(noisy(100, seed=8), together)


def test_there_is_none_outside_of_training_forwards_and_no_other_random_number_is_drawn() -> None:
    model = make_model()
    embedding, training_forward = model.get_input_embeddings(), embedding_noise(model, settings())
    plain, state = embedding(IDS), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), training_forward(3):
        assert not torch.equal(embedding(IDS), plain)
        raise ZeroDivisionError
    assert torch.equal(embedding(IDS), plain)
    assert torch.equal(torch.get_rng_state(), state)
    with embedding_noise(model, settings(alpha=None))(3):
        assert torch.equal(embedding(IDS), plain)


def test_it_has_the_type_of_the_embeddings_and_lets_their_gradient_through() -> None:
    model = make_model().to(torch.bfloat16)
    with embedding_noise(model, settings())(0):
        output = model.get_input_embeddings()(IDS)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert bool((gradient[: IDS.numel()] == 1).all())
