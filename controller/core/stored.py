"""What the fleet keeps for its jobs apart from them: secrets and volumes. A part of `State`: changed by records alone.

Owns who has a volume (by serial, from placement to end) and what volumes take of their nodes' disks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import assert_never

import msgspec

from controller.core.groups import GroupEntry, VolumeKey
from controller.core.nodes import NodeTable
from controller.core.records import (
    Record,
    SecretDeleted,
    SecretPut,
    StoreRecord,
    VolumeCreated,
    VolumeDeleted,
    VolumeSnapshotted,
)
from outrider.ids import Namespace, SecretName
from outrider.model.belongings import Volume, VolumeSnapshot


@dataclass(slots=True)
class SecretEntry:
    variable: bool
    versions: dict[int, SecretPut] = field(default_factory=dict)
    latest: int = 0


@dataclass(slots=True)
class VolumeEntry:
    volume: Volume
    created_at_s: float
    snapshots: dict[str, VolumeSnapshot] = field(default_factory=dict)
    claims: dict[int, None] = field(default_factory=dict)  # serials of what is placed with it and has not ended


class Stored:
    def __init__(self, nodes: NodeTable) -> None:
        self._nodes = nodes
        self.secrets: dict[tuple[Namespace, SecretName], SecretEntry] = {}
        self.volumes: dict[VolumeKey, VolumeEntry] = {}

    def apply(self, record: StoreRecord) -> None:
        match record:
            case SecretPut():
                self._put_secret(record)
            case SecretDeleted():
                del self.secrets[record.namespace, record.name]
            case VolumeCreated(volume=volume):
                self.volumes[volume.namespace, volume.name] = VolumeEntry(volume, record.at_s)
                self._nodes.disk_free[self._nodes.reference[volume.node]] -= volume.size_bytes
            case VolumeDeleted():
                volume = self.volumes.pop((record.namespace, record.name)).volume
                self._nodes.disk_free[self._nodes.reference[volume.node]] += volume.size_bytes
            case VolumeSnapshotted(removed=True):
                self.volumes[record.namespace, record.name].snapshots.pop(record.snapshot.name, None)
            case VolumeSnapshotted():
                self.volumes[record.namespace, record.name].snapshots[record.snapshot.name] = record.snapshot
            case _:
                assert_never(record)

    def snapshot(self) -> Iterator[Record]:
        """After the nodes, before the allocations."""
        for secret in self.secrets.values():
            yield from secret.versions.values()
        for (namespace, name), entry in self.volumes.items():
            yield VolumeCreated(volume=entry.volume, at_s=entry.created_at_s)
            for snapshot in entry.snapshots.values():
                yield VolumeSnapshotted(namespace=namespace, name=name, snapshot=snapshot)

    def claim(self, group: GroupEntry, serials: list[int]) -> None:
        """They are placed."""
        for key in group.volumes:
            if key in self.volumes:
                self.volumes[key].claims.update(dict.fromkeys(serials))

    def release(self, group: GroupEntry, serials: list[int]) -> None:
        """They have ended."""
        for key in group.volumes:
            if key in self.volumes:
                for serial in serials:
                    self.volumes[key].claims.pop(serial, None)

    def _put_secret(self, put: SecretPut) -> None:
        entry = self.secrets.setdefault((put.namespace, put.name), SecretEntry(put.variable))
        for version in put.dropped:
            del entry.versions[version]
        entry.versions[put.version] = msgspec.structs.replace(put, dropped=())
        entry.latest = max(entry.latest, put.version)
