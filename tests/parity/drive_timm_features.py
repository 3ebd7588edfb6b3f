"""Feature maps of timm models with random weights: ``drive_timm_features.py ORACLE.py``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from serve import load_module, serve

oracle = load_module(sys.argv[1])
torch, timm = oracle.torch, oracle.timm
torch.set_num_threads(1)


def make(
    out: str,
    arch: str,
    overrides: dict[str, Any] | None = None,
    img_size: Any = None,
    call_size: Any = None,
    out_indices: Any = None,
    norm: bool = False,
) -> dict[str, Any]:
    """Maps of ``features_only=True``, of its class with ``norm`` or of ``forward_intermediates``.

    The extractor gets the weights of a whole model, which are saved with its input.
    """
    model, x, meta = oracle.build(arch, 0, overrides, img_size, 2)
    if call_size is not None:
        x = torch.randn((2, x.shape[1], *call_size), generator=oracle._stream(0, "input"))
    oracle._save(model, x, meta, out, fp64=False)
    fields = dict(overrides or {})
    if hasattr(model, "blocks"):
        fields["img_size"] = img_size
    chosen = {} if out_indices is None else {"out_indices": out_indices}
    net = timm.create_model(arch, features_only=True, **chosen, **fields).eval()
    weights = model.state_dict()
    net.load_state_dict({key: weights[whole_name(key)] for key in net.state_dict()})
    with torch.no_grad():
        save(out, "maps", net(x))
        arguments = {"indices": out_indices, "norm": norm}
        if hasattr(model, "blocks"):
            arguments["return_prefix_tokens"] = True
        final, found = model.forward_intermediates(x, **arguments)
    if isinstance(found[0], tuple):
        save(out, "prefix", [tokens for _, tokens in found])
        found = [maps for maps, _ in found]
    save(out, "intermediates", found)
    save(out, "final", [final])
    Path(out, "info.json").write_text(json.dumps(facts(net)))
    return meta


def whole_name(key: str) -> str:
    """Name in the whole model of a weight of the extractor."""
    return re.sub(r"^model\.", "", re.sub(r"^(stem|stages)_", r"\1.", key))


def save(out: str, name: str, tensors: list[Any]) -> None:
    for i, tensor in enumerate(tensors):
        oracle.np.save(Path(out, f"{name}_{i}.npy"), oracle._channels_last(tensor))


def facts(net: Any) -> dict[str, Any]:
    """What timm says about the maps of an extractor."""
    info = net.feature_info
    return {
        "channels": info.channels(),
        "reduction": info.reduction(),
        "module": info.module_name(),
        "all": [[f["num_chs"], f["reduction"], f["module"]] for f in info.info],
    }


def feature_info(out: str, archs: list[str]) -> None:
    """Facts about the default maps of many architectures, without weights."""
    found = {}
    for arch in archs:
        with torch.device("meta"):
            found[arch] = facts(timm.create_model(arch, features_only=True))
    Path(out).mkdir(parents=True)
    Path(out, "info.json").write_text(json.dumps(found))


if __name__ == "__main__":
    serve({"make": make, "feature_info": feature_info})
