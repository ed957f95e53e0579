"""A node's view of the mesh, update by update. Pure; who shows it to the sidecars is not its matter."""

from outrider.model.mesh import MeshUpdate, MeshView


def updated(view: MeshView, update: MeshUpdate) -> MeshView:
    """`view` after `update`; a full one replaces all but roots that it does not carry."""
    services = {} if update.full else dict(view.services)
    intentions = {} if update.full else dict(view.intentions)
    rates = {} if update.full else dict(view.rates)
    reach = {} if update.full else dict(view.reach)
    for name in update.services_removed:
        services.pop(name, None)
    for name in update.intentions_removed:
        intentions.pop(name, None)
        rates.pop(name, None)
        reach.pop(name, None)
    services |= {service.name: service for service in update.services}
    intentions |= {each.service: each.intentions for each in update.intentions}
    rates |= {each.service: each.rate for each in update.intentions}
    reach |= {each.service: each.reach for each in update.intentions}
    return MeshView(
        services=services, intentions=intentions, rates=rates, reach=reach, roots=update.roots or view.roots
    )
