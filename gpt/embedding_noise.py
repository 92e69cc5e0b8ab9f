"""NEFTune: uniform noise on the embeddings of training rows (arXiv:2310.05914)."""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from gpt.recipe import Train

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def noise_seed(seed: int, position: int) -> int:
    """Seed of the noise of the sample at a position of the data order."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{position}".encode())


class EmbeddingNoise:
    """Adds each sample's noise to the output of a model's input embedding, inside `of_samples_from` only.

    A sample's noise depends on nothing else than seed and position, so it is the same on any rank, in any micro-batch
    and after a resume, and training's generators are not touched. (A CPU and a GPU draw different numbers.)
    """

    def __init__(self, model: "PreTrainedModel", alpha: float, seed: int) -> None:
        self._alpha, self._seed = alpha, seed
        self._first_position: int | None = None
        model.get_input_embeddings().register_forward_hook(self._add)

    @contextlib.contextmanager
    def of_samples_from(self, first_position: int) -> Iterator[None]:
        """The rows of a forward inside are the samples from this position on."""
        self._first_position = first_position
        try:
            yield
        finally:
            self._first_position = None

    def _add(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if self._first_position is None:
            return output
        bound = self._alpha / math.sqrt(output.shape[1] * output.shape[2])
        noise = torch.empty_like(output, dtype=torch.float32, requires_grad=False)
        generator = torch.Generator(output.device)
        for row, row_noise in enumerate(noise):
            generator.manual_seed(noise_seed(self._seed, self._first_position + row))
            row_noise.uniform_(-bound, bound, generator=generator)
        return output + noise.to(output.dtype)


def embedding_noise(model: "PreTrainedModel", settings: Train) -> Callable[[int], AbstractContextManager[Any]]:
    """What goes around a training forward, given the position of its first sample; without noise it does nothing."""
    if settings.neftune_noise_alpha is None:
        return contextlib.nullcontext
    return EmbeddingNoise(model, settings.neftune_noise_alpha, settings.seed).of_samples_from
