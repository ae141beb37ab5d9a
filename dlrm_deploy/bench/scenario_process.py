"""The child process of `run_scenarios`: takes one request in JSON, answers in lines of JSON.

It ends at once when an engine fails, and when standard input closes: LoadGen tests cannot be stopped otherwise.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
import warnings
from pathlib import Path

from dlrm_deploy.bench.scenarios import ScenarioSettings, measure
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.errors import DlrmDeployError


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print is no answer

    def say(**answer: object) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    def failed(error: Exception) -> None:
        say(error="EngineError", message=f"the engine failed on a query: {error}")
        os._exit(0)  # the LoadGen test would go on for its duration

    request = json.loads(sys.argv[1])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")
    values = request["settings"]
    settings = ScenarioSettings(**{**values, "scenarios": tuple(values["scenarios"])})
    try:
        bundle = Bundle.open(request["bundle"])
        rows = measure(
            bundle,
            settings,
            Path(request["logs"]),
            target=request["bundle"],
            progress=lambda step: say(progress=step),
            failed=failed,
        )
        for row in rows:
            say(row=row.facts())
        say(done=True)
    except DlrmDeployError as err:
        say(error=type(err).__name__, message=str(err))
    except OSError as err:
        say(error="OutputError", message=f"the load test failed: {err}.")
    except Exception:  # a bug of ours: the parent shows the last lines
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)
    answers.flush()
    os._exit(0)  # a failed engine may have left threads of LoadGen that nobody answers


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
