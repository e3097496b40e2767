"""Placements on nodes with GPUs, shared memory, groups, gangs and labels, as properties of any sequence of events."""

from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from localmesh.core.errors import ModelNotFound, PlacementFailed
from localmesh.core.ids import CPU, DeviceId, ModelName, NodeName
from localmesh.core.labels import Operator, SelectorTerm
from localmesh.core.records import (
    ApprovalRecord,
    DeviceRecord,
    EngineInfo,
    MeasuredRecord,
    ModelRecord,
    ModelSpec,
    NodeRecord,
    Policy,
    PolicyRecord,
    ReplicaRecord,
    SourceRecord,
)
from localmesh.core.snapshot import Snapshot
from localmesh.scheduling.assume import with_placement, without_replica
from localmesh.scheduling.placement import PlacementPlan, plan_placement
from localmesh.scheduling.reconcile import Place, ReconcileState, reconcile
from localmesh.store.placement import Placement, check_placement
from tests.unit.scheduling_kit import READY, apply, kinds, set_state

GIB = 1 << 30
MODELS = st.sampled_from(["m0", "m1", "m2", "m3"])
NODES = st.sampled_from(["n0", "n1", "n2"])
SIZES = st.integers(0, 6).map(lambda n: n * GIB // 2)
TERMS = st.builds(
    lambda key, operator: SelectorTerm(
        key=key, operator=operator, values=("0", "1", "n0") if operator.takes_values else ()
    ),
    st.sampled_from(["zone", "gpu.count", "node.name"]),
    st.sampled_from(list(Operator)),
)
POLICIES = st.builds(
    lambda low, groups, spread, terms: Policy(
        min_replicas=0 if spread else low, groups=tuple(sorted(groups)), spread_all=spread, selector_terms=tuple(terms)
    ),
    st.integers(0, 2),
    st.sets(st.sampled_from(["x", "y"])),
    st.booleans(),
    st.just([]) | st.lists(TERMS, min_size=1, max_size=1),
)
GPUS = st.lists(st.tuples(st.sampled_from([GIB, 2 * GIB, 4 * GIB]), st.booleans()), max_size=3)


class DeviceFleet(RuleBasedStateMachine):
    """F26, F27, F28, F33, F37: nodes with all kinds of devices, and models with all kinds of wishes."""

    def __init__(self) -> None:
        super().__init__()
        self.snapshot = Snapshot()
        self.state = ReconcileState()
        self.now = 0.0
        self.incarnations = 0

    def replicas(self) -> list[ReplicaRecord]:
        return sorted(self.snapshot.all_replicas(), key=lambda r: r.id)

    @initialize(nodes=st.lists(st.tuples(st.integers(1, 2), GPUS), min_size=2, max_size=3), data=st.data())
    def begin(self, nodes: list[tuple[int, list[tuple[int, bool]]]], data: st.DataObject) -> None:
        """Most of what is interesting needs nodes and models to begin with."""
        for number, (slots, gpus) in enumerate(nodes):
            self.register(f"n{number}", slots=slots, ram=4 * GIB, gpus=gpus)
        for name in ("m0", "m1", "m2", "m3"):
            count = data.draw(st.integers(0, 2))
            memory = data.draw(st.sampled_from([GIB, 2 * GIB, 3 * GIB]))
            self.declare(name, memory=memory, policy=data.draw(POLICIES), count=count, kind="")

    @rule(name=NODES)
    def vanish(self, name: str) -> None:
        """A node goes for good, and all that ran there with it."""
        node = NodeName(name)
        for record in self.replicas():
            if record.id.node == node:
                self.snapshot = without_replica(self.snapshot, record)
        self.snapshot = replace(
            self.snapshot,
            nodes={n: r for n, r in self.snapshot.nodes.items() if n != node},
            measured={n: r for n, r in self.snapshot.measured.items() if n != node},
        )

    @rule(name=NODES, slots=st.integers(1, 2), ram=SIZES, gpus=GPUS)
    def register(self, name: str, slots: int, ram: int, gpus: list[tuple[int, bool]]) -> None:
        """A node that has not been there registers, with nothing running on it."""
        node = NodeName(name)
        if node in self.snapshot.nodes:
            return
        self.incarnations += 1
        devices = [DeviceRecord(node=node, id=CPU, kind="cpu", total_bytes=ram, budget_bytes=ram)]
        for number, (size, unified) in enumerate(gpus):
            budget = ram if unified else size
            devices.append(
                DeviceRecord(
                    node=node,
                    id=DeviceId(f"GPU-{number}"),
                    kind="gpu",
                    total_bytes=budget,
                    budget_bytes=budget,
                    unified=unified,
                )
            )
        record = NodeRecord(
            name=node,
            incarnation=self.incarnations,
            record_lease=0,
            endpoint="x:1",
            labels={"zone": str(slots)},
            engines=(EngineInfo(name="e", available=True, device_kinds=("cpu", "gpu")),),
            max_replicas_per_model=slots,
        )
        known = {m: SourceRecord(revision=r.revision, present=True, path="/f") for m, r in self.snapshot.models.items()}
        self.snapshot = replace(
            self.snapshot,
            nodes={**self.snapshot.nodes, node: record},
            approvals={**self.snapshot.approvals, node: ApprovalRecord(key_fingerprint=name)},
            devices={**self.snapshot.devices, node: {d.id: d for d in devices}},
            sources={**self.snapshot.sources, node: known},
        )

    @rule(name=MODELS, memory=SIZES, policy=POLICIES, count=st.integers(0, 2), kind=st.sampled_from(["", "gpu"]))
    def declare(self, name: str, memory: int, policy: Policy, count: int, kind: str) -> None:
        model = ModelName(name)
        revision = f"{memory}-{count}-{kind}"
        spec = ModelSpec(name=model, backend="e", source="f", memory_bytes=memory, device_count=count, device_kind=kind)
        source = SourceRecord(revision=revision, present=True, path="/f")
        self.snapshot = replace(
            self.snapshot,
            models={**self.snapshot.models, model: ModelRecord(spec=spec, revision=revision)},
            policies={**self.snapshot.policies, model: PolicyRecord(policy=policy)},
            sources={node: {**known, model: source} for node, known in self.snapshot.sources.items()},
        )

    @rule(name=MODELS)
    def place(self, name: str) -> None:
        """A cold request."""
        try:
            plan = plan_placement(self.snapshot, ModelName(name))
        except (ModelNotFound, PlacementFailed):
            return
        assert plan_placement(self.snapshot, ModelName(name)) == plan
        self.check(self.snapshot, plan)
        self.snapshot = with_placement(self.snapshot, plan)

    @precondition(lambda self: self.replicas())
    @rule(data=st.data(), what=st.sampled_from(["ready", "exit"]), more=SIZES)
    def replica_event(self, data: st.DataObject, what: str, more: int) -> None:
        """T6, where the measurement may be any; T7."""
        record = data.draw(st.sampled_from(self.replicas()))
        if what == "exit":
            self.snapshot = without_replica(self.snapshot, record)
        elif record.state.coming:
            self.snapshot = set_state(self.charge(record, more), record.id, READY)

    def charge(self, record: ReplicaRecord, more: int) -> Snapshot:
        devices = dict(self.snapshot.devices[record.id.node])
        sizes = {device: size + more for device, size in record.devices.items()}
        for device, size in sizes.items():
            devices[device] = replace(devices[device], claims={**devices[device].claims, record.id: size})
        siblings = {**self.snapshot.replicas[record.id.model], record.id: replace(record, devices=sizes)}
        return replace(
            self.snapshot,
            devices={**self.snapshot.devices, record.id.node: devices},
            replicas={**self.snapshot.replicas, record.id.model: siblings},
        )

    @precondition(lambda self: self.snapshot.devices)
    @rule(data=st.data(), size=SIZES)
    def budget(self, data: st.DataObject, size: int) -> None:
        """An operator says how much of a device may be used."""
        node = data.draw(st.sampled_from(sorted(self.snapshot.devices)))
        device = data.draw(st.sampled_from(sorted(self.snapshot.devices[node])))
        known = self.snapshot.devices[node]
        changed = {**known, device: replace(known[device], budget_bytes=size)}
        self.snapshot = replace(self.snapshot, devices={**self.snapshot.devices, node: changed})

    @precondition(lambda self: self.snapshot.nodes)
    @rule(data=st.data(), size=SIZES)
    def measure(self, data: st.DataObject, size: int) -> None:
        node = data.draw(st.sampled_from(sorted(self.snapshot.nodes)))
        free = dict.fromkeys(self.snapshot.devices[node], size)
        measured = {**self.snapshot.measured, node: MeasuredRecord(free_bytes=free)}
        self.snapshot = replace(self.snapshot, measured=measured)

    @rule(name=NODES, zone=st.sampled_from(["0", "1", None]))
    def label(self, name: str, zone: str | None) -> None:
        approval = self.snapshot.approvals.get(NodeName(name))
        if approval is not None:
            labelled = replace(approval, labels={"zone": zone} if zone is not None else {})
            self.snapshot = replace(self.snapshot, approvals={**self.snapshot.approvals, NodeName(name): labelled})

    @rule()
    def tick(self) -> None:
        self.step()

    @rule()
    def settle(self) -> None:
        """With nothing happening in between, plans come to an end: nothing flaps."""
        idle = 0
        for _ in range(80):
            did = self.step()
            for record in self.replicas():
                if record.state.name == "UNLOADING":
                    self.snapshot = without_replica(self.snapshot, record)
            idle = 0 if did else idle + 1
            if idle == 2:
                return
        raise AssertionError("the plan never ends")

    def step(self) -> list[tuple[str, str]]:
        result = reconcile(self.snapshot, now=self.now, state=self.state)
        again = reconcile(self.snapshot, now=self.now, state=self.state)
        assert (again.actions, again.state) == (result.actions, result.state), "the same state, the same plan"
        snapshot = self.snapshot
        for action in result.actions:
            if isinstance(action, Place):
                self.check(snapshot, action.plan)
            snapshot = apply(snapshot, [action])
        self.snapshot, self.state = snapshot, result.state
        return kinds(result)

    def check(self, before: Snapshot, plan: PlacementPlan) -> None:
        """Invariants 1 and 4 of the design, and that the last check before T1 lets the plan pass."""
        replica, node = plan.replica, plan.replica.node
        check_placement(
            Placement(
                replica=replica,
                revision=plan.revision,
                devices=plan.devices,
                incarnation=plan.incarnation,
                snapshot=before,
            )
        )
        model, policy = before.models[replica.model], before.policy(replica.model)
        assert len(plan.devices) == max(1, model.spec.device_count), "a gang is all or nothing"
        after = with_placement(before, plan)
        devices = after.devices[node]
        for device, size in plan.devices.items():
            assert size == 0 or devices[device].claimed_bytes <= devices[device].budget_bytes
            in_ram = [d for d in devices.values() if d.kind == "cpu" or d.unified]
            if size and devices[device] in in_ram:
                assert sum(d.claimed_bytes for d in in_ram) <= devices[CPU].budget_bytes
        here = [r for r in after.replicas_of(replica.model) if r.id.node == node]
        assert len(here) <= before.nodes[node].max_replicas_per_model
        if policy.spread_all:
            assert sum(r.revision == plan.revision for r in here) == 1
        assert before.selector_mismatch(policy, node) is None
        for member in before.group_members(replica.model):
            assert not any(r.id.node == node for r in before.replicas_of(member))


TestDeviceFleet = DeviceFleet.TestCase
TestDeviceFleet.settings = settings(
    max_examples=80, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
