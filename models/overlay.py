"""An anomaly map as a picture: warm colours over the image, boxes around the regions."""

import numpy as np
from PIL import Image, ImageDraw

from models.scoring import MapArray, Region

# Dark red, red, orange, yellow, by eye: ordered in lightness too, so that they read without colour vision.
HEAT = np.array([[90, 0, 20], [200, 20, 30], [250, 130, 20], [255, 240, 120]], dtype=np.float32)
BOX_COLOUR = (0, 220, 255)
OPACITY = 0.65
# Colour and opacity of the 256 steps that an overlay knows. In floating point a picture of four megapixels would take a
# third of a gigabyte.
STEPS = np.linspace(0, 1, 256)
COLOURS = np.stack([np.interp(STEPS, np.linspace(0, 1, len(HEAT)), channel) for channel in HEAT.T], axis=-1)
PALETTE = COLOURS.round().astype(np.uint8).tobytes()
OPACITIES = (255 * OPACITY * np.minimum(4 * STEPS, 1)).round().tolist()


def overlay(image: Image.Image, anomaly_map: MapArray, *, level: float, regions: list[Region]) -> Image.Image:
    """Lay a map (height, width) over its image; returns RGB of the image's size.

    Nothing is drawn below three quarters of `level`, the height that good images rarely exceed; full colour is at
    twice it.
    """
    height, width = anomaly_map.shape
    heat = np.clip((anomaly_map / max(level, 1e-12) - 0.75) / 1.25, 0, 1)  # (H, W)
    colours = Image.fromarray((255 * heat).round().astype(np.uint8))
    opacity = colours.point(OPACITIES)
    colours.putpalette(PALETTE)
    picture = Image.composite(colours.convert("RGB"), image.convert("RGB").resize((width, height)), opacity)
    draw = ImageDraw.Draw(picture)
    for region in regions:
        right, bottom = region.left + region.width - 1, region.top + region.height - 1
        # Pillow draws beyond a box that is thinner than its lines.
        thinner = min(region.width, region.height)
        line = max(1, min(width // 200, (thinner - 1) // 2))
        fill = BOX_COLOUR if thinner <= 2 else None
        draw.rectangle((region.left, region.top, right, bottom), fill=fill, outline=BOX_COLOUR, width=line)
    return picture
