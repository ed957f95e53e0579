"""Networks of the allocations of one node: makes them, finds them again, removes them, opens sockets inside them.

Owns the namespaces' mount points and specs below `run_directory/netns` and the node's nftables table. All its work
is done by two threads of its own, as joining a namespace is a thread's matter: one makes and removes networks, one
opens sockets, so that a check never waits for a network being made. Never decides what should exist.
"""

import asyncio
import ctypes
import os
import re
import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from agent.network.guest import GUEST_MAC, TAP, TAP_MAC, guest_rules, make_tap
from agent.network.nftables import Nftables
from agent.network.plan import (
    INNER_LINK,
    NAMESPACE_TABLE,
    REFUSED,
    NetworkSpec,
    gateway_address,
    namespace_rules,
    node_elements,
    node_rules,
    node_table,
    shared_address,
)
from agent.network.rtnetlink import RouteSocket
from agent.network.shared import entrances, member_rules, outer_link, shared_elements, shared_rules
from outrider.errors import HostError
from outrider.ids import AllocId
from outrider.log import Log
from outrider.model.job import Value
from outrider.model.mesh import DNS_ADDRESS, GUEST_ADDRESS, GUEST_GATEWAY, LISTENER_NETWORK, VIRTUAL_NETWORK

T = TypeVar("T")
_log = Log("agent.network")

_CLONE_NEWNET = 0x40000000
_MS_BIND = 4096
_MNT_DETACH = 2
_OUTER_PREFIX = "or"
_SPEC_SUFFIX = ".json"
_UNFINISHED_SUFFIX = ".making"
_ISOLATED = "isolated"
_PACKETS = re.compile(r"packets ([0-9]+)")
_SHARED, _SHARED_READY = "shared", "shared.ready"
# Inside an allocation. IPv6 is off whole; a workload without capabilities may still serve on port 80.
_INNER_SETTINGS = {
    "ipv6/conf/all/disable_ipv6": "1",
    "ipv6/conf/default/disable_ipv6": "1",
    "ipv4/ip_unprivileged_port_start": "0",
}
# Of one that hangs on the shared sidecar: what comes from there may be led to a workload that listens on 127.0.0.1.
_MEMBER_SETTINGS = {"ipv4/conf/all/route_localnet": "1"}
_libc = ctypes.CDLL(None, use_errno=True)


class AllocationNetwork(Value, frozen=True, kw_only=True):
    """A network found on this host."""

    alloc: AllocId
    namespace: str  # a path to join it by
    local_address: str
    shared: bool = False  # it hangs on the shared sidecar's


