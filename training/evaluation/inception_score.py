"""The Inception Score (arXiv 1606.03498), as ADM computes it."""

import torch
from torch import Tensor

SPLIT_SIZE = 5000


def inception_score(logits: Tensor, split_size: int = SPLIT_SIZE) -> float:
    """Return the mean score of consecutive splits, exp(mean KL(p(y|x) || p(y))).

    Args:
        logits: (N, classes), without the bias of the last layer.
        split_size: images of a split; the last one may be smaller and counts as much.
    """
    scores = []
    for part in logits.double().split(split_size):
        log_p = torch.log_softmax(part, dim=1)
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(dim=0).log())).sum(dim=1).mean().exp())
    return float(torch.stack(scores).mean())
