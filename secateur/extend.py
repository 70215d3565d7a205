"""What a package that adds a method or an allocator to Secateur imports.

A method extends one of five bases, an allocator one of three. The package declares its class by an
entry point, in the group ``secateur.methods`` or ``secateur.allocators``; docs/extending.md shows
how. Names that are not listed here may change with any version.
"""

from secateur.allocate.base import Allocator, BlockAllocator, Evidence, ShareAllocator
from secateur.allocate.knapsack import Knapsack
from secateur.allocate.least_error import LeastError
from secateur.allocate.uniform import Uniform
from secateur.calibration.needs import INPUTS, MOMENTS, BlockStatistics, Need, Needs
from secateur.calibration.statistics import Statistic
from secateur.calibration.token_batches import TokenBatches
from secateur.linalg.least_squares import least_squares
from secateur.methods.base import Method, SequentialMethod, Solution
from secateur.methods.form import FormMethod, Metric
from secateur.methods.refitted import RefittedMethod, in_order, problem
from secateur.methods.scored import ScoredMethod
from secateur.models.block import Block
from secateur.models.model import Model
from secateur.structure.costs import Prices
from secateur.structure.error_curve import Curve
from secateur.structure.form import Form
from secateur.structure.narrowing import Narrowing
from secateur.structure.parametrizations import form_of
from secateur.structure.units import (
    DEPTH,
    EVERY_BLOCK,
    MATRICES,
    MLP,
    STREAM,
    WHOLE_HEADS,
    WIDTHS,
    Heads,
    Matrix,
    QueryKey,
    Unit,
    ValueOutput,
)
from secateur.utils.errors import InputError
from secateur.utils.options import option, whole_numbers

__all__ = [
    "DEPTH",
    "EVERY_BLOCK",
    "INPUTS",
    "MATRICES",
    "MLP",
    "MOMENTS",
    "STREAM",
    "WHOLE_HEADS",
    "WIDTHS",
    "Allocator",
    "Block",
    "BlockAllocator",
    "BlockStatistics",
    "Curve",
    "Evidence",
    "Form",
    "FormMethod",
    "Heads",
    "InputError",
    "Knapsack",
    "LeastError",
    "Matrix",
    "Method",
    "Metric",
    "Model",
    "Narrowing",
    "Need",
    "Needs",
    "Prices",
    "QueryKey",
    "RefittedMethod",
    "ScoredMethod",
    "SequentialMethod",
    "ShareAllocator",
    "Solution",
    "Statistic",
    "TokenBatches",
    "Uniform",
    "Unit",
    "ValueOutput",
    "form_of",
    "in_order",
    "least_squares",
    "option",
    "problem",
    "whole_numbers",
]
