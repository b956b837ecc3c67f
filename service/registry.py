"""The models that are served: what is on disk, what of it is in memory, and which version answers.

The folder is looked at again and again. A version is read, checked and warmed in a thread of its own and only then
takes over; one that fails is reported, and the version before it goes on. Requests keep the model that they began with.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from models.calibration import Calibration
from models.checkpoint import RECORD_FILE, Checkpoint, load_checkpoint
from models.errors import CheckpointError
from service.device_worker import DeviceError, Scoring
from service.drift import Drift
from service.errors import ServiceError, logger, shown
from service.found import UNREADABLE, Found, scan
from service.settings import Settings
from service.telemetry import Telemetry


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A version in memory, on its device and warm."""

    name: str
    version: int
    checkpoint: Checkpoint
    scorer: Scoring
    drift: Drift

    @property
    def calibration(self) -> Calibration:
        return self.checkpoint.calibration


@dataclass(frozen=True, eq=False)
class About:
    """What is kept of a version that was in memory once."""

    name: str
    sha256: str
    calibration: Calibration
    drift: Drift


@dataclass(eq=False)
class Version:
    """What is known of a version. Its model leaves memory when others need the room, and comes back when asked for."""

    found: Found
    name: str
    model: ServedModel | None = None
    known: About | None = None
    problem: str | None = None  # why it cannot be served
    reading: "asyncio.Future[ServedModel] | None" = None  # while someone waits for the model
    used: float = field(default_factory=time.monotonic)

    def was_read(self, reading: "asyncio.Future[ServedModel]") -> None:
        self.reading = None  # it would keep the model in memory
        if not reading.cancelled():
            reading.exception()  # or asyncio complains where nobody waits any more

    @property
    def refused(self) -> bool:
        """It was never in memory; one that was is tried again whenever it is asked for."""
        return self.problem is not None and self.known is None

    @property
    def about(self) -> About:
        """Of one that has been in memory, as every one has that answers."""
        assert self.known is not None
        return self.known


