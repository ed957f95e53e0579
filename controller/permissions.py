"""What each operation needs: a capability, and where. An operation that is not named here is refused to everybody.

Pure: a table, and the answer to "may this caller?". A test compares the table with the services' methods.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from controller.callers import Caller
from controller.core import views
from controller.core.state import State
from outrider.errors import RefusedError
from outrider.ids import DEFAULT_NAMESPACE, JobName, ServiceName
from outrider.model.access import EVERYWHERE, Capability
from outrider.model.allocation import Allocation


class Where(StrEnum):
    """Where the caller must have the capability."""

    FLEET = "fleet"  # in what belongs to no namespace
    SOMEWHERE = "somewhere"  # in one namespace: the operation shows, or touches, what its caller may
    JOB = "job"  # in the namespace of the job that `request.job` names
    ALLOCATION = "allocation"  # of the allocation that `request.alloc` begins
    SUBMITTED = "submitted"  # of the job that the request brings
    NAMESPACE = "namespace"  # that `request.namespace` names
    DESTINATION = "destination"  # of the service that is called
    NOWHERE = "nowhere"  # whoever is a user may


class Rule(NamedTuple):
    capability: Capability
    where: Where
    changing: bool = False  # written to the audit log


_READ, _SUBMIT, _ADMIN = Capability.READ, Capability.SUBMIT, Capability.ADMIN
RULES: Mapping[str, Rule] = {
    # OperatorService
    "GetFleet": Rule(_READ, Where.SOMEWHERE),
    "SubmitJob": Rule(_SUBMIT, Where.SUBMITTED, changing=True),
    "PlanJob": Rule(_SUBMIT, Where.SUBMITTED),
    "StopJob": Rule(_SUBMIT, Where.JOB, changing=True),
    "DispatchJob": Rule(_SUBMIT, Where.JOB, changing=True),
    "RevertJob": Rule(_SUBMIT, Where.JOB, changing=True),
    "MoveAllocation": Rule(Capability.OPERATE, Where.ALLOCATION, changing=True),
    "ScaleJob": Rule(Capability.OPERATE, Where.JOB, changing=True),
    "SteerRollout": Rule(Capability.OPERATE, Where.JOB, changing=True),
    "RestartJob": Rule(Capability.OPERATE, Where.JOB, changing=True),
    "SteerAllocation": Rule(Capability.OPERATE, Where.ALLOCATION, changing=True),
    "SteerNode": Rule(Capability.OPERATE, Where.FLEET, changing=True),
    "GetJobHistory": Rule(_READ, Where.JOB),
    "ListJobs": Rule(_READ, Where.SOMEWHERE),
    "GetJob": Rule(_READ, Where.JOB),
    "WatchJob": Rule(_READ, Where.JOB),
    "ListNodes": Rule(_READ, Where.SOMEWHERE),
    "GetNode": Rule(_READ, Where.SOMEWHERE),
    "ListAllocations": Rule(_READ, Where.SOMEWHERE),
    "GetAllocation": Rule(_READ, Where.ALLOCATION),
    "ExplainAllocation": Rule(_READ, Where.ALLOCATION),
    "Logs": Rule(_READ, Where.ALLOCATION),
    "Exec": Rule(Capability.EXEC, Where.SOMEWHERE, changing=True),
    "WatchEvents": Rule(_READ, Where.SOMEWHERE),
    "ListIntentions": Rule(_READ, Where.SOMEWHERE),
    "CreateIntention": Rule(_SUBMIT, Where.DESTINATION, changing=True),
    "DeleteIntention": Rule(_SUBMIT, Where.DESTINATION, changing=True),
    "CheckIntention": Rule(_READ, Where.SOMEWHERE),
    "SetLogLevel": Rule(_ADMIN, Where.FLEET, changing=True),
    # StoreService
    "PutSecret": Rule(Capability.SECRETS, Where.NAMESPACE, changing=True),
    "ListSecrets": Rule(Capability.SECRETS, Where.SOMEWHERE),
    "DeleteSecret": Rule(Capability.SECRETS, Where.NAMESPACE, changing=True),
    "CreateVolume": Rule(_SUBMIT, Where.SOMEWHERE, changing=True),
    "ListVolumes": Rule(_READ, Where.SOMEWHERE),
    "DeleteVolume": Rule(_SUBMIT, Where.NAMESPACE, changing=True),
    "SnapshotVolume": Rule(Capability.OPERATE, Where.NAMESPACE, changing=True),
    "RestoreVolume": Rule(_SUBMIT, Where.NAMESPACE, changing=True),
    "RekeySecrets": Rule(_ADMIN, Where.FLEET, changing=True),
    # ArchiveService
    "SaveSnapshot": Rule(_ADMIN, Where.FLEET),
    "RestoreSnapshot": Rule(_ADMIN, Where.FLEET, changing=True),
    "Inspect": Rule(_ADMIN, Where.FLEET),
    # InsightService
    "GetMeshGraph": Rule(_READ, Where.SOMEWHERE),
    "ExplainCall": Rule(_READ, Where.SOMEWHERE),
    "TapCalls": Rule(_READ, Where.SOMEWHERE, changing=True),
    "ListCertificates": Rule(_READ, Where.SOMEWHERE),
    "RotateRoot": Rule(_ADMIN, Where.FLEET, changing=True),
    # AccessService
    "WhoAmI": Rule(_READ, Where.NOWHERE),
    "Can": Rule(_READ, Where.NOWHERE),
    "ListNamespaces": Rule(_READ, Where.SOMEWHERE),
    "SetNamespace": Rule(_ADMIN, Where.FLEET, changing=True),
    "DeleteNamespace": Rule(_ADMIN, Where.FLEET, changing=True),
    "ListRoles": Rule(_ADMIN, Where.FLEET),
    "SetRole": Rule(_ADMIN, Where.FLEET, changing=True),
    "DeleteRole": Rule(_ADMIN, Where.FLEET, changing=True),
    "ListUsers": Rule(_ADMIN, Where.FLEET),
    "SetUser": Rule(_ADMIN, Where.FLEET, changing=True),
    "DeleteUser": Rule(_ADMIN, Where.FLEET, changing=True),
    "IssueCertificate": Rule(_ADMIN, Where.FLEET, changing=True),
    "CreateToken": Rule(_ADMIN, Where.FLEET, changing=True),
    "ListTokens": Rule(_ADMIN, Where.FLEET),
    "RevokeToken": Rule(_ADMIN, Where.FLEET, changing=True),
    "RevokeNode": Rule(_ADMIN, Where.FLEET, changing=True),
    "GetCa": Rule(_ADMIN, Where.FLEET),
    "RotateCa": Rule(_ADMIN, Where.FLEET, changing=True),
    "RetireCa": Rule(_ADMIN, Where.FLEET, changing=True),
    "ReadAudit": Rule(_ADMIN, Where.FLEET),
}


def check(state: State, caller: Caller, method: str, request: Any) -> str:
    """The namespace that the call is about, EVERYWHERE for none. Raises RefusedError("denied")."""
    rule = RULES.get(method)
    if rule is None:
        raise RefusedError("denied", f"{method} is nobody's to call")
    if rule.where is Where.NOWHERE:
        return EVERYWHERE
    if rule.where is Where.SOMEWHERE:
        if state.access.allowed_somewhere(caller.roles, rule.capability):
            return EVERYWHERE
        raise denied(caller, rule.capability, "anywhere")
    namespace, subject = _about(state, rule.where, request)
    if not state.access.allowed(caller.roles, rule.capability, namespace):
        raise denied(caller, rule.capability, subject)
    return namespace


def denied(caller: Caller, capability: Capability, subject: str) -> RefusedError:
    """The same for what is not there as for what is another's: a stranger learns nothing from it."""
    hint = f"`outrider auth can {capability} --namespace NAME` tells where"
    return RefusedError("denied", f"{caller.name} may not {capability} {subject}; {hint}")


