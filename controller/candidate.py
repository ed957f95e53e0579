"""One of several controllers: follows, wins the lock, leads for a term, and follows again, until it is stopped.

Owns that round. What it follows with is `follower`, what it leads with is `app.lead`, handed in. A term ends when the
lock is lost, or when nobody can tell whether the journal took what it was given: the next term reads it anew.
"""

import asyncio
import contextlib
import fcntl
import os
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from controller.ca import FleetCa
from controller.config import WILDCARDS, Config
from controller.consul_access import client_tls, token
from controller.election import Election, HeldLock, Member
from controller.engine import RestoredError
from controller.follower import Follower
from controller.journal import LeadershipLostError
from controller.journal.consul import ConsulJournal
from controller.journal.kv import ConsulKv
from controller.keyring import Keyring
from controller.listeners import socket_listener, tls_listener
from controller.mesh.consul_adapter import ConsulAdapter
from controller.progress import progress_listener
from controller.shared_files import SharedFiles
from controller.term import Term
from outrider.apart import apart
from outrider.config import host_port
from outrider.errors import ConfigError, HostError, PeerError
from outrider.log import Log
from outrider.tls import TlsFiles, server_credentials

_RETRY_S: Final = 0.5
_CA_POLL_S: Final = 2.0
_CALLS_GRACE_S: Final = 5.0

Lead = Callable[[Config, Term, asyncio.Event], Coroutine[None, None, None]]
Issue = Callable[[FleetCa, Config], TlsFiles]


async def candidate(config: Config, stop: asyncio.Event, *, lead: Lead, issue: Issue) -> None:
    """Until `stop` is set. Raises OutriderError for what another controller in this place would meet too."""
    log = Log("candidate", name=config.name)
    with _alone_in(config.data):
        kv = _kv(config)
        shared = SharedFiles(kv, cluster=config.cluster, data=config.data)
        files = await _files(config, shared, issue, stop, log)
        async with contextlib.AsyncExitStack() as stack:
            access = config.consul_or_local
            consul = ConsulAdapter(access.url, token=token(access), tls=client_tls(access))
            stack.push_async_callback(consul.close)
            election = Election(consul, cluster=config.cluster, member=_member(config), log=Log("election"))
            listener = progress_listener(config.progress_listen, election.of_use)
            election.progress_url = await stack.enter_async_context(listener)
            stack.push_async_callback(election.leave)
            stack.push_async_callback(election.resign)
            patience_s = _RETRY_S  # an uncontested lock is won at once: nobody needs to be told who leads meanwhile
            while not stop.is_set():
                await _follow(
                    config,
                    election,
                    files,
                    stop,
                    log,
                    patience_s=patience_s,
                    changed=partial(_changed, config, shared, issue),
                )
                patience_s = 0.0
                if stop.is_set():
                    return
                log.info("term begins")
                try:
                    await asyncio.to_thread(shared.pull)
                    await apart(lead(config, _term(config, election, shared), stop), name="term")
                except* (LeadershipLostError, RestoredError, PeerError) as lost:
                    log.warning("term ends", reason="; ".join(str(each) for each in _flat(lost)))
                await election.resign()


async def _files(config: Config, shared: SharedFiles, issue: Issue, stop: asyncio.Event, log: Log) -> TlsFiles:
    """The fleet's CA, from Consul or made for it, and this controller's certificate. Waits until Consul answers.

    Raises ConfigError where this controller could not open what the others sealed.
    """
    while not stop.is_set():
        try:
            if not await asyncio.to_thread(shared.adopt_ca):
                FleetCa(config.data / "ca", config.cluster)  # makes one, which is then everybody's or is replaced
                await asyncio.to_thread(shared.adopt_ca, fresh=True)
            await asyncio.to_thread(shared.check, Keyring(config.secrets_key_file, os.environ))
            break
        except PeerError as error:
            log.warning("consul away", reason=str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RETRY_S):
                    await stop.wait()
    return issue(FleetCa(config.data / "ca", config.cluster), config)


