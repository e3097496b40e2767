"""Commands that look at the mesh and change what it is to run."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from localmesh.app.exits import Exit
from localmesh.cli import output, tables
from localmesh.cli.arguments import model_and_index
from localmesh.cli.connection import Command, Connection, connect, pages
from localmesh.cli.tables import Column
from localmesh.core.errors import InvalidRequest
from localmesh.rpc import manifest
from localmesh.v1 import registry_service_pb2 as registry
from localmesh.v1 import router_service_pb2 as router
from localmesh.v1 import types_pb2 as types

_MANIFEST_SUFFIXES = (".yaml", ".yml")


async def apply(command: Command) -> int:
    """`apply -f FILE`: declare models."""
    wanted = [found for source in command.arguments.file for found in manifests(source)]
    results = []
    async with connect(command.config) as mesh:
        for spec, policy in wanted:
            request = registry.ApplyModelRequest(spec=spec, policy=policy, dry_run=command.arguments.dry_run)
            response = await mesh.registry.ApplyModel(request, timeout=command.timeout)
            results.append(response)
            if not command.json:
                outcome = tables.word(registry.ApplyOutcome.Name(response.outcome), "APPLY_OUTCOME_")
                dry = " (dry run)" if command.arguments.dry_run else ""
                output.write_line(f"model {response.model.spec.name} {outcome}{dry}")
    if command.json:
        output.print_document({"results": [output.as_dict(response) for response in results]})
    return Exit.OK


async def delete(command: Command) -> int:
    """`delete MODEL...`: remove models."""
    results = {}
    async with connect(command.config) as mesh:
        for name in command.arguments.model:
            request = registry.DeleteModelRequest(name=name)
            response = await mesh.registry.DeleteModel(request, timeout=command.timeout)
            results[name] = output.as_dict(response)
            if not command.json:
                output.write_line(f"model {name} deleted; {tables.count(response.replicas, 'replica')} will stop")
    if command.json:
        output.print_document({"results": results})
    return Exit.OK


async def models(command: Command) -> int:
    """`models [MODEL]`: list models, or tell all of one."""
    if command.arguments.model:
        return await _one_model(command, command.arguments.model)
    async with connect(command.config) as mesh:
        found = [m async for m in pages(mesh.registry.ListModels, registry.ListModelsRequest, "models", command)]
        if command.json:
            output.print_message(registry.ListModelsResponse(models=found))
            return Exit.OK
        replicas = await _replicas(mesh, command)
    columns = [
        *(Column("MODEL"), Column("BACKEND"), Column("SOURCE"), Column("READY", right=True)),
        *(Column("MIN", right=True), Column("MAX", right=True), Column("IN FLIGHT", right=True), Column("REVISION")),
    ]
    rows = []
    for model in found:
        own = [r for r in replicas if r.ref.model == model.spec.name]
        ready = sum(r.state == types.REPLICA_STATE_READY for r in own)
        rows.append(
            [
                *(model.spec.name, model.spec.backend, model.spec.source, f"{ready}/{len(own)}"),
                *(str(model.policy.min_replicas), str(model.policy.max_replicas or "-")),
                *(str(sum(r.in_flight for r in own)), model.revision),
            ]
        )
    output.write_line(tables.render(columns, rows) if rows else "no models; declare one with `localmesh apply -f FILE`")
    return Exit.OK


async def replicas(command: Command) -> int:
    """`replicas`: list replicas."""
    async with connect(command.config) as mesh:
        found = await _replicas(mesh, command, model=command.arguments.model or "", node=command.arguments.node or "")
    if command.json:
        output.print_message(registry.ListReplicasResponse(replicas=found))
    else:
        output.write_line(_replica_table(found) if found else "no replicas")
    return Exit.OK


async def status(command: Command) -> int:
    """`status`: the mesh at a glance."""
    async with connect(command.config) as mesh:
        found = await mesh.router.GetStatus(router.GetStatusRequest(), timeout=command.timeout)
    if command.json:
        output.print_message(found)
        return Exit.OK
    store = "connected" if found.store_connected else "NOT connected"
    silence = found.store_silence.ToMilliseconds() / 1000
    rows = [
        ("mesh", found.mesh),
        ("version", found.version),
        ("router", found.router),
        ("reconciler", found.reconciler or "none"),
        ("store", f"{store}, revision {found.store_revision}, heard {tables.seconds(silence)} ago"),
        ("nodes", f"{found.live_nodes} live of {found.nodes}"),
        ("models", str(found.models)),
        ("replicas", f"{found.ready_replicas} ready of {found.replicas}"),
        *(("warning", warning) for warning in found.warnings),
    ]
    for name, text in rows:
        output.write_line(f"{name:<11} {text}")
    return Exit.OK


async def logs(command: Command) -> int:
    """`logs MODEL[#INDEX]`: the output of a model's replicas."""
    given = command.arguments
    model, index = model_and_index(given.model)
    if index is not None and given.index not in (None, index):
        raise InvalidRequest(f"{given.model} and --index {given.index} name different replicas", field="index")
    request = router.StreamLogsRequest(
        model=model,
        index=given.index if index is None else index,
        node=given.node or "",
        follow=given.follow,
        tail_lines=given.tail,
    )
    async with connect(command.config) as mesh:
        stream = mesh.router.StreamLogs(request, timeout=None if given.follow else command.timeout)
        async for found in stream:
            if command.json:
                output.print_document(output.as_dict(found), one_line=True)
                continue
            where = f"{found.ref.node}/{found.ref.index}"
            when = f"{found.time.ToJsonString()} " if given.timestamps else ""
            if found.lost_bytes:
                output.write_text(f"{when}{where} | ... {tables.size(found.lost_bytes)} left out: too much to read\n")
            output.write_text(f"{when}{where} | {found.line}\n")
    return Exit.OK


