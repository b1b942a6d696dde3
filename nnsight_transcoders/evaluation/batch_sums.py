"""What ``evaluate`` sums up of a batch while it runs, so that nothing larger leaves the run.

Torch only, plain data in and out: these functions also run on a server (``remote/shipping.py``).

Legend: n texts, T positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Numbers of a float32 copy that are made at once.
CHUNK = 1 << 22


def prediction_sums(logits: Tensor, reference: Tensor, ids: Tensor, where: Tensor) -> Tensor:
    """Sums over positions of what one model's predictions are worth, beside another's.

    Args:
        logits: ``(n, T, V)`` of the model that is measured, in any dtype.
        reference: ``(n, T, V)`` of the model it is compared with.
        ids: ``(n, T)`` token ids.
        where: ``(n, T)`` the positions whose next token counts; never the last.

    Returns:
        ``(3,)`` float64 on the CPU: cross-entropy of the next token, KL(reference || model), both
            in nats, and how often the two models' most likely tokens are the same.
    """
    rows, columns = where.nonzero(as_tuple=True)
    actual = ids[rows, columns + 1]
    total = torch.zeros(3, dtype=torch.float64)
    step = max(1, CHUNK // logits.shape[-1])
    for start in range(0, len(rows), step):
        here = slice(start, start + step)
        at = (rows[here].to(logits.device), columns[here].to(logits.device))
        found = logits[at].float().log_softmax(-1)
        expected = reference[at].float().log_softmax(-1)
        target = actual[here].to(found.device)[:, None]
        entropy = -found.gather(1, target).double().sum()
        divergence = (expected.exp() * (expected - found)).double().sum()
        agree = (found.argmax(-1) == expected.argmax(-1)).double().sum()
        total += torch.stack([entropy, divergence, agree]).detach().cpu()
    return total


def layer_statistics(
    features: Tensor, reconstruction: Tensor, error: Tensor, where: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over positions of one layer's reconstruction.

    Args:
        features: ``(n, T, d_transcoder)`` activations.
        reconstruction: ``(n, T, d_out)``.
        error: ``(n, T, d_out)`` the MLP's output minus the reconstruction.
        where: ``(n, T)`` the positions that count.

    Returns:
        On the CPU: ``()`` sum of ``|error|^2`` and of ``|output|^2``, ``(d_out,)`` sum of the
            output, in float64; ``(d_transcoder,)`` at how many positions each feature is active.
    """
    where = where.to(features.device)
    wrong = error[where].detach().double()
    output = reconstruction[where].detach().double() + wrong
    sums = (wrong.pow(2).sum(), output.pow(2).sum(), output.sum(0))
    squared, square, total = (part.cpu() for part in sums)
    return squared, square, total, features[where].count_nonzero(0).cpu()
