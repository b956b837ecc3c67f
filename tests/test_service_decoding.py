"""Decoding in worker processes: what they answer, and what becomes of the service when they die."""

import asyncio
import os
import signal
import struct
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.config import ModelConfig
from models.errors import ImageCorruptError, ImageError, ImageTooLargeError, ImageUnreadableError
from models.images import decode_image, image_tensor
from service import decode_worker, decoding
from service.decode_worker import Job
from service.decoding import Decoder
from service.telemetry import Telemetry
from tests.conftest import png, until

CONFIG = ModelConfig(image_size=32, channels=3, width=8, latent="grid", latent_dim=4, head_width=8)


def run(test: Callable[[Decoder, Telemetry], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def whole() -> None:
        telemetry = Telemetry()
        decoder = await Decoder(**{"max_pixels": 10_000, "workers": 1, **options}, telemetry=telemetry).start()
        try:
            await asyncio.wait_for(test(decoder, telemetry), 60)
        finally:
            await decoder.close()

    asyncio.run(whole())


def pids(decoder: Decoder) -> list[int]:
    return [worker._process.pid for worker in decoder._workers if worker._process and worker._process.pid]


def lost(telemetry: Telemetry, reason: str) -> float:
    return telemetry.registry.get_sample_value("hazelnut_decoders_lost_total", {"reason": reason}) or 0.0


def busy(decoder: Decoder) -> bool:
    """An image has been taken from the queue."""
    return decoder._telemetry.registry.get_sample_value("hazelnut_stage_seconds_count", {"stage": "wait"}) == 1


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_pixels_are_those_of_the_library():
    async def test(decoder: Decoder, _: Telemetry) -> None:
        for seed, channels in ((0, 3), (1, 1)):
            data = png(size=(50, 37), seed=seed)
            config = ModelConfig(image_size=32, channels=channels, width=8, latent="grid", latent_dim=4, head_width=8)
            found = await decoder.decode(data, config)
            expected = image_tensor(decode_image(data), channels=channels, size=32)
            np.testing.assert_array_equal(found.pixels, expected)
            assert (found.width, found.height) == (50, 37)

    run(test)


def test_picture_is_the_image_at_the_size_asked_for():
    async def test(decoder: Decoder, _: Telemetry) -> None:
        data = png(size=(50, 37))
        for size in ((50, 37), (25, 18)):
            picture = await decoder.picture(data, width=size[0], height=size[1])
            np.testing.assert_array_equal(np.asarray(picture), np.asarray(decode_image(data).resize(size)))

    run(test)


def test_an_image_that_cannot_be_read_is_the_librarys_error():
    async def test(decoder: Decoder, telemetry: Telemetry) -> None:
        (before,) = pids(decoder)
        with pytest.raises(ImageTooLargeError, match="10000"):
            await decoder.decode(png(size=(101, 100)), CONFIG)
        broken = bytearray(png())
        broken[len(broken) // 2] ^= 1
        with pytest.raises(ImageCorruptError):
            await decoder.decode(bytes(broken), CONFIG)
        assert pids(decoder) == [before]
        assert lost(telemetry, "died") == 0

    run(test)


def test_a_worker_that_died_is_replaced_and_its_image_is_decoded():
    async def test(decoder: Decoder, telemetry: Telemetry) -> None:
        (before,) = pids(decoder)
        kill(before)
        found = await decoder.decode(png(), CONFIG)
        assert (found.width, found.height) == (40, 30)
        (after,) = pids(decoder)
        assert after != before
        assert lost(telemetry, "died") == 1

    run(test)


def test_workers_killed_at_random_fail_only_images_that_are_hit_twice():
    async def test(decoder: Decoder, telemetry: Telemetry) -> None:
        async def killer() -> None:
            for _ in range(6):
                await asyncio.sleep(0.1)
                with suppress(ProcessLookupError):  # it is being replaced
                    kill(pids(decoder)[0])

        expected = image_tensor(decode_image(png(size=(90, 90))), channels=3, size=32)
        killing = asyncio.ensure_future(killer())
        failed = decoded = 0
        while not killing.done():
            decodings = (decoder.decode(png(size=(90, 90)), CONFIG) for _ in range(8))
            for found in await asyncio.gather(*decodings, return_exceptions=True):
                if isinstance(found, ImageUnreadableError):
                    failed += 1
                else:
                    assert not isinstance(found, BaseException)
                    np.testing.assert_array_equal(found.pixels, expected)
                    decoded += 1
        await killing
        assert decoded > failed
        assert lost(telemetry, "died") >= max(2, decoding.TRIES * failed)

    run(test, workers=2)


def test_an_image_that_kills_every_worker_fails_alone(monkeypatch):
    async def test(decoder: Decoder, telemetry: Telemetry) -> None:
        killed: list[int] = []

        async def killer() -> None:
            """As soon as there is another worker, it dies."""
            for _ in range(decoding.TRIES):
                await until(lambda: pids(decoder) not in ([], killed))
                killed[:] = pids(decoder)
                kill(killed[0])

        os.kill(pids(decoder)[0], signal.SIGSTOP)  # holds the job until it dies
        monkeypatch.setattr(decoding._Worker, "start", stopped(decoding._Worker.start))
        killing = asyncio.ensure_future(killer())
        with pytest.raises(ImageUnreadableError, match="crash"):
            await decoder.decode(png(), CONFIG)
        monkeypatch.undo()
        await killing
        assert lost(telemetry, "died") == decoding.TRIES
        await decoder.decode(png(), CONFIG)

    run(test)


def stopped(start: Callable[..., Any]) -> Callable[..., Any]:
    """A worker that is frozen once it has started, so that it dies with its image."""

    async def wrapped(worker: Any) -> Any:
        fresh = worker._streams is None
        streams = await start(worker)
        if fresh:
            os.kill(worker._process.pid, signal.SIGSTOP)
        return streams

    return wrapped


def test_an_image_that_takes_too_long_is_given_up(monkeypatch):
    async def test(decoder: Decoder, telemetry: Telemetry) -> None:
        (before,) = pids(decoder)
        monkeypatch.setattr(decoding, "DECODE_SECONDS", 0.2)
        os.kill(before, signal.SIGSTOP)
        with pytest.raises(ImageUnreadableError, match=r"longer than 0\.2 s"):
            await decoder.decode(png(), CONFIG)
        assert lost(telemetry, "slow") == 1
        monkeypatch.setattr(decoding, "DECODE_SECONDS", 30)
        await decoder.decode(png(), CONFIG)
        assert before not in pids(decoder)

    run(test)


def test_an_image_whose_caller_left_is_not_decoded():
    async def test(decoder: Decoder, telemetry: Telemetry) -> None:
        os.kill(pids(decoder)[0], signal.SIGSTOP)
        first = asyncio.ensure_future(decoder.decode(png(), CONFIG))
        await until(lambda: busy(decoder))
        second = asyncio.ensure_future(decoder.decode(png(seed=1), CONFIG))
        await asyncio.sleep(0.01)
        second.cancel()
        os.kill(pids(decoder)[0], signal.SIGCONT)
        await first
        await decoder.decode(png(seed=2), CONFIG)
        assert telemetry.registry.get_sample_value("hazelnut_stage_seconds_count", {"stage": "decode"}) == 2

    run(test)


def test_memory_of_a_worker_is_bounded():
    """A picture of a gigabyte fails in the worker, and the worker lives."""

    async def test(decoder: Decoder, _: Telemetry) -> None:
        (before,) = pids(decoder)
        with pytest.raises(ImageUnreadableError, match="memory"):
            await decoder.picture(png(), width=20_000, height=20_000)
        await decoder.decode(png(), CONFIG)
        assert pids(decoder) == [before]

    run(test)


def test_workers_have_a_name_and_no_voice():
    async def test(decoder: Decoder, _: Telemetry) -> None:
        await decoder.decode(png(), CONFIG)
        for pid in pids(decoder):
            assert Path(f"/proc/{pid}/comm").read_text().strip() == decode_worker.NAME
            assert Path(f"/proc/{pid}/fd/2").readlink() == Path(os.devnull)

    run(test, workers=2)


def test_who_waits_when_the_decoder_is_closed_is_cancelled():
    async def test(decoder: Decoder, _: Telemetry) -> None:
        os.kill(pids(decoder)[0], signal.SIGSTOP)
        waiting = [asyncio.ensure_future(decoder.decode(png(), CONFIG)) for _ in range(3)]
        await until(lambda: busy(decoder))
        await decoder.close()
        await asyncio.wait(waiting, timeout=20)
        assert all(each.cancelled() for each in waiting)

    run(test)


def test_a_worker_that_answers_nonsense_is_replaced():
    async def test(decoder: Decoder, telemetry: Telemetry) -> None:
        (before,) = pids(decoder)
        streams = decoder._workers[0]._streams
        assert streams
        streams[0].feed_data(struct.pack("!I", 4) + b"what")  # before the process has been asked anything
        assert (await decoder.decode(png(), CONFIG)).width == 40
        assert pids(decoder) != [before]
        assert lost(telemetry, "died") == 1

    run(test)


def test_workers_are_gone_when_the_decoder_is_closed():
    seen: list[int] = []

    async def test(decoder: Decoder, _: Telemetry) -> None:
        seen.extend(pids(decoder))

    run(test, workers=2)
    assert len(seen) == 2
    end = time.monotonic() + 20
    while alive := [pid for pid in seen if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < end, alive
        time.sleep(0.01)


def test_a_fault_of_ours_is_none_of_the_images(monkeypatch):
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("a slip of ours")

    monkeypatch.setattr(decode_worker, "decode_image", broken)
    head, pixels = decode_worker._answer(Job(png(), 100, channels=3, width=8, height=8))
    assert pixels is None
    assert "a slip of ours" in str(head["fault"])


def test_every_image_error_has_its_way_back():
    kinds: list[type[ImageError]] = [ImageError, *ImageError.__subclasses__()]
    assert set(decoding.KINDS) == {kind.code for kind in kinds}


def test_a_long_message_of_a_file_fits_the_way_back():
    """TIFF tags are repeated in messages; whatever they say, the answer is an ImageError."""

    async def test(decoder: Decoder, _: Telemetry) -> None:
        entries = struct.pack("<HHII", 256, 3, 1, 8) + struct.pack("<HHII", 259, 3, 1, 65000)
        data = b"II*\x00" + struct.pack("<I", 8) + struct.pack("<H", 2) + entries + bytes(4)
        with pytest.raises(ImageError):
            await decoder.decode(data, CONFIG)

    run(test)
