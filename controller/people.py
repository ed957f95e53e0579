"""What the services for people share: who calls, whether they may, and what the audit log says of it.

One `OngoingCall` for each call, in the task that serves it. Owns no service and no rule.
"""

from contextvars import ContextVar
from typing import Any

from controller.audit import AuditLog
from controller.callers import Caller, Callers
from controller.core.access import Access
from controller.core.commands import Reply
from controller.core.state import State
from controller.parts import Parts
from controller.permissions import RULES, check, denied, job_namespace
from controller.rpc import Context, Edge
from outrider.clock import wall_s
from outrider.errors import OutriderError, RefusedError
from outrider.log import Log
from outrider.model.access import EVERYWHERE, AuditEntry, Capability

LEADERSHIP_TIMEOUT_S = 10.0


class OngoingCall:
    """Who calls, and what the audit log will say of the call."""

    def __init__(self, caller: Caller, namespace: str) -> None:
        self.caller = caller
        self.namespace = namespace
        self.subject = ""
        self.changes: tuple[str, ...] = ()
        self.written = False


_CALL: ContextVar[OngoingCall] = ContextVar("call")


class PeopleEdge(Edge):
    """Base of the services for people. `call` is there from `authorize` on."""

    def __init__(self, parts: Parts, *, callers: Callers, audit: AuditLog, log: Log) -> None:
        super().__init__(log=log, refused=parts.refused)
        self._engine = parts.engine
        self._callers = callers
        self._audit = audit

    @property
    def call(self) -> OngoingCall:
        return _CALL.get()

    @property
    def state(self) -> State:
        return self._engine.state

    @property
    def access(self) -> Access:
        return self._engine.state.access

    def authorize(self, context: Context, method: str, request: Any) -> None:
        caller = self._callers.identify(context)
        call = OngoingCall(caller, EVERYWHERE)
        _CALL.set(call)
        call.subject = _subject(request)
        call.namespace = check(self.state, caller, method, request)

    async def admit(self) -> None:
        """A controller that cannot tell whether it still leads waits a moment; then it answers with what it knows."""
        await self._engine.settled(LEADERSHIP_TIMEOUT_S)

    def require(self, capability: Capability, namespace: str, subject: str) -> None:
        """For what only the operation itself finds out. Raises RefusedError("denied")."""
        self.call.namespace, self.call.subject = namespace, subject
        if not self.access.allowed(self.call.caller.roles, capability, namespace):
            raise denied(self.call.caller, capability, subject)

    def may(self, capability: Capability, namespace: str) -> bool:
        return bool(self.access.allowed(self.call.caller.roles, capability, namespace))

    def sees(self, namespace: str) -> bool:
        return self.may(Capability.READ, namespace)

    def sees_job(self, job: str) -> bool:
        return self.sees(job_namespace(self.state, job))

    def begun(self, method: str) -> None:
        """For what may go on for long, and end with its caller's connection: it is written down before it begins."""
        self._write(method, "begun", ())
        self.call.written = True

    def concluded(self, method: str, failure: OutriderError | None) -> None:
        call = _CALL.get(None)
        rule = RULES.get(method)
        if call is None or rule is None or not rule.changing or (call.written and failure is None):
            return  # who is nobody changes nothing: `abort` counts and logs the attempt
        self._write(method, _outcome(failure), call.changes if failure is None else ())

    def _write(self, method: str, outcome: str, changes: tuple[str, ...]) -> None:
        call = self.call
        self._audit.write(
            AuditEntry(
                at_s=wall_s(),
                caller=call.caller.name,
                by=call.caller.by,
                peer=call.caller.peer,
                call=method,
                namespace="" if call.namespace == EVERYWHERE else call.namespace,
                subject=call.subject,
                outcome=outcome,
                changes=changes,
            )
        )


def done(reply: Reply) -> Reply:
    """Raises RefusedError where the core said no."""
    if reply.code:
        raise RefusedError(reply.code, reply.message)
    return reply


def _outcome(failure: OutriderError | None) -> str:
    match failure:
        case None:
            return "done"
        case RefusedError():
            return failure.code
        case _:
            return type(failure).__name__.removesuffix("Error").lower()


_SUBJECTS = ("job", "alloc", "node", "name", "user", "id")


def _subject(request: Any) -> str:
    """What the request names: a job, a node ... ; "" where it names nothing."""
    descriptor = getattr(request, "DESCRIPTOR", None)
    names = descriptor.fields_by_name if descriptor is not None else {}
    for field in _SUBJECTS:
        if field in names:
            value = getattr(request, field)
            return str(value if isinstance(value, str) else getattr(value, "name", ""))[:200]
    return ""
