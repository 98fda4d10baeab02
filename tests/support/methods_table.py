"""One table of methods: each must plan, apply, train, resume, save, reload and generate."""

from collections.abc import Callable
from dataclasses import dataclass

from prunelight.callbacks import (
    DLP,
    SLEB,
    BudgetPruning,
    DepthPruning,
    DynamicSlicing,
    LaCo,
    PruningCallback,
    ShortenedLlama,
    ShortGPT,
    SliceGPT,
    SlidingLayerMerging,
    WeightPruning,
    WidthPruning,
)
from prunelight.recovery.zeros.gradual_zeros import Schedule


@dataclass(frozen=True)
class Method:
    """How to make a method, and what is left: decoder layers, zeros in their matrices, widths."""

    make: Callable[[], PruningCallback]
    layers: int = 6
    sparsity: float | None = None
    gradual: bool = False
    slices: bool = False


def gradually() -> DLP:
    """Two rounds of zeros in the six steps of a run, one before and one after a resume."""
    return DLP(0.5, schedule=Schedule(1, 5, every=2))


METHODS = {
    "ShortGPT by number": Method(lambda: ShortGPT(num_layers=2), layers=4),
    "ShortGPT, layers by hand": Method(lambda: ShortGPT(layers=[1, -2]), layers=4),
    "SLM, highest layers": Method(lambda: SlidingLayerMerging(num_layers=2), layers=4),
    "SLM, the paper's sum of differences": Method(
        lambda: SlidingLayerMerging(ratio=0.34, merge="difference_sum", criterion="cosine"),
        layers=4,
    ),
    "SLM by threshold": Method(
        lambda: SlidingLayerMerging(threshold=-1.0, merge="mean", criterion="cka"), layers=2
    ),
    "LaCo": Method(lambda: LaCo(num_layers=2, window=3), layers=4),
    "SLEB": Method(lambda: SLEB(num_layers=2), layers=4),
    "Shortened LLaMA, Taylor": Method(
        lambda: ShortenedLlama(num_layers=2, score="taylor", protected=[0]), layers=4
    ),
    "depth by healing": Method(lambda: DepthPruning(num_layers=2, protected=[0]), layers=4),
    "depth and width in a budget": Method(lambda: BudgetPruning(0.75, multiple=8)),
    "attention dropped": Method(lambda: ShortGPT(num_layers=2, granularity="attention")),
    "sublayers dropped": Method(lambda: ShortGPT(ratio=0.5, granularity="sublayer")),
    "width": Method(lambda: WidthPruning(neuron_ratio=0.25, head_ratio=0.5, multiple=8)),
    "width by layer": Method(
        lambda: WidthPruning(neuron_ratio=0.25, head_ratio=0.25, multiple=8, allocation="global")
    ),
    "SliceGPT": Method(lambda: SliceGPT(0.25, embedding="full"), slices=True),
    # The text has too few different words for wider ones.
    "SliceGPT, sliced embeddings": Method(lambda: SliceGPT(0.5), slices=True),
    "DynamicSlicing, sweep": Method(
        lambda: DynamicSlicing(0.7, round_to=2, embedding="full"), slices=True
    ),
    "DynamicSlicing, by hand": Method(
        lambda: DynamicSlicing(
            slice_ratios=[0.75, 0.75, 0.8, 0.65, 0.7, 0.75], round_to=2, embedding="full"
        ),
        slices=True,
    ),
    "DLP, Wanda": Method(lambda: DLP(0.5), sparsity=0.5),
    "DLP, SparseGPT": Method(lambda: DLP(0.5, solver="sparsegpt"), sparsity=0.5),
    "DLP by linear": Method(lambda: DLP(0.6, granularity="linear"), sparsity=0.6),
    "Wanda": Method(lambda: WeightPruning(0.5), sparsity=0.5),
    "magnitude": Method(lambda: WeightPruning(0.5, solver="magnitude"), sparsity=0.5),
    "2:4, SparseGPT": Method(
        lambda: WeightPruning(pattern="2:4", solver="sparsegpt"), sparsity=0.5
    ),
    "DLP, gradual": Method(gradually, sparsity=0.5, gradual=True),
}

