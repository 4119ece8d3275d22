"""Equation 2, against arithmetic done by hand."""

import math

import pytest
import torch

from model.config import UNetPlusPlusConfig
from model.losses import SMOOTH, deep_supervision_loss, head_loss, soft_dice
from model.network import UNetPlusPlus

LN3 = math.log(3)


def two_pixels(*logits):
    return torch.tensor(logits).reshape(1, 1, 1, 2)


@pytest.mark.parametrize(("smooth", "expected"), [(0.0, 0.25), (1.0, 1 / 6)])
def test_two_pixels_by_hand(smooth, expected):
    # logits ln 3 and -ln 3 give p = 3/4 and 1/4; labels 1 and 0.
    # BCE = -(ln 3/4 + ln(1 - 1/4)) / 2 = -ln 3/4 = ln 4/3
    # Dice = (2 * 3/4 + s) / (3/4 + 1/4 + 1 + s): s = 0: 3/4, s = 1: 2.5/3 = 5/6
    # loss = 1/2 * ln 4/3 + 1 - Dice
    loss = head_loss(two_pixels(LN3, -LN3), torch.tensor([[[1, 0]]]), smooth=smooth)
    assert loss.item() == pytest.approx(0.5 * math.log(4 / 3) + expected, abs=1e-6)


def test_all_wrong_by_hand():
    # p = 1/4 and 3/4 with labels 1 and 0: BCE = ln 4; Dice (s = 0) = 2 * 1/4 / 2 = 1/4.
    loss = head_loss(two_pixels(-LN3, LN3), torch.tensor([[[1, 0]]]), smooth=0.0)
    assert loss.item() == pytest.approx(0.5 * math.log(4) + 0.75, abs=1e-6)


def test_smoothing_defines_dice_where_nothing_is_there():
    # No foreground, p = 1/2 twice: Dice = 1 / (1 + 1) = 1/2; BCE = ln 2.
    labels = torch.zeros(1, 1, 2, dtype=torch.long)
    assert head_loss(two_pixels(0.0, 0.0), labels).item() == pytest.approx(0.5 * math.log(2) + 0.5, abs=1e-6)
    assert SMOOTH == 1.0
    assert soft_dice(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).item() == 1


def test_softmax_by_hand():
    # Three classes, two pixels of class 1 and 2. Logits ln of the probabilities:
    #   pixel a: (1/4, 1/2, 1/4), class 1;  pixel b: (1/4, 1/4, 1/2), class 2
    # CE = (ln 2 + ln 2) / 2 = ln 2
    # Dice of class 1 (s = 0): 2 * 1/2 / (1/2 + 1/4 + 1) = 1 / 1.75 = 4/7; class 2 alike; background is left out.
    logits = torch.log(torch.tensor([[1 / 4, 1 / 2, 1 / 4], [1 / 4, 1 / 4, 1 / 2]])).T.reshape(1, 3, 1, 2)
    loss = head_loss(logits, torch.tensor([[[1, 2]]], dtype=torch.uint8), smooth=0.0)
    assert loss.item() == pytest.approx(0.5 * math.log(2) + 1 - 4 / 7, abs=1e-6)


def test_dice_is_averaged_over_images_not_over_pixels_of_the_batch():
    # Image 1 (8 foreground pixels) is perfect, image 2 (1 foreground pixel) is missed wholly. Per image:
    # (1 + 0) / 2. Pooled over the batch it would be 2 * 8 / (8 + 9) = 0.94.
    target = torch.zeros(2, 1, 4, 4)
    target[0, 0, :2] = 1
    target[1, 0, 0, 0] = 1
    answer = target.clone()
    answer[1] = 0
    assert soft_dice(answer, target, 0.0).squeeze(1).tolist() == [1, 0]
    far = (answer * 2 - 1) * 50
    labels = target[:, 0].long()
    # BCE of the one missed pixel: 50 / 32 pixels.
    assert head_loss(far, labels, smooth=0.0).item() == pytest.approx(0.5 * 50 / 32 + 0.5, abs=1e-5)


