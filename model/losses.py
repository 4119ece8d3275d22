"""The loss of UNet++ (paper, equation 2): one half cross-entropy plus Dice, on every head.

Deep supervision here trains *every* head and averages their losses, as the paper describes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Keeps Dice defined where neither the target nor the prediction has foreground.
SMOOTH = 1.0


def soft_dice(probabilities: Tensor, target: Tensor, smooth: float = SMOOTH) -> Tensor:
    """Dice coefficient per image and class: (2 * sum(p * y) + smooth) / (sum(p) + sum(y) + smooth).

    Args:
        probabilities: (N, K, H, W[, D]) in [0, 1].
        target: (N, K, H, W[, D]), 0 or 1.
        smooth: term added to numerator and denominator.

    Returns:
        (N, K) in [0, 1].
    """
    axes = tuple(range(2, probabilities.ndim))
    overlap = (probabilities * target).sum(axes)
    return (2 * overlap + smooth) / (probabilities.sum(axes) + target.sum(axes) + smooth)


def head_loss(logits: Tensor, labels: Tensor, smooth: float = SMOOTH) -> Tensor:
    """½ · cross-entropy + (1 - Dice) of one head: equation 2, averaged over the batch.

    Args:
        logits: (N, K, H, W[, D]) float; K = 1 is a sigmoid class, K > 1 exclusive softmax classes
            of which class 0 is background.
        labels: (N, H, W[, D]) integer class per pixel; for K = 1, 0 or 1.
        smooth: term added to numerator and denominator of Dice.

    Returns:
        Scalar loss. For K > 1 Dice averages the foreground classes.
    """
    logits = logits.float()
    if logits.shape[1] == 1:
        target = labels.unsqueeze(1).to(logits.dtype)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, target)
        dice = soft_dice(torch.sigmoid(logits), target, smooth)
    else:
        cross_entropy = F.cross_entropy(logits, labels.long())
        target = F.one_hot(labels.long(), logits.shape[1]).movedim(-1, 1).to(logits.dtype)
        dice = soft_dice(torch.softmax(logits, dim=1), target, smooth)[:, 1:]
    return 0.5 * cross_entropy + (1 - dice).mean()


def deep_supervision_loss(heads: list[Tensor], labels: Tensor, smooth: float = SMOOTH) -> Tensor:
    """Mean of `head_loss` over all heads; with one head (a U-Net), its loss."""
    return torch.stack([head_loss(logits, labels, smooth) for logits in heads]).mean()
