"""LitServe: decodes and scores in its worker, in batches. Over multipart, for it takes no raw body (its issue 732)."""

from typing import Any

import litserve  # type: ignore[import-not-found]
from fastapi import Request
from torch import Tensor

from benchmarks.peers.common import DEVICE, HOST, LARGEST_BATCH, PORT, WORKERS, load_scorer, pixels, results

# Seconds that a batch is collected for. Without them, the default, its worker asks for requests without a pause, and
# a core is lost to that.
BATCH_TIMEOUT = 0.002


class Peer(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:  # noqa: ARG002 - the environment says where, to all peers alike
        self.scorer = load_scorer()

    # The annotation makes LitServe hand over the form.
    def decode_request(self, request: Request) -> Tensor:
        return pixels(request["files"].file.read(), self.scorer.config)

    # Tensors are stacked to batches by LitServe itself.
    def predict(self, batch: Tensor) -> list[dict[str, Any]]:
        return results(self.scorer.score(batch))

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return {"results": [output]}


if __name__ == "__main__":
    api = Peer(max_batch_size=LARGEST_BATCH, batch_timeout=BATCH_TIMEOUT, api_path="/score")
    # fast_queue: what LitServe advises for hundreds of requests per second.
    server = litserve.LitServer(
        api, accelerator=DEVICE, devices=1, workers_per_device=WORKERS, timeout=60, fast_queue=True
    )
    server.run(host=HOST, port=PORT, generate_client_file=False)
