"""The architectures and their checkpoints, as data.

``convnext.json``, ``vision_transformer.json`` and ``deit.json`` are called as timm's modules and
have one line per architecture::

    "name": {"parameters": 123, "config": {...}, "tags": {"tag": {...}, ...}}

``parameters`` is the number of weights with the head of the default checkpoint, ``config`` has
fields of the model's configuration, and ``tags`` has the facts of every checkpoint as fields of
:class:`~tfimm_lora.PretrainedConfig`, the default one first; what is left out has its default.
``retired_names.json`` has names that timm has given up and what they are called now.
``source.json`` says which timm these files were written from, by ``from_timm.py``.

``tfimm_names.json``, written by hand, has the names of tfimm 0.2.14 and the checkpoint that timm
had under that name when tfimm was written. Where timm has an architecture of the same name, that
name means what it means in timm, even if another checkpoint is the default now.
"""