def _changed(config: Config, shared: SharedFiles, issue: Issue) -> bool:
    """Whether the leader changed the fleet's CA: then this controller has new certificates of its own."""
    changed = shared.pull()
    if changed:
        issue(FleetCa(config.data / "ca", config.cluster), config)
    return changed


async def _watch_ca(changed: Callable[[], bool], follower: Follower, log: Log) -> None:
    """For ever. A Consul that is away is asked again."""
    while True:
        await asyncio.sleep(_CA_POLL_S)
        try:
            if await asyncio.to_thread(changed):
                log.warning("the fleet's CA changes")
                await follower.close(grace_s=_CALLS_GRACE_S)
        except PeerError as error:
            log.warning("consul away", reason=str(error))


async def _follow(
    config: Config,
    election: Election,
    files: TlsFiles,
    stop: asyncio.Event,
    log: Log,
    *,
    patience_s: float,
    changed: Callable[[], bool],
) -> None:
    """Until this controller holds the lock, or `stop` is set."""
    follower = Follower(cluster=config.cluster, files=files, election=election, refused=Counter(), log=Log("follower"))
    members, anybody = (server_credentials(files, client_certificate=each) for each in (True, False))
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(follower.close)
        winning = asyncio.create_task(election.win(), name="election")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        watching = asyncio.create_task(_watch_ca(changed, follower, log), name="ca")
        try:
            await asyncio.wait((winning, stopping), timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            if not winning.done():
                for listener in (
                    socket_listener(
                        config.operator_socket, lambda server: server.add_generic_rpc_handlers((follower.members(),))
                    ),
                    tls_listener(
                        "listen",
                        config.listen,
                        members,
                        lambda server: server.add_generic_rpc_handlers((follower.members(),)),
                    ),
                    tls_listener(
                        "join_listen",
                        config.join_listen,
                        anybody,
                        lambda server: server.add_generic_rpc_handlers((follower.joins(),)),
                    ),
                ):
                    await stack.enter_async_context(listener)
                log.info("following")
                await asyncio.wait((winning, stopping, watching), return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()
            if winning.done():
                winning.result()
        finally:
            for task in (winning, stopping, watching):
                task.cancel()


def _term(config: Config, election: Election, shared: SharedFiles) -> Term:
    session = election.session
    return Term(
        journal=ConsulJournal(_kv(config), cluster=config.cluster, session=session),
        standing=election,
        lock=HeldLock(cluster=config.cluster, session=session, confirmed=election.confirmed),
        confirm=election.confirm,
        share=lambda: shared.push(session),
        agree=lambda keyring: shared.agree(keyring, session),
    )


def _member(config: Config) -> Member:
    """As agents and the other controllers reach this one."""
    host, port = host_port(config.listen)
    join_host, join_port = host_port(config.join_listen)
    if config.advertise is not None:
        host = join_host = config.advertise
    if 0 in (port, join_port) or host in WILDCARDS:
        raise ConfigError("listen, join_listen: with `journal: consul` name the ports, others have to find them")
    return Member(name=config.name, address=f"{host}:{port}", join_address=f"{join_host}:{join_port}")


def _kv(config: Config) -> ConsulKv:
    access = config.consul_or_local
    pair = (access.cert_file, access.key_file) if access.cert_file and access.key_file else None
    return ConsulKv(access.url, token=token(access), ca=access.ca_file, certificate=pair)


@contextlib.contextmanager
def _alone_in(data: Path) -> Iterator[None]:
    """One controller for each data directory: its sessions in Consul are named after it."""
    try:
        data.mkdir(parents=True, exist_ok=True)
        lock = os.open(data / "controller.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(str(data), step=f"make the directory: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise HostError(
            str(data), step="claim it", hint="another controller runs on it; stop that one first"
        ) from error
    try:
        yield
    finally:
        os.close(lock)


def _flat(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _flat(error)
        else:
            yield error