# Other scores and shares of methods above: what they leave is of the same kind. Swept alone.
VARIANTS = {
    "ShortGPT by ratio": Method(lambda: ShortGPT(ratio=0.5), layers=3),
    "ShortGPT, sinks ignored, ends protected": Method(
        lambda: ShortGPT(num_layers=1, ignore_first_tokens=4, protected=[0, -1]), layers=5
    ),
    "ShortGPT, angular": Method(lambda: ShortGPT(num_layers=2, score="angular"), layers=4),
    "SLM, flattened cosine, lowest kept": Method(
        lambda: SlidingLayerMerging(num_layers=2, merge="lowest", criterion="cosine_flat"),
        layers=4,
    ),
    "SLM, searched by the paper's loop": Method(
        lambda: SlidingLayerMerging(num_layers=2, search="sliding"), layers=4
    ),
    "width by layer, Taylor, no correction": Method(
        lambda: WidthPruning(head_ratio=0.25, score="taylor", correction=False, allocation="global")
    ),
    "width by DLP's shares": Method(
        lambda: WidthPruning(neuron_ratio=0.5, multiple=8, allocation="dlp", alpha=0.4)
    ),
    "SliceGPT, one rotation": Method(lambda: SliceGPT(0.25, rotation="shared"), slices=True),
    "DynamicSlicing, single cuts": Method(
        lambda: DynamicSlicing(0.7, 0.65, round_to=2, embedding="full", score="single_cut"),
        slices=True,
    ),
    "DLP, Wanda's variant": Method(lambda: DLP(0.5, solver="wanda_variant"), sparsity=0.5),
    "DLP, mixed 2:4": Method(lambda: DLP(pattern="2:4", alpha=0.3), sparsity=0.5),
    "OWL, Wanda": Method(lambda: WeightPruning(0.5, allocation="owl"), sparsity=0.5),
    "ShortGPT, relative magnitude": Method(
        lambda: ShortGPT(num_layers=2, score="relative_magnitude"), layers=4
    ),
    "ShortGPT, share of all parameters": Method(lambda: ShortGPT(parameter_ratio=0.2), layers=4),
    "ShortGPT, healed": Method(lambda: ShortGPT(num_layers=2, heal="linear"), layers=4),
    "ShortGPT, an MLP stands in": Method(lambda: ShortGPT(layers=[2, 3], heal="mlp"), layers=5),
    "ShortGPT, a matrix at the gap": Method(
        lambda: ShortGPT(layers=[2, 3], heal="operator"), layers=4
    ),
    "a budget, widths by layer": Method(
        lambda: BudgetPruning(0.7, multiple=4, allocation="by_layer")
    ),
    "a budget of memory, layers alone": Method(
        lambda: BudgetPruning(0.8, metric="memory", allocation="none", heal="none"), layers=4
    ),
    "SLM's mean, healed": Method(
        lambda: SlidingLayerMerging(num_layers=2, merge="mean", heal="linear"), layers=4
    ),
    "width by layer, healed": Method(
        lambda: WidthPruning(
            neuron_ratio=0.25, head_ratio=0.25, multiple=8, allocation="global", heal="linear"
        )
    ),
    "MLPs dropped, healed": Method(
        lambda: ShortGPT(num_layers=2, granularity="mlp", heal="linear")
    ),
    "SliceGPT, healed": Method(
        lambda: SliceGPT(0.25, embedding="full", heal="linear"), slices=True
    ),
    "DLP, healed": Method(lambda: DLP(0.5, heal="linear"), sparsity=0.5),
    "ShortGPT, layers trained": Method(lambda: ShortGPT(num_layers=2, heal="layer"), layers=4),
    "Wanda, layers trained": Method(lambda: WeightPruning(0.5, heal="layer"), sparsity=0.5),
    "DLP by deviation, alpha chosen": Method(
        lambda: DLP(0.5, statistic="std", alpha="auto"), sparsity=0.5
    ),
    "ALPS": Method(lambda: WeightPruning(0.5, solver="alps"), sparsity=0.5),
    "2:4, ALPS": Method(lambda: WeightPruning(pattern="2:4", solver="alps"), sparsity=0.5),
    "2:4, ALPS, swapped": Method(
        lambda: WeightPruning(pattern="2:4", solver="alps", swaps=2), sparsity=0.5
    ),
    "Wanda, swapped": Method(lambda: WeightPruning(0.5, swaps=2), sparsity=0.5),
    "ramp, Wanda": Method(lambda: WeightPruning(0.5, allocation="ramp"), sparsity=0.5),
    "LAMP, magnitude": Method(
        lambda: WeightPruning(0.5, solver="magnitude", allocation="lamp", granularity="linear"),
        sparsity=0.5,
    ),
    "FLAP": Method(
        lambda: WidthPruning(
            0.25,
            0.25,
            score="fluctuation",
            multiple=1,
            correction="bias",
            allocation="flap",
        )
    ),
    "Wanda-sp": Method(lambda: WidthPruning(0.25, 0.5, multiple=1, correction=False)),
    "width in a range of layers": Method(
        lambda: WidthPruning(
            0.25, 0.25, score="taylor", multiple=8, correction=False, skip_first=1, skip_last=2
        )
    ),
}