def test_a_batch_costs_the_mean_of_its_images():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4, 6, 6), torch.randint(0, 4, (3, 6, 6))
    apart = [head_loss(logits[n : n + 1], labels[n : n + 1]) for n in range(3)]
    assert head_loss(logits, labels).item() == pytest.approx(torch.stack(apart).mean().item(), abs=1e-6)


def test_deep_supervision_is_the_mean_of_the_heads():
    torch.manual_seed(0)
    heads = [torch.randn(2, 1, 4, 4) for _ in range(3)]
    labels = torch.randint(0, 2, (2, 4, 4))
    expected = sum(head_loss(h, labels).item() for h in heads) / 3
    assert deep_supervision_loss(heads, labels).item() == pytest.approx(expected, abs=1e-6)
    assert deep_supervision_loss(heads[:1], labels).item() == pytest.approx(
        head_loss(heads[0], labels).item()
    )


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_gradient_reaches_every_head_and_every_node(dims, classes):
    torch.manual_seed(0)
    # A smooth activation: with ReLU a tiny channel may be dead by chance.
    network = UNetPlusPlus(
        UNetPlusPlusConfig(dims=dims, classes=classes, widths=(3, 4, 5), activation="silu")
    )
    size = [8] * dims
    deep_supervision_loss(
        network(torch.randn(2, 1, *size)), torch.randint(0, max(classes, 2), (2, *size))
    ).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_channel_of_objects_by_hand():
    # p = 3/4 and 1/4 in both channels. The class as in the first test; the object's targets are 1/2 and 0:
    # BCE = -(1/2 ln 3/4 + 1/2 ln 1/4 + ln 3/4) / 2
    both = torch.cat([two_pixels(LN3, -LN3)] * 2, dim=1)
    labels, target = torch.tensor([[[1, 0]]]), torch.tensor([[[[0.5, 0.0]]]])
    alone = head_loss(both[:, :1], labels).item()
    expected = -(0.5 * math.log(3 / 4) + 0.5 * math.log(1 / 4) + math.log(3 / 4)) / 2
    assert head_loss(both, labels, target).item() == pytest.approx(alone + expected, abs=1e-6)


def test_weights_are_those_of_a_weighted_mean_of_the_cross_entropies():
    # Pixels cost ln 4/3 (right) and ln 4 (wrong); the wrong one counts three times. Dice knows no weights.
    logits, labels = two_pixels(LN3, LN3), torch.tensor([[[1, 0]]])
    weight = torch.tensor([[[1.0, 3.0]]])
    dice = head_loss(logits, labels).item() - 0.5 * (math.log(4 / 3) + math.log(4)) / 2
    expected = 0.5 * (math.log(4 / 3) + 3 * math.log(4)) / 4 + dice
    assert head_loss(logits, labels, weight=weight).item() == pytest.approx(expected, abs=1e-6)
    assert head_loss(logits, labels, weight=weight * 7).item() == pytest.approx(expected, abs=1e-6)


def test_half_precision_logits_are_judged_in_float32():
    # 70,000 pixels: a sum in float16 would overflow (65,504), in bfloat16 it would lose the small ones.
    labels = torch.ones(1, 70, 1000, dtype=torch.uint8)
    for dtype in (torch.float16, torch.bfloat16):
        loss = head_loss(torch.full((1, 1, 70, 1000), 9.0, dtype=dtype), labels)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(
            head_loss(torch.full((1, 1, 70, 1000), 9.0), labels).item(), abs=1e-6
        )


def test_a_perfect_answer_costs_nothing_and_a_better_one_less():
    labels = torch.tensor([[[1, 0]]])
    losses = [head_loss(two_pixels(x, -x), labels).item() for x in (-5.0, 0.0, 5.0, 50.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(0, abs=1e-6)
