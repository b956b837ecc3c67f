"""What only the service's real processes show."""

import io
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
from PIL import Image

from benchmarks.running import Running, running
from benchmarks.traffic import PNG, Client, picture, request_bytes

KEPT_MIB = 100


def status_of(service: Running, target: str, image: bytes) -> int:
    client = Client(service.port)
    with closing(client.connection):
        return client.send("POST", target, image, PNG).status


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    """With one place."""
    with running(max_files=1, max_waiting=1, device="cpu") as service:
        yield service
    assert not service.problems


def test_an_image_without_a_place_is_refused_before_its_body_is_sent(service: Running) -> None:
    file = io.BytesIO()
    Image.new("RGB", (6000, 6000)).save(file, "PNG")  # takes long to decode
    statuses: list[int] = []
    other = threading.Thread(target=lambda: statuses.append(status_of(service, "/score", file.getvalue())))
    other.start()
    head = request_bytes("/score", b"", length=100)
    refusal = b""
    while not refusal and other.is_alive():
        with socket.create_connection(("127.0.0.1", service.port), timeout=0.05) as client:
            client.sendall(head)
            try:
                refusal = client.recv(2**16)
            except TimeoutError:
                continue  # the place was not taken yet, or is free again: the service waits for the body
    assert refusal.startswith(b"HTTP/1.1 503 "), "the one place was taken, and nothing was refused"
    other.join()
    assert statuses == [200]


def test_sighup_ends_none_of_its_processes(service: Running) -> None:
    """A terminal that closes sends it to all of them."""
    before = service.pids()
    for pid in before:
        os.kill(pid, signal.SIGHUP)
    assert status_of(service, "/score", picture(0)) == 200
    assert service.pids() == before


def test_the_memory_of_large_maps_is_given_back(service: Running) -> None:
    own = f" {service.process.pid}"

    def memory_mib() -> float:
        return next(mib for name, mib in service.memory_of_processes().items() if name.endswith(own))

    status_of(service, "/score?map=overlay", picture(0))
    before = memory_mib()
    for side in (1200, 2000, 2400):
        photograph = picture(0, side=side, format_name="JPEG")
        for kind in ("float32", "overlay"):
            assert status_of(service, f"/score?map={kind}", photograph) == 200
    assert memory_mib() < before + KEPT_MIB
