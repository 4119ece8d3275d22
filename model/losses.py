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


def head_loss(
    logits: Tensor,
    labels: Tensor,
    objects: Tensor | None = None,
    weight: Tensor | None = None,
    smooth: float = SMOOTH,
) -> Tensor:
    """½ · cross-entropy + (1 - Dice) of one head: equation 2, averaged over the batch; and the channels of objects.

    Args:
        logits: (N, K + M, H, W[, D]) float; K = 1 is a sigmoid class, K > 1 exclusive softmax classes
            of which class 0 is background; then M channels of objects.
        labels: (N, H, W[, D]) integer class per pixel; for K = 1, 0 or 1.
        objects: (N, M, H, W[, D]) targets in [0, 1] of the channels of objects, whose cross-entropies are added.
        weight: (N, H, W[, D]) weight of each pixel in the cross-entropies.
        smooth: term added to numerator and denominator of Dice.

    Returns:
        Scalar loss. For K > 1 Dice averages the foreground classes.
    """
    logits = logits.float()
    classes = logits if objects is None else logits[:, : logits.shape[1] - objects.shape[1]]
    if classes.shape[1] == 1:
        target = labels.unsqueeze(1).to(logits.dtype)
        cross_entropy = F.binary_cross_entropy_with_logits(classes, target, reduction="none")[:, 0]
        dice = soft_dice(torch.sigmoid(classes), target, smooth)
    else:
        cross_entropy = F.cross_entropy(classes, labels.long(), reduction="none")
        target = F.one_hot(labels.long(), classes.shape[1]).movedim(-1, 1).to(logits.dtype)
        dice = soft_dice(torch.softmax(classes, dim=1), target, smooth)[:, 1:]
    loss = 0.5 * _mean(cross_entropy, weight) + (1 - dice).mean()
    if objects is not None:
        further = F.binary_cross_entropy_with_logits(logits[:, classes.shape[1] :], objects, reduction="none")
        loss = loss + _mean(further.sum(1), weight)
    return loss


def _mean(values: Tensor, weight: Tensor | None) -> Tensor:
    return values.mean() if weight is None else (values * weight).sum() / weight.sum()


def deep_supervision_loss(
    heads: list[Tensor],
    labels: Tensor,
    objects: Tensor | None = None,
    weight: Tensor | None = None,
    smooth: float = SMOOTH,
) -> Tensor:
    """Mean of `head_loss` over all heads; with one head (a U-Net), its loss."""
    return torch.stack([head_loss(logits, labels, objects, weight, smooth) for logits in heads]).mean()
