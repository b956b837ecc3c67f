"""For Schemathesis, which imports it: what the document cannot say of a request."""

from pathlib import Path
from typing import Any

import schemathesis  # type: ignore[import-not-found, unused-ignore]
from hypothesis import strategies

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
IMAGES = {
    "image/png": ["rgb.png", "gray_16bit.png", "palette_trns.png"],
    "image/jpeg": ["rgb_420.jpg", "gray.jpg", "orientation_6.jpg"],
    "image/webp": ["rgb_lossless.webp", "rgb_lossy.webp"],
    "image/bmp": ["rgb.bmp"],
    "image/tiff": ["rgb.tif", "gray_16bit_lzw.tif"],
}


def register_images() -> None:
    """As bodies and as the parts of a form. To the document, a file is any bytes."""
    everything = []
    for media_type, names in IMAGES.items():
        images = [(GOLDEN / name).read_bytes() for name in names]
        schemathesis.openapi.media_type(media_type, strategies.sampled_from(images))
        everything += images
    schemathesis.openapi.format("binary", strategies.sampled_from(everything))


register_images()


@schemathesis.hook  # type: ignore[untyped-decorator, unused-ignore]
def filter_failure(_: Any, failure: Any, case: Any, response: Any) -> bool:  # noqa: ARG001 - it goes by their names
    """Not an alpha that is refused because this model has too few images for it. That an alpha is above 0 and below 1
    the document can say; above which it has to be depends on the model.
    """
    refused = response.status_code == 422 and b'"alpha_out_of_range"' in response.content
    return not (refused and 0 < float(case.query["alpha"]) < 1)


@schemathesis.hook  # type: ignore[untyped-decorator, unused-ignore]
def map_path_parameters(_: Any, path_parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    """Half of the projects that are made up become the one that the demo's checkpoint has."""
    if path_parameters and len(str(path_parameters.get("project", ""))) % 2:
        return {"project": "gears", "version": "1"}
    return path_parameters
