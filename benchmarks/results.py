"""Where the figures of the benchmarks go."""

import json
from pathlib import Path
from typing import Any


def write_results(path: Path, record: dict[str, Any] | list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
