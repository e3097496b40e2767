"""Commands that show nodes, and what operators do to them."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

from localmesh.app.exits import Exit
from localmesh.cli import output, tables
from localmesh.cli.connection import Command, connect, pages
from localmesh.cli.tables import Column
from localmesh.core.budgets import EVERY_DEVICE
from localmesh.core.errors import InvalidRequest
from localmesh.v1 import registry_service_pb2 as registry
from localmesh.v1 import router_service_pb2 as router
from localmesh.v1 import types_pb2 as types

VERBS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "approve": "let a node in that waits, and bind its name to its key",
        "cordon": "keep new replicas and requests from a node; what runs finishes",
        "uncordon": "end a cordon",
        "drain": "empty a node: move its replicas to others, then stop them",
        "resume": "end a drain",
        "remove": "forget a node: approval, key, labels and overrides",
    }
)
"""What `localmesh node VERB NODE...` can do, by verb."""

_DONE: Final = {
    "approve": "is approved",
    "cordon": "is cordoned",
    "uncordon": "is not cordoned any more",
    "drain": "is being drained",
    "resume": "is not drained any more",
    "remove": "is forgotten",
}
_KEY_DIGITS: Final = 16


async def nodes(command: Command) -> int:
    """`nodes`: list nodes."""
    async with connect(command.config) as mesh:
        found = [n async for n in pages(mesh.registry.ListNodes, registry.ListNodesRequest, "nodes", command)]
    if command.json:
        output.print_message(registry.ListNodesResponse(nodes=found))
        return Exit.OK
    wide = command.arguments.wide
    output.write_line(node_table(found, wide=wide) if found else "no nodes; start one with `localmesh worker`")
    for note in (*_waiting_notes(found), *_engine_notes(found)):
        output.write_line(note)
    return Exit.OK


async def release_guard(command: Command) -> int:
    """`guard release`: let what is on silent nodes be replaced."""
    async with connect(command.config) as mesh:
        response = await mesh.router.ReleaseGuard(router.ReleaseGuardRequest(), timeout=command.timeout)
    if command.json:
        output.print_message(response)
    elif response.released:
        output.write_line(f"the guard is released; taken for dead unless they come back: {', '.join(response.nodes)}")
    else:
        output.write_line("the guard was not on")
    return Exit.OK


async def change(command: Command) -> int:
    """`node VERB NODE...`: change how nodes stand."""
    verb = command.arguments.verb
    results = {}
    async with connect(command.config) as mesh:
        for name in command.arguments.node:
            response = await _call(mesh.registry, verb, name, command)
            results[name] = output.as_dict(response)
            if not command.json:
                output.write_line(f"node {name} {_DONE[verb]}{_more(verb, response)}")
    if command.json:
        output.print_document({"results": results})
    return Exit.OK


async def label(command: Command) -> int:
    """`node label NODE KEY=VALUE|KEY-...`: set and remove labels."""
    request = registry.SetNodeLabelsRequest(node=command.arguments.node)
    for text in command.arguments.label:
        key, separator, value = text.partition("=")
        if separator and key:
            request.set[key] = value
        elif text.endswith("-") and len(text) > 1:
            request.remove.append(text[:-1])
        else:
            raise InvalidRequest(f"expected KEY=VALUE, or KEY- to remove it, not {text!r}", field="label")
    async with connect(command.config) as mesh:
        response = await mesh.registry.SetNodeLabels(request, timeout=command.timeout)
    if command.json:
        output.print_message(response)
    else:
        output.write_line(f"node {response.node.name} has the labels {labels_text(response.node.labels)}")
    return Exit.OK


async def override(command: Command) -> int:
    """`node override NODE ...`: say how much of a node may be used, or take it back."""
    given = command.arguments
    sets = given.max_replicas_per_model is not None or bool(given.memory_budget)
    if sets == bool(given.reset):
        raise InvalidRequest("name what to override, or --reset, one of both", field="override")
    async with connect(command.config) as mesh:
        if given.reset:
            reset = registry.ResetNodeOverridesRequest(
                node=given.node,
                max_replicas_per_model=given.reset == "max-replicas-per-model",
                memory_budgets=given.reset == "memory-budget",
            )
            response = await mesh.registry.ResetNodeOverrides(reset, timeout=command.timeout)
        else:
            request = registry.SetNodeOverridesRequest(node=given.node, overrides=_overrides(given))
            response = await mesh.registry.SetNodeOverrides(request, timeout=command.timeout)
    if command.json:
        output.print_message(response)
    else:
        output.write_line(node_table([response.node]))
    return Exit.OK


def node_table(found: Iterable[types.Node], *, wide: bool = False) -> str:
    """Return nodes with their devices for people; an override is shown with what the worker says."""
    columns = [
        *(Column("NODE"), Column("STATE"), Column("ENDPOINT"), Column("SLOTS"), Column("DEVICE")),
        *(Column("CLAIMED", right=True), Column("BUDGET"), Column("FREE", right=True), Column("CPU LOAD", right=True)),
        *(Column("ENGINES"), *((Column("KEY"), Column("LABELS")) if wide else ())),
    ]
    rows: list[list[str]] = []
    for node in found:
        load = f"{100 * node.cpu_load:.0f} %" if node.HasField("cpu_load") else ""
        engines = ",".join(e.name for e in node.engines if e.available)
        head = [node.name, state_text(node), node.endpoint, slots_text(node)]
        tail = [load, engines, *((node.key_fingerprint[:_KEY_DIGITS], labels_text(node.labels)) if wide else ())]
        for number, device in enumerate(node.devices or [types.Device()]):
            first = number == 0
            free = tables.size(device.free_bytes) if device.HasField("free_bytes") else ""
            memory = [tables.size(device.claimed_bytes), budget_text(node, device)] if device.id else ["", ""]
            name = device.name if device.kind == "gpu" and device.name else device.id
            rows.append(
                [*(head if first else " " * len(head)), name, *memory, free, *(tail if first else " " * len(tail))]
            )
    return tables.render(columns, rows)


def state_text(node: types.Node) -> str:
    """Return how a node stands, with what an operator said of it besides: `gone, cordoned`."""
    state = tables.word(types.NodeState.Name(node.state), "NODE_STATE_")
    also = [name for name, so in (("draining", node.draining), ("cordoned", node.cordoned)) if so and name != state]
    return ", ".join([state, *also])


def slots_text(node: types.Node) -> str:
    """Return how many replicas of a model a node may hold, and by whose word: `2 (worker: 1)`."""
    if node.overrides.max_replicas_per_model:
        own = node.worker_max_replicas_per_model
        return f"{node.overrides.max_replicas_per_model} ({f'worker: {own}' if own else 'override'})"
    return str(node.max_replicas_per_model or "")


def budget_text(node: types.Node, device: types.Device) -> str:
    """Return a device's budget, and by whose word: `8.0 GiB (80% of 10.0 GiB; worker: 9.0 GiB)`."""
    text = node.overrides.memory_budgets.get(device.id) or node.overrides.memory_budgets.get(EVERY_DEVICE)
    budget = tables.size(device.budget_bytes)
    if not text:
        return budget
    own = tables.size(device.worker_budget_bytes)
    return f"{budget} ({text} of {tables.size(device.total_bytes)}; worker: {own})"


