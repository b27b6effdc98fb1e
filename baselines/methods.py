"""Realiz3D and its baselines (Sec. 5) as one table: what each trains, on what, and what it keeps for sampling.

Another baseline is a row here and, where it has an adapter of its own, a class in adapters.py (in ADAPTERS and
`adapter_rank`); to stand in the tables, a row in BASELINES of experiments/paper.py and the paper's numbers beside it.
SDEdit (sdedit.py) trains nothing and has no row.
"""
from typing import NamedTuple


class Method(NamedTuple):
    """What a row of the paper's tables trains."""
    adapter: str | None         # "shifters", a key of ADAPTERS (adapters.py), or None
    stage1: bool                # whether that is trained alone first, then frozen (--joint: trained with the model)
    backbone: bool              # whether the backbone trains; the weights of control (texturing) and views always do
    real_data: bool             # whether real iterations alternate with the synthetic ones
    kept: bool = True           # whether the adapter stays for sampling


METHODS = {
    #                         adapter     stage1 backbone real   kept
    "realiz3d":        Method("shifters", True,  True,  True),
    "syn_only":        Method(None,       False, True,  False),
    "syn_real":        Method(None,       False, True,  True),
    "lora":            Method("lora",     False, False, False),
    "linear_adapter":  Method("linear",   False, False, False),
    "domain_adapter":  Method("lora",     True,  True,  False, kept=False),         # AnimateDiff, Guo et al. 2024
    "spatial_adapter": Method("linear",   True,  True,  False, kept=False),         # Still-Moving
    "domain_switcher": Method("switcher", True,  True,  True),                      # Wonder3D
}
