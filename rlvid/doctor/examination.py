"""The doctor's checks in their order, and the output of their findings."""

import time
from collections.abc import Iterator
from functools import partial

from rich.markup import escape

from rlvid.credentials import refuse_credentials
from rlvid.doctor.finding import Finding, examine, examine_each
from rlvid.terminal import console

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def examination(
    storage: str, address: str | None, run: str | None, quick: bool, model: str | None = None
) -> Iterator[Finding]:
    """Yields all findings: of a run or a model if named, else of the machine, and without ``quick`` of the cluster."""
    refuse_credentials(storage, "--storage")
    if run is not None and model is not None:
        raise ValueError(f"--run {run} --model {model}: a call checks one of the two; leave one out")
    if model is not None:
        from rlvid.doctor.model import check_model_folder

        yield from examine("model", partial(check_model_folder, model), "name another model: --model")
        return
    if run is not None:
        from rlvid.doctor.run import check_run

        yield from examine("run", partial(check_run, run), "name another folder")
        return
    from rlvid.doctor import machine, places

    broken = "install the packages again: make venv"
    yield from examine_each(
        {
            "python": (machine.check_python, broken),
            "packages": (machine.check_packages, broken),
            "accelerator": (machine.check_accelerator, broken),
            "memory": (machine.check_memory, ""),
            "home": (places.check_home, "set HOME to a folder that you may write to"),
            "token": (places.check_token, ""),
            "temporary folder": (places.check_temporary, "set RAY_TMPDIR to another folder"),
            "storage": (partial(machine.check_storage, storage), "choose another folder: --storage"),
        }
    )

    def selftest() -> Iterator[Finding]:
        from rlvid.doctor.attention import check_attention
        from rlvid.doctor.selftest import check_first_ratio, check_gradient_step, check_samples, check_wan_step

        checks = {
            "gradient": check_gradient_step,
            "gradient of Wan": check_wan_step,
            "first-step ratio": check_first_ratio,
            "samples": check_samples,
            "attention kernel": check_attention,
        }
        yield from examine_each({name: (check, "first correct the errors above") for name, check in checks.items()})

    yield from examine("self-test", selftest, broken)
    if not quick:

        def cluster() -> Iterator[Finding]:
            from rlvid.doctor.cluster import check_cluster

            yield from check_cluster(address, storage)

        yield from examine("cluster", cluster, "first correct the errors above, or skip Ray: --quick")


def show(findings: Iterator[Finding]) -> int:
    """Prints findings as they come, a line each and a line for the way out; returns the number of errors."""
    began, counts = time.perf_counter(), dict.fromkeys(_STYLES, 0)
    for each in findings:
        counts[each.status] += 1
        line = f"[{_STYLES[each.status]}]{each.status:<8}[/] {each.name:<20} {escape(each.found)}"
        console.print(line, soft_wrap=True, highlight=False)
        if each.way_out:
            console.print(f"{'':<8} {'way out:':>20} {escape(each.way_out)}", soft_wrap=True, highlight=False)
    seconds = time.perf_counter() - began
    summary = f"{counts['ok']} ok, {counts['warning']} warnings, {counts['error']} errors; {seconds:.0f} s"
    console.print(summary, soft_wrap=True, highlight=False)
    return counts["error"]