class AllocationNetworks:
    """All the allocation networks of one node. One agent at a time uses a `run_directory`."""

    def __init__(self, *, run_directory: Path, node_address: str, block: int) -> None:
        self._directory = run_directory / "netns"
        self._node_address = node_address
        self._block = block
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="networks")
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="sockets")
        self._nftables: Nftables | None = None  # of the node's namespace, once its table is laid

    async def create(self, spec: NetworkSpec, *, reserved: AllocId | None = None) -> AllocationNetwork:
        """Make the network, in 2 to 3 ms. What a killed agent left half made under this id goes first.

        `reserved`: the namespace that becomes this allocation's. Raises HostError, and nothing is left then.
        Cancelled, it is made all the same: `delete` it.
        """
        return await self._in_thread(f"make the network of {spec.alloc}", lambda: self._create(spec, reserved))

    async def reserve(self, name: AllocId) -> str:
        """A namespace without any link, for an allocation to come; its path. `create` takes it, `delete` removes it."""
        return await self._in_thread(f"make the namespace {name}", lambda: self._reserve(name))

    async def delete(self, alloc: AllocId) -> None:
        """Remove the network; does nothing where there is none."""
        await self._in_thread(f"remove the network of {alloc}", lambda: self._delete(alloc))

    async def list(self) -> tuple[AllocationNetwork, ...]:
        """What is there and whole, in order of id. What a killed agent left half made is for `reap` and `create`."""
        return await self._in_thread("list networks", self._list)

    async def reap(self, known: Collection[AllocId]) -> tuple[AllocId, ...]:
        """Remove all networks but the `known`; returns the removed. With the last one goes the node's table."""
        return await self._in_thread("remove networks", lambda: self._reap(frozenset(known)))

    @property
    def shared_namespace(self) -> str:
        """The path of the shared sidecar's: there as long as an allocation's network hangs on it."""
        return str(self._directory / _SHARED)

    async def close_entrances(self, alloc: AllocId) -> None:
        """No new call reaches an allocation's services by the shared sidecar; those under way go on."""
        await self._in_thread(f"close the entrances of {alloc}", lambda: self._close_entrances(alloc))

    async def isolated(self) -> str:
        """The path of a namespace without any link, for the node's own sandboxes; made where it is missing."""
        return await self._in_thread("make an isolated namespace", self._isolated)

    def open_socket(self, alloc: AllocId, kind: socket.SocketKind) -> socket.socket:
        """An unbound IPv4 socket inside the allocation's namespace, in about 0.1 ms. Raises HostError."""
        return self._opener.submit(self._open_socket, alloc, kind).result()

    async def refused(self, alloc: AllocId) -> int:
        """How many packets its workload sent where nothing lets it. Raises HostError."""
        return await asyncio.get_running_loop().run_in_executor(self._opener, self._refused, alloc)

    async def close(self) -> None:
        """Let go of threads and descriptors. The networks stay, to be found again."""
        await self._in_thread("close", self._forget_node_table)
        self._maker.shutdown()
        self._opener.shutdown()
        os.close(self._home)

    async def _in_thread(self, step: str, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._maker, work)
        except OSError as error:
            raise HostError(str(self._directory), step=step, hint=str(error)) from error

    def _reserve(self, name: AllocId) -> str:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._unfinished_path(name).touch()  # by which `reap` finds it
        with self._new_namespace(self._path(name)):
            pass
        return str(self._path(name))

    def _create(self, spec: NetworkSpec, reserved: AllocId | None) -> AllocationNetwork:
        node = self._node_table()
        self._delete_whole(spec.alloc)
        path = self._path(spec.alloc)
        try:
            # Written first: whatever happens from here on, `reap` finds it and `delete` knows what to undo.
            self._unfinished_path(spec.alloc).write_bytes(msgspec.json.encode(spec))
            with self._beyond(spec) as beyond:
                with self._new_namespace(path) if reserved is None else self._reserved_namespace(path, reserved):
                    self._furnish(spec, beyond)
                with self._joined(beyond):
                    self._lead_to(spec)
            if spec.shared:
                with RouteSocket() as outside:
                    outside.add_route_by(outer_link(self._block), spec.local_address, spec.host_side_address)
            self._add_elements(node, spec)
            self._unfinished_path(spec.alloc).replace(self._spec_path(spec.alloc))
        except (HostError, OSError):
            self._delete_whole(spec.alloc)
            raise
        finally:
            if reserved is not None:
                self._delete(reserved)
        return self._found(spec)

    def _isolated(self) -> str:
        path = self._directory / _ISOLATED
        self._directory.mkdir(parents=True, exist_ok=True)
        if not self._is_mounted(path):
            with self._new_namespace(path):
                pass
        return str(path)

    def _furnish(self, spec: NetworkSpec, beyond: int) -> None:
        """All that is inside. The rules come before the link, so that nothing ever passes without them."""
        for setting, value in (_INNER_SETTINGS | (_MEMBER_SETTINGS if spec.shared else {})).items():
            _set(setting, value)
        with Nftables() as inside:
            guest = guest_rules(spec) if spec.guest_uid is not None else ()
            rules = member_rules(spec, block=self._block) if spec.shared else namespace_rules(spec, guest)
            inside.run(rules, subject=f"allocation {spec.alloc}")
        with RouteSocket() as inside:
            inside.set_up("lo")
            inside.add_local_route("lo", f"{DNS_ADDRESS}/32" if spec.shared else VIRTUAL_NETWORK)
            inside.add_veth(INNER_LINK, peer=_outer_link(spec.alloc), peer_namespace=beyond)
            inside.add_address(INNER_LINK, spec.local_address)
            if spec.bandwidth_bytes:
                inside.limit(INNER_LINK, spec.bandwidth_bytes)
            inside.set_up(INNER_LINK)
            inside.add_link_route(INNER_LINK, spec.host_side_address)
            inside.add_default_route(INNER_LINK, spec.host_side_address)
            if spec.guest_uid is not None:
                _set("ipv4/ip_forward", "1")
                make_tap(spec.guest_uid)
                inside.set_hardware_address(TAP, TAP_MAC)
                inside.add_address(TAP, GUEST_GATEWAY)
                inside.set_up(TAP)
                inside.add_link_route(TAP, GUEST_ADDRESS)
                # What is sent to it waits in the tap until the guest runs, and is not given up for want of an answer.
                inside.add_neighbour(TAP, GUEST_ADDRESS, GUEST_MAC)

    def _lead_to(self, spec: NetworkSpec) -> None:
        """From the namespace at the other end of its link, which this thread is in."""
        with RouteSocket() as outside:
            outer = _outer_link(spec.alloc)
            _set(f"ipv6/conf/{outer}/disable_ipv6", "1")
            outside.add_address(outer, spec.host_side_address)
            outside.set_up(outer)
            outside.add_link_route(outer, spec.local_address)
            if spec.bandwidth_bytes:
                outside.limit(outer, spec.bandwidth_bytes)
        if spec.shared:
            with Nftables() as rules:
                _add(rules, shared_elements(spec, outer), subject=f"allocation {spec.alloc}")

    @contextmanager
    def _beyond(self, spec: NetworkSpec) -> Iterator[int]:
        """The namespace at the other end of its link, as a descriptor."""
        if not spec.shared:
            yield self._home
            return
        if not self._shared_is_there():
            self._make_shared(spec.sidecar_uid)
        with _opened(self.shared_namespace) as descriptor:
            yield descriptor

    def _shared_is_there(self) -> bool:
        return self._is_mounted(self._directory / _SHARED) and (self._directory / _SHARED_READY).exists()

    def _make_shared(self, uid: int) -> None:
        """The shared sidecar's namespace, whole; what a killed agent left half made goes first."""
        self._delete_shared()
        outer, address, gateway = outer_link(self._block), shared_address(self._block), gateway_address(self._block)
        with self._new_namespace(self._directory / _SHARED):
            for setting, value in (_INNER_SETTINGS | {"ipv4/ip_forward": "1"}).items():
                _set(setting, value)
            with Nftables() as rules:
                rules.run(shared_rules(block=self._block, uid=uid), subject="the shared sidecar")
            with RouteSocket() as inside:
                inside.set_up("lo")
                inside.add_local_route("lo", LISTENER_NETWORK)
                inside.add_veth(INNER_LINK, peer=outer, peer_namespace=self._home)
                inside.add_address(INNER_LINK, address)
                inside.set_up(INNER_LINK)
                inside.add_link_route(INNER_LINK, gateway)
                inside.add_default_route(INNER_LINK, gateway)
        with RouteSocket() as outside:
            _set(f"ipv6/conf/{outer}/disable_ipv6", "1")
            outside.add_address(outer, gateway)
            outside.set_up(outer)
            outside.add_link_route(outer, address)
        (self._directory / _SHARED_READY).touch()

    def _delete_shared(self) -> None:
        """With whatever hangs on it."""
        (self._directory / _SHARED_READY).unlink(missing_ok=True)
        _unmount(self._directory / _SHARED)
        with RouteSocket() as outside:
            outside.delete_link(outer_link(self._block))

    def _close_entrances(self, alloc: AllocId) -> None:
        spec = _read_spec(self._spec_path(alloc))
        if spec is not None and spec.shared and self._shared_is_there():
            with self._beyond(spec) as beyond, self._joined(beyond), Nftables() as rules:
                _delete_each(rules, entrances(spec), alloc)

    def _leave_shared(self, spec: NetworkSpec) -> None:
        if self._shared_is_there():
            with self._beyond(spec) as beyond, self._joined(beyond):
                with Nftables() as rules:
                    _delete_each(rules, shared_elements(spec, _outer_link(spec.alloc)), spec.alloc)
                with RouteSocket() as inside:
                    inside.delete_route(spec.local_address)

    def _delete(self, alloc: AllocId) -> None:
        """All but the link, which goes with the namespace: to wait for it costs 40 ms, all else half of one."""
        for spec_path in (self._unfinished_path(alloc), self._spec_path(alloc)):
            spec = _read_spec(spec_path)
            if spec is not None:
                _delete_each(self._node_table(), node_elements(spec, block=self._block), alloc)
                with RouteSocket() as outside:
                    outside.delete_route(spec.local_address)
                if spec.shared:
                    self._leave_shared(spec)
        _unmount(self._path(alloc))
        self._unfinished_path(alloc).unlink(missing_ok=True)
        self._spec_path(alloc).unlink(missing_ok=True)
        if self._is_mounted(self._directory / _SHARED) and not any(spec.shared for spec in self._written()):
            self._delete_shared()

    def _delete_whole(self, alloc: AllocId) -> None:
        self._delete(alloc)
        with RouteSocket() as outside:
            outside.delete_link(_outer_link(alloc))
        if self._is_mounted(self._directory / _SHARED):
            with _opened(self.shared_namespace) as beyond, self._joined(beyond), RouteSocket() as there:
                there.delete_link(_outer_link(alloc))

    def _add_elements(self, node: Nftables, spec: NetworkSpec) -> None:
        _add(node, node_elements(spec, block=self._block), subject=f"allocation {spec.alloc}")

    def _list(self) -> tuple[AllocationNetwork, ...]:
        return tuple(self._found(spec) for spec in self._specs())

    def _found(self, spec: NetworkSpec) -> AllocationNetwork:
        return AllocationNetwork(
            alloc=spec.alloc,
            namespace=str(self._path(spec.alloc)),
            local_address=spec.local_address,
            shared=spec.shared,
        )

    def _specs(self) -> tuple[NetworkSpec, ...]:
        specs = (_read_spec(path) for path in sorted(self._directory.glob(f"*{_SPEC_SUFFIX}")))
        return tuple(spec for spec in specs if spec is not None and self._is_mounted(self._path(spec.alloc)))

    def _written(self) -> Iterator[NetworkSpec]:
        """Of all networks, half made ones too."""
        for suffix in (_SPEC_SUFFIX, _UNFINISHED_SUFFIX):
            for path in self._directory.glob(f"*{suffix}"):
                if (spec := _read_spec(path)) is not None:
                    yield spec

    def _reap(self, known: frozenset[AllocId]) -> tuple[AllocId, ...]:
        suffixes = (_SPEC_SUFFIX, _UNFINISHED_SUFFIX)
        there = {AllocId(path.stem) for suffix in suffixes for path in self._directory.glob(f"*{suffix}")}
        gone = tuple(sorted(there - known))
        for alloc in gone:
            self._delete_whole(alloc)
        if not known:
            _unmount(self._directory / _ISOLATED)
            self._delete_shared()
            table = f"ip {node_table(self._block)}"
            self._node_table().run(f"add table {table}\ndelete table {table}", subject="the node")
            self._forget_node_table()
        return gone

    def _node_table(self) -> Nftables:
        if self._nftables is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            _set("ipv4/ip_forward", "1")
            nftables = Nftables()
            nftables.run(node_rules(block=self._block, node_address=self._node_address), subject="the node")
            # Of earlier agents' allocations: a firewall's reload may have flushed them meanwhile.
            for spec in self._specs():
                try:
                    self._add_elements(nftables, spec)
                except HostError as error:
                    _log.warning("elements not restored", alloc=spec.alloc, reason=error)
            self._nftables = nftables
        return self._nftables

    def _forget_node_table(self) -> None:
        if self._nftables is not None:
            self._nftables.close()
            self._nftables = None

    @contextmanager
    def _new_namespace(self, path: Path) -> Iterator[None]:
        path.touch()
        _call("make a network namespace", _libc.unshare(_CLONE_NEWNET))
        try:
            source = b"/proc/thread-self/ns/net"
            _call(f"mount it at {path}", _libc.mount(source, os.fsencode(path), None, _MS_BIND, None))
            yield
        finally:
            _call("return to the node's namespace", _libc.setns(self._home, _CLONE_NEWNET))

    @contextmanager
    def _reserved_namespace(self, path: Path, reserved: AllocId) -> Iterator[None]:
        path.touch()
        source = os.fsencode(self._path(reserved))
        _call(f"mount {reserved} at {path}", _libc.mount(source, os.fsencode(path), None, _MS_BIND, None))
        with _opened(str(path)) as inside, self._joined(inside):
            yield

    @contextmanager
    def _joined(self, namespace: int) -> Iterator[None]:
        """This thread is in the namespace of that descriptor meanwhile."""
        try:
            _call("join a network namespace", _libc.setns(namespace, _CLONE_NEWNET))
            yield
        finally:
            _call("return to the node's namespace", _libc.setns(self._home, _CLONE_NEWNET))

    def _open_socket(self, alloc: AllocId, kind: socket.SocketKind) -> socket.socket:
        with self._inside(alloc):
            return socket.socket(socket.AF_INET, kind)

    def _refused(self, alloc: AllocId) -> int:
        with self._inside(alloc), Nftables() as inside:
            counter = inside.asked(f"list counter inet {NAMESPACE_TABLE} {REFUSED}", subject=f"allocation {alloc}")
        packets = _PACKETS.search(counter)
        return int(packets[1]) if packets else 0

    @contextmanager
    def _inside(self, alloc: AllocId) -> Iterator[None]:
        """This thread joins the allocation's namespace, and returns."""
        try:
            inside = os.open(self._path(alloc), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"allocation {alloc}", step="open its network namespace", hint=str(error)) from error
        try:
            with self._joined(inside):
                yield
        finally:
            os.close(inside)

    def _is_mounted(self, path: Path) -> bool:
        return path.exists() and path.stat().st_dev != self._directory.stat().st_dev

    def _path(self, alloc: AllocId) -> Path:
        return self._directory / alloc

    def _spec_path(self, alloc: AllocId) -> Path:
        return self._directory / (alloc + _SPEC_SUFFIX)

    def _unfinished_path(self, alloc: AllocId) -> Path:
        return self._directory / (alloc + _UNFINISHED_SUFFIX)