class Registry:
    """Reading and forgetting happen in one thread, `loading`; the event loop only looks up."""

    def __init__(
        self,
        settings: Settings,
        telemetry: Telemetry,
        *,
        load: Callable[[Checkpoint], Scoring],
        given: Checkpoint | None = None,
    ) -> None:
        """load: brings a model to the device, as service.device.Device does. given: serve this one, whatever is on
        disk. Raises CheckpointError where there is nothing to serve.
        """
        self._root = settings.checkpoint
        self._room = settings.model_bytes
        self._seconds = settings.answer_seconds
        self._load = load
        self._telemetry = telemetry
        self._versions: dict[Path, Version] = {}
        self._answering: dict[str, Version] = {}  # by the product's name
        self._loading = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loading")
        self._look_now = asyncio.Event()
        self._forget = False
        self._watched = given is None
        if given is not None:
            found = Found(self._root, product=None, version=1, size=0, stamp=())
            version = Version(found, name=checkpoint_name(given))
            self._made_ready(version, given)
            self._versions[self._root] = version
            self._take_over(version)
        else:
            self._first_look()

    def answering(self) -> list[Version]:
        """The version of each product that answers where none is asked for, by name."""
        return [version for _, version in sorted(self._answering.items())]

    def versions(self, name: str) -> list[int]:
        """Those that can be asked for."""
        return sorted({each.found.version for each in self._all() if each.name == name and not each.refused})

    def problem(self, name: str) -> str | None:
        """Why a version on disk is not served, of the highest that is not."""
        refused = [each for each in list(self._versions.values()) if each.name == name and each.problem]
        return max(refused, key=lambda each: each.found.version).problem if refused else None

    async def get(self, wanted: str | None) -> ServedModel:
        """The model for NAME, NAME:VERSION or, where there is one product, None. Reads it where it is not in memory.

        Raises ServiceError: model_required, model_unknown, model_unavailable, deadline.
        """
        return (await self.get_version(wanted))[1]

    async def get_version(self, wanted: str | None) -> tuple[Version, ServedModel]:
        """The same, with what is known of it."""
        version = self._looked_up(wanted)
        version.used = time.monotonic()
        if model := version.model:
            return version, model
        shown_name = shown(wanted or version.name)
        if version.refused:
            raise ServiceError("model_unavailable", f"model {shown_name}: {version.problem}")
        # All who ask share it: who gives up takes it from nobody, and no more are under way than there are versions.
        if version.reading is None:
            loop = asyncio.get_running_loop()
            version.reading = loop.run_in_executor(self._loading, self._back_in_memory, version)
            version.reading.add_done_callback(version.was_read)
        read, _ = await asyncio.wait([version.reading], timeout=self._seconds)
        if not read:
            raise ServiceError(
                "deadline", f"model {shown_name} was not read within {self._seconds:g} seconds: try later."
            )
        try:
            return version, read.pop().result()
        except CheckpointError as error:
            raise ServiceError("model_unavailable", f"model {shown_name}: {error}") from error

    def _looked_up(self, wanted: str | None) -> Version:
        if wanted is None:
            answering = self.answering()
            if len(answering) == 1:
                return answering[0]
            if not answering:
                raise ServiceError("model_unknown", "no model is served.")
            raise ServiceError("model_required", f"several models are served: name one of {self._names()}.")
        if wanted in self._answering:
            return self._answering[wanted]
        name, _, number = wanted.rpartition(":")
        for version in self._all():
            if version.name == name and str(version.found.version) == number:
                return version
        if name in self._answering:
            numbers = ", ".join(map(str, self.versions(name)))
            raise ServiceError("model_unknown", f"there is no model {shown(wanted)}: {name} has versions {numbers}.")
        raise ServiceError("model_unknown", f"there is no model {shown(wanted)}: allowed are {self._names()}.")

    def _all(self) -> list[Version]:
        """Those that answer first: on disk there may be another one in its place that cannot."""
        return [*self._answering.values(), *self._versions.values()]

    def _names(self) -> str:
        names = sorted(self._answering)
        return (", ".join(names[:10]) or "none") + (f" and {len(names) - 10} more" if len(names) > 10 else "")

    def look_now(self, *, forget: bool) -> None:
        """Have `watch` look at once. forget: versions that are gone from disk are served no more, and those that were
        refused are tried again."""
        self._forget |= forget
        self._look_now.set()

    async def watch(self, seconds: float) -> None:
        """Look at the folder every so many seconds, until cancelled."""
        loop = asyncio.get_running_loop()
        while self._watched:
            try:
                async with asyncio.timeout(seconds):
                    await self._look_now.wait()
            except TimeoutError:
                pass
            self._look_now.clear()
            forget, self._forget = self._forget, False
            try:
                await loop.run_in_executor(self._loading, self.look, forget)
            except Exception:  # noqa: BLE001 - whatever it is, what is in memory goes on
                logger.exception("looking for models failed")

    def close(self) -> None:
        self._loading.shutdown(cancel_futures=True)

    # What follows runs in the thread `loading`, or before there is one.

    def _first_look(self) -> None:
        try:
            self._look_at(scan(self._root)[0])
        except OSError as error:
            raise CheckpointError(f"cannot read the checkpoint {self._root}: {error}.") from error
        problems = [version.problem for version in self._versions.values() if version.problem]
        if not self._answering and problems:
            raise CheckpointError(problems[0])
        if not self._answering:
            raise CheckpointError(
                f"{self._root} has no checkpoint: allowed is a folder with {RECORD_FILE} in it, or one of folders "
                "NAME/VERSION with such, names in lower case, versions whole numbers."
            )

    def look(self, forget: bool) -> None:
        """Bring the newest version of each product into service, if it can be."""
        try:
            found, unreadable = scan(self._root)
        except OSError as error:
            logger.warning("cannot look for models in %s: %s", self._root, error)
            if forget:
                self._forget = True  # at the next look
            return
        answered = set(self._answering)
        if forget:
            self._forget_all_but({each.folder for each in found}, unreadable)
        self._look_at(found)
        # One that is gone has answered while the one in its place was read.
        self._answering = {name: each for name, each in self._answering.items() if each.found.folder in self._versions}
        for name in answered - set(self._answering):
            self._telemetry.model_gone(name)

    def _look_at(self, found: list[Found]) -> None:
        for each in found:
            known = self._versions.get(each.folder)
            if known is None or each.stamp not in (UNREADABLE, known.found.stamp):
                self._versions[each.folder] = Version(each, name=each.product or (known.name if known else ""))
        for name, versions in self._by_product().items():
            self._bring_up(name, versions)

    def _by_product(self) -> dict[str, list[Version]]:
        """The versions of each, highest first."""
        products: dict[str, list[Version]] = {}
        for version in sorted(self._versions.values(), key=lambda version: -version.found.version):
            products.setdefault(version.name, []).append(version)
        return products

    def _bring_up(self, name: str, versions: list[Version]) -> None:
        answering, least = self._answering.get(name), 0
        if answering is not None and answering.model is not None and answering.found.folder in self._versions:
            least = answering.found.version  # it goes on, though on disk there may be another one in its place
        for version in versions:
            if version is answering or version.found.version < least:
                return
            if version.problem is None and self._try(version):
                self._take_over(version)
                return

    def _try(self, version: Version) -> bool:
        try:
            self._back_in_memory(version)
        except CheckpointError as error:
            if self._answering or version.found.product:  # otherwise the start fails, and says so
                logger.error("version %d in %s is not served: %s", version.found.version, version.found.folder, error)
            self._telemetry.model_refused()
            return False
        return True

    def _back_in_memory(self, version: Version) -> ServedModel:
        """Raises CheckpointError, which is kept as the version's problem."""
        if version.model is not None:
            return version.model
        self._make_room(version.found.size)
        try:
            return self._made_ready(version, load_checkpoint(version.found.folder))
        except CheckpointError as error:
            version.problem = str(error)
            raise

    def _made_ready(self, version: Version, checkpoint: Checkpoint) -> ServedModel:
        version.name = version.found.product or checkpoint_name(checkpoint)
        scorer = self._on_device(version.found.folder, checkpoint)
        calibration = checkpoint.calibration
        drift = version.known.drift if version.known else Drift(calibration.n)
        version.known = About(version.name, checkpoint.weights_sha256, calibration, drift)
        version.model = ServedModel(version.name, version.found.version, checkpoint, scorer, drift)
        version.problem = None
        return version.model

    def _on_device(self, folder: Path, checkpoint: Checkpoint) -> Scoring:
        try:
            return self._load(checkpoint)
        except torch.OutOfMemoryError as error:
            raise CheckpointError(f"{folder} does not fit into the device's memory.") from error
        except DeviceError as error:
            logger.exception("a model cannot be brought to the device")
            raise CheckpointError(f"{folder} cannot be brought to the device; the log has the traceback.") from error

    def _take_over(self, version: Version) -> None:
        number, drift = version.found.version, version.about.drift
        self._telemetry.model_answers(version.name, version=number, drift=drift)
        if version.found.product is None:
            self._answering = {version.name: version}
        else:
            self._answering[version.name] = version
        logger.info("model %s, version %d answers", version.name, number)

    def _make_room(self, size: int) -> None:
        """Of those in memory the least recently used leave, until `size` more bytes fit."""
        loaded = sorted((each for each in self._versions.values() if each.model), key=lambda each: each.used)
        held = sum(each.found.size for each in {*loaded, *self._answering.values()} if each.model)
        for version in loaded:
            if held + size <= self._room:
                return
            version.model = None
            held -= version.found.size
            logger.info("model %s, version %d leaves memory", version.name, version.found.version)

    def _forget_all_but(self, folders: set[Path], unreadable: set[Path]) -> None:
        for folder in set(self._versions) - folders:
            if folder.parent not in unreadable:
                gone = self._versions.pop(folder)
                logger.info("model %s, version %d is gone", gone.name, gone.found.version)
        for version in self._versions.values():
            version.problem = None  # what was wrong with it may have been put right


def checkpoint_name(checkpoint: Checkpoint) -> str:
    """Raises CheckpointError where there is none."""
    name = checkpoint.origin.get("name")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"the checkpoint's origin has the name {name!r}: a model is served under a name.")
    return name
