"""How a run's model computes attention; on a CPU by matrix products over blocks of queries.

torch's own attention on a CPU (sdpa) computes 512 tokens in twice the time that the matrix products take which it
replaces; these reach the processor's best rate. Each block of queries is multiplied with the keys up to its end only,
so that most of what causality hides is never computed. The price is memory: the weights of attention are kept for the
backward pass, `batch * heads * tokens ** 2 / 2` numbers a layer and a little more, and in bf16 the rounding of scores
and of their gradients, as in transformers' eager attention; sdpa holds both in fp32.
"""

from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import is_flash_attn_2_available

BLOCK_TOKENS = 128
"""Queries of one product: smaller blocks compute less in vain, in products that are less efficient."""


def choose_attention(config: PreTrainedConfig, attention: str) -> None:
    """Make the recipe's `attention` that of models of this configuration.

    Raises:
        ValueError: this host cannot compute it.
    """
    if attention == "flash_attention_2" and not (torch.cuda.is_available() and is_flash_attn_2_available()):
        lacks = "the package flash-attn" if torch.cuda.is_available() else "a CUDA device"
        raise ValueError(f"attention is flash_attention_2, but this host has not {lacks} that it needs: use auto")
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if attention == "blockwise" and not model_class._supports_sdpa:
        raise ValueError(
            f"attention is blockwise, which {model_class.__name__} cannot use, as it cannot sdpa: use auto"
        )
    if attention != "auto":
        config._attn_implementation = attention


def blockwise_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of queries (batch, heads, tokens, width) to keys and values (batch, heads or fewer, tokens, width).

    Args:
        attention_mask: (batch, 1, tokens, tokens) is added to the scores. It must be causal.

    Returns:
        (batch, tokens, heads, width), and no weights. As in transformers' eager attention, the scores are rounded to
        the inputs' type before the softmax, which computes in fp32.
    """
    batch, heads, tokens, width = query.shape
    cached = key.shape[2] != tokens  # generation, one token a time
    special = any(options.get(name) is not None for name in ("position_bias", "softcap"))  # sdpa computes or refuses
    if cached or special or attention_mask is None or not getattr(module, "is_causal", True):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    groups = key.shape[1]  # of heads that share keys and values: their queries are rows of one product
    query = (query * (width**-0.5 if scaling is None else scaling)).view(batch, groups, -1, tokens, width)
    outputs = []
    for start in range(0, tokens, BLOCK_TOKENS):
        end = min(start + BLOCK_TOKENS, tokens)
        rows = query[..., start:end, :].reshape(batch, groups, -1, width)
        scores = (rows @ key[:, :, :end].transpose(2, 3)).view(batch, groups, -1, end - start, end)
        weights = (scores + attention_mask[:, :, None, start:end, :end]).softmax(-1)
        weights = functional.dropout(weights, dropout, module.training)
        mixed = weights.view(batch, groups, -1, end) @ value[:, :, :end]
        outputs.append(mixed.view(batch, heads, end - start, -1).transpose(1, 2))
    return torch.cat(outputs, 1), None


AttentionInterface.register("blockwise", blockwise_attention)
AttentionMaskInterface.register("blockwise", eager_mask)
