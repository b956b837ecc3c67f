"""The images and the composition, as far as they can be held to without a container engine. `make check` lints them."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from service.app import CLOSE_SECONDS
from service.found import NAME
from service.server import GRACE_SECONDS
from service.settings import PREFIX, Settings

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
PUBLISHED = [name for name, service in SERVICES.items() if "ports" in service]
VARIABLE = re.compile(r"\$\{([A-Z_]+)(?::-([^}]*))?\}")


def stage(name: str) -> list[str]:
    """The instructions that end up in an image: the stage's own and those of the stages that it starts from."""
    stages = {}
    for text in re.split(r"^(?=FROM )", DOCKERFILE.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
        first, *rest = [line for line in text.splitlines() if line and not line.startswith("#")]
        _, image, _, own_name = first.split()
        stages[own_name] = (image.replace("${TORCH:-cuda}", "cuda"), rest)
    image, lines = stages[name]
    while image in stages:
        image, above = stages[image]
        lines = above + lines
    return lines


def default(text: str) -> str:
    """What compose makes of it where no variable is set."""
    return VARIABLE.sub(lambda match: match[2] or "", str(text))


def test_the_service_is_the_image_that_is_built_by_default():
    assert re.findall(r"^FROM \S+ AS (\S+)", DOCKERFILE, flags=re.MULTILINE)[-1] == "service"


def test_the_services_image_has_no_training_code():
    copied = [line for line in stage("service") if line.startswith(("COPY", "ADD"))]
    assert [line for line in copied if "training" in line] == []
    assert "COPY --from=code /app /app" in copied
    assert "mv /app/training /training" in stage("code")[-1]
    assert any("training" in line for line in stage("train"))


@pytest.mark.parametrize("name", ["service", "train"])
def test_an_image_runs_as_a_user_that_is_not_root(name):
    users = [line.split()[1] for line in stage(name) if line.startswith("USER")]
    assert int(users[-1]) > 0
    assert any(f"useradd --uid {users[-1]} " in line for line in stage(name))


def test_the_services_image_starts_without_a_shell_and_asks_for_its_health():
    last = {line.split()[0]: line for line in stage("service")}
    for instruction in ("ENTRYPOINT", "CMD"):
        assert last[instruction].split(maxsplit=1)[1].startswith('["')
    assert ' CMD ["python", ' in last["HEALTHCHECK"]
    assert "/health/ready" in last["HEALTHCHECK"]


def test_packages_of_the_default_image_must_have_hashes():
    installed = [line for line in stage("service") if "uv pip install" in line]
    assert len(installed) == 1
    assert "--require-hashes" in installed[0]


def test_the_label_has_the_version_of_the_project():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f'org.opencontainers.image.version="{version}"' in DOCKERFILE


def test_the_image_seeds_its_volume_with_the_demo_under_a_name_that_is_served():
    (seeded,) = [line.split()[-1] for line in stage("service") if "checkpoints/demo" in line]
    _, root, product, version = seeded.split("/")
    assert (f"/{root}", version) == (SERVICES["hazelnut"]["environment"]["HAZELNUT_CHECKPOINT"], "1")
    assert NAME.fullmatch(product)


def test_ports_are_published_on_the_loopback_alone():
    assert PUBLISHED == ["hazelnut", "prometheus", "grafana"]
    for name in PUBLISHED:
        for port in SERVICES[name]["ports"]:
            assert default(port).startswith("127.0.0.1:"), (name, port)


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_can_do_no_more_than_it_needs(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "user", "cap_add", "network_mode", "pid"} & service.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_service_is_limited_and_asked_for_its_health(name):
    assert SERVICES[name].keys() >= {"cpus", "mem_limit", "restart"}
    assert name == "hazelnut" or SERVICES[name]["healthcheck"]["test"][0] == "CMD"  # the service's is in its image


def test_the_service_decodes_and_scores_on_the_cores_that_it_may_use():
    service = SERVICES["hazelnut"]
    for name in ("PYTHON_CPU_COUNT", "OMP_NUM_THREADS"):
        assert service["environment"][name] == service["cpus"] == "${CPUS:-2}"


def test_a_stopped_service_has_the_time_to_drain():
    grace = SERVICES["hazelnut"]["stop_grace_period"].removesuffix("s")
    assert int(grace) > Settings().drain_seconds + GRACE_SECONDS + CLOSE_SECONDS


def test_what_a_documented_command_removes_can_be_written_there():
    commands = re.findall(r"--entrypoint rm (\w+) -r (/\w+)/", (ROOT / "docs/operations.md").read_text())
    assert len(commands) == 2
    for name, folder in commands:
        assert any(mount.endswith(f":{folder}") for mount in SERVICES[name]["volumes"]), (name, folder)


def test_published_images_are_pinned_by_a_whole_version():
    images = [service["image"] for service in SERVICES.values() if "build" not in service]
    assert len(images) == 2
    for image in images:
        assert re.fullmatch(r"\S+:v?\d+\.\d+\.\d+", image)


def test_the_environment_of_the_service_is_made_of_settings():
    names = {PREFIX + field.upper() for field in Settings.model_fields}
    given = {name for name in SERVICES["hazelnut"]["environment"] if name.startswith(PREFIX)}
    assert given <= names
    assert set(re.findall(rf"{PREFIX}[A-Z_]+", DOCKERFILE)) <= names


def test_env_example_has_every_setting_and_variable_with_its_default():
    example = dict(re.findall(r"^#([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), flags=re.MULTILINE))
    expected = {
        PREFIX + name.upper(): "" if field.default is None else str(field.default).replace("False", "false")
        for name, field in Settings.model_fields.items()
    }
    expected[f"{PREFIX}CHECKPOINT"] = "checkpoints/demo"
    for name, value in VARIABLE.findall((ROOT / "docker-compose.yml").read_text()):
        assert expected.setdefault(name, value) == value
    assert example == expected


def test_env_example_says_what_each_setting_means():
    text = " ".join((ROOT / ".env.example").read_text().replace("\n# ", " ").split())
    assert [name for name, field in Settings.model_fields.items() if str(field.description) not in text] == []


def test_the_build_gets_no_more_than_it_copies():
    """What is not listed in .dockerignore stays out: data, runs, .git, .env and whatever lies about."""
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert next(line for line in ignore if not line.startswith("#")) == "*"
    sources = re.findall(r"--mount=source=(\S+?),", DOCKERFILE)
    for line in DOCKERFILE.splitlines():
        if line.startswith("COPY") and "--from" not in line:
            sources += [word for word in line.split()[1:-1] if not word.startswith("--")]
    for source in sources:
        assert any(source == kept or source.startswith(kept + "/") for kept in (line[1:] for line in ignore)), source
        assert (ROOT / source).exists()
