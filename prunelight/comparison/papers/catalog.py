"""The papers' tables: which contest repeats each, and what it asks.

A table is a config of `prunelight compare` in configs/papers. `reproduce_quick.yaml` over it makes
it small enough for a laptop.
"""

from __future__ import annotations

from dataclasses import dataclass

from prunelight.runtime.arguments import did_you_mean

QUICK = "reproduce_quick.yaml"


@dataclass(frozen=True)
class Table:
    """A table or figure of a paper.

    Attributes:
        config: installed config of the contest.
        asks: the question that it answers.
    """

    config: str
    asks: str


@dataclass(frozen=True)
class Paper:
    """A paper.

    Attributes:
        title: of the paper, with its arXiv number.
        tables: name -> table; the first is the main one.
    """

    title: str
    tables: dict[str, Table]


PAPERS = {
    "shortgpt": Paper(
        "ShortGPT (arXiv:2403.03853)",
        {
            "methods": Table(
                "reproduce_shortgpt_methods.yaml",
                "Which layers should go, and is depth better than width?",
            ),
            "ratios": Table(
                "reproduce_shortgpt_ratios.yaml",
                "How does quality fall with the number of layers removed?",
            ),
            "orthogonality": Table(
                "reproduce_shortgpt_orthogonality.yaml",
                "Do the harms of pruning and of 4 or 8 bits add up, whichever comes first?",
            ),
            "laco": Table(
                "reproduce_shortgpt_laco.yaml",
                "Is collapsing windows of layers better than removing layers?",
            ),
        },
    ),
    "dynamic_slicing": Paper(
        "DynamicSlicing (Layer Redundancy and SliceGPT)",
        {
            "methods": Table(
                "reproduce_dynamic_slicing_methods.yaml",
                "Are widths by Layer Redundancy better than SliceGPT's equal ones?",
            ),
            "base": Table(
                "reproduce_dynamic_slicing_base.yaml",
                "Which base ratio is best at each slice ratio?",
            ),
            "signal": Table(
                "reproduce_dynamic_slicing_signal.yaml",
                "Components of the residual, or of the normalized signal?",
            ),
            "scores": Table(
                "reproduce_dynamic_slicing_scores.yaml",
                "Does the text of Layer Redundancy matter, and do single cuts say the same?",
            ),
        },
    ),
    "slm": Paper(
        "SLM: sliding layer merging (arXiv:2502.19159)",
        {
            "methods": Table(
                "reproduce_slm_methods.yaml",
                "Is merging better than removing layers, or than width?",
            ),
            "ablations": Table(
                "reproduce_slm_ablations.yaml",
                "How should windows merge, and how should layers be chosen?",
            ),
            "calibration": Table(
                "reproduce_slm_calibration.yaml",
                "How much do other calibration windows change?",
            ),
            "grid": Table(
                "reproduce_slm_grid.yaml",
                "Which part of the parameters should go by depth, which by width?",
            ),
            "threshold": Table(
                "reproduce_slm_threshold.yaml",
                "How much does each threshold remove, and what does it cost?",
            ),
            "law": Table(
                "reproduce_slm_law.yaml",
                "Is SLM ever more than 2 % worse than ShortGPT, within 10 forwards?",
            ),
            "orthogonality": Table(
                "reproduce_slm_orthogonality.yaml",
                "Do the harms of merging layers and of 4 or 8 bits add up?",
            ),
        },
    ),
    "dlp": Paper(
        "DLP (arXiv:2505.23807)",
        {
            "perplexity": Table(
                "reproduce_dlp_perplexity.yaml",
                "Which shares of zeros are best at 70 %, with each solver?",
            ),
            "sparsity": Table(
                "reproduce_dlp_sparsity.yaml",
                "From which share of zeros on do DLP's shares pay?",
            ),
            "statistics": Table(
                "reproduce_dlp_statistics.yaml",
                "By which statistic should a layer be scored?",
            ),
            "alpha": Table("reproduce_dlp_alpha.yaml", "Does alpha matter?"),
            "orthogonality": Table(
                "reproduce_dlp_orthogonality.yaml",
                "Do the harms of zeros and of 4 or 8 bits add up?",
            ),
        },
    ),
}


def table_of(paper: str, table: str | None = None) -> tuple[str, Table]:
    """Return name and table of a paper; the main one where none is named.

    Raises:
        ValueError: if paper or table is unknown; names the nearest one.
    """
    if paper not in PAPERS:
        raise ValueError(
            f"there is no paper {paper!r}{did_you_mean(paper, PAPERS)}; take one of "
            f"{', '.join(PAPERS)}"
        )
    tables = PAPERS[paper].tables
    name = table if table is not None else next(iter(tables))
    if name not in tables:
        raise ValueError(
            f"table={name!r} is none of {paper}{did_you_mean(name, tables)}; take one of "
            f"{', '.join(tables)}"
        )
    return name, tables[name]
