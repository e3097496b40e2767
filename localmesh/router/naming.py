"""Which model a forwarded call is for."""

from localmesh.core.errors import InvalidRequest, MethodUnknown, ModelNotNamed
from localmesh.core.ids import ModelName, model_name
from localmesh.router.peek import model_field
from localmesh.rpc.metadata import MODEL

INFERENCE_SERVICE = "localmesh.v1.InferenceService"
BACKEND_SERVICE = "backend.Backend"
FORWARDED_SERVICES = (INFERENCE_SERVICE, BACKEND_SERVICE)
"""Services that replicas are known to have. Any other one is forwarded, too, but cannot be reflected here."""

_OWN_SERVICES = ("localmesh.v1.RouterService", "grpc.health.v1.Health", "grpc.reflection.")


def names_model_in_message(method: str) -> bool:
    """Whether the first message of a call of the method may name the model, in field 1."""
    return method.startswith(f"/{INFERENCE_SERVICE}/")


def model_of(method: str, in_metadata: str, first_message: bytes) -> ModelName:
    """Return the model that a call is for.

    Args:
        method: Full name, "/package.Service/Method".
        in_metadata: Value of the metadata "localmesh-model"; empty where there is none.
        first_message: The call's first message; looked at only where `names_model_in_message`.

    Raises:
        ModelNotNamed: Neither names one.
        InvalidRequest: Metadata and message name different ones, or the name cannot be one.
        MethodUnknown: The method belongs to a service of the router itself, which has no such method.
    """
    in_message = model_field(first_message) if names_model_in_message(method) else ""
    if in_metadata and in_message and in_metadata != in_message:
        raise InvalidRequest(
            f"the metadata {MODEL!r} names the model {in_metadata!r}, the request {in_message!r}: name one",
            field="model",
        )
    named = in_metadata or in_message
    if not named:
        raise _not_named(method)
    try:
        return model_name(named)
    except ValueError as error:
        raise InvalidRequest(f"the call names {error}", field="model") from error


def _not_named(method: str) -> ModelNotNamed | MethodUnknown:
    if method[1:].startswith(_OWN_SERVICES):
        return MethodUnknown(f"the router has no method {method}", method=method)
    where = f"the metadata {MODEL!r}"
    if names_model_in_message(method):
        where += " or the request's field 'model'"
    return ModelNotNamed(f"{method} is forwarded to a replica of a model: say of which one, with {where}")
