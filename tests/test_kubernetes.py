"""The manifests: valid for Kubernetes, hardened, and in agreement with the service that they start."""

import re
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.app import CLOSE_SECONDS
from service.decoding import BYTES_PER_PIXEL, MORE_BYTES
from service.server import GRACE_SECONDS
from service.settings import PREFIX, Settings

ROOT = Path(__file__).parents[1]
MANIFESTS = {each["kind"]: each for each in yaml.safe_load_all((ROOT / "deploy/kubernetes/hazelnut.yml").read_text())}
POD = MANIFESTS["Deployment"]["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]
ENVIRONMENT = {variable["name"]: variable["value"] for variable in CONTAINER["env"]}
OLDEST = "1.34"  # which has the preStop sleep for everybody
OPERATIONS = (ROOT / "docs/operations.md").read_text()
SERVICE_BYTES = float(re.findall(r"(\S+) GiB with one of the default recipe", OPERATIONS)[0]) * 2**30


def validated(manifest: dict[str, Any], version: str) -> None:
    """Raises ValidationError. strict: an unknown field is an error too."""
    kubernetes_validate.validate(manifest, version, strict=True)


def size(quantity: str) -> float:
    return float(quantity.removesuffix("Gi")) * 2**30


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifest_is_valid(kind, version):
    validated(MANIFESTS[kind], version)


def test_manifest_with_a_misspelt_field_is_not_valid():
    service = MANIFESTS["Service"]
    with pytest.raises(kubernetes_validate.ValidationError, match="selektor"):
        validated({**service, "spec": {**service["spec"], "selektor": {}}}, OLDEST)


def test_the_pod_runs_without_rights():
    assert POD["spec"]["securityContext"]["runAsNonRoot"] is True
    assert f"useradd --uid {POD['spec']['securityContext']['runAsUser']} " in (ROOT / "Dockerfile").read_text()
    assert POD["spec"]["automountServiceAccountToken"] is False
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_image_is_of_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert CONTAINER["image"] == f"hazelnut:{version}"
    documented = re.findall(r"\bhazelnut:([0-9][0-9.]*[0-9])", OPERATIONS)
    assert set(documented) == {version}


def test_environment_is_what_the_service_knows():
    given = {name.removeprefix(PREFIX).lower(): value for name, value in ENVIRONMENT.items() if name.startswith(PREFIX)}
    assert set(given) <= set(Settings.model_fields)
    settings = Settings(**given)
    assert settings.host == "0.0.0.0"
    assert not settings.behind_loopback
    assert settings.port == CONTAINER["ports"][0]["containerPort"]


def test_the_service_has_keys_from_the_secret():
    (keys,) = [volume["secret"] for volume in POD["spec"]["volumes"] if "secret" in volume]
    (mount,) = [mount for mount in CONTAINER["volumeMounts"] if mount["name"] == "keys"]
    assert Path(ENVIRONMENT["HAZELNUT_API_KEYS"]).parent == Path(mount["mountPath"])
    assert keys["defaultMode"] == 0o440
    assert f"create secret generic {keys['secretName']} --from-file=keys.txt" in OPERATIONS


def test_probes_ask_paths_that_answer(client):
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert client.get(CONTAINER[probe]["httpGet"]["path"]).status_code == 200
        assert CONTAINER[probe]["httpGet"]["port"] == CONTAINER["ports"][0]["name"]
    assert "ready" in CONTAINER["readinessProbe"]["httpGet"]["path"]
    assert "live" in CONTAINER["livenessProbe"]["httpGet"]["path"]


def test_the_pod_is_killed_only_after_its_drain():
    settings = Settings()
    stopping = (
        CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"] + settings.drain_seconds + GRACE_SECONDS + CLOSE_SECONDS
    )
    assert "HAZELNUT_DRAIN_SECONDS" not in ENVIRONMENT
    assert POD["spec"]["terminationGracePeriodSeconds"] > stopping


def test_the_service_decodes_and_scores_on_the_cores_that_it_may_use():
    cores = CONTAINER["resources"]["limits"]["cpu"]
    assert ENVIRONMENT["PYTHON_CPU_COUNT"] == ENVIRONMENT["OMP_NUM_THREADS"] == cores


def test_memory_is_enough_for_every_decoder():
    workers, pixels = int(ENVIRONMENT["PYTHON_CPU_COUNT"]), int(ENVIRONMENT["HAZELNUT_MAX_PIXELS"])
    needed = SERVICE_BYTES + workers * (BYTES_PER_PIXEL * pixels + MORE_BYTES)
    assert size(CONTAINER["resources"]["limits"]["memory"]) >= needed
    assert size(CONTAINER["resources"]["requests"]["memory"]) >= SERVICE_BYTES


def test_the_manifests_mean_the_same_pods():
    labels = POD["metadata"]["labels"]
    assert MANIFESTS["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert MANIFESTS["Service"]["spec"]["selector"] == labels
    assert MANIFESTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert MANIFESTS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    target = MANIFESTS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", MANIFESTS["Deployment"]["metadata"]["name"])


def test_the_autoscaler_looks_at_a_metric_of_the_service(client):
    (metric,) = MANIFESTS["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert f"\n{metric['pods']['metric']['name']} " in client.get("/metrics").text
    budget = MANIFESTS["PodDisruptionBudget"]["spec"]["minAvailable"]
    assert MANIFESTS["HorizontalPodAutoscaler"]["spec"]["minReplicas"] > budget
