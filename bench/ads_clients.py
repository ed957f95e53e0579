"""Many clients of one agent's ADS server, as Envoys speak to it. Reads sidecars' directories from standard input, an
empty line at the end; says "ready" once each has its first configuration; acknowledges whatever comes.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import grpc.aio
from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2

from sidecar.bootstrap import ADS_SOCKET, BOOTSTRAP_FILE, TOKEN_KEY
from sidecar.core.resources import Kind
from sidecar.render import TYPE_URLS

_STREAMS_A_CONNECTION = 10
_WANTED = {Kind.CLUSTER: (), Kind.LISTENER: (), Kind.ENDPOINTS: ("callee",)}


class _Client:
    def __init__(self, directory: Path) -> None:
        bootstrap = json.loads((directory / BOOTSTRAP_FILE).read_text())
        self.token = bootstrap["node"]["metadata"][TOKEN_KEY]
        self.served = asyncio.Event()

    async def run(self, stub: Any) -> None:
        stream = stub.DeltaAggregatedResources()
        for at, (kind, names) in enumerate(_WANTED.items()):
            request = discovery_pb2.DeltaDiscoveryRequest(type_url=TYPE_URLS[kind], resource_names_subscribe=names)
            if at == 0:
                request.node.metadata[TOKEN_KEY] = self.token
            await stream.write(request)
        answered = set()
        while True:
            response = await stream.read()
            assert isinstance(response, discovery_pb2.DeltaDiscoveryResponse), "the server ended the stream"
            nonce = discovery_pb2.DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
            await stream.write(nonce)
            answered.add(response.type_url)
            if len(answered) == len(_WANTED):
                self.served.set()


async def main() -> None:
    directories = [Path(line.strip()) for line in iter(sys.stdin.readline, "\n")]
    clients = [_Client(directory) for directory in directories]
    async with asyncio.TaskGroup() as group:
        for at in range(0, len(clients), _STREAMS_A_CONNECTION):
            socket = directories[at] / ADS_SOCKET
            connection = grpc.aio.insecure_channel(f"unix:{socket}", options=[("grpc.use_local_subchannel_pool", 1)])
            stub = ads_pb2_grpc.AggregatedDiscoveryServiceStub(connection)
            for client in clients[at : at + _STREAMS_A_CONNECTION]:
                group.create_task(client.run(stub), name="client")
        for client in clients:
            await client.served.wait()
        print("ready", flush=True)


asyncio.run(main())
