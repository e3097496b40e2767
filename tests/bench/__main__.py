"""The benchmarks: python -m tests.bench [hop|engine|cold|estimate ...] [--quick] [--json].

Each measures its baseline in the same run. See README.md in this folder for what was measured.
"""

import argparse
import asyncio
import os

from tests.bench import cold, engine, estimate, hop

BENCHMARKS = {"hop": hop.run, "engine": engine.run, "cold": cold.run, "estimate": estimate.run}


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(BENCHMARKS)}; all of them if none is named")
    parser.add_argument("--quick", action="store_true", help="less of everything, for a look")
    parser.add_argument("--json", action="store_true", help="one object a benchmark instead of text")
    arguments = parser.parse_args()
    environment = {k: v for k, v in os.environ.items() if k == "LOCALMESH_ETCD_BIN"}  # noqa: TID251 - the edge
    if unknown := set(arguments.names) - set(BENCHMARKS):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))} (there are {', '.join(BENCHMARKS)})")
    for name in arguments.names or BENCHMARKS:
        report = asyncio.run(BENCHMARKS[name](quick=arguments.quick, environment=environment))
        print(report.to_json() if arguments.json else report.to_text(), flush=True)


if __name__ == "__main__":
    main()
