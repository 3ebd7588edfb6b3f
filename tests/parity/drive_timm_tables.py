"""What timm says about its models, without running any: ``drive_timm_tables.py STUBS SCRIPT.py``.

STUBS is a folder with what timm imports and the environment does not have; SCRIPT.py is the
package's own script that writes its tables.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from serve import load_module, serve

sys.path.insert(0, sys.argv[1])
script = load_module(sys.argv[2])

import timm  # noqa: E402  the path has to be there first
from timm.models import (  # noqa: E402
    get_arch_pretrained_cfgs,
    get_deprecated_models,
    get_pretrained_cfg,
    is_model_pretrained,
    model_entrypoint,
)


def tables(out: str) -> None:
    """The tables as the script writes them."""
    Path(out).mkdir()
    script.write_tables(Path(out))


def _constructor_defaults(name: str) -> dict[str, Any]:
    parameters = inspect.signature(getattr(timm.models, name).__init__).parameters
    simple = (bool, int, float, str, tuple, type(None))
    return {k: p.default for k, p in parameters.items() if isinstance(p.default, simple)}


def facts(out: str) -> None:
    """timm's registry of checkpoints as ``facts.json``."""
    architectures: dict[str, Any] = {}
    retired: dict[str, str | None] = {}
    for module in script.MODULES:
        for name in timm.list_models(module=module):
            cfgs = get_arch_pretrained_cfgs(name)
            architectures[name] = {
                "module": module,
                "default": dataclasses.asdict(get_pretrained_cfg(name)),
                "tags": {
                    cfg.tag: {
                        **dataclasses.asdict(cfg),
                        "has_weights": is_model_pretrained(full_name),
                    }
                    for full_name, cfg in cfgs.items()
                },
            }
        for old, new in get_deprecated_models(module).items():
            try:
                known = bool(new) and get_pretrained_cfg(new) is not None
            except RuntimeError:  # timm's own new name has a tag that does not exist
                known = False
            assert callable(model_entrypoint(old))
            retired[old] = new if known else None
    answer = {
        "version": timm.__version__,
        "architectures": architectures,
        "retired": retired,
        "defaults": {k: _constructor_defaults(k) for k in ("ConvNeXt", "VisionTransformer")},
    }
    Path(out).mkdir()
    Path(out, "facts.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    serve({"tables": tables, "facts": facts})
