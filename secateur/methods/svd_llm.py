"""SVD-LLM: low rank that is best for what the layers read."""

from dataclasses import dataclass
from typing import ClassVar

from secateur.methods.svd import SVD
from secateur.utils.options import option


@dataclass(frozen=True)
class SVDLLM(SVD):
    """Replace a weight by the low-rank matrix with the best outputs on calibration data.

    With H = E xxᵀ = L Lᵀ (by ``eigh``, as H may be singular) and W L = Σ σ_i u_i v_iᵀ,

        Ŵ = (U_r Σ_r^½) (Σ_r^½ V_rᵀ L⁻¹),   E‖(W − Ŵ)x‖² = Σ_{i>r} σ_i²

    No other Ŵ of rank r does better. The paper's later least squares on changed activations is left
    out: H is read behind the blocks that have changed already. Don't use it below about two thirds
    of the bytes if you can quantize.

    Source: Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition", arXiv 2403.07378.
    """

    ridge: float = option(1e-6, "ridge of H, relative to its mean diagonal", 0.0)

    name: ClassVar[str] = "svd-llm"
    summary: ClassVar[str] = "low-rank factors by activation-weighted SVD"
    source: ClassVar[str] = "arXiv 2403.07378"
    data_aware: ClassVar[bool] = True
    rereads: ClassVar[bool] = True
