"""prunelight: make causal language models smaller, bring them back, and save what others can load.

The functions below need no Trainer; the Lightning callbacks are in `prunelight.callbacks`.
"""

from pathlib import Path

# A source checkout keeps `callbacks/` and `configs/` beside this folder. Without the next lines,
# anything started from the repository root after a wheel install would not find them.
_repository = Path(__file__).resolve().parent.parent
if (_repository / "pyproject.toml").is_file() and (_repository / "callbacks").is_dir():
    __path__.append(str(_repository))

__version__ = "0.1.0"

import prunelight.models.families.registration  # noqa: E402, F401
from prunelight.calibration.shared_windows import share_windows  # noqa: E402
from prunelight.data.token_windows import calibration_windows  # noqa: E402
from prunelight.evaluation.perplexity import perplexity  # noqa: E402
from prunelight.models.loading import load  # noqa: E402
from prunelight.models.saving import save  # noqa: E402
from prunelight.planning.plan import Plan  # noqa: E402
from prunelight.pruning.apply import apply  # noqa: E402
from prunelight.scoring.analysis import analyze  # noqa: E402

__all__ = [
    "Plan",
    "analyze",
    "apply",
    "calibration_windows",
    "load",
    "perplexity",
    "save",
    "share_windows",
]
