"""The batcher: every image gets its own answer once, whoever leaves, whatever fails, however much waits."""

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from torch import Tensor

from models.errors import ImageFailedError
from models.scoring import Scores
from service.batching import LARGEST_BATCH, Batcher, BusyError, Scored
from service.decode_worker import Pixels
from service.telemetry import Telemetry
from tests.conftest import until

POISON = 13


def image(number: int) -> Pixels:
    """An image that can be told from others."""
    return np.full((1, 2, 2), number, dtype=np.uint8)


class Device:
    """Scores an image by its number, and fails on the poisoned one. Keeps what it was asked."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Semaphore(0)
        self.gated = False

    def begin(self, pixels: Tensor) -> Future[Scores]:
        scored: Future[Scores] = Future()
        scored.set_result(self.score(pixels))
        return scored

    def score(self, pixels: Tensor) -> Scores:
        numbers = pixels[:, 0, 0, 0].tolist()
        self.batches.append(numbers)
        if self.gated:
            assert self.gate.acquire(timeout=30)
        if POISON in numbers:
            raise RuntimeError("poison")
        scores = np.array(numbers, dtype=float)
        return Scores(
            scores=np.stack([scores] * 3, axis=1),
            anomaly_score=scores,
            p_value=scores / 256,
            maps=np.zeros((len(numbers), 2, 2), dtype=np.float32),
        )


def number_of(scored: Scored) -> int:
    return int(scored.batch.anomaly_score[scored.index])


def run(test: Callable[[Batcher, Device], Coroutine[Any, Any, None]], *, gated: bool = False, **limits: int) -> None:
    async def whole() -> None:
        device = Device()
        device.gated = gated
        batcher = Batcher(**{"max_images": 99, "max_bytes": 999, **limits}, telemetry=Telemetry())
        try:
            await asyncio.wait_for(test(batcher, device), 30)
        finally:
            device.gate.release(1000)
            batcher.close()

    asyncio.run(whole())


def test_a_lone_image_is_scored_at_once_and_alone():
    async def test(batcher: Batcher, device: Device) -> None:
        assert number_of(await batcher.score(device, image(7))) == 7
        assert device.batches == [[7]]

    run(test)


def test_images_that_wait_share_a_batch_up_to_the_largest():
    async def test(batcher: Batcher, device: Device) -> None:
        first = asyncio.ensure_future(batcher.score(device, image(99)))
        await until(lambda: device.batches)
        crowd = [asyncio.ensure_future(batcher.score(device, image(number))) for number in range(14, 14 + 20)]
        await asyncio.sleep(0)
        device.gate.release(3)
        assert [number_of(scored) for scored in await asyncio.gather(first, *crowd)] == [99, *range(14, 34)]
        assert device.batches == [[99], list(range(14, 30)), list(range(30, 34))]
        assert len(device.batches[1]) == LARGEST_BATCH

    run(test, gated=True)


def test_the_loop_takes_what_comes_in_between_two_answers_of_a_batch():
    async def test(batcher: Batcher, device: Device) -> None:
        loop = asyncio.get_running_loop()
        first = asyncio.ensure_future(batcher.score(device, image(99)))
        await until(lambda: device.batches)
        order: list[str] = []

        async def answered(number: int) -> None:
            await batcher.score(device, image(number))
            order.append("answer")
            loop.call_soon(order.append, "another")  # of what the loop looks at next

        crowd = [asyncio.ensure_future(answered(number)) for number in range(4)]
        await asyncio.sleep(0)
        device.gate.release(2)
        await asyncio.gather(first, *crowd)
        await asyncio.sleep(0)
        assert order == ["answer", "another"] * 4

    run(test, gated=True)


def test_an_image_whose_caller_left_is_never_scored():
    async def test(batcher: Batcher, device: Device) -> None:
        first = asyncio.ensure_future(batcher.score(device, image(99)))
        await until(lambda: device.batches)
        leaving, staying = (asyncio.ensure_future(batcher.score(device, image(number))) for number in (1, 2))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.sleep(0)
        device.gate.release(2)
        assert [number_of(scored) for scored in await asyncio.gather(first, staying)] == [99, 2]
        assert device.batches == [[99], [2]]
        assert leaving.cancelled()

    run(test, gated=True)


def test_an_image_whose_caller_left_takes_no_memory_while_the_device_hangs():
    async def test(batcher: Batcher, device: Device) -> None:
        first = asyncio.ensure_future(batcher.score(device, image(99)))
        await until(lambda: device.batches)
        pixels = image(1)
        kept = weakref.ref(pixels)
        leaving = asyncio.ensure_future(batcher.score(device, pixels))
        del pixels
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
        del leaving
        assert kept() is None
        device.gate.release()
        await first

    run(test, gated=True)


def test_of_a_batch_that_fails_only_the_image_at_fault_does():
    async def test(batcher: Batcher, device: Device) -> None:
        first = asyncio.ensure_future(batcher.score(device, image(99)))
        await until(lambda: device.batches)
        numbers = [1, 2, POISON, 4, 5]
        waiting = [asyncio.ensure_future(batcher.score(device, image(number))) for number in numbers]
        await asyncio.sleep(0)
        device.gate.release(100)
        await first
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [number_of(one) for one in outcomes if isinstance(one, Scored)] == [1, 2, 4, 5]
        assert isinstance(outcomes[2], ImageFailedError)
        # The thread lives on.
        assert number_of(await batcher.score(device, image(8))) == 8

    run(test, gated=True)


def test_a_device_that_is_out_of_memory_gets_smaller_batches_from_then_on():
    sizes: list[int] = []

    class SmallDevice(Device):
        def score(self, pixels: Tensor) -> Scores:
            sizes.append(len(pixels))
            if len(pixels) > 3:
                raise torch.OutOfMemoryError("no more than three")
            time.sleep(0.01)
            return super().score(pixels)

    async def test() -> None:
        batcher, device = Batcher(max_images=99, max_bytes=999, telemetry=Telemetry()), SmallDevice()
        for _ in range(2):
            answers = await asyncio.gather(*(batcher.score(device, image(number)) for number in range(14, 42)))
            assert [number_of(answer) for answer in answers] == list(range(14, 42))
        batcher.close()

    asyncio.run(test())
    failed = [size for size in sizes if size > 3]
    assert failed
    assert failed == sorted(failed, reverse=True)
    assert len(failed) == len(set(failed)) <= 3  # of 56 images: 16, 8 and 4, each tried once


class Gpu:
    """Computes when it is told to; its results can be waited for. Keeps what it was asked, in order."""

    def __init__(self) -> None:
        self.device = Device()
        self.events: list[str] = []
        self.batches: list[Future[Scores]] = []

    def begin(self, pixels: Tensor) -> "Gpu.Waited":
        self.events.append(f"begin {len(self.batches)}")
        waited = Gpu.Waited(self, len(self.batches), pixels)
        self.batches.append(waited.future)
        return waited

    class Waited:
        def __init__(self, gpu: "Gpu", number: int, pixels: Tensor) -> None:
            self.gpu, self.number, self.pixels = gpu, number, pixels
            self.future: Future[Scores] = Future()

        def done(self) -> bool:
            return self.future.done()

        def result(self) -> Scores:
            self.gpu.events.append(f"result {self.number}")
            self.future.exception(timeout=30)  # only waits
            return self.gpu.device.score(self.pixels)

    def has_begun(self, number: int) -> bool:
        return len(self.batches) > number

    def compute(self, number: int) -> None:
        self.batches[number].set_result(None)  # type: ignore[arg-type]


def test_a_full_batch_is_sent_before_the_last_is_done_and_no_third_is():
    async def test(batcher: Batcher, _: Device) -> None:
        gpu = Gpu()
        first = asyncio.ensure_future(batcher.score(gpu, image(99)))
        await until(lambda: gpu.events == ["begin 0", "result 0"])  # nothing else waits: its thread waits for this one
        crowd = [asyncio.ensure_future(batcher.score(gpu, image(number))) for number in range(20, 20 + 40)]
        await asyncio.sleep(0)
        gpu.compute(0)
        assert number_of(await first) == 99
        await until(lambda: len(gpu.events) == 5)
        assert gpu.events[2:] == ["begin 1", "begin 2", "result 1"]  # 40 images are three batches
        assert not any(one.done() for one in crowd)
        gpu.compute(1)
        await until(lambda: len(gpu.events) == 6)
        assert gpu.events[5:] == ["result 2"]  # what is left gathers
        assert [one.done() for one in crowd] == [True] * 16 + [False] * 24
        gpu.compute(2)
        await until(lambda: len(gpu.events) == 8)
        assert gpu.events[6:] == ["begin 3", "result 3"]
        gpu.compute(3)
        assert [number_of(one) for one in await asyncio.gather(*crowd)] == list(range(20, 60))

    run(test)


def test_the_device_is_never_said_to_be_busy_for_longer_than_there_was_time():
    async def test() -> None:
        begin = time.perf_counter()
        telemetry, gpu = Telemetry(), Gpu()
        batcher = Batcher(max_images=99, max_bytes=999, telemetry=telemetry)
        crowd = [asyncio.ensure_future(batcher.score(gpu, image(number))) for number in range(20, 20 + 32)]
        await until(partial(gpu.has_begun, 1))  # while the device has the first
        for number in range(2):
            await asyncio.sleep(0.1)
            gpu.compute(number)
        await asyncio.gather(*crowd)
        batcher.close()
        busy = telemetry.registry.get_sample_value("hazelnut_stage_seconds_sum", {"stage": "device"})
        assert busy is not None
        assert 0.2 <= busy <= time.perf_counter() - begin

    asyncio.run(test())


def test_of_a_batch_that_fails_on_a_gpu_later_only_the_image_at_fault_does():
    async def test(batcher: Batcher, _: Device) -> None:
        gpu = Gpu()
        first = asyncio.ensure_future(batcher.score(gpu, image(99)))
        await until(lambda: len(gpu.events) == 2)
        crowd = [asyncio.ensure_future(batcher.score(gpu, image(number))) for number in (1, POISON, 3)]
        await asyncio.sleep(0)
        for number in range(5):  # the first, the whole crowd, and each of it by itself
            await until(partial(gpu.has_begun, number))
            gpu.compute(number)
        outcomes = await asyncio.gather(first, *crowd, return_exceptions=True)
        assert [number_of(one) for one in outcomes if isinstance(one, Scored)] == [99, 1, 3]
        assert isinstance(outcomes[2], ImageFailedError)

    run(test)


def test_places_are_bounded_in_images():
    async def test(batcher: Batcher, _: Device) -> None:
        with batcher.places(3, 10):
            refused = "3 of 4 places for waiting images are taken: 2 more do not fit"
            with pytest.raises(BusyError, match=refused) as raised, batcher.places(2, 10):
                pass
            assert raised.value.headers == {"Retry-After": "1"}
            with batcher.places(1, 10):
                pass
        with batcher.places(4, 10):
            pass

    run(test, max_images=4)


def test_who_is_refused_is_told_to_wait_as_long_as_requests_have_taken_lately(monkeypatch):
    seconds = iter(range(0, 1000, 7))  # each request takes seven
    monkeypatch.setattr("service.batching.time", SimpleNamespace(perf_counter=lambda: next(seconds)))

    async def test(batcher: Batcher, _: Device) -> None:
        for _request in range(50):
            with batcher.places(1, 10):
                pass
        refusal = batcher.refusal(5, 10)
        assert refusal is not None
        assert refusal.headers == {"Retry-After": "7"}

    run(test, max_images=4)


def test_places_are_bounded_in_bytes_but_for_one_that_comes_alone():
    async def test(batcher: Batcher, _: Device) -> None:
        with batcher.places(1, 60):
            refused = "have 60 of 100 bytes: 41 more do not fit"
            with pytest.raises(BusyError, match=refused), batcher.places(1, 41):
                pass
            with batcher.places(1, 40):
                pass
        refused = "have 101 of 100 bytes: 1 more do not fit"
        with batcher.places(1, 101), pytest.raises(BusyError, match=refused), batcher.places(1, 1):
            pass

    run(test, max_bytes=100)


def test_places_are_given_back_by_whoever_fails():
    async def test(batcher: Batcher, _: Device) -> None:
        for _attempt in range(5):
            with pytest.raises(RuntimeError, match="left"), batcher.places(2, 50):
                raise RuntimeError("left")
        with batcher.places(2, 50):
            pass

    run(test, max_images=2, max_bytes=50)


def test_a_closed_batcher_first_scores_what_waits():
    async def test(batcher: Batcher, device: Device) -> None:
        waiting = [asyncio.ensure_future(batcher.score(device, image(number))) for number in range(40)]
        await asyncio.sleep(0)
        await asyncio.to_thread(batcher.close)
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert [number_of(one) for one in answers if isinstance(one, Scored)] == [n for n in range(40) if n != POISON]

    run(test)


class Requests(RuleBasedStateMachine):
    """Images come, leave, fail and are scored in any order; each caller who stays gets the answer to its own image."""

    waiting = Bundle("waiting")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.devices = Device(), Device()  # two models: the even and the odd numbers
        self.gate = threading.Semaphore(0)
        for device in self.devices:
            device.gate, device.gated = self.gate, True
        self.answers: dict[int, asyncio.Task[Scored]] = {}
        self.numbers: dict[int, int] = {}
        self.left: set[int] = set()
        self.telemetry = Telemetry()
        self.batcher = self.runner.run(self._batcher())

    async def _batcher(self) -> Batcher:
        return Batcher(max_images=9999, max_bytes=9999, telemetry=self.telemetry)

    def _turn(self, condition: Callable[[], object] = lambda: True) -> None:
        async def turn() -> None:
            await asyncio.sleep(0)
            await until(condition)

        self.runner.run(turn())

    @rule(target=waiting, numbers=st.lists(st.integers(0, 255), min_size=1, max_size=24))
    def images_come(self, numbers: list[int]) -> Any:
        async def come() -> list[int]:
            ids = []
            for number in numbers:
                ids.append(len(self.answers))
                self.numbers[ids[-1]] = number
                self.answers[ids[-1]] = asyncio.ensure_future(
                    self.batcher.score(self.devices[number % 2], image(number))
                )
            await asyncio.sleep(0)
            return ids

        return multiple(*self.runner.run(come()))

    @rule(one=consumes(waiting))
    def a_caller_leaves(self, one: int) -> None:
        if not self.answers[one].done():
            self.left.add(one)
        self.answers[one].cancel()
        self._turn()

    @rule(batches=st.integers(1, 4))
    def the_device_works(self, batches: int) -> None:
        self.gate.release(batches)
        self._turn()

    @invariant()
    def answers_are_right_so_far(self) -> None:
        for one, answer in self.answers.items():
            if answer.done() and not answer.cancelled():
                self._check(one, answer)

    def _check(self, one: int, answer: "asyncio.Task[Scored]") -> None:
        if self.numbers[one] == POISON:
            assert isinstance(answer.exception(), ImageFailedError)
        else:
            assert number_of(answer.result()) == self.numbers[one]

    def teardown(self) -> None:
        with ExitStack() as stack:
            stack.callback(self.runner.close)
            stack.callback(self.batcher.close)
            self.gate.release(100_000)
            self._turn(lambda: all(answer.done() for answer in self.answers.values()))
            for one, answer in self.answers.items():
                assert answer.cancelled() == (one in self.left)
            self.answers_are_right_so_far()
            for parity, device in enumerate(self.devices):
                assert max(map(len, device.batches), default=0) <= LARGEST_BATCH
                assert {number % 2 for batch in device.batches for number in batch} <= {parity}


TestRequests = Requests.TestCase
TestRequests.settings = settings(
    max_examples=30, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
