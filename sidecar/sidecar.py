"""One allocation's part of what its Envoy should have: all of its own, or a share of the one that several have."""

from collections.abc import Mapping

from envoy.service.discovery.v3 import discovery_pb2

from outrider.ids import AllocId, SecretName, ServiceName
from outrider.log import Log
from outrider.model.mesh import Leaf, MeshService, MeshView
from sidecar.core.access import access_rules, remember
from sidecar.core.external import Addresses
from sidecar.core.intent import SidecarSpec
from sidecar.core.resources import Kind, Pair, ResourceSet, resources
from sidecar.core.subscription import Versions
from sidecar.core.traffic import used_services
from sidecar.directory import SidecarState
from sidecar.render import render

Rendered = Mapping[Kind, Mapping[str, discovery_pb2.Resource]]
_log = Log("sidecar")


class Sidecar:
    def __init__(self, spec: SidecarSpec, state: SidecarState) -> None:
        self.spec, self.state = spec, state
        self.alloc: AllocId = spec.alloc
        self.rendered: Rendered = {}
        self.versions: Versions = {}
        self.complete = False
        self.missing: tuple[str, ...] = ()
        self.tapped: Pair | None = None
        self.pems: Mapping[SecretName, str] = {}
        self.addresses: Addresses = {}
        self._seen: tuple[object, ...] = ()
        self._services: dict[ServiceName, MeshService] = {}
        self._reach: dict[ServiceName, tuple[ServiceName, ...]] = {}

    def update(self, view: MeshView, leaves: Mapping[ServiceName, Leaf]) -> bool:
        """Takes the newest view in. Returns whether there was anything new in it."""
        view = self._own(view)
        own = tuple(service.service for service in self.spec.services)
        leaves = {name: leaves[name] for name in own if name in leaves}
        seen = (view, leaves, self.tapped, self.pems, self.addresses)
        if seen == self._seen:
            return False
        self._seen = seen
        history = self.state.history
        if view.roots.trust_domain:
            # A controller that just started may not know yet what runs here: no key is not the same as no intention.
            rules = {name: access_rules(name, found, view.roots) for name, found in view.intentions.items()}
            history = remember(history, rules)
        wanted = resources(
            self.spec, view, leaves, history, tapped=self.tapped, pems=self.pems, addresses=self.addresses
        )
        self._install(wanted)
        if history != self.state.history:
            self.state = SidecarState(token=self.state.token, history=history)
        return True

    def _own(self, view: MeshView) -> MeshView:
        """The part of the node's view that this sidecar uses. A service that left the view has no endpoints: its
        listener stays, for what was sent once never goes."""
        for service in self.spec.services:
            # What was once in reach keeps its listener; its names went, and its sidecars refuse.
            reached = dict.fromkeys((*self._reach.get(service.service, ()), *view.reach.get(service.service, ())))
            if reached:
                self._reach[service.service] = tuple(reached)
            for called in (*(upstream.service for upstream in service.upstreams), *reached):
                self._take(view, called)
                for name in used_services(self._services[called]) if called in self._services else ():
                    self._take(view, ServiceName(name))
        own = tuple(service.service for service in self.spec.services)
        intentions = {name: view.intentions[name] for name in own if name in view.intentions}
        rates = {name: view.rates[name] for name in own if name in view.rates}
        return MeshView(
            services=dict(self._services),
            intentions=intentions,
            rates=rates,
            reach=dict(self._reach),
            roots=view.roots,
        )

    def _take(self, view: MeshView, name: ServiceName) -> None:
        if name in view.services:
            self._services[name] = view.services[name]
        elif name in self._services and self._services[name].endpoints:
            last = self._services[name]
            self._services[name] = MeshService(name=name, virtual_address=last.virtual_address, protocol=last.protocol)

    def _install(self, wanted: ResourceSet) -> None:
        self.missing = wanted.missing
        # Once complete, always complete: what is missing later (a root, a leaf) is a change, and the last good stays.
        if wanted.missing and self.complete:
            _log.warning("view incomplete, the last one stays", alloc=self.alloc, missing=wanted.missing)
            return
        self.rendered = {
            kind: {name: render(resource) for name, resource in by_name.items()}
            for kind, by_name in wanted.resources.items()
        }
        self.versions = {
            kind: {name: resource.version for name, resource in by_name.items()}
            for kind, by_name in self.rendered.items()
        }
        self.complete = not wanted.missing
