"""BentoML: its adaptive batches. Files come as paths, for that is how it hands over bytes that it shall not decode."""

from pathlib import Path
from typing import Any

import bentoml  # type: ignore[import-not-found]
import torch

from benchmarks.peers.common import LARGEST_BATCH, WORKERS, load_scorer, pixels, results


@bentoml.service(workers=WORKERS)
class Peer:
    def __init__(self) -> None:
        self.scorer = load_scorer()

    @bentoml.api(batchable=True, max_batch_size=LARGEST_BATCH)  # type: ignore[untyped-decorator]
    def score(self, files: list[Path]) -> list[dict[str, Any]]:
        batch = torch.stack([pixels(file.read_bytes(), self.scorer.config) for file in files])
        return results(self.scorer.score(batch))
