"""bench and info: what this machine can do, and what a run would need on it."""

from memlayers.bench.run import BenchConfig, run
from memlayers.cli.configuration import Call
from memlayers.console import tell
from memlayers.info import hardware, operations, versions
from memlayers.presentation import Lines, two_columns


def run_bench(call: Call) -> None:
    """memlayers bench"""
    print(run(BenchConfig(**call.options), say=tell))


def run_info(call: Call) -> None:
    """memlayers info"""
    lines = machine()
    options = call.options
    if options["what"] is not None or options["mesh"] or call.fields or (call.base is not None and call.base.chosen):
        from memlayers.cli.model_commands import asked_for  # imports transformers, which the rest does without

        lines += asked_for(call)
    print(two_columns(lines))


def machine() -> Lines:
    """Versions, devices, and what runs each operation."""
    found = hardware()
    return [
        ("versions", ", ".join(f"{name} {version}" for name, version in versions().items())),
        ("cpu", f"{found['cpu']}, {found['cpu_cores']} cores, {found['threads']} threads"),
        ("gpu", f"{found['gpu']}, {found['gpu_gigabytes']} GiB" if found["gpu"] else "none"),
        *operations().items(),
    ]
