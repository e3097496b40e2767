"""A component as a child of `up`: all of its configuration is in the file that it is given."""

import argparse
import os
import sys

from localmesh.app import component, config_reader
from localmesh.app.lifeline import StatusPipe, die_with_parent
from localmesh.core.errors import MeshError


def main() -> int:
    """Run the component that the arguments name and return its exit code."""
    parser = argparse.ArgumentParser(prog="localmesh.app", description="Started by `localmesh up`, not by hand.")
    parser.add_argument("role", choices=component.ROLES)
    parser.add_argument("--config", required=True)
    parser.add_argument("--status-fd", type=int, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    given = parser.parse_args()
    status = StatusPipe(given.status_fd)
    die_with_parent(given.parent_pid)
    os.umask(0o077)
    config = config_reader.read({}, config_file=given.config, environment={}).config
    try:
        return component.run(given.role, config, say=lambda _: None, status=status)
    except MeshError as error:
        sys.stderr.write(f"{given.role}: {error.message}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