async def _one_model(command: Command, name: str) -> int:
    async with connect(command.config) as mesh:
        found = await mesh.registry.GetModel(registry.GetModelRequest(name=name), timeout=command.timeout)
    if command.json:
        output.print_message(found)
        return Exit.OK
    spec, policy = found.model.spec, found.model.policy
    rollout = tables.word(types.Rollout.Name(policy.rollout), "ROLLOUT_")
    selector = ",".join(f"{k}={v}" for k, v in sorted(policy.node_selector.items()))
    count = f"at least {policy.min_replicas}, at most {policy.max_replicas or 'as many as the nodes take'}"
    for title, text in (
        ("model", spec.name),
        ("backend", spec.backend),
        ("source", spec.source),
        ("revision", found.model.revision),
        ("replicas", "one on every node that matches" if policy.spread_all else count),
        ("rollout", "overlap" if rollout == "unspecified" else rollout),
        *((("selector", selector),) if selector else ()),
        *(("selector", _term(term)) for term in policy.selector_terms),
        *((("groups", ", ".join(policy.groups)),) if policy.groups else ()),
        *((("pinned", "yes"),) if policy.pinned else ()),
        *(("failure", _failure(failure)) for failure in found.failures),
    ):
        output.write_line(f"{title:<11} {text}")
    if found.replicas:
        output.write_line("\n" + _replica_table(found.replicas))
    return Exit.OK


def _failure(failure: types.LoadFailure) -> str:
    often = f" ({failure.attempts} times in a row)" if failure.attempts > 1 else ""
    return f"on {failure.node}: {failure.reason}: {failure.message}{often}"


def _term(term: types.SelectorTerm) -> str:
    operator = tables.word(types.SelectorOperator.Name(term.operator), "SELECTOR_OPERATOR_").replace("_", " ")
    return " ".join([term.key, operator, *([f"({', '.join(term.values)})"] if term.values else [])])


def _replica_table(found: Iterable[types.Replica]) -> str:
    columns = [
        *(Column("MODEL"), Column("NODE"), Column("INDEX", right=True), Column("STATE"), Column("IN FLIGHT", True)),
        *(Column("LIMIT", right=True), Column("MEMORY", right=True), Column("ENDPOINT"), Column("REVISION")),
    ]
    rows = []
    for replica in found:
        state = tables.word(types.ReplicaState.Name(replica.state), "REPLICA_STATE_")
        if replica.state == types.REPLICA_STATE_READY and not replica.routable:
            state += " (not routable)"
        elif replica.progress.total_bytes:
            state += f" {100 * replica.progress.done_bytes // replica.progress.total_bytes} %"
        rows.append(
            [
                *(replica.ref.model, replica.ref.node, str(replica.ref.index), state, str(replica.in_flight)),
                *(str(replica.limit or "-"), tables.size(sum(replica.devices.values())), replica.endpoint),
                replica.revision,
            ]
        )
    return tables.render(columns, rows)


async def _replicas(mesh: Connection, command: Command, *, model: str = "", node: str = "") -> list[types.Replica]:
    def request(**page: Any) -> registry.ListReplicasRequest:
        return registry.ListReplicasRequest(model=model, node=node, **page)

    return [r async for r in pages(mesh.registry.ListReplicas, request, "replicas", command)]


def manifests(source: str) -> Iterable[manifest.Declared]:
    """Read the models of a file, of all YAML files of a folder, or of stdin ("-")."""
    if source == "-":
        return manifest.parse_models(sys.stdin.buffer.read(), origin="stdin")
    path = Path(source)
    try:
        paths = sorted(p for p in path.iterdir() if p.suffix in _MANIFEST_SUFFIXES) if path.is_dir() else [path]
        texts = [(str(each), each.read_bytes()) for each in paths]
    except OSError as problem:
        raise InvalidRequest(f"cannot read {problem.filename}: {problem.strerror}", field="file") from None
    if not texts:
        raise InvalidRequest(f"there is no .yaml file in the folder {source}", field="file")
    return [found for origin, text in texts for found in manifest.parse_models(text, origin=origin)]
