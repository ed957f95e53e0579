"""The files that a host gets: systemd units, the keeper where there is no systemd, configurations. Text alone."""

import yaml

from outrider.cli.deploy.inventory import (
    AGENT_METRICS_PORT,
    FLEET_PORT,
    JOIN_PORT,
    METRICS_PORT,
    Host,
    Inventory,
)

# The agent makes mounts that must outlive it: nothing here may give it a mount namespace of its own (no Protect...,
# Private... or ReadOnly...), or the next agent would not find what runs.
AGENT_UNIT = """\
[Unit]
Description=Outrider agent
After=network-online.target
Wants=network-online.target

[Service]
ExecStart=/opt/outrider/current/bin/python -m agent --config /etc/outrider/agent.yaml
WorkingDirectory=/
# The workloads run on when the agent stops, is upgraded or dies: they are not its children.
KillMode=process
Delegate=yes
Restart=always
RestartSec=1
# Bad configuration: trying again changes nothing.
RestartPreventExitStatus=64
TasksMax=infinity
LimitNOFILE=1048576
OOMScoreAdjust=-900
UMask=0077
LockPersonality=yes
RestrictRealtime=yes
SystemCallArchitectures=native

[Install]
WantedBy=multi-user.target
"""

CONTROLLER_UNIT = """\
[Unit]
Description=Outrider controller
After=network-online.target
Wants=network-online.target

[Service]
ExecStart=/opt/outrider/current/bin/python -m controller --config /etc/outrider/controller.yaml
WorkingDirectory=/
Restart=always
RestartSec=1
RestartPreventExitStatus=64
LimitNOFILE=1048576
UMask=0077
StateDirectory=outrider/controller
RuntimeDirectory=outrider/controller
RuntimeDirectoryMode=0700
CapabilityBoundingSet=
NoNewPrivileges=yes
ProtectSystem=strict
ReadWritePaths=/var/lib/outrider/controller
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
RestrictNamespaces=yes
RestrictSUIDSGID=yes
RestrictRealtime=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
LockPersonality=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service

[Install]
WantedBy=multi-user.target
"""

KEEPER = """\
#!/bin/sh
# outrider-keep ROLE CONFIG: starts the role, and again when it ends; SIGTERM ends both. Workloads run on.
role=$1 config=$2 child=
trap 'trap - TERM; [ -n "$child" ] && kill -TERM "$child" && wait "$child"; exit 0' TERM INT
while :; do
  /opt/outrider/current/bin/python -m "$role" --config "$config" &
  child=$!
  wait "$child"
  [ $? = 64 ] && exit 64  # bad configuration: trying again changes nothing
  sleep 1 & child=$!; wait "$child"; child=
done
"""

OPERATOR_SOCKET = "/run/outrider/controller/operator.sock"
JOIN_TOKEN = "/etc/outrider/join-token"  # noqa: S105 - a path
AGENT_CONFIG, CONTROLLER_CONFIG = "/etc/outrider/agent.yaml", "/etc/outrider/controller.yaml"


def agent_files(inventory: Inventory, host: Host) -> dict[str, tuple[str, str]]:
    """Path -> content and mode."""
    config = {
        "cluster": inventory.cluster,
        "node": host.node,
        "data": "/var/lib/outrider/agent",
        "run": "/run/outrider/agent",
        "address": host.reached_at,
        "controllers": list(inventory.controller_addresses(FLEET_PORT)),
        "join": {"address": inventory.controller_addresses(JOIN_PORT)[0], "token_file": JOIN_TOKEN},
        "metrics_listen": f"{host.reached_at}:{AGENT_METRICS_PORT}",
        **inventory.agent,
        **host.agent,
    }
    return {
        AGENT_CONFIG: (_yaml(config), "600"),
        "/etc/systemd/system/outrider-agent.service": (AGENT_UNIT, "644"),
        "/opt/outrider/outrider-keep": (KEEPER, "755"),
    }


def controller_files(inventory: Inventory, host: Host) -> dict[str, tuple[str, str]]:
    config = {
        "cluster": inventory.cluster,
        "data": "/var/lib/outrider/controller",
        "listen": f"{host.reached_at}:{FLEET_PORT}",
        "join_listen": f"{host.reached_at}:{JOIN_PORT}",
        "metrics_listen": f"{host.reached_at}:{METRICS_PORT}",
        "operator_socket": OPERATOR_SOCKET,
        "addresses": [host.reached_at, host.host] if host.reached_at != host.host else [host.host],
        **inventory.controller,
        **host.controller,
    }
    return {
        CONTROLLER_CONFIG: (_yaml(config), "600"),
        "/etc/systemd/system/outrider-controller.service": (CONTROLLER_UNIT, "644"),
        "/opt/outrider/outrider-keep": (KEEPER, "755"),
    }


def _yaml(config: dict[str, object]) -> str:
    return "# Written by `outrider deploy`: change hosts.yaml and deploy again.\n" + yaml.safe_dump(
        config, sort_keys=False
    )
