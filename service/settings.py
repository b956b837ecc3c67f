"""What the service can be told, by environment variables that begin with HAZELNUT_."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.errors import ConfigError
from models.images import MAX_PIXELS

PREFIX = "HAZELNUT_"
DEFAULT_CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "demo"


class Settings(BaseSettings):
    """Every field is read from HAZELNUT_ and its name; an empty variable counts as unset."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    checkpoint: Path = Field(
        default=DEFAULT_CHECKPOINT,
        description="Folder of a checkpoint, or of many: NAME/VERSION in it. Default: the demo model that ships.",
    )
    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 is every one.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where the model runs: cpu, cuda, or auto, which is cuda if there is one."
    )
    max_pixels: int = Field(
        default=MAX_PIXELS, ge=1, le=MAX_PIXELS, description="The most pixels, width times height, of an image."
    )
    max_body_bytes: int = Field(default=32 * 2**20, ge=1, description="The most bytes of a request's body.")
    max_files: int = Field(default=64, ge=1, description="The most images in a request.")
    max_waiting: int = Field(
        default=64,
        ge=1,
        description="How many images, of all requests, may be waiting for their scores; at least HAZELNUT_MAX_FILES.",
    )

    max_waiting_bytes: int = Field(
        default=256 * 2**20,
        ge=1,
        description="How many bytes the uploads that wait for their scores may have together. One comes in alone.",
    )
    model_bytes: int = Field(
        default=2 * 2**30,
        ge=1,
        description="How many bytes the weights of the models in memory may have together; those that were not asked "
        "for the longest leave first.",
    )
    look_seconds: float = Field(
        default=5.0, gt=0, description="How often new versions are looked for in the folder of checkpoints."
    )
    header_seconds: float = Field(
        default=10.0,
        gt=0,
        description="How long the headers of a request may take to arrive; then the connection is cut.",
    )
    receive_seconds: float = Field(
        default=30.0, gt=0, description="How long a request may take to arrive; slower clients are refused."
    )
    answer_seconds: float = Field(
        default=30.0,
        gt=0,
        description="How long an image may take from its arrival to its scores, and before that a model to be read.",
    )
    send_seconds: float = Field(
        default=30.0, gt=0, description="How long a client may leave its answer unread; then the connection is cut."
    )
    drain_seconds: float = Field(
        default=30.0, gt=0, description="How long the answers on their way may take when the service is told to stop."
    )
    api_keys: Path | None = Field(
        default=None,
        description="File of the keys' hashes, made by `hazelnut key`. Default: none, for a loopback address alone.",
    )
    behind_loopback: bool = Field(
        default=False,
        description="true: HAZELNUT_HOST is an address in a container, and its port is published on the loopback "
        "alone. It may then be any without keys.",
    )

    @model_validator(mode="after")
    def _one_request_can_wait(self) -> Self:
        if self.max_waiting < self.max_files:
            raise ValueError(
                f"{PREFIX}MAX_WAITING is {self.max_waiting}: allowed is {PREFIX}MAX_FILES, {self.max_files}, or more."
            )
        return self


def load_settings(
    *,
    checkpoint: Path | None = None,
    host: str | None = None,
    port: int | None = None,
    device: str | None = None,
) -> Settings:
    """Settings of this process's environment; what is given takes the place of its variable.

    Raises ConfigError, naming the first variable that does not do.
    """
    given: dict[str, Any] = {"checkpoint": checkpoint, "host": host, "port": port, "device": device}
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise ConfigError(str(first["ctx"]["error"])) from error
        name = PREFIX + str(first["loc"][0]).upper()
        raise ConfigError(f"{name} is {first['input']!r}: {first['msg'][:1].lower()}{first['msg'][1:]}.") from error
