"""The app that a user would write first: each request is decoded and scored in FastAPI's own threads, no batches."""

from typing import Any

import uvicorn
from fastapi import FastAPI, UploadFile

from benchmarks.peers.common import HOST, PORT, WORKERS, load_scorer, pixels, results

app = FastAPI()
scorer = load_scorer()


@app.post("/score")
def score(files: UploadFile) -> dict[str, Any]:
    image = pixels(files.file.read(), scorer.config)
    return {"results": results(scorer.score(image.unsqueeze(0)))}


if __name__ == "__main__":
    # By name: uvicorn cannot start several workers of an object.
    uvicorn.run("benchmarks.peers.plain_fastapi:app", host=HOST, port=PORT, workers=WORKERS)
