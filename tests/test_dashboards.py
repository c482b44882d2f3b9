"""The Grafana dashboard and the Prometheus rules: every name in them is in a daemon's /metrics, and Prometheus agrees."""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from contextlib import suppress

import pytest
from daemons import ROOT, Daemon
from prometheus_client.parser import text_string_to_metric_families

DASHBOARD = json.loads((ROOT / "etc/grafana/llmd.json").read_text())
RULES = ROOT / "etc/prometheus/rules.yml"
_METRIC = re.compile(r"\b(?:llmd_|process_|python_gc_|vllm:)[a-z0-9_]+\b")
_SUFFIXES = ("_bucket", "_count", "_sum", "_total")
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    """A daemon that has answered a request."""
    with Daemon("serve", "demo", cwd=tmp_path_factory.mktemp("daemon")) as running:
        running.ready()
        assert running.complete()[0] == 200
        yield running


@pytest.fixture(scope="module")
def page(daemon):
    """Its /metrics."""
    status, text = daemon.get("/metrics")
    assert status == 200
    return text


def expressions():
    """Every PromQL expression of the dashboard, as the panel sends it."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def queries():
    """The same with the dashboard's variables filled in."""
    for title, expression in expressions():
        filled = expression.replace("$__rate_interval", "1m").replace("$instance", ".*").replace("$model", ".*")
        yield title, filled


def family_name(name):
    """A family's name, as the parser gives it."""
    for suffix in _SUFFIXES:
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


def names_on(page):
    return {name for family in text_string_to_metric_families(page) for name in (family.name, family_name(family.name))}


@pytest.mark.parametrize("where", ["dashboard", "rules"])
def test_every_name_is_on_the_page(where, page):
    text = RULES.read_text() if where == "rules" else "\n".join(expression for _, expression in expressions())
    used, known = set(_METRIC.findall(text)), names_on(page)
    assert len(used) > 10
    assert {name for name in used if name not in known and family_name(name) not in known} == set()


def test_the_dashboard_holds_together():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = set()
    for panel in panels:
        place = panel["gridPos"]
        area = {
            (x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])
        }
        assert not area & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= area
    variables = {entry["name"] for entry in DASHBOARD["templating"]["list"]} | {"__rate_interval"}
    for _, expression in expressions():
        assert set(re.findall(r"\$(\w+)", expression)) <= variables


def promtool(*arguments, code=0, **options):
    run = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60, **options)
    assert run.returncode == code, run.stdout + run.stderr
    return run.stdout + run.stderr


@needs_promtool
def test_promtool_takes_rules_and_configuration():
    assert "SUCCESS" in promtool("check", "rules", RULES)
    assert "SUCCESS" in promtool("check", "config", RULES.parent / "prometheus.yml")


@needs_promtool
def test_promtool_takes_the_metrics(page):
    """vLLM's names break Prometheus' rules for names; ours do not."""
    own = "".join(f"{line}\n" for line in page.splitlines() if not re.match(r"(# (HELP|TYPE) )?vllm:", line))
    assert promtool("check", "metrics", input=own) == ""


