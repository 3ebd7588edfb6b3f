"""Options of AdaLoRA."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class AdaLoRAOptions:
    """Options of AdaLoRA.

    Attributes:
        target_rank: Mean rank of an update at the end (PEFT's ``target_r``). Defaults to ``None``,
            half of ``lora_rank``.
        tinit: Steps at the start in which nothing is pruned. Defaults to 0.
        tfinal: Steps at the end in which the ranks stay as they are. Defaults to 0.
        delta_t: Steps from one allocation of ranks to the next (PEFT's ``deltaT``). Defaults to 1.
        beta1: Momentum of the importance. Defaults to 0.85.
        beta2: Momentum of its uncertainty. Defaults to 0.85.
        orth_reg_weight: Weight of the penalty that keeps A and B orthogonal. Defaults to 0.5.
        total_step: Steps of the whole training. Defaults to ``None``: ``fit`` knows them.

    Raises:
        ValueError: A value is out of range.
    """

    target_rank: int | None = None
    tinit: int = 0
    tfinal: int = 0
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    def __post_init__(self) -> None:
        least = {"target_rank": 1, "tinit": 0, "tfinal": 0, "delta_t": 1, "total_step": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is None and name in ("target_rank", "total_step"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(
                    f"lora_options: {name} has to be an integer of at least {low}, found {value!r}."
                )
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"lora_options: {name} has to be in (0, 1), found {getattr(self, name)!r}."
                )
        if not self.orth_reg_weight >= 0:
            raise ValueError(
                "lora_options: orth_reg_weight has to be 0 or more, found "
                f"{self.orth_reg_weight!r}."
            )
        if self.total_step is not None:
            check_total_step(self, self.total_step)


def check_total_step(options: AdaLoRAOptions, total: int) -> None:
    """Raises unless a training leaves steps between the first and the last phase.

    Raises:
        ValueError: It does not.
    """
    if options.tinit + options.tfinal >= total:
        raise ValueError(
            f"AdaLoRA prunes between the first tinit={options.tinit} and the last tfinal="
            f"{options.tfinal} steps, and of {total} steps none lies between them. Make tinit and "
            "tfinal in lora_options smaller, or train for more steps."
        )
