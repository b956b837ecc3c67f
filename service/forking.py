"""The process from which the others are forked. It imports torch once, for all of them and their successors."""

import multiprocessing
import signal
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running


def forking_context() -> ForkServerContext:
    """Its processes come from one without threads, into which this one's memory and files have not leaked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["service.decode_worker", "service.device_worker"])
    return context


def begin_forking() -> None:
    """Let it import torch while this process does so too: that takes seconds, and `service.decoding` waits for it.

    From here on this process ignores SIGHUP until its server listens to it, and those that are forked do for good: a
    terminal that closes tells every one of them.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    forking_context()
    ensure_running()
