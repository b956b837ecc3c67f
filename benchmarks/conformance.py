"""The live service against its own OpenAPI document: every check that Schemathesis has.

    python -m benchmarks.conformance --schemathesis VENV/bin/st [--examples 200]

Schemathesis wants an environment of its own:

    uv venv --python 3.11 VENV
    uv pip install --python VENV --group conformance

It sends what the document allows and what it does not, with the images of tests/golden as files, and compares each
answer with the document. The service has an API key, so that a missing or a wrong one makes a difference. What the
document cannot say is in benchmarks/conformance_hooks.py, with the reason of each.

Prints the tool's own report and a table in Markdown, writes docs/benchmarks/reliability-conformance.json.
"""

import hashlib
import json
import os
import secrets
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.running import report, running

ROOT = Path(__file__).parents[1]


def main(
    schemathesis: Annotated[Path, typer.Option(help="The command st.")] = Path("st"),
    examples: Annotated[int, typer.Option(help="At most so many random requests of each operation.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the requests.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The JSON.")] = None,
) -> None:
    key = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder, running(api_keys=key_file(Path(folder), key)) as service:
        told = Path(folder) / "report.json"
        command = [str(schemathesis), "run", "--checks", "all", "--continue-on-failure"]
        command += ["--max-examples", str(examples), "--seed", str(seed), "--report-json-path", str(told)]
        # Not as a header: one that it has not made itself it takes for a guess that ought to fail.
        (Path(folder) / "schemathesis.toml").write_text(
            f'[auth.openapi]\nHTTPBearer = {{bearer = "{key}"}}\nAPIKeyHeader = {{api_key = "{key}"}}\n'
        )
        environment = os.environ | {"SCHEMATHESIS_HOOKS": "benchmarks.conformance_hooks", "PYTHONPATH": str(ROOT)}
        url = f"http://127.0.0.1:{service.port}/openapi.json"
        status = subprocess.run([*command, url], env=environment, cwd=folder, check=False).returncode
        found = json.loads(told.read_text())
        tracebacks = service.tracebacks()
    record = {
        "examples": examples,
        "seed": seed,
        "schemathesis": found["schemathesis_version"],
        "operations tested": f"{found['operations']['tested']} of {found['operations']['total']}",
        "phases": {name: phase["status"] for name, phase in found["phases"].items()},
        "requests": found["test_cases"]["generated"],
        "failures": [f"{each['code']} {each['title']}: {each['operations']}" for each in found["failures"]],
        "unique failures": found["test_cases"]["unique_failures"],
        "errors": len(found["errors"]),
        "tracebacks in the log": tracebacks,
    }
    bars = {"every check passes": status == 0, "no traceback in the log": tracebacks == 0}
    report("conformance", out, record, bars | service.bars())


def key_file(folder: Path, key: str) -> Path:
    """As `hazelnut key` writes it."""
    path = folder / "keys"
    path.write_text(f"{hashlib.sha256(key.encode()).hexdigest()} conformance\n")
    return path


if __name__ == "__main__":
    typer.run(main)
