"""`cmrm check`: the contract, on a real checkpoint."""

from __future__ import annotations

from dataclasses import asdict

import typer

from cmrm.cli import options as c

MARKS = {"pass": "pass", "fail": "FAIL", "skip": "skip"}


def check(
    model: c.ModelArgument,
    revision: c.RevisionOption = None,
    dtype: c.DtypeOption = "auto",
    device_map: c.DeviceOption = None,
    trust_remote_code: c.TrustOption = False,
    as_json: c.JsonOption = False,
) -> None:
    """Run the contract that capture and steering rest on against MODEL; exit code 1 when a check fails."""
    vlm = c.open_model(
        model, revision=revision, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code
    )

    from cmrm.checks.run import failed, run_checks
    from cmrm.checks.contract import CHECKS

    with c.progress(len(CHECKS)) as (say, tick):
        say("checking")
        findings = run_checks(vlm, on_check=lambda finding: tick(1))
    if as_json:
        c.print_json({"model": vlm.model_id, "architecture": type(vlm.model).__name__, "dtype": str(vlm.model.dtype),
                      "checks": [asdict(f) for f in findings], "failed": len(failed(findings))})  # fmt: skip
    else:
        c.print_rows(
            f"{vlm.model_id}: {type(vlm.model).__name__}, {str(vlm.model.dtype).removeprefix('torch.')}",
            ["check", "outcome", "detail"],
            [[f.name, MARKS[f.outcome], f.detail] for f in findings],
        )
    if failed(findings):
        raise typer.Exit(1)
