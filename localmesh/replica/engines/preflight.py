"""Whether this machine can run an engine at all, asked before the engine could crash on it."""

from localmesh.core.errors import EngineUnavailable

# pip's wheel of llama.cpp is built for these; without one of them the process would die of an illegal instruction
_NEEDED = ("avx2", "fma", "f16c", "bmi2")


def check_cpu_flags(cpuinfo: str, machine: str) -> None:
    """Check that the processor has what the prebuilt llama.cpp needs.

    Args:
        cpuinfo: Text of /proc/cpuinfo; empty where there is none.
        machine: Name of the processor family, as of platform.machine(): only x86_64 is checked.

    Raises:
        EngineUnavailable: An instruction set is missing.
    """
    if machine not in ("x86_64", "AMD64"):
        return
    flags = next((line.split(":", 1)[1].split() for line in cpuinfo.splitlines() if line.startswith("flags")), None)
    if flags is None:
        return  # not known: let it try
    missing = [flag for flag in _NEEDED if flag not in flags]
    if missing:
        raise EngineUnavailable(
            f"this node's processor lacks {', '.join(missing)}, which the prebuilt llama.cpp needs: use a node that has"
            " them.",
            engine="llama",
        )
