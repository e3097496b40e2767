"""The table of options, and which source wins."""

from pathlib import Path

import pytest

from localmesh.app import config_reader, kinds
from localmesh.app.config import OPTIONS, Config, build, flatten
from localmesh.app.config_reader import ConfigError, read

HOME = {"HOME": "/home/somebody"}


def test_every_option_has_help_and_a_default_of_its_own_kind() -> None:
    for option in OPTIONS.values():
        assert option.help
        if option.default not in (None, "", ()) and option.key != "state_dir":
            assert option.kind.parse(option.kind.dump(option.default)) == option.default, option.key


def test_key_variable_and_flag_follow_from_the_place_in_the_tree() -> None:
    option = OPTIONS["router.hold_seconds"]
    assert option.variable == "LOCALMESH_ROUTER_HOLD_SECONDS"
    assert option.flag("router") == "--hold-seconds"
    assert option.flag("up") == "--router-hold-seconds"
    assert OPTIONS["etcd.bin"].variable == "LOCALMESH_ETCD_BIN"
    assert OPTIONS["mesh"].flag("worker") == "--mesh"


def test_no_two_options_share_a_variable_or_a_flag_of_one_command() -> None:
    assert len({o.variable for o in OPTIONS.values()}) == len(OPTIONS)
    for command in ("up", "registry", "router", "worker", "client"):
        keys = [o for o in OPTIONS.values() if o.section in ("", "etcd", "tls", command)]
        assert len({o.flag(command) for o in keys}) == len(keys)


def test_a_flag_wins_over_a_variable_and_a_variable_over_the_default() -> None:
    env = HOME | {"LOCALMESH_MESH": "by-variable"}
    assert read({}, environment=HOME).config.mesh == "main"
    assert read({}, environment=env).config.mesh == "by-variable"
    reading = read({"mesh": "by-flag"}, environment=env)
    assert reading.config.mesh == "by-flag"
    assert reading.sources["mesh"] == "flag mesh"


def test_the_state_folder_follows_the_xdg_rules() -> None:
    assert read({}, environment=HOME).config.state_dir == Path("/home/somebody/.local/state/localmesh")
    assert read({}, environment=HOME | {"XDG_STATE_HOME": "/s"}).config.state_dir == Path("/s/localmesh")
    assert read({"state_dir": "/x"}, environment=HOME).config.state_dir == Path("/x")


def test_an_empty_variable_is_no_value() -> None:
    assert read({}, environment=HOME | {"LOCALMESH_MESH": ""}).config.mesh == "main"


def test_a_wrong_value_names_the_setting_its_source_and_what_is_expected() -> None:
    with pytest.raises(ConfigError, match=r"drain_seconds = 'soon' \(from LOCALMESH_DRAIN_SECONDS\).*expected a time"):
        read({}, environment=HOME | {"LOCALMESH_DRAIN_SECONDS": "soon"})


def test_a_variable_that_looks_misspelt_is_pointed_out() -> None:
    reading = read({}, environment=HOME | {"LOCALMESH_ROUTER_LISTN": "x"})
    assert reading.notes == (
        "the variable LOCALMESH_ROUTER_LISTN means nothing here: did you mean LOCALMESH_ROUTER_LISTEN?",
    )


def test_the_variables_that_kubernetes_sets_for_a_service_are_no_mistake() -> None:
    env = HOME | {"LOCALMESH_ROUTER_SERVICE_HOST": "10.0.0.1", "LOCALMESH_ROUTER_PORT": "tcp://10.0.0.1:9500"}
    assert read({}, environment=env).notes == ()


def test_what_differs_from_the_defaults_builds_the_same_tree() -> None:
    tree = read(
        {"worker.labels": "zone=a", "etcd.endpoints": "h:1,h:2", "tls.cert": "/c", "up.workers": "2", "insecure": True},
        environment=HOME,
    ).config
    assert build(flatten(tree)) == tree
    assert flatten(Config()) == {}


def test_a_child_inherits_none_of_our_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALMESH_MESH", "other")
    monkeypatch.setenv("SOMETHING", "else")
    env = config_reader.child_environment()
    assert "LOCALMESH_MESH" not in env
    assert env["SOMETHING"] == "else"


@pytest.mark.parametrize(
    ("text", "size"),
    [("64MiB", 64 << 20), ("64M", 64 << 20), ("1MB", 1_000_000), ("1.5 GiB", 3 << 29), (7, 7), ("12B", 12)],
)
def test_sizes_are_read_as_people_write_them(text: object, size: int) -> None:
    assert kinds.BYTES.parse(text) == size


@pytest.mark.parametrize(("text", "seconds"), [("30", 30.0), ("500ms", 0.5), ("2m", 120.0), (1.5, 1.5), ("1h", 3600.0)])
def test_times_are_read_as_people_write_them(text: object, seconds: float) -> None:
    assert kinds.SECONDS.parse(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (kinds.BYTES, "much"),
        (kinds.BYTES, True),
        (kinds.SECONDS, "-1"),
        (kinds.COUNT, "-1"),
        (kinds.COUNT, "1.5"),
        (kinds.BOOLEAN, "perhaps"),
        (kinds.LABELS, "zone"),
        (kinds.TEXT, ["a"]),
        (kinds.CHOICES("a", "b"), "c"),
    ],
)
def test_what_is_not_of_the_kind_is_refused(kind: kinds.Kind, text: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        kind.parse(text)


def test_a_bare_off_in_yaml_is_the_word_off() -> None:
    assert kinds.CHOICES("auto", "on", "off").parse(False) == "off"
