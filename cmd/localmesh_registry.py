"""`localmesh registry` as a script."""  # noqa: INP001 - a package `cmd` would shadow the standard library's

import sys

from localmesh.cli import main

if __name__ == "__main__":
    sys.exit(main(["registry", *sys.argv[1:]]))