def _read_spec(path: Path) -> NetworkSpec | None:
    """None where there is none, or none that was written whole: nothing else was made then."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=NetworkSpec)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


@contextmanager
def _opened(namespace: str) -> Iterator[int]:
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _add(rules: Nftables, elements: Sequence[str], *, subject: str) -> None:
    rules.run("\n".join(f"add element {element}" for element in elements), subject=subject)


def _delete_each(rules: Nftables, elements: Sequence[str], alloc: AllocId) -> None:
    for element in elements:
        # Adding what is there already is no error, deleting what is not there is one: so both, as one transaction.
        try:
            rules.run(f"add element {element}\ndelete element {element}", subject=f"allocation {alloc}")
        except HostError as error:
            # The port leads to another allocation: this one was cut short before it got it.
            _log.warning("element kept", alloc=alloc, element=element, reason=error)


def _outer_link(alloc: AllocId) -> str:
    return _OUTER_PREFIX + alloc


def _unmount(path: Path) -> None:
    _libc.umount2(os.fsencode(path), _MNT_DETACH)  # fails where nothing got mounted
    path.unlink(missing_ok=True)


def _call(step: str, result: int) -> None:
    if result != 0:
        raise HostError("network namespaces", step=step, hint=os.strerror(ctypes.get_errno()))


def _set(setting: str, value: str) -> None:
    """Write a setting of the network namespace that this thread is in; /proc/sys/net follows the thread."""
    path = Path("/proc/sys/net") / setting
    with suppress(FileNotFoundError):  # a kernel without IPv6 has none of its settings
        if path.read_text().strip() == value:
            return
        try:
            path.write_text(value)
        except OSError as error:
            raise HostError(str(path), step=f"set it to {value}", hint=str(error)) from error
