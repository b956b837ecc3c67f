"""What watches the service: its queries name what /metrics really has, and every alert is tested and explained."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from promql_parser import AggModifierType, AggregateExpr, Expr, MatchOp, VectorSelector

ROOT = Path(__file__).parents[1]
PROMETHEUS, GRAFANA = ROOT / "deploy/prometheus", ROOT / "deploy/grafana"
PROMTOOL = shutil.which("promtool") or ROOT / ".promtool/usr/bin/promtool"  # `make test` gets it where it can

OF_PROMETHEUS = {"up", "ALERTS"}
LABELS_OF_PROMETHEUS = {"job", "instance"}


def loaded(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


CONFIG = loaded(PROMETHEUS / "prometheus.yml")
RULES = [
    rule for name in CONFIG["rule_files"] for group in loaded(PROMETHEUS / name)["groups"] for rule in group["rules"]
]
RECORDED = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
TESTS = loaded(PROMETHEUS / "tests.yml")["tests"]
DASHBOARD = json.loads((GRAFANA / "dashboards/hazelnut.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [(panel["title"], target) for panel in PANELS for target in panel["targets"]]
QUERIES = {
    **RECORDED,
    **{name: rule["expr"] for name, rule in ALERTS.items()},
    **{f"{title}, {target['refId']}": target["expr"].replace("$__rate_interval", "5m") for title, target in TARGETS},
}


@pytest.fixture
def fresh(client) -> list[tuple[str, dict[str, str]]]:
    """The series of a service that nobody has asked anything yet."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return [(sample.name, sample.labels) for family in families for sample in family.samples]


def nodes(query: str) -> list[Expr]:
    """Raises ValueError for a query that cannot be parsed."""
    found: list[Expr] = []
    promql_parser.walk(promql_parser.parse(query), found.append)
    return found


def selectors(query: str) -> Iterator[tuple[str, dict[str, tuple[MatchOp, str]]]]:
    for node in nodes(query):
        if isinstance(node, VectorSelector):
            assert node.name is not None
            yield node.name, {each.name: (each.op, each.value) for each in node.matchers.matchers}


def fits(labels: dict[str, str], name: str, op: MatchOp, value: str) -> bool:
    """Whether the series has such a label at all, and the label is what the matcher asks for."""
    if name not in labels:
        return False
    if op in (MatchOp.Equal, MatchOp.NotEqual):
        return (labels[name] == value) is (op == MatchOp.Equal)
    return (re.fullmatch(value, labels[name]) is not None) is (op == MatchOp.Re)


def test_every_query_finds_series_of_a_fresh_service(fresh):
    jobs = {job["job_name"] for job in CONFIG["scrape_configs"]}
    for title, query in QUERIES.items():
        for name, matchers in selectors(query):
            if "job" in matchers:
                assert matchers.pop("job")[1] in jobs, title
            if name in OF_PROMETHEUS or (name in RECORDED and not matchers):
                continue
            of_this_name = [labels for found, labels in fresh if found == name]
            assert of_this_name, f"{title}: {name} is no metric of the service, and no recording rule"
            fitting = [labels for labels in of_this_name if all(fits(labels, key, *matchers[key]) for key in matchers)]
            assert fitting, f"{title}: no series of {name} has {matchers}"


def test_every_query_groups_by_labels_that_there_are(fresh):
    for title, query in QUERIES.items():
        for node in nodes(query):
            if isinstance(node, AggregateExpr) and node.modifier is not None:
                assert node.modifier.type == AggModifierType.By
                names = {name for name, _ in selectors(node.expr.prettify())}
                labels = {key for name, labels in fresh if name in names for key in labels}
                assert set(node.modifier.labels) <= labels | LABELS_OF_PROMETHEUS, title


