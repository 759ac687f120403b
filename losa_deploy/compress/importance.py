"""Layer-wise importance from representation mutual information (RMI), as linear CKA.

The features of a block, without each sequence's first token, are flattened to [samples, tokens·hidden];
only their Gram matrix [samples, samples] is kept. Linear CKA is the normalised biased HSIC
(Kornblith et al. 2019); LoSA uses it as its estimate of mutual information between blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losa_deploy.compress.device import wide, wide_type


def gram(features: Tensor) -> Tensor:
    """Centred Gram matrix [samples, samples] f64 of `features` [samples, …]."""
    flat = features.flatten(1)
    product = torch.zeros(flat.shape[0], flat.shape[0], dtype=wide_type(flat.device), device=flat.device)
    # Pieces bound the f64 copy; sums over features are exact enough this way for any hidden size.
    for piece in torch.split(flat, 1 << 16, dim=1):
        numbers = wide(piece)
        product += numbers @ numbers.T
    product = product.cpu().double()
    product -= product.mean(dim=0, keepdim=True)
    product -= product.mean(dim=1, keepdim=True)
    return (product + product.T) / 2


def block_gram(hidden: Tensor) -> Tensor:
    """Centred Gram matrix [samples, samples] f64 of hidden states [samples, tokens, hidden].

    The first token is left out: as an attention sink it holds up to 99 % of the energy of late blocks,
    and the matrix would be about nothing else.
    """
    return gram(hidden[:, 1:])


def linear_cka(grams: list[Tensor]) -> Tensor:
    """Pairwise linear CKA [blocks, blocks] in [0, 1] from centred Gram matrices.

    CKA(K, L) = <K, L> / (‖K‖·‖L‖); constant features (zero Gram) count as unrelated.
    """
    flat = torch.stack([matrix.flatten() for matrix in grams])
    norms = flat.norm(dim=1)
    safe = torch.where(norms > 0, norms, torch.ones_like(norms))
    unit = flat / safe[:, None]
    return (unit @ unit.T).clamp(0.0, 1.0)


def block_importance(cka: Tensor, beta: float) -> Tensor:
    """importance_i = exp(-β·p_i), p = row sums without the diagonal, normalised to sum 1 [blocks].

    A block whose features resemble all others' carries little of its own, so it may be pruned more.
    With one block everything is 1.
    """
    redundancy = cka.sum(dim=1) - cka.diagonal()
    total = redundancy.sum()
    share = redundancy / total if total > 0 else torch.zeros_like(redundancy)
    return torch.exp(-beta * share)
