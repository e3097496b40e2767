"""`localmesh explain` against a mesh that runs."""

MODEL = """apiVersion: localmesh/v1
kind: Model
name: {name}
engine: llama
source: {source}
parameters: {{context_tokens: 128}}
placement: {placement}
"""


def model(name: str, *, source: str = "tiny.gguf", placement: str = "{}") -> str:
    return MODEL.format(name=name, source=source, placement=placement)


def test_a_model_is_explained_before_it_is_applied_and_afterwards(mesh) -> None:
    """F44."""
    text = model("why")
    dry = mesh.run("explain", "why", "-f", "-", text=text)
    assert dry.returncode == 0, dry.stderr
    assert "(dry run: not applied)" in dry.stdout
    assert mesh.run("models", "why").returncode == 4, "nothing was applied"
    assert mesh.run("apply", "-f", "-", text=text).returncode == 0
    mesh.until(lambda: mesh.json("explain", "why")["chosen"])
    found = mesh.json("explain", "why")
    assert found["dryRun"] is False
    assert found["chosen"]["ref"]["node"] == found["nodes"][0]["node"]
    assert [node["rank"] for node in found["nodes"]] == [1, 2]
    assert all(f["outcome"] == "FILTER_OUTCOME_PASSED" for node in found["nodes"] for f in node["filters"])
    shown = mesh.run("explain", "why", "-v").stdout
    assert "would be taken" in shown
    assert "source-known" in shown
    mesh.run("delete", "why")


def test_why_a_model_is_pending_is_told_for_every_node(mesh) -> None:
    """F26, F44."""
    placement = "{selector_terms: [{key: node.name, operator: NotIn, values: [nobody]}, {key: zone, operator: Exists}]}"
    mesh.run("apply", "-f", "-", text=model("pending", placement=placement))
    found = mesh.json("explain", "pending")
    assert found["reason"] == "NO_CAPACITY"
    for node in found["nodes"]:
        refused = {f["filter"]: f["reason"] for f in node["filters"] if f["outcome"] == "FILTER_OUTCOME_FAILED"}
        assert refused["selector"] == f"{node['node']} has no label 'zone' (the selector wants it)"
    shown = mesh.run("explain", "pending").stdout
    assert "nowhere" in shown
    assert "selector" in shown
    mesh.run("delete", "pending")


def test_a_model_that_is_not_there_is_not_found(mesh) -> None:
    """F44."""
    assert mesh.run("explain", "nobody").returncode == 4
    missing = mesh.run("explain", "nobody", "-f", "-", text=model("somebody"))
    assert missing.returncode == 5
    assert "there is no model 'nobody'" in missing.stderr


def test_hardware_labels_are_there_by_themselves(mesh) -> None:
    """F6."""
    for node in mesh.json("nodes")["nodes"]:
        assert node["labels"]["node.name"] == node["name"]
        assert node["labels"]["cpu.arch"]
        assert node["labels"]["node.replica-slots"] == str(node["maxReplicasPerModel"])
