"""Every operation for people says what its caller needs; none is open by having been forgotten."""

from controller.permissions import RULES, Where
from outrider.v1 import access_pb2, archive_pb2, insight_pb2, operator_pb2, stores_pb2

SERVICES = (
    operator_pb2.DESCRIPTOR.services_by_name["OperatorService"],
    stores_pb2.DESCRIPTOR.services_by_name["StoreService"],
    access_pb2.DESCRIPTOR.services_by_name["AccessService"],
    insight_pb2.DESCRIPTOR.services_by_name["InsightService"],
    archive_pb2.DESCRIPTOR.services_by_name["ArchiveService"],
)


def test_the_table_of_permissions_names_exactly_the_operations() -> None:
    methods = [method.name for service in SERVICES for method in service.methods]
    assert len(methods) == len(set(methods)), "the table knows methods by name alone"
    missing, gone = set(methods) - set(RULES), set(RULES) - set(methods)
    assert not missing, f"controller/permissions.py: say what {sorted(missing)} need"
    assert not gone, f"controller/permissions.py: {sorted(gone)} are no operations"


def test_what_an_operation_is_about_is_in_its_request() -> None:
    needed = {Where.JOB: "job", Where.ALLOCATION: "alloc", Where.SUBMITTED: "job", Where.NAMESPACE: "namespace"}
    for method in (method for service in SERVICES for method in service.methods):
        field = needed.get(RULES[method.name].where)
        assert field is None or field in method.input_type.fields_by_name, method.name
