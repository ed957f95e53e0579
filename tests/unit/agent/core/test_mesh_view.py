"""A node's view of the mesh, update by update."""

from agent.core.mesh_view import updated
from outrider.ids import ServiceName
from outrider.model.mesh import MeshService, MeshUpdate, MeshView, ServiceIntentions, TrustRoots

WEB, API = ServiceName("web"), ServiceName("api")
ROOTS = TrustRoots(datacenter="dc1", trust_domain="t.consul", certificates_pem=("pem",))


def service(name: ServiceName, address: str = "198.18.1.0") -> MeshService:
    return MeshService(name=name, virtual_address=address)


def test_a_delta_replaces_what_it_names_and_keeps_the_rest() -> None:
    view = updated(MeshView(), MeshUpdate(version=1, full=True, services=(service(WEB), service(API)), roots=ROOTS))
    intentions = (ServiceIntentions(service=WEB),)
    view = updated(view, MeshUpdate(version=2, services=(service(WEB, "198.18.1.9"),), intentions=intentions))
    assert view.services[WEB].virtual_address == "198.18.1.9"
    assert API in view.services
    assert view.intentions == {WEB: ()}
    assert view.roots == ROOTS


def test_removals_remove() -> None:
    view = MeshView(services={WEB: service(WEB)}, intentions={WEB: ()})
    view = updated(view, MeshUpdate(version=2, services_removed=(WEB,), intentions_removed=(WEB, API)))
    assert view == MeshView()


def test_a_full_update_drops_what_it_does_not_name() -> None:
    view = MeshView(services={WEB: service(WEB)}, intentions={WEB: ()}, roots=ROOTS)
    view = updated(view, MeshUpdate(version=2, full=True, services=(service(API),)))
    assert set(view.services) == {API}
    assert not view.intentions
    assert view.roots == ROOTS
