"""Writes the Grafana dashboards beside this file: `python deploy/grafana/generate.py`. A test holds the files to it.

Owns what each dashboard shows; every query is one that a running fleet answers.
"""

import json
from pathlib import Path
from typing import NamedTuple


class Panel(NamedTuple):
    title: str
    query: str
    legend: str = ""
    unit: str = "short"


DASHBOARDS: dict[str, tuple[Panel, ...]] = {
    "fleet": (
        Panel("Nodes", "outrider_controller_nodes", "{{status}}"),
        Panel("Jobs", "outrider_controller_jobs"),
        Panel("Allocations", "outrider_controller_allocations"),
        Panel("Allocations by node", 'sum by (node) (outrider_agent_allocations{status="running"})', "{{node}}"),
        Panel("CPU", "sum by (node) (rate(outrider_workload_cpu_seconds_total[1m]))", "{{node}}"),
        Panel("Memory", "sum by (node) (outrider_workload_memory_bytes)", "{{node}}", "bytes"),
        Panel("Longest rollout", "outrider_controller_rollout_seconds_max", "", "s"),
        Panel("Versions", "count by (version) (outrider_agent_info)", "{{version}}"),
    ),
    "node": (
        Panel("Agent answers", 'up{component="agent", node=~"$node"}', "{{node}}"),
        Panel("Connected to a controller", 'outrider_agent_controller_connected{node=~"$node"}', "{{node}}"),
        Panel("Allocations", 'outrider_agent_allocations{node=~"$node"}', "{{node}} {{status}}"),
        Panel("CPU by task", 'sum by (job, task) (rate(outrider_workload_cpu_seconds_total{node=~"$node"}[1m]))',
              "{{job}} {{task}}"),
        Panel("Memory by task", 'sum by (job, task) (outrider_workload_memory_bytes{node=~"$node"})',
              "{{job}} {{task}}", "bytes"),
        Panel("Memory of the agent", 'outrider_agent_process_resident_memory_bytes{node=~"$node"}', "{{node}}",
              "bytes"),
        Panel("Its certificate ends in", 'outrider_agent_certificate_expiry_timestamp_seconds{node=~"$node"} - time()',
              "{{node}}", "s"),
    ),
    "job": (
        Panel("CPU", 'sum by (group, alloc) (rate(outrider_workload_cpu_seconds_total{job=~"$job"}[1m]))',
              "{{group}} {{alloc}}"),
        Panel("Memory", 'sum by (group, alloc) (outrider_workload_memory_bytes{job=~"$job"})', "{{group}} {{alloc}}",
              "bytes"),
        Panel("Restarts", 'sum by (group, alloc) (outrider_workload_restarts_total{job=~"$job"})',
              "{{group}} {{alloc}}"),
        Panel("Kills for memory", 'sum by (group, alloc) (outrider_workload_oom_kills_total{job=~"$job"})',
              "{{group}} {{alloc}}"),
    ),
    "mesh": (
        Panel("Requests", "sum by (source, destination) (rate(outrider_mesh_requests_total[1m]))",
              "{{source}} -> {{destination}}", "reqps"),
        Panel("Requests by class", "sum by (code_class) (rate(outrider_mesh_requests_total[1m]))", "{{code_class}}",
              "reqps"),
        Panel("Latency, p99",
              "histogram_quantile(0.99, sum by (source, destination, le) "
              "(rate(outrider_mesh_request_duration_seconds_bucket[1m])))", "{{source}} -> {{destination}}", "s"),
        Panel("Connections", "sum by (source, destination) (rate(outrider_mesh_connections_total[1m]))",
              "{{source}} -> {{destination}}"),
        Panel("Bytes", "sum by (source, destination) (rate(outrider_mesh_bytes_total[1m]))",
              "{{source}} -> {{destination}}", "Bps"),
        Panel("Errors", "sum by (source, destination) (rate(outrider_mesh_errors_total[1m]))",
              "{{source}} -> {{destination}}"),
        Panel("Refused", "sum by (source, destination) (rate(outrider_mesh_refused_total[1m]))",
              "{{source}} -> {{destination}}"),
        Panel("Sidecars that answer", "sum by (node) (outrider_sidecar_up)", "{{node}}"),
        Panel("Certificates end in", "min by (service) (outrider_agent_leaf_expiry_timestamp_seconds) - time()",
              "{{service}}", "s"),
    ),
    "controller": (
        Panel("Events", "rate(outrider_controller_events_total[1m])"),
        Panel("Time spent deciding", "rate(outrider_controller_step_seconds_total[1m])", "", "s"),
        Panel("Longest decision", "outrider_controller_step_seconds_max", "", "s"),
        Panel("Records written", "rate(outrider_controller_journal_records_total[1m])"),
        Panel("Time of a commit",
              "rate(outrider_controller_journal_commit_seconds_total[1m]) "
              "/ rate(outrider_controller_journal_commits_total[1m])", "", "s"),
        Panel("Agents connected", "outrider_controller_sessions"),
        Panel("Catalog reachable, and led", "outrider_controller_mesh_reachable + outrider_controller_mesh_leading"),
        Panel("Memory", 'process_resident_memory_bytes{component="controller"}', "", "bytes"),
    ),
}  # fmt: skip
VARIABLES = {
    "node": "label_values(outrider_agent_info, node)",
    "job": "label_values(outrider_workload_memory_bytes, job)",
}
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard(name: str) -> str:
    """As Grafana imports it."""
    variables: list[dict[str, object]] = [{"name": "datasource", "type": "datasource", "query": "prometheus"}]
    if name in VARIABLES:
        variables.append({
            "name": name, "type": "query", "datasource": _DATASOURCE, "query": VARIABLES[name], "refresh": 2,
            "includeAll": True, "multi": True,
        })  # fmt: skip
    document = {
        "uid": f"outrider-{name}",
        "title": f"Outrider: {name}",
        "tags": ["outrider"],
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "schemaVersion": 39,
        "templating": {"list": variables},
        "panels": [_panel(panel, at) for at, panel in enumerate(DASHBOARDS[name])],
    }
    return json.dumps(document, indent=2) + "\n"


def _panel(panel: Panel, at: int) -> dict[str, object]:
    return {
        "id": at + 1,
        "title": panel.title,
        "type": "timeseries",
        "datasource": _DATASOURCE,
        "gridPos": {"x": 12 * (at % 2), "y": 8 * (at // 2), "w": 12, "h": 8},
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "targets": [{"refId": "A", "expr": panel.query, "legendFormat": panel.legend, "datasource": _DATASOURCE}],
    }


if __name__ == "__main__":
    for each in DASHBOARDS:
        (Path(__file__).parent / f"{each}.json").write_text(dashboard(each))
