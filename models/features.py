"""What the networks see instead of pixels, if the recipe says so: the features of a frozen network of torchvision.

Weights that were learned from ImageNet tell textures and shapes apart that a few hundred pictures of one product do not
teach. As in PatchCore (Roth et al., arXiv 2106.08265, section 3.1) features of several layers stand side by side, each
averaged over its neighbours; here they are rebuilt by an autoencoder instead of looked up.
"""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import fuse_conv_bn_eval
from torchvision import models
from torchvision.models import get_model, list_models
from torchvision.models.feature_extraction import create_feature_extractor

from models.config import CELL, ModelConfig
from models.errors import ConfigError

SPOT = 4  # pixels on each side
SPOTS = 32  # places that are measured
FITTED_AT_ONCE = 16  # images


class Features(nn.Module):
    """Intensities (B, C, S, S) in [0, 1] -> features (B, F, S/8, S/8), one for each 8 x 8 pixels.

    A place's features have length one, then zero mean and mean square one over the training images: what a
    reconstruction misses is then, as a cosine distance is, independent of how strongly a place answers.
    """

    def __init__(self, config: ModelConfig) -> None:
        """Raises ConfigError for a backbone or a layer that torchvision does not have."""
        super().__init__()
        self.config = config
        self.network = _backbone(config, None)
        self.layers = config.layers
        # ImageNet's, which torchvision's weights expect.
        self.register_buffer("shift", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("range", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        self.register_buffer("starts", torch.zeros(len(self.layers), 2))
        self.register_buffer("mean", torch.zeros(config.feature_channels, 1, 1))
        self.register_buffer("scale", torch.ones(()))
        self.shift: Tensor
        self.range: Tensor
        self.starts: Tensor
        self.mean: Tensor
        self.scale: Tensor
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Features":  # noqa: ARG002
        """Frozen: it stays in eval mode, whatever the networks around it do."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, intensities: Tensor) -> Tensor:
        return self.standardised(self.directions(intensities))

    def standardised(self, directions: Tensor) -> Tensor:
        return (directions - self.mean) / self.scale

    def directions(self, intensities: Tensor) -> Tensor:
        """The same, of length one only: (B, F, S/8, S/8)."""
        # In float32, in training too: what bfloat16 changes of features is as much as a reconstruction misses of them.
        with torch.autocast(intensities.device.type, enabled=False):
            found = self.network(self._expected(intensities.float()))
            size, places = intensities.shape[-1], zip(self.layers, self.starts, strict=True)
            maps = [centred(found[layer].float(), start, size) for layer, start in places]
            joined = torch.cat(maps, dim=-1)  # (B, S/8, S/8, channels of all layers)
        if joined.shape[-1] != len(self.mean):
            # Means of neighbouring channels, as PatchCore reduces them.
            few = F.adaptive_avg_pool1d(joined.flatten(1, 2), len(self.mean))
            joined = few.view(*joined.shape[:3], -1)
        return F.normalize(joined, dim=-1).permute(0, 3, 1, 2)

    def _expected(self, intensities: Tensor) -> Tensor:
        images = (intensities.expand(-1, 3, -1, -1) - self.shift) / self.range
        return images.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def locate(self, intensities: Tensor) -> None:
        """Learn where each layer's cells lie, by training images (N, C, S, S). Raises ConfigError for a layer that is
        no map of the image."""
        images = self._expected(intensities[:SPOTS])
        shapes = {layer: tuple(answer.shape[1:]) for layer, answer in self.network(images[:1]).items()}
        for layer, shape in shapes.items():
            if len(shape) != 3 or shape[1] != shape[2] or not 1 < shape[2] <= images.shape[-1]:
                raise ConfigError(
                    f"feature_layers has {layer!r}, of shape {shape}: allowed are layers of feature maps."
                )
        found = starts(self.network, images)
        self.starts.copy_(torch.stack([found[layer] for layer in self.layers]))

    @torch.no_grad()
    def fit(self, directions: Tensor) -> None:
        """Learn what is usual from training images' directions, (N, F, S/8, S/8)."""
        total = torch.zeros_like(self.mean, dtype=torch.float64)
        squares = torch.zeros_like(self.scale, dtype=torch.float64)
        # Few at a time: all of them would take four times their memory in float32, of which they are half.
        for few in map(Tensor.double, torch.split(directions, FITTED_AT_ONCE)):
            total += few.sum(dim=(0, 2, 3)).view(-1, 1, 1)
            squares += few.square().sum()
        mean = total * len(self.mean) / directions.numel()
        self.mean.copy_(mean)
        variance = squares / directions.numel() - mean.square().mean()
        # Images of one flat colour have no deviation.
        self.scale.copy_(variance.clamp(min=1e-6).sqrt())

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take the weights of torchvision's network; those of layers that are not used are passed over. Or take those
        that another one's `network` holds.

        Raises ConfigError for weights of another network.
        """
        if weights.keys() == self.network.state_dict().keys():
            self.network.load_state_dict(weights)
        else:
            network = _backbone(self.config, weights).to(self.mean.device).to(memory_format=torch.channels_last)
            self.network = network.requires_grad_(False).eval()


def centred(maps: Tensor, start: Tensor, size: int) -> Tensor:
    """Feature maps (B, F, h, w) of images of size x size pixels -> (B, size/8, size/8, F): for the centre of each 8 x 8
    pixels the mean of 3 x 3 cells, interpolated bilinearly; beyond the borders lie the cells at the borders.

    start: where the centre of the first cell of the maps lies, across and down, in pixels.
    """
    side = maps.shape[-1]
    centres = CELL * (torch.arange(size // CELL, device=maps.device) + 0.5) - 0.5
    places = ((centres - start.unsqueeze(1)) * (side / size)).clamp(0, side - 1)  # (2, size/8), in cells
    cells = torch.arange(side, device=maps.device)
    bilinear = (1 - (places.unsqueeze(2) - cells).abs()).clamp(min=0)  # (2, size/8, side)
    # Both are done along one axis after the other, by one matrix for each.
    across, down = bilinear @ _means_of_three(side, maps.device)
    rows = maps.permute(0, 2, 3, 1).flatten(2)  # (B, h, w F)
    resampled: Tensor = across @ (down @ rows).unflatten(2, (side, -1))
    return resampled


@cache
def _means_of_three(side: int, device: torch.device) -> Tensor:
    """(side, side): of each cell and its neighbours, of which those at the ends have one."""
    with torch.inference_mode(False):
        near = torch.ones(side, side, device=device).tril(1).triu(-1)
        return near / near.sum(dim=1, keepdim=True)


def starts(network: Callable[[Tensor], dict[str, Tensor]], images: Tensor) -> dict[str, Tensor]:
    """Where the centre of each layer's first cell lies, across and down in pixels, (2,): measured by where the network
    answers to SPOTS small spots on images, what it expects, (N, 3, S, S).

    How the layers pad says it only in part: half a stride to the left with symmetric padding, to the right with
    TensorFlow's. What the weights have learned to look at shifts it by some pixels more.
    """
    size, generator = images.shape[-1], torch.Generator().manual_seed(0)
    offsets: dict[str, list[Tensor]] = {}
    for number in range(SPOTS):
        image = images[number % len(images)].unsqueeze(0)
        place = torch.randint(size // 4, 3 * size // 4 - SPOT, (2,), generator=generator).tolist()
        spotted = image.clone()
        square = spotted[..., place[1] : place[1] + SPOT, place[0] : place[0] + SPOT]
        square.copy_(torch.where(square.mean() > 0, -2.0, 2.0))
        before, after = network(image), network(spotted)
        middle = torch.tensor(place, device=images.device) + (SPOT - 1) / 2
        for layer, answer in after.items():
            change = (answer - before[layer]).float().square().sum(dim=1)[0]  # (h, w)
            change = change / change.max().clamp(min=1e-30)  # a network may answer weakly, or not at all
            # What a layer hears of the whole image lies everywhere.
            weight = (change - change.median()).clamp(min=0).square()
            cells = torch.arange(change.shape[-1], device=images.device, dtype=weight.dtype)
            centre = torch.stack([(weight.sum(dim=0) * cells).sum(), (weight.sum(dim=1) * cells).sum()])
            centre = centre / weight.sum().clamp(min=1e-30)
            offsets.setdefault(layer, []).append(middle - centre * (size / change.shape[-1]))
    return {layer: torch.stack(found).median(dim=0).values for layer, found in offsets.items()}


def check_backbone(name: str) -> None:
    """Raises ConfigError for a network that torchvision does not have, or has for something else."""
    if name not in list_models(module=models):
        raise ConfigError(f"features is {name!r}: torchvision has no such network that classifies images.")


def _backbone(config: ModelConfig, weights: dict[str, Tensor] | None) -> nn.Module:
    """A network of torchvision up to the last of its layers that are asked for, with its batch norms folded into its
    convolutions: on a CPU that takes half of MobileNetV2's time away."""
    check_backbone(config.features)
    network = get_model(config.features, weights=None).eval()
    if config.feature_padding == "tensorflow":
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and module.stride[0] > 1:
                module.padding = (0, 0)
                module.register_forward_pre_hook(_pad_as_tensorflow)
    try:
        cut = cast(fx.GraphModule, create_feature_extractor(network, {layer: layer for layer in config.layers}))
    except ValueError:
        names = ", ".join(config.layers)
        raise ConfigError(f"feature_layers is {names!r}: {config.features} does not have all of them.") from None
    if weights is not None:
        _load(cut, weights, config.features)
    cut.eval()
    for module in cut.modules():  # torchvision's building blocks are one step to fx
        if isinstance(module, nn.Sequential):
            for index, (first, second) in enumerate(pairwise(module)):
                if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                    module[index], module[index + 1] = fuse_conv_bn_eval(first, second), nn.Identity()
    return fuse(cut, inplace=True)


def _load(network: nn.Module, weights: dict[str, Tensor], name: str) -> None:
    own = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    for key, value in own.items():
        given = weights.get(key)
        if given is None or given.shape != value.shape:
            found = "are missing" if given is None else f"have shape {tuple(given.shape)}, not {tuple(value.shape)}"
            raise ConfigError(f"the backbone's weights are not of {name}: {key} {found}.")
    network.load_state_dict({key: weights[key].float() for key in own}, strict=False)


def _pad_as_tensorflow(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """ "SAME" padding of a strided convolution, of an even side: where it is odd, more to the right and below."""
    convolution = cast(nn.Conv2d, module)
    total = convolution.kernel_size[0] - convolution.stride[0]
    before = max(total // 2, 0)
    after = max(total - before, 0)
    return F.pad(inputs[0], (before, after, before, after))
