"""A method's part in PEFT's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np


class PeftHooks:
    """What PEFT's files ask a method.

    The files are read and written by ``lora/peft``, which asks a method only for what is its
    own. Writing: :meth:`to_peft` of every layer (:meth:`pack` where slices are adapted; without it
    slices get keys of their own, which PEFT does not know), :meth:`peft_config` and
    :meth:`peft_modules_config`. Reading: :meth:`matches_peft` finds the method,
    :meth:`fields_from_peft` and :meth:`refine_fields` its fields; ranks, alphas, targets, biases
    and layers stored in full come from the config by PEFT's rules, unless :meth:`peft_rank` and
    :meth:`peft_alpha` say otherwise. When the model has got the adapter, :meth:`complete_peft` may
    complete the tensors, and :meth:`from_peft` gives every layer its values. A method in place has
    :meth:`peft_key` instead of tensors of its own.

    Attributes:
        peft_type: PEFT's name of the method in ``adapter_config.json``, ``None`` if it has none.
        peft_tensors: Ends of the keys of its tensors in PEFT's files, all that can occur.
        peft_shared: Names of tensors that PEFT stores once for the whole adapter (``vera_A``).
    """

    peft_type: ClassVar[str | None] = None
    peft_tensors: ClassVar[tuple[str, ...]] = ()
    peft_shared: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def matches_peft(cls, config: Mapping[str, Any]) -> bool:
        """Whether an ``adapter_config.json`` is of this method."""
        return cls.peft_type is not None and config.get("peft_type") == cls.peft_type

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """``lora_`` fields of an ``adapter_config.json``, without targets, patterns and biases."""
        raise NotImplementedError(f"{cls.__name__} cannot be read from PEFT's files.")

    @classmethod
    def peft_config(cls, fields: Any) -> dict[str, Any]:
        """The method's own part of ``adapter_config.json``.

        Args:
            fields: A :class:`~tfimm_lora.lora.LoRAConfig`.
        """
        raise NotImplementedError(f"{cls.__name__} cannot be written in PEFT's files.")

    @classmethod
    def peft_modules_config(
        cls, fields: Any, updates: Mapping[str, Sequence[Any]]
    ) -> dict[str, Any]:
        """Entries of ``adapter_config.json`` that depend on the layers; they win over all others.

        Args:
            fields: A :class:`~tfimm_lora.lora.LoRAConfig`.
            updates: The method's instances in every adapted layer, by timm path.
        """
        return {}

    @classmethod
    def peft_targets(cls, modules: Sequence[str]) -> list[str] | str:
        """``target_modules`` of the config that mean exactly these modules.

        Args:
            modules: timm paths.
        """
        return list(modules)

    @classmethod
    def peft_key(cls, name: str) -> str:
        """Key, without prefix, of a weight of the model that a method in place trains.

        Args:
            name: timm name of the weight, ``blocks.0.norm1.weight``.
        """
        return name

    @classmethod
    def peft_rank(cls, config: Mapping[str, Any], module: str) -> int | None:
        """Rank of a module where it is not ``r`` or what ``rank_pattern`` says.

        Args:
            config: Content of ``adapter_config.json``.
            module: Path of the module in PEFT's model.
        """
        return None

    @classmethod
    def peft_alpha(cls, config: Mapping[str, Any], module: str) -> float | None:
        """Alpha of a module where it is not the config's or what ``alpha_pattern`` says."""
        return None

    @classmethod
    def refine_fields(
        cls,
        fields: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray],
        layers: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Adjusts what :meth:`fields_from_peft` returned to the tensors and the model's layers.

        Args:
            fields: ``lora_`` fields.
            tensors: As for :meth:`complete_peft`.
            layers: The regular model's layers by timm path.
        """
        return dict(fields)

    @classmethod
    def complete_peft(
        cls,
        config: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray],
        layers: Mapping[str, Any],
    ) -> dict[str, np.ndarray]:
        """Completes or expands the tensors of a file before they go to :meth:`from_peft`.

        AdaLoRA lays out tensors that were cropped to the ranks left; VeRA draws its projections
        again where the file has none.

        Args:
            config: Content of ``adapter_config.json``; names in it are those of PEFT's model.
            tensors: All tensors of the method by timm path and end of key
                (``blocks.0.attn.qkv.lora_A``); shared ones by their name alone (``vera_A``).
            layers: The adapted layers by timm path.

        Returns:
            The tensors that the layers get.

        Raises:
            ValueError: The tensors contradict the config.
        """
        return dict(tensors)

    def to_peft(self) -> dict[str, np.ndarray]:
        """Tensors in PEFT's layouts by the end of their key (``lora_A.weight``).

        Shared tensors (:attr:`peft_shared`) are among them, by their name, as far as this layer
        knows them: of those of all layers the file gets the largest, of which the others have to
        be the leading part.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be written in PEFT's files.")

    def from_peft(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inverse of :meth:`to_peft`: values by plain name, for variables that are given any.

        Args:
            tensors: Tensors by the end of their key; shared ones, in full, by their name.

        Raises:
            ValueError: The tensors do not fit the layer.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be read from PEFT's files.")

    @classmethod
    def pack(cls, updates: Sequence[Any]) -> tuple[dict[str, np.ndarray], int, float] | None:
        """Expresses the slices of one layer as one update of the whole kernel, as PEFT needs it.

        Args:
            updates: The updates of the slices.

        Returns:
            Tensors as of :meth:`to_peft`, the rank and the alpha; ``None`` if PEFT's form cannot
            express slices.
        """
        return None

    @classmethod
    def unpack(
        cls, updates: Sequence[Any], tensors: Mapping[str, np.ndarray]
    ) -> list[dict[str, np.ndarray]]:
        """The inverse of :meth:`pack`: values by plain name for each slice.

        Raises:
            ValueError: The tensors are no update of these slices.
        """
        raise NotImplementedError(f"{cls.__name__} cannot adapt slices in PEFT's files.")
