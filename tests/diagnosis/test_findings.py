import json

import pytest

from memlayers.diagnosis import DoctorError, Finding, Report

REPORT = Report(
    (
        Finding("loss", None, "pass", "fine"),
        Finding("usage", "h.1.mlp", "fail", "the query has " + "really " * 20 + "collapsed", "use a norm"),
        Finding("written", "h.1.mlp", "skip", "not checked"),
        Finding("output", "h.2.mlp", "warn", "large"),
    )
)


def test_it_reads_well_in_80_columns():
    lines = str(REPORT).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "1 failed, 1 warned, 1 passed, 1 not checked"
    assert [line for line in lines if line and not line.startswith(" ")][1:] == ["model", "h.1.mlp", "h.2.mlp"]
    assert "  FAIL  usage    the query has really" in str(REPORT)
    assert "-> use a norm" in str(REPORT)
    assert "  ok    loss     fine" in lines


def test_failures_and_warnings():
    assert not REPORT.ok
    with pytest.raises(DoctorError, match=r"usage of h\.1\.mlp: the query has .*collapsed\. use a norm"):
        REPORT.raise_for_failures()
    softer = REPORT.with_failures_as_warnings({"usage"})
    assert softer.ok
    softer.raise_for_failures()
    assert [finding.state for finding in softer.findings] == ["pass", "warn", "skip", "warn"]
    assert not REPORT.with_failures_as_warnings({"written"}).ok


def test_json():
    assert json.loads(json.dumps(REPORT.to_dict())) == REPORT.to_dict()
    assert REPORT.to_dict()["ok"] is False
    assert REPORT.to_dict()["findings"][0] == {
        "check": "loss", "memory": None, "state": "pass", "message": "fine", "advice": "",
    }  # fmt: skip
