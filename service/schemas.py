"""What the service answers, field by field, with units. FastAPI turns these into the OpenAPI document."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MapFormat = Literal["none", "png", "overlay", "float32"]
MAX_MAP_SIDE = 2048  # pixels


class ErrorDetail(BaseModel):
    code: str = Field(description="Stable; one of those that docs/service.md lists.")
    message: str = Field(description="One sentence for a person; its words may change.")
    request_id: str = Field(description="Also in the header X-Request-ID, and in the service's log.")


class ErrorAnswer(BaseModel):
    """The one shape of every failed request."""

    error: ErrorDetail


class ScoreQuery(BaseModel):
    """The query parameters of /score."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(
        default=None,
        max_length=255,
        description="NAME of a model, or NAME:VERSION for another version than the one that answers. May be left out "
        "where there is one.",
    )
    map: MapFormat = Field(default="none", description="The form in which each image's anomaly map is wanted.")
    alpha: float | None = Field(
        default=None,
        description="Share of good parts that may be called anomalous, from the model's smallest_alpha up to, but "
        "not including, 1. Default: the model's own.",
        json_schema_extra={"exclusiveMinimum": 0, "exclusiveMaximum": 1},
    )


class NamedScores(BaseModel):
    """Higher is more anomalous, always."""

    reconstruction: float = Field(description="Mean squared error: of intensities in [0, 1], or of features.")
    latent: float = Field(description="Negative log-likelihood of the code under N(0, I), nats per latent dimension.")
    anomaly_map: float = Field(description="The mean of the anomaly map's highest squares, in its unit.")


class RegionBox(BaseModel):
    """A connected part of the anomaly map above map_level."""

    left: int = Field(description="Pixels of the original image, from its left edge.")
    top: int = Field(description="Pixels of the original image, from its upper edge.")
    width: int = Field(description="Pixels of the original image.")
    height: int = Field(description="Pixels of the original image.")
    peak: float = Field(description="The map's highest value in it.")


class MapImage(BaseModel):
    """An anomaly map at the original image's resolution; where its longer side exceeds 2048 pixels, at 2048."""

    format: MapFormat = Field(
        description="png: 8-bit gray PNG; 0 is a map value of 0, 255 one of 2 x map_level or more. "
        "overlay: RGB PNG of the image, with the map in warm colours and the regions framed. "
        "float32: the map's values, little-endian, row by row from the top, without a header."
    )
    width: int = Field(description="Pixels of the map.")
    height: int = Field(description="Pixels of the map.")
    data: str = Field(description="The bytes in base64.", json_schema_extra={"contentEncoding": "base64"})


class ImageProblem(BaseModel):
    code: str = Field(description="Stable; begins with image_.")
    message: str = Field(description="One sentence for a person; its words may change.")


class ImageResult(BaseModel):
    """One image's answer. Of an image that could not be read, all fields but filename and error are null."""

    filename: str | None = Field(
        description="As uploaded, cut to 255 characters, unprintable ones replaced; null for a raw body."
    )
    width: int | None = Field(default=None, description="Pixels of the upright image.")
    height: int | None = Field(default=None, description="Pixels of the upright image.")
    scores: NamedScores | None = None
    anomaly_score: float | None = Field(
        default=None,
        description="Weighted mean of the three scores, each in standard deviations of the good images' score.",
    )
    p_value: float | None = Field(
        default=None,
        description="(1 + number of calibration images that look at least as anomalous) / (n + 1); in (0, 1].",
    )
    is_anomalous: bool | None = Field(default=None, description="p_value <= alpha.")
    regions: list[RegionBox] | None = Field(
        default=None, description="Where the map exceeds map_level, highest peak first."
    )
    map: MapImage | None = Field(default=None, description="Null unless asked for.")
    error: ImageProblem | None = Field(default=None, description="Why the image was not scored; null if it was.")


ModelName = Annotated[str, Field(description="Of the checkpoint's folder, or as the checkpoint says.")]
ModelVersion = Annotated[int, Field(ge=1, description="Of the folder; 1 where there is none.")]
Sha256 = Annotated[str, Field(description="Of the weights, in hexadecimal.")]
CalibrationImages = Annotated[int, Field(description="Number n of held-out good images that p-values count.")]
SmallestAlpha = Annotated[float, Field(description="1 / (n + 1): n images resolve no smaller one.")]


class AnsweringModel(BaseModel):
    """The model behind an answer, and the level at which it was asked."""

    name: ModelName
    version: ModelVersion
    sha256: Sha256
    alpha: float = Field(description="The alpha of this answer: the request's, or the model's own.")
    map_level: float = Field(
        description="The height that the map of a good image exceeds with probability at most alpha, in its unit."
    )
    calibration_images: CalibrationImages
    smallest_alpha: SmallestAlpha


class ScoreAnswer(BaseModel):
    model: AnsweringModel
    results: list[ImageResult] = Field(description="In the order of the upload.")


class ModelSummary(BaseModel):
    name: ModelName
    version: ModelVersion
    sha256: Sha256
    alpha: float = Field(description="Used where a request names none.")
    calibration_images: CalibrationImages
    smallest_alpha: SmallestAlpha
    versions: list[int] = Field(description="All that can be asked for.")
    in_memory: bool = Field(description="Otherwise it is read when it is asked for.")
    problem: str | None = Field(description="Why a version on disk is not served; null if all are.")


class ModelList(BaseModel):
    models: list[ModelSummary] = Field(description="All that this service serves.")


class ModelDetails(ModelSummary):
    map_level: float = Field(description="At the model's own alpha.")
    good_scores: list[float] = Field(
        description="Anomaly scores of the calibration images, ascending: those that p-values count."
    )
    device: str = Field(description="Where it runs: cpu, or cuda and its index.")
    config: dict[str, Any] = Field(description="Sizes of the networks; image_size is in pixels.")
    origin: dict[str, Any] = Field(description="The recipe, the command and the fingerprint of the training data.")
    metrics: dict[str, Any] = Field(description="What was measured, and the command that measured it; may be empty.")


class Health(BaseModel):
    status: Literal["live", "ready"]
