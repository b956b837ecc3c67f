"""The losses, as pure functions: tensors in, one scalar out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from models.maps import gradient_magnitude_similarity
from training.config import AdversarialLoss


def reconstruction_loss(
    reconstructions: Tensor, images: Tensor, *, l2_weight: float, ssim_weight: float, gradient_weight: float
) -> Tensor:
    """Weighted sum of squared error, 1 - SSIM and 1 - gradient magnitude similarity.

    Of standardised images, (B, C, S, S).
    """
    loss = l2_weight * F.mse_loss(reconstructions, images)
    if ssim_weight:
        similarity = structural_similarity_index_measure(reconstructions, images, data_range=2.0)
        assert isinstance(similarity, Tensor)  # a tuple only when the full image is asked for
        loss = loss + ssim_weight * (1 - similarity)
    if gradient_weight:
        loss = loss + gradient_weight * (1 - gradient_magnitude_similarity(reconstructions, images).mean())
    return loss


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross entropy per pixel, of (B, 1, S, S), with more weight on small defects.

    The pixels of a defect that covers less than 2 % of its image count up to ten times: a crack would otherwise weigh
    nothing beside a stain.
    """
    share = masks.flatten(1).mean(dim=1).view(-1, 1, 1, 1)
    weights = 1 + masks * (0.02 / (share + 1e-3)).clamp(max=10)
    return F.binary_cross_entropy_with_logits(logits, masks, weight=weights)


def discriminator_loss(kind: AdversarialLoss, real: Tensor, fake: Tensor) -> Tensor:
    """What a discriminator minimises, of its logits on real and fake samples, any shape.

    bce: Goodfellow et al., arXiv 1406.2661, equation 1. wgan-gp: Gulrajani et al., arXiv 1704.00028, equation 3
    without the penalty.
    """
    if kind == "bce":
        return _mean(F.softplus(-real)) + _mean(F.softplus(fake))
    return _mean(fake) - _mean(real)


def _mean(values: Tensor) -> Tensor:
    """0 of none: of a small batch every patch may be damaged, and none is real."""
    return values.mean() if values.numel() else values.sum()


def generator_loss(kind: AdversarialLoss, fake: Tensor) -> Tensor:
    """What the encoder or decoder minimises, of the logits of its fakes. bce is the non-saturating form."""
    if kind == "bce":
        return F.softplus(-fake).mean()
    return -fake.mean()


def gradient_penalty(discriminator: nn.Module, real: Tensor, fake: Tensor, *, generator: torch.Generator) -> Tensor:
    """Mean of (|gradient of D at a point between a real and a fake sample| - 1)^2.

    Gulrajani et al., arXiv 1704.00028, equation 3, unweighted. real, fake: (B, ...) of one shape and any rank. One
    coefficient per sample; the norm over all of a sample's dimensions; of a patch discriminator's outputs the
    mean. In float32, whatever autocast says (cuDNN may still multiply in TF32).
    """
    if real.shape != fake.shape:
        raise ValueError(f"real samples are {tuple(real.shape)}, fake ones {tuple(fake.shape)}.")
    with torch.autocast(real.device.type, enabled=False):
        shape = (len(real), *[1] * (real.ndim - 1))
        share = torch.rand(shape, generator=generator, device=real.device)  # (B, 1, ...)
        between = torch.lerp(fake.detach().float(), real.detach().float(), share).requires_grad_()
        logits = discriminator(between).flatten(1).mean(dim=1)  # (B,)
        (gradient,) = torch.autograd.grad(logits.sum(), between, create_graph=True)
        # vector_norm has a finite slope at zero, the root of a sum of squares has not.
        norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1)  # (B,)
        penalty: Tensor = (norm - 1).square().mean()
        return penalty
