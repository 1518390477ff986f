"""Golden correlations from scipy: python correlation.py > correlation.json"""

import json

import numpy as np
import scipy
from scipy.stats import pearsonr, spearmanr

draw = np.random.default_rng(0)
x = draw.normal(size=40).round(4)
CASES = [
    (x, (x + draw.normal(size=40)).round(4)),
    (draw.integers(0, 6, 60), draw.integers(0, 4, 60)),
    (x, np.exp(3 * x).round(4)),
    (np.array([1.0, 2.0]), np.array([5.0, -1.0])),
]
cases = [
    {"x": a.tolist(), "y": b.tolist(), "spearman": spearmanr(a, b).statistic.item(), "pearson": float(pearsonr(a, b).statistic)}
    for a, b in CASES
]
print(json.dumps({"scipy": scipy.__version__, "cases": cases}, separators=(",", ":")))
