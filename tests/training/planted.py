"""A one-layer model whose MLP is a known sparse ReLU network, and what of it was found again."""

from __future__ import annotations

from typing import Any

import nnsight
import torch
import transformers
from torch import Tensor
from torch.nn.functional import normalize

D_MODEL, N_NEURONS, VOCAB, CONTEXT = 32, 64, 512, 64


def planted_model(n_layers: int = 1, seed: int = 0) -> tuple[Any, Tensor, Tensor]:
    """An nnsight model, and the read and write vectors ``(N_NEURONS, D_MODEL)`` of layer 0's MLP.

    About 5 % of the neurons are active at a position.
    """
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=D_MODEL,
        n_layer=n_layers,
        n_head=4,
        n_positions=CONTEXT,
        n_inner=N_NEURONS,
        activation_function="relu",
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    module = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        module.transformer.wte.weight.normal_()
        module.transformer.wpe.weight.normal_()
        for block in module.transformer.h:
            block.attn.c_attn.weight.normal_().div_(D_MODEL**0.5)
            block.attn.c_proj.weight.normal_().div_(D_MODEL**0.5)
            block.mlp.c_fc.weight.copy_(normalize(torch.randn(D_MODEL, N_NEURONS), dim=0))
            block.mlp.c_fc.bias.fill_(-1.6)
            block.mlp.c_proj.weight.copy_(normalize(torch.randn(N_NEURONS, D_MODEL), dim=1))
            block.mlp.c_proj.bias.zero_()
    mlp = module.transformer.h[0].mlp
    reads, writes = mlp.c_fc.weight.detach().T.contiguous(), mlp.c_proj.weight.detach()
    return nnsight.NNsight(module), reads, writes


def rows(n: int, seed: int = 1) -> list[Tensor]:
    """Random token ids, ``CONTEXT`` in a row."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (CONTEXT,), generator=generator) for _ in range(n)]


def recovered(planted: Tensor, learned: Tensor) -> float:
    """Mean over planted vectors of the largest cosine similarity with a learned one."""
    similarity = normalize(planted, dim=1) @ normalize(learned.detach(), dim=1).T
    return float(similarity.max(dim=1).values.mean())
