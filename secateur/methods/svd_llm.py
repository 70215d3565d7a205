"""SVD-LLM: low rank that is best for what the layers read."""

from dataclasses import dataclass
from typing import ClassVar

from secateur.methods.svd import SVD
from secateur.utils.options import option


@dataclass(frozen=True)
class SVDLLM(SVD):
    """The matrix of low rank whose outputs on real text are nearest to the dense ones.

    With H = E xxᵀ = L Lᵀ (by ``eigh``, as H may be singular) and W L = Σ σ_i u_i v_iᵀ,

        Ŵ = (U_r Σ_r^½) (Σ_r^½ V_rᵀ L⁻¹),   E‖(W − Ŵ)x‖² = Σ_{i>r} σ_i²

    No other Ŵ of rank r does better. The paper's later least squares on changed activations is left
    out: H is read behind the blocks that have changed already. Don't use it below about two thirds
    of the bytes where integers are an option.

    Source: Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition", arXiv 2403.07378.
    """

    ridge: float = option(1e-6, "on the diagonal of H, relative", 0.0)

    name: ClassVar[str] = "svd-llm"
    summary: ClassVar[str] = "low rank by an SVD in the metric of what the layers read"
    source: ClassVar[str] = "arXiv 2403.07378"
    data_aware: ClassVar[bool] = True
    rereads: ClassVar[bool] = True