RULE_TESTS = """
rule_files: [{rules}]
evaluation_interval: 5s
tests:
  - interval: 5s
    input_series:
      - series: 'llmd_stalled_seconds{{instance="a", model_name="m"}}'
        values: '0 1 6 7'
      - series: 'llmd_stalled_seconds{{instance="idle", model_name="m"}}'
        values: '0 1 0.5 1'
      - series: 'llmd_hang_seconds{{instance="a", model_name="m"}}'
        values: '8+0x4'
      - series: 'llmd_hang_seconds{{instance="idle", model_name="m"}}'
        values: '8+0x4'
    alert_rule_test:
      - eval_time: 5s
        alertname: LlmdHang
        exp_alerts: []
      - eval_time: 10s
        alertname: LlmdHang
        exp_alerts:
          - exp_labels: {{severity: critical, instance: a, model_name: m}}
            exp_annotations:
              summary: m on a stands still
              description: >-
                No sign of life for 6s. The daemon ends itself soon (health.hang_timeout_s).
  - interval: 1m
    input_series:
      - series: 'process_start_time_seconds{{job="llmd", instance="a"}}'
        values: '1000+0x5 1400+0x5 1900+0x10'
      - series: 'llmd_http_requests_total{{instance="a", status="200", route="/v1/completions"}}'
        values: '0+60x20'
      - series: 'llmd_http_requests_total{{instance="a", status="500", route="/v1/completions"}}'
        values: '0+20x20'
      - series: 'llmd_num_waiting_tokens{{instance="a", model_name="m"}}'
        values: '100+600x20'
      - series: 'llmd_num_requests_waiting{{instance="a", model_name="m"}}'
        values: '1+1x20'
      - series: 'llmd_kv_cache_usage_perc{{instance="a", model_name="m"}}'
        values: '0.99+0x20'
      - series: 'llmd_num_preemptions_total{{instance="a", model_name="m"}}'
        values: '0+60x20'
    promql_expr_test:
      - expr: count by (alertname) (ALERTS{{alertstate="firing"}})
        eval_time: 20m
        exp_samples:
          - {{labels: '{{alertname="LlmdErrors"}}', value: 1}}
          - {{labels: '{{alertname="LlmdKVPressure"}}', value: 1}}
          - {{labels: '{{alertname="LlmdQueueGrows"}}', value: 1}}
          - {{labels: '{{alertname="LlmdRestarts"}}', value: 1}}
"""


@needs_promtool
def test_alerts_fire_when_they_should(tmp_path):
    (tmp_path / "rules_test.yml").write_text(RULE_TESTS.format(rules=RULES))
    assert "SUCCESS" in promtool("test", "rules", tmp_path / "rules_test.yml")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def prometheus(daemon, tmp_path_factory):
    """A Prometheus that scrapes the daemon each half second; asks it for a path of its API."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    target = urllib.parse.urlsplit(daemon.url).netloc
    config = (RULES.parent / "prometheus.yml").read_text().replace("127.0.0.1:8001", target)
    config = config.replace("scrape_interval: 5s", "scrape_interval: 500ms").replace("rules.yml", str(RULES))
    (folder / "prometheus.yml").write_text(config.replace("evaluation_interval: 15s", "evaluation_interval: 1s"))
    process = subprocess.Popen(
        [
            "prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}", "--log.level=error",
        ],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def ask(path, **parameters):
        url = f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    try:
        wait_for(lambda: ask("query", query='up{job="llmd"} == 1')["result"], process)
        yield ask
    finally:
        process.terminate()
        process.wait(30)


def wait_for(condition, process, limit_s=30.0):
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        assert process.poll() is None, "prometheus ended"
        with suppress(OSError):  # it is not listening yet
            if found := condition():
                return found
        time.sleep(0.2)
    raise AssertionError("it did not happen in time")


def test_a_real_prometheus_scrapes_a_daemon(prometheus):
    (target,) = prometheus("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    (state,) = prometheus("query", query="llmd_state == 1")["result"]
    assert state["metric"]["state"] == "ready"
    (twin,) = prometheus("query", query='{__name__="vllm:request_success_total"}')["result"]
    assert twin["metric"]["finished_reason"] == "length"
    assert float(twin["value"][1]) == 1


def test_a_real_prometheus_can_answer_every_panel(prometheus):
    for title, query in queries():
        assert prometheus("query", query=query)["resultType"] == "vector", title
    assert prometheus("query", query=dict(queries())["Running"])["result"], "no series"


def test_a_real_prometheus_evaluates_every_rule(prometheus):
    rules = [rule for group in prometheus("rules")["groups"] for rule in group["rules"]]
    assert len(rules) >= 15
    assert {rule.get("lastError", "") for rule in rules} == {""}
    assert {rule["name"] for rule in rules if rule.get("state") == "firing"} == set()
