"""Mosquitto's configuration for a fleet, as text. Owns topics' names and who may write where; never writes a file.

Everybody shows a certificate of the fleet's CA; its common name is the user. A node's is its id; the controller's
and the operators' begin with a character that no node's name can have.
"""

from pathlib import Path

from outrider.ids import AllocId, NodeId
from outrider.tls import TlsFiles

CONTROLLER_USER = "@controller"
OPERATOR_USER = "@operator"

MESSAGE_BYTES_MAX = 64 * 1024


def topic_root(cluster: str) -> str:
    return f"outrider/{cluster}"


def node_topic(cluster: str, node: NodeId) -> str:
    """All that a node may write is below this."""
    return f"{topic_root(cluster)}/node/{node}"


def node_status_topic(cluster: str, node: NodeId) -> str:
    """Retained: `online`, or, by the agent's last will, `gone`."""
    return f"{node_topic(cluster, node)}/status"


def alloc_event_topic(cluster: str, node: NodeId, alloc: AllocId) -> str:
    """What the node's agent says of one allocation, as it happens."""
    return f"{node_topic(cluster, node)}/alloc/{alloc}/event"


def controller_topic(cluster: str) -> str:
    return f"{topic_root(cluster)}/controller"


def mosquitto_conf(*, host: str, port: int, files: TlsFiles, acl: Path, user: str = "mosquitto") -> str:
    """One TLS listener, no anonymous access, bounded queues, nothing kept on disk.

    `user` is whom Mosquitto becomes when root starts it: it must be able to read the files.
    """
    return "\n".join(
        (
            f"user {user}",
            f"listener {port} {host}",
            f"cafile {files.ca}",
            f"certfile {files.certificate}",
            f"keyfile {files.key}",
            "tls_version tlsv1.2",
            "require_certificate true",
            "use_identity_as_username true",
            "allow_anonymous false",
            f"acl_file {acl}",
            f"max_packet_size {MESSAGE_BYTES_MAX}",
            "max_queued_messages 10000",
            "persistence false",
            "log_dest stderr",
            "log_type error",
            "log_type warning",
            "log_type notice",
            "",
        )
    )


def mosquitto_acl(cluster: str) -> str:
    """A node writes below its own topic alone and reads nothing; what is not named is denied."""
    root = topic_root(cluster)
    return "\n".join(
        (
            f"pattern write {root}/node/%u/#",
            "",
            f"user {CONTROLLER_USER}",
            f"topic read {root}/#",
            f"topic write {controller_topic(cluster)}/#",
            "",
            f"user {OPERATOR_USER}",
            f"topic read {root}/#",
            "",
        )
    )