def labels_text(labels: Mapping[str, str]) -> str:
    """Return labels by name: `a=1,b=2`."""
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


async def _call(stub: Any, verb: str, node: str, command: Command) -> Any:
    given, timeout = command.arguments, command.timeout
    match verb:
        case "approve":
            request = registry.ApproveNodeRequest(node=node, key_fingerprint=given.key or "")
            return await stub.ApproveNode(request, timeout=timeout)
        case "cordon":
            return await stub.CordonNode(registry.CordonNodeRequest(node=node), timeout=timeout)
        case "uncordon":
            return await stub.UncordonNode(registry.UncordonNodeRequest(node=node), timeout=timeout)
        case "drain":
            return await stub.DrainNode(registry.DrainNodeRequest(node=node), timeout=timeout)
        case "resume":
            return await stub.ResumeNode(registry.ResumeNodeRequest(node=node), timeout=timeout)
    return await stub.RemoveNode(registry.RemoveNodeRequest(node=node, force=given.force), timeout=timeout)


def _more(verb: str, response: Any) -> str:
    match verb:
        case "drain":
            return f"; {tables.count(response.replicas, 'replica')} will leave"
        case "remove" if response.replicas:
            return f" with {tables.count(response.replicas, 'replica')}"
        case "remove":
            return ""
    if response.node.state == types.NODE_STATE_GONE:
        return "; it is not here now" if verb != "approve" else "; it is let in when it asks again"
    state = state_text(response.node)
    return "" if state in _DONE[verb] else f": it is {state}"


def _overrides(given: Any) -> types.NodeOverrides:
    if given.max_replicas_per_model is not None and given.max_replicas_per_model < 1:
        raise InvalidRequest("--max-replicas-per-model is at least 1; cordon a node to keep replicas away", field="N")
    overrides = types.NodeOverrides(max_replicas_per_model=given.max_replicas_per_model or 0)
    for text in given.memory_budget or ():
        device, _, size = text.rpartition("=")
        overrides.memory_budgets[device or EVERY_DEVICE] = size
    return overrides


def _waiting_notes(found: Iterable[types.Node]) -> list[str]:
    return [
        f"{node.name} waits for approval: `localmesh node approve {node.name}` (its key: {node.key_fingerprint})"
        for node in found
        if node.state == types.NODE_STATE_PENDING
    ]


def _engine_notes(found: Iterable[types.Node]) -> list[str]:
    notes: dict[str, list[str]] = {}
    for node in found:
        for engine in node.engines:
            if not engine.available and engine.detail:
                notes.setdefault(f"{engine.name}: {engine.detail}", []).append(node.name)
    return [f"{note} ({', '.join(names)})" for note, names in notes.items()]
