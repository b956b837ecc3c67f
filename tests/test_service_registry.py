"""Many products: which model answers, how a new version takes over, and what becomes of a broken one."""

import asyncio
import gc
import json
import shutil
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from models.config import ModelConfig
from models.errors import CheckpointError
from models.maps import MapFusion
from models.networks import ScoringNetworks, Standardisation
from models.scoring import Scorer
from service.app import create_app
from service.device_worker import DeviceError, Scoring, warm_scorer
from service.errors import ServiceError
from service.registry import Registry
from service.settings import Settings
from service.telemetry import Telemetry
from tests.conftest import png, until


def load(checkpoint: Checkpoint) -> Scoring:
    """In this process."""
    return warm_scorer(checkpoint, torch.device("cpu"))


class Disk:
    """Lets no checkpoint be read while the gate is closed. Keeps which ones are."""

    def __init__(self) -> None:
        self.gate, self.at_the_gate = threading.Event(), threading.Event()
        self.gate.set()
        self.folders: list[Path] = []

    def read(self, folder: Path) -> Checkpoint:
        self.folders.append(folder)
        self.at_the_gate.set()
        assert self.gate.wait(30)
        return load_checkpoint(folder)


def other(checkpoint: Checkpoint, seed: int) -> Checkpoint:
    """One with weights of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return replace(checkpoint, networks=ScoringNetworks(checkpoint.config, Standardisation()).eval())


@pytest.fixture
def root(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """Two products; of the first there are two versions."""
    root = tmp_path / "models"
    for index, version in enumerate(("bolt/9", "bolt/10", "nut/1")):
        save_checkpoint(root / version, other(checkpoint, index))
    return root


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr("service.registry.load_checkpoint", disk.read)
    yield disk
    disk.gate.set()


def run(
    root: Path,
    test: Callable[[Registry, Telemetry], Coroutine[Any, Any, None]],
    *,
    load: Callable[[Checkpoint], Scoring] = load,
    **settings: Any,
) -> None:
    async def whole() -> None:
        telemetry = Telemetry()
        registry = Registry(Settings(checkpoint=root, **settings), telemetry, load=load)
        watching = asyncio.create_task(registry.watch(3600))
        try:
            await asyncio.wait_for(test(registry, telemetry), 60)
        finally:
            watching.cancel()
            registry.close()

    asyncio.run(whole())


async def looked(registry: Registry, *, forget: bool = False) -> None:
    """Have it look at the folder, and wait until it has."""
    await asyncio.get_running_loop().run_in_executor(registry._loading, registry.look, forget)


def in_memory(registry: Registry) -> set[tuple[str, int]]:
    return {(each.name, each.found.version) for each in registry._versions.values() if each.model}


async def refusal(registry: Registry, wanted: str | None) -> ServiceError:
    with pytest.raises(ServiceError) as raised:
        await registry.get(wanted)
    return raised.value


def test_the_highest_version_answers_and_the_others_can_be_asked_for(root):
    async def test(registry: Registry, _: Telemetry) -> None:
        newest, older = await registry.get("bolt"), await registry.get("bolt:9")
        assert (newest.name, newest.version) == ("bolt", 10)
        assert (older.name, older.version) == ("bolt", 9)
        assert newest.checkpoint.weights_sha256 != older.checkpoint.weights_sha256
        assert await registry.get("bolt:10") is newest
        assert (await registry.get("nut")).version == 1
        assert registry.versions("bolt") == [9, 10]

    run(root, test)


def test_a_model_that_is_not_there_is_refused_with_what_is(root):
    async def test(registry: Registry, _: Telemetry) -> None:
        for wanted, says in (
            (None, "bolt, nut"),
            ("screw", "'screw': allowed are bolt, nut"),
            ("bolt:11", "'bolt:11': bolt has versions 9, 10"),
            ("bolt:", "bolt has versions 9, 10"),
            ("../nut", "'../nut': allowed are bolt, nut"),
            ("bolt/9", "allowed are bolt, nut"),
            ("", "'': allowed are bolt, nut"),
        ):
            error = await refusal(registry, wanted)
            assert error.code == ("model_required" if wanted is None else "model_unknown")
            assert says in str(error)

    run(root, test)


def test_names_on_disk_that_do_not_do_are_no_models(root, checkpoint, tmp_path):
    for odd in ("Upper/1", ".hidden/1", "nut/v2", "nut/0", "nut/.3", "nut/02", "x" * 65 + "/1"):
        save_checkpoint(root / odd, checkpoint)
    save_checkpoint(tmp_path / "elsewhere" / "5", checkpoint)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "nut" / "7").symlink_to(tmp_path / "elsewhere" / "5")
    (root / "nut" / "8").mkdir()  # being copied: no file is there yet
    (root / "note.txt").write_text("not a folder")

    async def test(registry: Registry, _: Telemetry) -> None:
        assert [version.name for version in registry.answering()] == ["bolt", "nut"]
        assert registry.versions("nut") == [1]

    run(root, test)


def test_a_new_version_takes_over_and_begun_requests_keep_theirs(root, checkpoint):
    async def test(registry: Registry, telemetry: Telemetry) -> None:
        before = await registry.get("nut")
        save_checkpoint(root / "nut" / "2", other(checkpoint, 7))
        registry.look_now(forget=False)
        await until(lambda: registry.answering()[1].found.version == 2)
        after = await registry.get("nut")
        assert after.version == 2
        assert after.checkpoint.weights_sha256 != before.checkpoint.weights_sha256
        assert before.scorer.begin(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).result().p_value.shape == (1,)
        assert telemetry.registry.get_sample_value("hazelnut_model_version", {"model": "nut"}) == 2

    run(root, test)


def test_a_product_that_appears_is_served(root, checkpoint):
    async def test(registry: Registry, _: Telemetry) -> None:
        save_checkpoint(root / "screw" / "1", checkpoint)
        await looked(registry)
        assert (await registry.get("screw")).version == 1

    run(root, test)


def test_the_model_that_answers_stays_until_the_next_is_warm(root, checkpoint, monkeypatch):
    gate, at_the_gate = threading.Event(), threading.Event()
    score = Scorer.score

    def slow(self: Scorer, pixels: torch.Tensor) -> Any:
        at_the_gate.set()
        assert gate.wait(30)
        return score(self, pixels)

    async def test(registry: Registry, _: Telemetry) -> None:
        save_checkpoint(root / "nut" / "2", other(checkpoint, 7))
        monkeypatch.setattr(Scorer, "score", slow)
        registry.look_now(forget=False)
        await until(at_the_gate.is_set)
        assert (await registry.get("nut")).version == 1
        gate.set()
        await until(lambda: registry.answering()[1].found.version == 2)

    run(root, test)


@pytest.mark.parametrize("damage", ["weights", "record", "nan", "empty"])
def test_a_broken_version_is_refused_while_the_old_one_serves(root, checkpoint, damage):
    async def test(registry: Registry, telemetry: Telemetry) -> None:
        broken = other(checkpoint, 7)
        if damage == "nan":
            with torch.no_grad():
                next(broken.networks.decoder.parameters()).fill_(float("nan"))
        save_checkpoint(root / "nut" / "2", broken)
        if damage == "weights":
            path = root / "nut" / "2" / "model.safetensors"
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        if damage == "record":
            (root / "nut" / "2" / "model.json").write_text("{")
        if damage == "empty":
            (root / "nut" / "2" / "model.safetensors").write_bytes(b"")
        for _ in range(3):
            await looked(registry)
        assert (await registry.get("nut")).version == 1
        problem = registry.problem("nut")
        assert problem is not None
        assert problem.endswith(".")
        assert telemetry.registry.get_sample_value("hazelnut_models_refused_total") == 1, "it is tried once"
        error = await refusal(registry, "nut:2")
        assert error.code == "model_unavailable"
        # Mended, it takes over.
        save_checkpoint(root / "nut" / "2", other(checkpoint, 8))
        await looked(registry)
        assert (await registry.get("nut")).version == 2
        assert registry.problem("nut") is None

    run(root, test)


def test_a_version_that_is_refused_is_not_offered_and_costs_no_other_its_place(root, checkpoint):
    size = (root / "nut" / "1" / "model.safetensors").stat().st_size

    async def test(registry: Registry, telemetry: Telemetry) -> None:
        save_checkpoint(root / "nut" / "2", checkpoint)
        (root / "nut" / "2" / "model.json").write_text("{")
        await looked(registry)
        await registry.get("nut")
        before = in_memory(registry)
        assert ("nut", 1) in before
        assert registry.versions("nut") == [1]
        assert "nut has versions 1." in str(await refusal(registry, "nut:3"))
        for _ in range(3):
            error = await refusal(registry, "nut:2")
            assert error.code == "model_unavailable"
            assert "not JSON" in str(error)
        assert in_memory(registry) == before
        assert telemetry.registry.get_sample_value("hazelnut_models_refused_total") == 1

    run(root, test, model_bytes=size)


def test_a_version_that_is_replaced_by_a_broken_one_goes_on(root, checkpoint):
    async def test(registry: Registry, _: Telemetry) -> None:
        before = await registry.get("bolt")
        record = root / "bolt" / "10" / "model.json"
        record.write_text("{")
        for forget in (False, True):
            await looked(registry, forget=forget)
            assert await registry.get("bolt") is before
            assert await registry.get("bolt:10") is before
        assert registry.versions("bolt") == [9, 10]
        assert "not JSON" in (registry.problem("bolt") or "")
        save_checkpoint(record.parent, other(checkpoint, 7))
        await looked(registry)
        after = await registry.get("bolt")
        assert after.version == 10
        assert after is not before

    run(root, test)


def test_a_version_that_is_replaced_by_a_broken_one_while_it_is_not_in_memory_leaves_the_older_one(root):
    async def test(registry: Registry, _: Telemetry) -> None:
        await registry.get("nut")
        (root / "bolt" / "10" / "model.json").write_text("{")
        await looked(registry)
        assert (await registry.get("bolt")).version == 9

    run(root, test, model_bytes=1)


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError("of 2 GiB"), DeviceError("Traceback: it died")])
def test_a_version_over_which_the_device_fails_is_tried_again_at_a_sighup_alone(root, checkpoint, failure):
    tried: list[str] = []

    def failing_once(found: Checkpoint) -> Scoring:
        if found.origin["name"] == "large":
            tried.append("large")
            if len(tried) == 1:
                raise failure
        return load(found)

    async def test(registry: Registry, telemetry: Telemetry) -> None:
        save_checkpoint(root / "nut" / "2", replace(other(checkpoint, 7), origin={"name": "large"}))
        for _ in range(3):
            await looked(registry)
        assert len(tried) == telemetry.registry.get_sample_value("hazelnut_models_refused_total") == 1
        assert "device" in (registry.problem("nut") or "")
        assert (await registry.get("nut")).version == 1
        await looked(registry, forget=True)
        assert (await registry.get("nut")).version == 2
        assert registry.problem("nut") is None

    run(root, test, load=failing_once)


def test_a_version_that_could_not_be_read_for_a_moment_has_no_problem_once_it_is_in_memory(root):
    async def test(registry: Registry, _: Telemetry) -> None:
        weights = root / "bolt" / "9" / "model.safetensors"
        await registry.get("bolt:9")
        await registry.get("nut")
        weights.rename(root / "away")
        assert (await refusal(registry, "bolt:9")).code == "model_unavailable"
        assert "cannot read" in (registry.problem("bolt") or "")
        (root / "away").rename(weights)
        assert (await registry.get("bolt:9")).version == 9
        assert registry.problem("bolt") is None

    run(root, test, model_bytes=1)


def test_a_version_that_is_gone_is_served_until_it_is_to_be_forgotten(root):
    async def test(registry: Registry, _: Telemetry) -> None:
        shutil.rmtree(root / "bolt" / "10")
        await looked(registry)
        assert (await registry.get("bolt")).version == 10
        registry.look_now(forget=True)
        await until(lambda: registry.answering()[0].found.version == 9)
        assert (await registry.get("bolt")).version == 9
        assert (await refusal(registry, "bolt:10")).code == "model_unknown"

    run(root, test)


def test_a_version_that_is_gone_answers_until_the_older_one_is_warm(root, disk):
    async def test(registry: Registry, _: Telemetry) -> None:
        shutil.rmtree(root / "nut")
        shutil.rmtree(root / "bolt" / "10")
        disk.gate.clear()
        disk.at_the_gate.clear()
        registry.look_now(forget=True)
        await until(disk.at_the_gate.is_set)
        assert (await registry.get("bolt")).version == 10
        disk.gate.set()
        await until(lambda: [each.found.version for each in registry.answering()] == [9])
        assert (await registry.get(None)).version == 9

    run(root, test)


def test_where_all_models_are_gone_none_is_said_to_be_served(root):
    async def test(registry: Registry, _: Telemetry) -> None:
        for product in root.iterdir():
            shutil.rmtree(product)
        await looked(registry, forget=True)
        for wanted, says in ((None, "no model is served."), ("nut", "'nut': allowed are none.")):
            error = await refusal(registry, wanted)
            assert error.code == "model_unknown"
            assert says in str(error)

    run(root, test)


def test_a_product_that_is_gone_leaves_no_drift_to_watch(root):
    async def test(registry: Registry, telemetry: Telemetry) -> None:
        def drift_images(name: str) -> float | None:
            return telemetry.registry.get_sample_value("hazelnut_drift_images", {"model": name})

        shutil.rmtree(root / "bolt")
        await looked(registry)
        assert drift_images("bolt") == 0
        await looked(registry, forget=True)
        assert (drift_images("bolt"), drift_images("nut")) == (None, 0)
        assert telemetry.registry.get_sample_value("hazelnut_p_value_count", {"model": "bolt"}) == 0

    run(root, test)


def test_a_folder_that_is_gone_takes_nothing_with_it(root, caplog):
    async def test(registry: Registry, _: Telemetry) -> None:
        root.rename(root.with_name("away"))
        await looked(registry, forget=True)
        assert (await registry.get("bolt")).version == 10
        assert "cannot look for models" in caplog.text

    run(root, test)


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """Folders whose entries cannot be listed; a test that runs as root has no other."""
    folders: set[Path] = set()
    iterdir = Path.iterdir

    def listed(self: Path) -> Any:
        if self in folders:
            raise PermissionError(13, "Permission denied", str(self))
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", listed)
    return folders


def test_a_product_that_cannot_be_read_holds_up_no_other_and_is_not_forgotten(root, checkpoint, unreadable, caplog):
    async def test(registry: Registry, _: Telemetry) -> None:
        unreadable.add(root / "bolt")
        save_checkpoint(root / "nut" / "2", other(checkpoint, 7))
        shutil.rmtree(root / "nut" / "1")
        await looked(registry, forget=True)
        assert (await registry.get("nut")).version == 2
        assert registry.versions("nut") == [2]
        assert "cannot look for models in " + str(root / "bolt") in caplog.text
        assert (await registry.get("bolt")).version == 10
        assert (await registry.get("bolt:9")).version == 9

    run(root, test)


def test_start_with_a_product_that_cannot_be_read_serves_the_others(root, unreadable):
    async def test(registry: Registry, _: Telemetry) -> None:
        assert [each.name for each in registry.answering()] == ["nut"]
        unreadable.clear()
        await looked(registry)
        assert [each.name for each in registry.answering()] == ["bolt", "nut"]

    unreadable.add(root / "bolt")
    run(root, test)


def test_a_version_that_cannot_be_read_has_a_problem_and_the_old_one_goes_on(root, checkpoint):
    async def test(registry: Registry, telemetry: Telemetry) -> None:
        record = root / "nut" / "2" / "model.json"
        save_checkpoint(record.parent, other(checkpoint, 7))
        record.rename(root / "away")
        record.symlink_to(record)  # it leads to itself: whoever opens it fails
        for _ in range(2):
            await looked(registry)
        assert (await registry.get("nut")).version == 1
        assert "cannot read" in (registry.problem("nut") or "")
        assert telemetry.registry.get_sample_value("hazelnut_models_refused_total") == 1
        (root / "away").rename(record)
        await looked(registry)
        served = await registry.get("nut")
        assert served.version == 2
        # Unreadable for a moment, it is no other version than before.
        record.rename(root / "away")
        record.symlink_to(record)
        await looked(registry, forget=True)
        assert await registry.get("nut:2") is served
        assert registry.problem("nut") is None

    run(root, test)


def test_what_is_to_be_forgotten_is_forgotten_when_the_folder_can_be_read_again(root):
    async def test(registry: Registry, _: Telemetry) -> None:
        away = root.rename(root.with_name("away"))
        shutil.rmtree(away / "bolt" / "10")
        await looked(registry, forget=True)
        away.rename(root)
        registry.look_now(forget=False)
        await until(lambda: registry.answering()[0].found.version == 9)

    run(root, test)


def test_memory_is_bounded_and_the_least_recently_used_leaves(root):
    size = (root / "nut" / "1" / "model.safetensors").stat().st_size

    async def test(registry: Registry, _: Telemetry) -> None:
        assert in_memory(registry) == {("bolt", 10), ("nut", 1)}
        await registry.get("bolt")
        older = await registry.get("bolt:9")
        assert in_memory(registry) == {("bolt", 10), ("bolt", 9)}, "nut was used before bolt"
        assert [version.name for version in registry.answering()] == ["bolt", "nut"]
        assert (await registry.get("nut")).version == 1
        assert in_memory(registry) == {("bolt", 9), ("nut", 1)}
        assert await registry.get("bolt:9") is older

    run(root, test, model_bytes=2 * size)


def test_a_model_larger_than_the_budget_is_served_alone(root):
    async def test(registry: Registry, _: Telemetry) -> None:
        assert len(in_memory(registry)) == 1
        for name in ("bolt", "nut", "bolt"):
            assert (await registry.get(name)).name == name
            assert len(in_memory(registry)) == 1

    run(root, test, model_bytes=1)


def test_many_who_ask_for_a_model_on_disk_have_it_read_once(root, disk):
    async def test(registry: Registry, _: Telemetry) -> None:
        disk.folders.clear()
        found = await asyncio.gather(*(registry.get("bolt:9") for _ in range(20)))
        assert len({id(model) for model in found}) == 1
        assert disk.folders == [root / "bolt" / "9"]

    run(root, test)


def test_a_model_that_is_not_read_in_time_is_given_up_and_is_there_for_those_who_come_later(root, disk):
    async def test(registry: Registry, _: Telemetry) -> None:
        disk.folders.clear()
        disk.gate.clear()
        errors = await asyncio.gather(*(refusal(registry, wanted) for wanted in ["bolt", "bolt:9", "bolt:9", "bolt"]))
        assert [error.code for error in errors] == ["deadline"] * 4
        assert "model 'bolt' was not read within 0.1 seconds" in str(errors[0])
        registry._seconds = 60
        later = asyncio.gather(*(registry.get(wanted) for wanted in ["bolt:9", "bolt"]))
        await asyncio.sleep(0)
        disk.gate.set()
        assert [model.version for model in await later] == [9, 10]
        assert disk.folders == [root / "bolt" / "10", root / "bolt" / "9"], "each was read once for all"

    run(root, test, model_bytes=1, answer_seconds=0.1)


def test_a_reading_that_fails_when_nobody_waits_any_more_is_no_fault(root, disk, caplog):
    async def test(registry: Registry, _: Telemetry) -> None:
        (root / "bolt" / "9" / "model.json").write_text("{")
        disk.gate.clear()
        assert (await refusal(registry, "bolt:9")).code == "deadline"
        disk.gate.set()
        await until(lambda: registry.problem("bolt"))
        await looked(registry)
        gc.collect()
        assert "never retrieved" not in caplog.text

    run(root, test, answer_seconds=0.1)


def test_a_model_that_leaves_is_kept_in_memory_by_nobody(root):
    async def test(registry: Registry, _: Telemetry) -> None:
        gone = weakref.ref(await registry.get("bolt:9"))
        await registry.get("nut")
        gc.collect()
        assert gone() is None

    run(root, test, model_bytes=1)


def test_the_drift_of_a_model_outlives_its_time_on_disk(root):
    async def test(registry: Registry, _: Telemetry) -> None:
        (await registry.get("bolt")).drift.add(0.5)
        await registry.get("nut")
        assert in_memory(registry) == {("nut", 1)}
        assert (await registry.get("bolt")).drift.images() == 1

    run(root, test, model_bytes=1)


def test_a_single_checkpoint_is_swapped_when_it_is_replaced(folder, checkpoint):
    async def test(registry: Registry, _: Telemetry) -> None:
        before = await registry.get(None)
        assert (before.name, before.version) == ("nut", 1)
        save_checkpoint(folder, replace(other(checkpoint, 7), origin={"name": "Nut, new"}))
        await looked(registry)
        after = await registry.get(None)
        assert after.name == "Nut, new"
        assert after.checkpoint.weights_sha256 != before.checkpoint.weights_sha256
        assert (await refusal(registry, "nut")).code == "model_unknown"
        # A broken one in its place is refused.
        (folder / "model.json").write_text("{")
        await looked(registry)
        assert await registry.get(None) is after
        assert registry.problem("Nut, new") is not None

    run(folder, test)


def test_looking_that_fails_is_logged_and_goes_on(root, monkeypatch, caplog):
    async def test(registry: Registry, _: Telemetry) -> None:
        def failing(_forget: bool) -> None:
            raise KeyError("a slip of ours")

        with monkeypatch.context() as patch:
            patch.setattr(registry, "look", failing)
            registry.look_now(forget=False)
            await until(lambda: "a slip of ours" in caplog.text)
        shutil.rmtree(root / "bolt" / "10")
        registry.look_now(forget=True)
        await until(lambda: registry.answering()[0].found.version == 9)

    run(root, test)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda root: root, "cannot read the checkpoint"),
        (lambda root: root.mkdir(), "has no checkpoint"),
        (lambda root: (root / "nut" / "one").mkdir(parents=True), "has no checkpoint"),
    ],
    ids=["missing", "empty", "no version"],
)
def test_start_without_a_model_is_refused(tmp_path, make, says):
    make(tmp_path / "models")
    with pytest.raises(CheckpointError, match=says):
        Registry(Settings(checkpoint=tmp_path / "models"), Telemetry(), load=load)


def test_start_with_a_broken_product_serves_the_others(root, caplog):
    (root / "nut" / "1" / "model.json").write_text("{")
    (root / "bolt" / "10" / "model.json").write_text("{")

    async def test(registry: Registry, _: Telemetry) -> None:
        assert [(each.name, each.found.version) for each in registry.answering()] == [("bolt", 9)]
        assert "nut" in caplog.text
        assert (await refusal(registry, "nut")).code == "model_unknown"

    run(root, test)


def test_start_with_nothing_but_broken_ones_is_refused(root):
    for record in root.glob("*/*/model.json"):
        record.write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        Registry(Settings(checkpoint=root), Telemetry(), load=load)


def test_models_of_different_sizes_answer_side_by_side_over_http(root, checkpoint):
    config = ModelConfig(image_size=64, channels=1, width=8, latent="grid", latent_dim=4, head_width=8)
    networks = ScoringNetworks(config, Standardisation()).eval()
    maps = 1 + networks.evidence_maps
    fusion = MapFusion(torch.zeros(maps, 8, 8), torch.ones(maps, 8, 8), torch.zeros(2 * maps), torch.ones(2 * maps))
    save_checkpoint(root / "large" / "1", replace(checkpoint, networks=networks, fusion=fusion))
    with TestClient(create_app(Settings(checkpoint=root, device="cpu"))) as client:
        headers = {"Content-Type": "image/png"}
        for name, version in (("bolt", 10), ("bolt:9", 9), ("nut", 1), ("large", 1)):
            answer = client.post(f"/score?model={name}", content=png(), headers=headers)
            assert answer.status_code == 200, answer.text
            model = answer.json()["model"]
            assert (model["name"], model["version"]) == (name.split(":")[0], version)
        assert client.post("/score", content=png(), headers=headers).json()["error"]["code"] == "model_required"
        listed = client.get("/models").json()["models"]
        assert [(each["name"], each["version"], each["versions"]) for each in listed] == [
            ("bolt", 10, [9, 10]),
            ("large", 1, [1]),
            ("nut", 1, [1]),
        ]
        assert client.get("/models/bolt:9").json()["version"] == 9
        assert json.loads(client.get("/models/large").text)["config"]["image_size"] == 64


def test_a_model_over_which_the_device_fails_is_refused_in_one_sentence_and_logged(root, caplog):
    def fail(_: Checkpoint) -> Scoring:
        raise DeviceError("Traceback (most recent call last):\nValueError: odd")

    with pytest.raises(CheckpointError, match="cannot be brought to the device"):
        Registry(Settings(checkpoint=root), Telemetry(), load=fail)
    assert "ValueError: odd" in caplog.text
    refused = [record.getMessage() for record in caplog.records if "is not served" in record.getMessage()]
    assert refused
    assert all("cannot be brought to the device; the log has the traceback." in each for each in refused)