def job_namespace(state: State, job: str) -> str:
    """EVERYWHERE where there is no such job: only who may look everywhere is told so."""
    entry = state.jobs.get(JobName(job))
    return entry.job.namespace if entry is not None else EVERYWHERE


def service_namespace(state: State, service: str) -> str:
    """EVERYWHERE where no job has the name, or more than one namespace's."""
    owners = set(state.service_owners.get(ServiceName(service), {}).values())
    return owners.pop() if len(owners) == 1 else EVERYWHERE


def _about(state: State, where: Where, request: Any) -> tuple[str, str]:
    """The namespace, and what the call is about, for people."""
    match where:
        case Where.FLEET:
            return EVERYWHERE, "the fleet itself"
        case Where.JOB:
            return job_namespace(state, request.job), f"job {request.job[:80]!r}"
        case Where.ALLOCATION:
            return allocation_namespace(state, request.alloc), f"allocation {request.alloc[:80]!r}"
        case Where.SUBMITTED:
            namespace = request.job.namespace or DEFAULT_NAMESPACE
            return namespace, f"in namespace {namespace[:80]!r}"
        case Where.NAMESPACE:
            namespace = request.namespace or DEFAULT_NAMESPACE
            return namespace, f"in namespace {namespace[:80]!r}"
        case Where.DESTINATION:
            ends = request.intention if hasattr(request, "intention") else request
            return service_namespace(state, ends.destination), f"who calls {ends.destination[:80]!r}"
        case _:
            raise AssertionError(f"{where} needs no look at the request")


def allocation_namespace(state: State, prefix: str) -> str:
    """EVERYWHERE where `prefix` begins none, or allocations of several namespaces."""
    match views.allocation_by_prefix(state, prefix):
        case Allocation() as found:
            return job_namespace(state, found.job)
        case views.Ambiguous(matches=matches):
            shown = {each.job for each in (views.allocation(state, match) for match in matches) if each is not None}
            namespaces = {job_namespace(state, job) for job in shown}
            return namespaces.pop() if len(namespaces) == 1 else EVERYWHERE
        case _:
            return EVERYWHERE
