"""Why a model goes where it goes: `explain`."""

from typing import Any

from localmesh.app.exits import Exit
from localmesh.cli import output, tables
from localmesh.cli.commands_admin import manifests
from localmesh.cli.connection import Command, connect
from localmesh.cli.tables import Column
from localmesh.core.errors import InvalidRequest
from localmesh.v1 import router_service_pb2 as router

_OUTCOMES = {
    router.FILTER_OUTCOME_PASSED: "passed",
    router.FILTER_OUTCOME_FAILED: "FAILED",
    router.FILTER_OUTCOME_SKIPPED: "not asked",
}


async def explain(command: Command) -> int:
    """`explain MODEL [-f FILE]`: where its next replica would go, and why not elsewhere."""
    request = _request(command)
    async with connect(command.config) as mesh:
        found = await mesh.router.ExplainPlacement(request, timeout=command.timeout)
    if command.json:
        output.print_message(found)
        return Exit.OK
    for title, text in _head(found):
        output.write_line(f"{title:<11} {text}")
    if found.nodes:
        output.write_line("\n" + _node_table(found))
        output.write_line("\n" + _device_table(found))
    if found.nodes and command.arguments.verbose:
        output.write_line("\n" + _filter_table(found))
    return Exit.OK


def _request(command: Command) -> Any:
    name, source = command.arguments.model, command.arguments.file
    if source is None:
        return router.ExplainPlacementRequest(model=name)
    for spec, policy in manifests(source):
        if spec.name == name:
            return router.ExplainPlacementRequest(model=name, spec=spec, policy=policy)
    raise InvalidRequest(f"there is no model {name!r} in {'stdin' if source == '-' else source}", field="file")


def _head(found: Any) -> list[tuple[str, str]]:
    ref, devices = found.chosen.ref, found.chosen.devices
    place = ", ".join(f"{device} ({tables.size(size)})" for device, size in sorted(devices.items()))
    return [
        ("model", found.model),
        ("revision", found.revision + (" (dry run: not applied)" if found.dry_run else "")),
        ("replicas", f"{found.replicas} there, at least {found.min_replicas} kept"),
        ("next", f"{ref.node}, index {ref.index}, on {place}" if found.HasField("chosen") else "nowhere"),
        *([("reason", f"{found.reason}: {found.message}")] if found.reason else []),
        *(("failure", f"on {f.node}: {f.reason}: {f.message}") for f in found.failures),
        *(("note", note) for note in found.notes),
    ]


def _node_table(found: Any) -> str:
    columns = [Column("NODE"), Column("RANK", right=True), Column("STOPPED BY"), Column("WHY")]
    rows = []
    for node in found.nodes:
        failed = [f for f in node.filters if f.outcome == router.FILTER_OUTCOME_FAILED]
        scores = " ".join(f"{s.scorer}={s.score}" for s in node.scores)
        why = "; ".join(f.reason.removeprefix(f"{node.node} ") for f in failed) or scores
        rows.append([node.node, str(node.rank or "-"), ", ".join(f.filter for f in failed), why])
    return tables.render(columns, rows)


def _device_table(found: Any) -> str:
    columns = [
        *(Column("NODE"), Column("DEVICE"), Column("BUDGET", right=True), Column("CLAIMED", right=True)),
        *(Column("ROOM", right=True), Column("NEEDED", right=True), Column("VERDICT")),
    ]
    rows = []
    for node in found.nodes:
        for device in node.devices:
            sizes = (device.budget_bytes, device.claimed_bytes, max(0, device.room_bytes), device.needed_bytes)
            verdict = device.reason or ("would be taken" if device.chosen else "fits")
            rows.append([node.node, device.id, *(tables.size(size) for size in sizes), verdict])
    return tables.render(columns, rows)


def _filter_table(found: Any) -> str:
    columns = [Column("NODE"), Column("FILTER"), Column("VERDICT"), Column("WHY")]
    rows = [[n.node, f.filter, _OUTCOMES.get(f.outcome, "?"), f.reason] for n in found.nodes for f in n.filters]
    return tables.render(columns, rows)
