"""The command line: sub-commands and their arguments."""

import argparse
from collections.abc import Awaitable, Callable

from localmesh import __version__
from localmesh.app.exits import MEANING
from localmesh.cli import (
    commands_admin,
    commands_backends,
    commands_explain,
    commands_inference,
    commands_nodes,
    commands_run,
)
from localmesh.cli.arguments import add_settings, keys_of
from localmesh.cli.connection import Command

Handler = Callable[[Command], int | Awaitable[int]]

_CLIENT = ["state_dir", "max_message_bytes", "insecure", *keys_of("tls", "client")]
_COMPONENT = [k for k in keys_of("") if k not in ("models_dir", "backends_dir")]
_ROLES = {
    "registry": (keys_of("etcd", "tls", "registry"), "the registry: nodes, models, policies"),
    "router": (keys_of("etcd", "tls", "router"), "a router: requests to replicas"),
    "worker": (
        ["models_dir", "backends_dir", *keys_of("tls", "worker")],
        "a worker: this machine as a node",
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; each sub-command sets `handler`, and `client` where it needs a mesh that runs."""
    codes = "\n".join(f"  {code.value:>3}  {text}" for code, text in MEANING.items())
    parser = argparse.ArgumentParser(
        prog="localmesh",
        description="Runs models on the machines you own, as one gRPC mesh.",
        epilog=f"exit codes:\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"localmesh {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_running(commands)
    _add_admin(commands)
    _add_inference(commands)
    return parser


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    handler: Handler,
    help_text: str,
    *,
    section: str = "client",
    keys: list[str] = _CLIENT,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
    parser.set_defaults(handler=handler, client=section == "client")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    add_settings(parser, section, keys)
    return parser


def _add_running(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    everything = [*keys_of("", "etcd", "up", "registry", "router", "worker")]
    _add(
        commands,
        "up",
        commands_run.run_up,
        "run the whole mesh on this machine, until Ctrl-C",
        section="up",
        keys=everything,
    )
    for role, (own, help_text) in _ROLES.items():
        _add(commands, role, commands_run.run_component, f"run {help_text}", section=role, keys=[*_COMPONENT, *own])
    _add(
        commands,
        "demo",
        commands_run.run_demo,
        "run a short-lived mesh with two workers and two real models, and ask it something",
        section="demo",
        keys=["log_level", "etcd.bin"],
    )
    _add(commands, "version", commands_run.version, "print the version", keys=["client.output"])


def _add_admin(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    apply = _add(commands, "apply", commands_admin.apply, "declare models from YAML")
    apply.add_argument("-f", "--file", action="append", required=True, help="file, folder, or - for stdin; repeatable")
    apply.add_argument("--dry-run", action="store_true", help="check only, change nothing")
    delete = _add(commands, "delete", commands_admin.delete, "remove models; their replicas finish and stop")
    delete.add_argument("model", nargs="+", metavar="MODEL")
    models = _add(commands, "models", commands_admin.models, "list models, or tell all of one")
    models.add_argument("model", nargs="?", metavar="MODEL")
    nodes = _add(commands, "nodes", commands_nodes.nodes, "list nodes with their devices and engines")
    nodes.add_argument("-w", "--wide", action="store_true", help="with labels and keys")
    _add_node(commands)
    backends = _add(commands, "backends", commands_backends.backends_of, "list the foreign backends of nodes")
    backends.add_argument("node", nargs="?", metavar="NODE")
    _add_backend(commands)
    _add_guard(commands)
    replicas = _add(commands, "replicas", commands_admin.replicas, "list replicas")
    replicas.add_argument("model", nargs="?", metavar="MODEL")
    replicas.add_argument("--node", metavar="NODE", help="only on this node")
    explain = _add(commands, "explain", commands_explain.explain, "say where a model's next replica would go, and why")
    explain.add_argument("model", metavar="MODEL")
    explain.add_argument("-f", "--file", metavar="FILE", help="as if this were applied: file, folder, or - for stdin")
    explain.add_argument("-v", "--verbose", action="store_true", help="also what every filter says of every node")
    _add(commands, "status", commands_admin.status, "show the mesh at a glance")
    logs = _add(commands, "logs", commands_admin.logs, "print the output of a model's replicas")
    logs.add_argument("model", metavar="MODEL[#INDEX]", help="all its replicas, or those of one index")
    logs.add_argument("-f", "--follow", action="store_true", help="go on with new lines")
    logs.add_argument("--index", type=int, metavar="N", help="only the replicas of this index")
    logs.add_argument("--node", metavar="NODE", help="only on this node")
    logs.add_argument("-t", "--timestamps", action="store_true", help="with the time of each line")
    logs.add_argument("--tail", type=int, default=100, metavar="N", help="last lines of each replica [100]")


def _add_backend(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    backend = commands.add_parser("backend", help="install, upgrade or delete a foreign backend on nodes")
    verbs = backend.add_subparsers(dest="verb", metavar="VERB", required=True)
    install = _add(verbs, "install", commands_backends.install, "bring a backend to nodes")
    upgrade = _add(
        verbs, "upgrade", commands_backends.upgrade, "replace a backend; replicas that run it finish and stop"
    )
    delete = _add(verbs, "delete", commands_backends.delete, "take a backend from nodes")
    for verb in (install, upgrade, delete):
        verb.add_argument("name", metavar="NAME", help='models use it as engine "process:NAME"')
        where = verb.add_mutually_exclusive_group()
        where.add_argument("--node", action="append", metavar="NODE", help="on this node; repeatable")
        where.add_argument("--all-nodes", action="store_true", help="on all live nodes, or on all that have it")
    for verb in (install, upgrade):
        source = verb.add_mutually_exclusive_group(required=True)
        source.add_argument("--archive", metavar="FILE", help="archive here, which is uploaded: tar, tar.gz, zip, ...")
        source.add_argument("--archive-on-node", metavar="PATH", help="archive on the node; with --sha256")
        source.add_argument("--dir", metavar="PATH", help="folder on the node, which is copied")
        source.add_argument("--pip", action="append", metavar="REQUIREMENT", help="Python package; repeatable")
        verb.add_argument("--sha256", metavar="HEX", help="of the archive on the node")
        what = verb.add_mutually_exclusive_group()
        what.add_argument("--module", metavar="MODULE", help="what to run of the packages: python -m MODULE")
        what.add_argument("--script", metavar="SCRIPT", help="what to run of the packages: a console script")
    delete.add_argument("--force", action="store_true", help="also while replicas run it: they finish and stop")


def _add_guard(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    guard = commands.add_parser("guard", help="the guard that is on while many nodes are silent at once")
    verbs = guard.add_subparsers(dest="verb", metavar="VERB", required=True)
    _add(verbs, "release", commands_nodes.release_guard, "end it: take silent nodes for dead and replace what they had")


def _add_node(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    node = commands.add_parser("node", help="care for a node: approve, cordon, drain, label, ...")
    verbs = node.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, help_text in commands_nodes.VERBS.items():
        parser = _add(verbs, verb, commands_nodes.change, help_text)
        parser.add_argument("node", nargs="+", metavar="NODE")
        if verb == "approve":
            parser.add_argument("--key", metavar="SHA256", help="fingerprint of the key that is approved and no other")
        if verb == "remove":
            parser.add_argument("--force", action="store_true", help="also while it has replicas")
    label = _add(verbs, "label", commands_nodes.label, "set and remove labels that win over the worker's")
    label.add_argument("node", metavar="NODE")
    label.add_argument("label", nargs="+", metavar="KEY=VALUE|KEY-", help="set a label, or remove it")
    override = _add(verbs, "override", commands_nodes.override, "say how much of a node may be used")
    override.add_argument("node", metavar="NODE")
    override.add_argument("--max-replicas-per-model", type=int, metavar="N", help="replicas of one model")
    override.add_argument(
        "--memory-budget",
        action="append",
        metavar="[DEVICE=]SIZE",
        help="memory that replicas may claim, as 80%%, 12GiB or bytes: of one device, or of each; repeatable",
    )
    override.add_argument(
        "--reset",
        choices=("all", "max-replicas-per-model", "memory-budget"),
        help="let the worker's word hold again",
    )


def _add_inference(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    generate = _add(commands, "generate", commands_inference.generate, "continue a text, printed as it is made")
    generate.add_argument("model", metavar="MODEL")
    generate.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text; stdin if absent or -")
    _add_sampling(generate)
    chat = _add(commands, "chat", commands_inference.chat, "talk with a model, or get one answer with -m")
    chat.add_argument("model", metavar="MODEL")
    chat.add_argument("-m", "--message", metavar="TEXT", help="one message, one answer; - reads stdin")
    chat.add_argument("--system", metavar="TEXT", help="instructions to the model")
    _add_sampling(chat)
    embed = _add(commands, "embed", commands_inference.embed, "turn texts into vectors")
    embed.add_argument("model", metavar="MODEL")
    embed.add_argument("text", nargs="*", metavar="TEXT", help="texts; the lines of stdin if absent")
    tokenize = _add(commands, "tokenize", commands_inference.tokenize, "split a text into the model's tokens")
    tokenize.add_argument("model", metavar="MODEL")
    tokenize.add_argument("text", nargs="?", metavar="TEXT", help="the text; stdin if absent or -")
    tokenize.add_argument("--special", action="store_true", help="with the tokens that begin or end a prompt")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", "--max-tokens", type=int, metavar="N", help="tokens to make at most")
    parser.add_argument("--temperature", type=float, metavar="T", help="randomness; 0 takes the likeliest token")
    parser.add_argument("--top-p", type=float, metavar="P", help="keep the likeliest tokens up to this sum")
    parser.add_argument("--top-k", type=int, metavar="K", help="keep this many of the likeliest tokens")
    parser.add_argument("--seed", type=int, metavar="N", help="start of the random numbers")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("-v", "--verbose", action="store_true", help="tell tokens and speed on stderr")
