"""Types of the compiled module; the source is csrc/bindings.cpp."""

import numpy as np
from numpy.typing import NDArray

_RowStatistics = tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]

def row_statistics_float32(
    logits: NDArray[np.float32], num_valid_columns: int, temperature: float
) -> _RowStatistics: ...
def row_statistics_bfloat16(
    logits: NDArray[np.uint16], num_valid_columns: int, temperature: float
) -> _RowStatistics: ...
