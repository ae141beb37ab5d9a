"""May a converted bundle be? Every engine has to score what is stored in it, and it has to be as accurate as asked.

Main path: `check_conversion` -> `check_parity` of each engine -> `compare_accuracy` -> the records in the manifest.
`dlrm-deploy export` runs it before the bundle is at its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from dlrm_deploy.bundle import Bundle
from dlrm_deploy.errors import AccuracyError, EngineError, MissingDependencyError
from dlrm_deploy.formats import ROW_FORMATS
from dlrm_deploy.parity.accuracy import AccuracyReport, compare_accuracy
from dlrm_deploy.parity.check import check_parity, stored_cases
from dlrm_deploy.parity.labelled import LabelledSamples

ENGINES = ("onnxruntime", "onnxruntime-stock")


def check_conversion(
    fp32: Bundle,
    converted: Bundle,
    *,
    labelled: LabelledSamples | None = None,
    max_auc_drop: float | None = None,
    max_log_loss_rise: float | None = None,
    engines: Sequence[str] = ENGINES,
    threads: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> AccuracyReport:
    """Check parity of a converted bundle, compare it with the fp32 one, and record both in its manifest.

    Args:
        fp32: the bundle that was converted.
        converted: what it became.
        labelled: samples to compare AUC, log loss and calibration on.
        max_auc_drop: drop in AUC to accept on them; None for what the number formats allow by default.
        max_log_loss_rise: rise of log loss to accept on them; None likewise.
        engines: to check; one that cannot run here is told and left out.
        threads: CPU threads; None for one per core.
        say: told each verdict.

    Raises:
        AccuracyError: an engine does not score what is stored, or the bundle is less accurate than accepted.
        EngineError: no engine could run here.
        DataError: the labelled samples do not fit the model.
    """
    at_rest = stored_cases(converted)
    failed, absent = [], []
    for engine in engines:
        try:
            report = check_parity(converted, engine, at_rest=at_rest, threads=threads)
        except (EngineError, MissingDependencyError) as err:
            absent.append(f"{engine} was not compared: {err}")
            say(absent[-1])
            continue
        converted.record_parity(engine, report.record())
        say(f"{engine}: {report.summary()}")
        if not report.passed:
            failed.append(f"{engine} does not score what is stored: {report.summary()}")
    if len(absent) == len(engines):
        raise EngineError(" ".join(absent))
    accuracy = compare_accuracy(
        fp32,
        converted,
        labelled=labelled,
        max_auc_drop=max_auc_drop,
        max_log_loss_rise=max_log_loss_rise,
        threads=threads,
    )
    converted.record_accuracy(accuracy.record())
    for line in (*accuracy.summary(), *_tables_summary(converted)):
        say(line)
    if failed or accuracy.problems:
        problems = "; ".join((*failed, *accuracy.problems))
        raise AccuracyError(
            f"the converted model is not accepted, and nothing is left of it: {problems}. Choose formats that lose "
            "less (--tables fp16 or auto, --mlp fp32), or accept more (--max-auc-drop, --max-logloss-rise)."
        )
    return accuracy


def _tables_summary(converted: Bundle) -> tuple[str, ...]:
    """How many tables got which format, and the one that lost most; nothing where the record does not say."""
    tables: dict[str, dict[str, Any]] = converted.manifest.accuracy.get("tables", {})
    if not tables:
        return ()
    formats = Counter(table["format"] for table in tables.values())
    line = "tables: " + ", ".join(f"{formats[name]} {name}" for name in ROW_FORMATS if formats[name])
    lost = {name: table for name, table in tables.items() if "relative_rms" in table}
    if lost:
        worst = max(lost, key=lambda name: lost[name]["relative_rms"])
        rms, largest = (lost[worst][what] for what in ("relative_rms", "max_abs"))
        line += f"; largest error: {worst}, relative RMS {rms:.2g}, max abs {largest:.2g}"
    return (line,)
