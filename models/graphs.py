"""Scoring on a GPU that is not kept waiting: by CUDA graphs, with copies beside the computation.

A batch is hundreds of small kernels, and starting one takes the processor longer than running it takes the GPU. A graph
holds them all and is started by one call. It has one shape: there is a graph for each of a few sizes, and a batch is
padded to the next.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from models.scoring import Scorer, Scores

SIZES = (16, 8, 4, 2, 1)
WARMUP = 3  # rounds before recording: libraries choose their kernels and take their memory


class BatchUnderWay:
    """As a Future: `done`, and `result`, which waits."""

    def __init__(self, done: Callable[[], bool], result: Callable[[], Scores]) -> None:
        self.done, self.result = done, result


class GraphedScorer:
    """A Scorer on a GPU, recorded. `begin` belongs to one thread."""

    def __init__(self, scorer: Scorer) -> None:
        """Sizes that there is no memory for are left out; raises torch.OutOfMemoryError if that is all of them."""
        self._scorer = scorer
        self._device = scorer.device
        # One computes a batch while the others bring the next one's pixels and fetch the last one's results.
        self._computing, self._bringing, self._fetching = (
            torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            for _ in range(3)
        )
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, ...]]] = {}
        self._pool = torch.cuda.graph_pool_handle()  # one for all: they never run at the same time
        for size in SIZES:
            try:
                self._graphs[size] = self._recorded(size)
            except torch.OutOfMemoryError:
                if size == SIZES[-1]:
                    raise

    def _recorded(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, ...]]:
        """The graph, the pixels that it reads, and the scores and maps that it writes."""
        config = self._scorer.config
        shape = size, config.channels, config.image_size, config.image_size
        pixels = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        self._computing.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._computing):
            for _ in range(WARMUP):
                self._scorer.compute(pixels)
        graph = torch.cuda.CUDAGraph()
        # thread_local: meanwhile another model may be scoring, in its thread.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._computing, capture_error_mode="thread_local"):
            written = self._scorer.compute(pixels)[:2]
        return graph, pixels, written

    @torch.inference_mode()
    def begin(self, pixels: Tensor) -> BatchUnderWay:
        """Start scoring the host's uint8 (B, C, S, S) without waiting for the GPU.

        Raises torch.OutOfMemoryError for more images than there was memory to record.
        """
        count = len(pixels)
        if count > max(self._graphs):
            raise torch.OutOfMemoryError(f"there is memory for {max(self._graphs)} images at once, not for {count}.")
        graph, read, written = self._graphs[min(size for size in self._graphs if size >= count)]
        with torch.cuda.stream(self._bringing):
            # Only to and from pinned memory a copy runs by itself.
            brought = pixels.pin_memory().to(self._device, non_blocking=True)
        self._computing.wait_stream(self._bringing)
        with torch.cuda.stream(self._computing):
            # Beyond these are images of batches before; no score depends on them, and theirs are not read.
            read[:count].copy_(brought)
            brought.record_stream(self._computing)
            graph.replay()
            results = tuple(part[:count].clone() for part in written)  # the next replay writes over them
        self._fetching.wait_stream(self._computing)
        with torch.cuda.stream(self._fetching):
            scores, maps = (
                torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)
                for part in results
            )
            for part in results:
                part.record_stream(self._fetching)  # else the next batch may be given their memory before it is read
            fetched = torch.cuda.Event()  # type: ignore[no-untyped-call]
            fetched.record()

        def result() -> Scores:
            fetched.synchronize()
            return self._scorer.verdicts(scores, maps)

        return BatchUnderWay(fetched.query, result)
