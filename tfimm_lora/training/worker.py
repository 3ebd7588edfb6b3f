"""A process that trains one method: ``python -m tfimm_lora.training.worker RUN_FOLDER METHOD``.

Each method has a process of its own, so that its peak memory is its own, and so that a method
which runs out of memory does not take the others along. It tells its parent how it goes in lines
of JSON (:mod:`tfimm_lora.training.events`) and writes its results to RUN_FOLDER/METHOD.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def main(folder: str, method: str) -> int:
    """Trains one method of the recipe in ``folder/job.json``.

    Args:
        folder: The unfinished run folder.
        method: ``linear_probe``, ``lora`` or ``full``.

    Returns:
        The exit code: 0, or 1 after an error that was sent as an event.

    Example:
        >>> main("runs/.first.unfinished", "lora")
        0
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Other libraries print too; only this stream carries events.
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    from tfimm_lora.training.events import send

    def send_event(event: str, **values: object) -> None:
        send(event, events, **values)

    try:
        _work(Path(folder), method, send_event)
    except Exception as error:
        traceback.print_exc()
        send_event("error", kind=type(error).__name__, message=str(error))
        return 1
    return 0


def _work(folder: Path, method: str, send_event: Callable[..., None]) -> None:
    from dataclasses import replace

    import tfimm_lora.training.digits_model  # noqa: F401  (registers the embedded model)
    from tfimm_lora.data import load_dataset
    from tfimm_lora.training.config import RunConfig
    from tfimm_lora.training.fit import fit_method
    from tfimm_lora.training.results import save_results

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    config = RunConfig.from_dict(job["config"])
    # The parent has checked the images, and says which to leave out.
    dataset = load_dataset(replace(config.data, skip_unreadable=True), check=bool(job["skipped"]))
    fit = fit_method(config, method, dataset, send_event)
    send_event("saving")
    saved = save_results(fit, method, folder / method, save_models=config.train.save_models)
    send_event("finished", figures=fit.figures | saved, history=fit.history)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
