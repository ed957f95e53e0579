"""/v1/connect, /v1/agent and /v1/status: intentions, the Connect CA, who answers."""

from typing import Any

from cryptography import x509

from controller.catalog import intentions
from controller.catalog.api import Access, Answer, Call, Route, Scope, decode
from controller.catalog.ca import certificate_window, trusted
from controller.catalog.rows import IntentionRow
from controller.catalog.store import CA, INTENTIONS
from outrider.errors import InputError, RefusedError
from outrider.ids import ServiceName
from outrider.model.mesh import spiffe_id


def intention_list(scope: Scope, _call: Call) -> Answer:
    return _indexed(scope, intentions.ordered(scope.store))


def intention_create(scope: Scope, call: Call) -> Answer:
    wanted = decode(call, intentions.IntentionRequest)
    row = intentions.create(scope.store, wanted, intention=call.new_id, at=call.at.isoformat())
    return Answer(body={"ID": row.id})


def intention_get(scope: Scope, call: Call) -> Answer:
    return _indexed(scope, _present(scope.store.intentions.get(call.path["id"])))


def intention_update(scope: Scope, call: Call) -> Answer:
    wanted, intention = decode(call, intentions.IntentionRequest), call.path["id"]
    intentions.update(scope.store, wanted, intention=intention, at=call.at.isoformat())
    return Answer(body={"ID": intention})


def intention_delete(scope: Scope, call: Call) -> Answer:
    _present(scope.store.intentions.get(call.path["id"]))
    scope.store.set_intention(call.path["id"], None)
    return Answer(body=True)


def exact_get(scope: Scope, call: Call) -> Answer:
    return _indexed(scope, _present(intentions.find(scope.store, *_pair(call))))


def exact_put(scope: Scope, call: Call) -> Answer:
    source, destination = _pair(call)
    body = decode(call, intentions.IntentionRequest)
    wanted = intentions.IntentionRequest(
        source_name=source,
        destination_name=destination,
        source_type=body.source_type,
        action=body.action,
        permissions=body.permissions,
        description=body.description,
        meta=body.meta,
    )
    old, at = intentions.find(scope.store, source, destination), call.at.isoformat()
    if old is None:
        intentions.create(scope.store, wanted, intention=call.new_id, at=at)
    else:
        intentions.update(scope.store, wanted, intention=old.id, at=at)
    return Answer(body=True)


def exact_delete(scope: Scope, call: Call) -> Answer:
    row = intentions.find(scope.store, *_pair(call))
    if row is not None:  # Consul answers true either way
        scope.store.set_intention(row.id, None)
    return Answer(body=True)


def intention_match(scope: Scope, call: Call) -> Answer:
    by, name = call.query.get("by", ""), call.query.get("name", "")
    if by not in ("source", "destination"):
        raise InputError("required query parameter 'by' must be 'source' or 'destination'")
    if not name:
        raise InputError("required query parameter 'name' not set")
    return _indexed(scope, {name: intentions.matching(scope.store, by=by, name=name)})


def intention_check(scope: Scope, call: Call) -> Answer:
    row = intentions.decide(scope.store, *_pair(call))
    return Answer(body={"Allowed": row is not None and row.action == "allow"})


def roots(scope: Scope, _call: Call) -> Answer:
    row, index = scope.store.ca, scope.store.topic_index(CA)
    assert row is not None, "every catalog has its CA"
    found = [_root(row.trust_domain, pem, index, active=at == 0) for at, pem in enumerate(trusted(row))]
    body = {"ActiveRootID": found[0]["ID"], "TrustDomain": row.trust_domain, "Roots": found}
    return Answer(body=body, index=index, topics=(CA,))


def _root(trust_domain: str, pem: str, index: int, *, active: bool) -> dict[str, Any]:
    certificate = x509.load_pem_x509_certificate(pem.encode())
    since, until = certificate_window(pem)
    identifier = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest.hex(":")
    return {
        "ID": identifier,
        "Name": "Outrider CA Root Cert",
        "SerialNumber": certificate.serial_number & 0xFFFF_FFFF_FFFF_FFFF,  # Consul's is 64 bits wide
        "SigningKeyID": identifier,
        "ExternalTrustDomain": trust_domain.partition(".")[0],
        "NotBefore": since.isoformat(),
        "NotAfter": until.isoformat(),
        "RootCert": pem,
        "IntermediateCerts": None,
        "Active": active,
        "PrivateKeyType": "ec",
        "PrivateKeyBits": 256,
        "CreateIndex": index,
        "ModifyIndex": index,
    }


