"""Names behind the prefixes that training frameworks put in front of all of them."""

from __future__ import annotations

from collections.abc import Iterable

# Of the dictionary in a checkpoint, of DataParallel, of torch.compile, of Lightning, of
# transformers' wrapper of timm.
PREFIXES = ("state_dict.", "model.", "module.", "_orig_mod.", "timm_model.")

# What else the dictionary in a checkpoint has; weights averaged over training are not used.
_TRAINING = {
    "amp_scaler", "arch", "args", "config", "ema", "epoch", "hyper_parameters", "iteration", "loss",
    "loss_scaler", "lr_scheduler", "metric", "model_ema", "optimizer", "scaler", "scheduler",
    "state_dict_ema", "step", "version",
}  # fmt: skip


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Takes away prefixes that all names have, and what is no weight of the model.

    Args:
        names: Names in a file.

    Returns:
        Dictionary from the bare name to the name in the file.

    Example:
        >>> unwrapped(["model.module.cls_token", "epoch"])
        {'cls_token': 'model.module.cls_token'}
    """
    found = {name: name for name in names}
    while True:
        weights = [n for n in found if n.partition(".")[0] not in _TRAINING]
        prefix = next((p for p in PREFIXES if weights and _all_below(weights, p)), None)
        if prefix is None:
            return found
        found = {name[len(prefix) :]: found[name] for name in weights}


def _all_below(names: list[str], prefix: str) -> bool:
    return all(name.startswith(prefix) for name in names)
