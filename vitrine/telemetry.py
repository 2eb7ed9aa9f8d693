"""What libraries would send to their makers, or write about this machine, unless they are told not to.

Nothing that Vitrine runs asks anybody anything, so this is applied on the first import of `vitrine`, before these
libraries are loaded; child processes inherit it. deploy/Dockerfile sets the same for processes that load one of them
without Vitrine; tests/commands/test_elsewhere.py watches the system calls of every command.

Switched off where they are used, so not in the table: DuckDB's downloads of extensions (in the configuration of every
connection), and what a Ray of one's own asks (service/offline/bulk/ray_alone.py). OpenTelemetry sends only to
VITRINE_TRACE_ENDPOINT. Training on several devices has torch ask this machine's resolver for the name of 127.0.0.1.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Variable -> the value by which its library understands "no".
OFF = {
    # ONNX Runtime: looks up a host of Microsoft's every few seconds, sends graph names and an id of this machine, and
    # keeps both in a database under ~/.cache/Microsoft.
    "ORT_DISABLE_TELEMETRY": "1",
    # BentoML: every start and every twelve hours of serving. Only "True" counts, in any case.
    "BENTOML_DO_NOT_TRACK": "True",
    # huggingface_hub (by open_clip and datasets): versions and session id in each request; datasets: who loads what.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    # Ray: usage of the cluster, every hour.
    "RAY_USAGE_STATS_ENABLED": "0",
    # wandb, which runs only where `vitrine train --wandb` asks for it: its own crashes, to Sentry.
    "WANDB_ERROR_REPORTING": "false",
}
_NO, _YES = {"0", "false", "no", "off"}, {"1", "true", "yes", "on"}


def switch_off() -> None:
    """Set every variable of `OFF`, unless its value is a clear consent to be reported.

    Anything else counts as "no", in the spelling that the library understands: BENTOML_DO_NOT_TRACK=1 and an empty
    ORT_DISABLE_TELEMETRY would be overheard.
    """
    for name, value in OFF.items():
        consent = _YES if value.lower() in _NO else _NO
        if os.environ.get(name, "").strip().lower() not in consent:
            os.environ[name] = value


def keep_caches_apart() -> None:
    """Give matplotlib a folder for its list of fonts that goes with this process.

    It would write one under ~ otherwise, for every report; and for every training where torchmetrics is installed,
    which Lightning imports then. A folder of the user's (MPLCONFIGDIR) stays.
    """
    if "MPLCONFIGDIR" in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="vitrine-matplotlib-")
    os.environ["MPLCONFIGDIR"] = folder  # child processes share it
    atexit.register(_remove, folder, os.getpid())


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # forked processes run it, too
        shutil.rmtree(folder, ignore_errors=True)