def leaf(scope: Scope, call: Call) -> Answer:
    service = ServiceName(call.path["service"])
    made = scope.ca.make(service, call.at)
    since, until = certificate_window(made.certificate_pem)
    body = {
        "SerialNumber": made.serial,
        "CertPEM": made.certificate_pem,
        "PrivateKeyPEM": made.key_pem,
        "Service": service,
        "ServiceURI": spiffe_id(scope.ca.trust_domain, scope.ca.datacenter, service),
        "ValidAfter": since.isoformat(),
        "ValidBefore": until.isoformat(),
    }
    return Answer(body=body)


def agent_self(scope: Scope, _call: Call) -> Answer:
    config: dict[str, Any] = {
        "Datacenter": scope.store.datacenter,
        "NodeName": scope.own_node,
        "Revision": "outrider",
        "Server": True,
        "Version": scope.version,
    }
    # Without an intention nobody calls anybody: what Consul calls an ACL default policy of deny.
    debug = {"ACLDefaultPolicy": "deny", "ConnectEnabled": True}
    return Answer(body={"Config": config, "DebugConfig": debug, "Member": {"Name": scope.own_node}})


def leader(scope: Scope, _call: Call) -> Answer:
    return Answer(body=scope.address)


def peers(scope: Scope, _call: Call) -> Answer:
    return Answer(body=[scope.address])


def _pair(call: Call) -> tuple[str, str]:
    source, destination = call.query.get("source", ""), call.query.get("destination", "")
    if not source or not destination:
        raise InputError("required query parameters 'source' and 'destination'")
    return source, destination


def _present(row: IntentionRow | None) -> IntentionRow:
    if row is None:
        raise RefusedError("not_found", "Intention not found")
    return row


def _indexed(scope: Scope, body: object) -> Answer:
    return Answer(body=body, index=scope.store.topic_index(INTENTIONS), topics=(INTENTIONS,))


_INTENTIONS = "/connect/intentions"

ROUTES = (
    Route(method="GET", path=_INTENTIONS, access=Access.READ, handler=intention_list),
    Route(method="POST", path=_INTENTIONS, access=Access.INTENTIONS, handler=intention_create),
    # Before {id}, which would take their names for ids.
    Route(method="GET", path=f"{_INTENTIONS}/exact", access=Access.READ, handler=exact_get),
    Route(method="PUT", path=f"{_INTENTIONS}/exact", access=Access.INTENTIONS, handler=exact_put),
    Route(method="DELETE", path=f"{_INTENTIONS}/exact", access=Access.INTENTIONS, handler=exact_delete),
    Route(method="GET", path=f"{_INTENTIONS}/match", access=Access.READ, handler=intention_match),
    Route(method="GET", path=f"{_INTENTIONS}/check", access=Access.READ, handler=intention_check),
    Route(method="GET", path=f"{_INTENTIONS}/{{id}}", access=Access.READ, handler=intention_get),
    Route(method="PUT", path=f"{_INTENTIONS}/{{id}}", access=Access.INTENTIONS, handler=intention_update),
    Route(method="DELETE", path=f"{_INTENTIONS}/{{id}}", access=Access.INTENTIONS, handler=intention_delete),
    Route(method="GET", path="/connect/ca/roots", access=Access.READ, handler=roots),
    Route(method="GET", path="/agent/connect/ca/roots", access=Access.READ, handler=roots),
    Route(method="GET", path="/agent/connect/ca/leaf/{service}", access=Access.LEAF, handler=leaf),
    Route(method="GET", path="/agent/self", access=Access.READ, handler=agent_self),
    Route(method="GET", path="/status/leader", access=Access.READ, handler=leader),
    Route(method="GET", path="/status/peers", access=Access.READ, handler=peers),
)
