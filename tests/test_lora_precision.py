"""What 16 bits must not lose."""

from __future__ import annotations

import numpy as np
import pytest

from tfimm_lora import lora


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_a_small_depthwise_update_is_not_rounded_away(policy, dropout):
    layer = lora.LoRADepthwiseConv2D(2, lora_rank=1, lora_dropout=dropout, dtype=policy)
    layer.build((None, 4, 4, 3))
    # Ones and minus ones cancel, so the output is the update alone: 4 * 0.001. Added to the kernel
    # in bfloat16, whose step next to one is 0.008, it would be nothing.
    signs = np.array([[1.0, -1.0], [-1.0, 1.0]], "float32")
    layer.kernel.assign(np.broadcast_to(signs[:, :, None, None], (2, 2, 3, 1)))
    layer.kernel_lora_a.assign(np.full((2, 2, 1), 0.001, "float32"))
    layer.kernel_lora_b.assign(np.ones((1, 3), "float32"))
    output = np.asarray(layer(np.ones((1, 4, 4, 3), "float32")), "float32")
    np.testing.assert_allclose(output, 0.004, rtol=0.01)