def test_a_query_with_a_misspelt_name_or_label_would_be_noticed(fresh):
    names = {name for name, _ in fresh}
    assert [name for name, _ in selectors("sum(rate(hazelnut_request_total[5m]))") if name not in names]
    assert not fits({"route": "/score"}, "rout", MatchOp.NotEqual, "/models")
    assert not fits({"route": "/score"}, "route", MatchOp.Re, "/scor")
    with pytest.raises(ValueError, match="parenthesis"):
        nodes("sum(rate(hazelnut_requests_total[5m])")


@pytest.mark.parametrize("name", ALERTS)
def test_alert_says_what_and_how_much_and_where_to_read_on(name):
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in {"critical", "warning"}
    summary, runbook = alert["annotations"]["summary"], alert["annotations"]["runbook"]
    assert "$labels." in summary
    assert "$value" in summary
    path, _, anchor = runbook.partition("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), flags=re.MULTILINE)
    assert anchor == name.lower()
    assert name in headings


@pytest.mark.parametrize("name", ALERTS)
def test_alert_has_a_test_where_it_fires_and_one_where_it_does_not(name):
    cases = [case for test in TESTS for case in test.get("alert_rule_test", []) if case["alertname"] == name]
    assert {bool(case["exp_alerts"]) for case in cases} == {True, False}


def test_every_recording_rule_has_a_test_and_a_use():
    used = {name for query in QUERIES.values() for name, _ in selectors(query)}
    assert set(RECORDED) <= used
    tested = {
        name for test in TESTS for case in test.get("promql_expr_test", []) for name, _ in selectors(case["expr"])
    }
    assert tested == set(RECORDED)


@pytest.mark.parametrize(
    "command", [["check", "config", "prometheus.yml"], ["test", "rules", "tests.yml"]], ids=" ".join
)
def test_promtool_passes(command):
    if not Path(PROMTOOL).exists():
        pytest.skip("promtool is not on this machine: Prometheus's own tests of the alerts were not run")
    done = subprocess.run(
        [PROMTOOL, *command], cwd=PROMETHEUS, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_scrapes_the_service_of_docker_compose():
    services = loaded(ROOT / "docker-compose.yml")["services"]
    (job,) = [job for job in CONFIG["scrape_configs"] if job["job_name"] == "hazelnut"]
    ((target,),) = [config["targets"] for config in job["static_configs"]]
    host, _, port = target.partition(":")
    assert str(services[host]["environment"]["HAZELNUT_PORT"]) == port == "8000"
    (source,) = loaded(GRAFANA / "provisioning/datasources/prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services


def test_dashboard_is_provisioned_with_its_data_source():
    (source,) = loaded(GRAFANA / "provisioning/datasources/prometheus.yml")["datasources"]
    asked = [panel["datasource"] for panel in PANELS] + [target["datasource"] for _, target in TARGETS]
    assert all(each == {"type": "prometheus", "uid": source["uid"]} for each in asked)
    (provider,) = loaded(GRAFANA / "provisioning/dashboards/hazelnut.yml")["providers"]
    mounts = [mount.split(":")[:2] for mount in loaded(ROOT / "docker-compose.yml")["services"]["grafana"]["volumes"]]
    assert ["./deploy/grafana/dashboards", provider["options"]["path"]] in mounts
    assert ["./deploy/grafana/provisioning", "/etc/grafana/provisioning"] in mounts


def test_dashboard_begins_with_health_and_every_panel_has_its_unit_and_place():
    everything = DASHBOARD["panels"]
    assert (everything[0]["type"], everything[0]["title"]) == ("row", "Health")
    assert all(panel["fieldConfig"]["defaults"]["unit"] for panel in PANELS)
    assert len({panel["id"] for panel in everything}) == len(everything)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    for one, other in combinations([panel["gridPos"] for panel in everything], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above


def test_dashboard_shows_labels_that_there_are(fresh):
    labels = {key for _, labels in fresh for key in labels} | LABELS_OF_PROMETHEUS
    for title, target in TARGETS:
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels, title
