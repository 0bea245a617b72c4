"""`moesaic upcycle DENSE OUT --experts 8 --top-k 2`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import moesaic
from moesaic.cli.verb import Summary, verb
from moesaic.upcycling.config import UpcycleConfig


def show(done: Mapping[str, Any]) -> Iterator[str]:
    """The model, its proof, and the verdict if budgets were given."""
    yield (
        f"{done['family']} of {done['experts']} experts, top-{done['top_k']}, in "
        f"{len(done['moe_layers'])} layers: {done['num_params']:,} parameters, "
        f"{done['active_params']:,} of them active for a token"
    )
    if proof := done["proof"]:
        logits = proof["logits"]
        yield (
            f"proof: {proof['verdict']}, largest logit difference to the dense model "
            f"{logits['largest_difference']:.3g} on {proof['text']['tokens']:,} tokens of "
            f"{proof['text']['source']} (largest logit {logits['largest_logit']:.3g})"
        )
    if verdict := done["verdict"]:
        yield f"verdict: {verdict['advice']}. {verdict['reason']}"
    yield f"wrote {done['out']}"


@verb(UpcycleConfig, positional=("dense", "out"), show=show)
def upcycle(config: UpcycleConfig) -> Summary:
    """Turn a dense model into a mixture of experts, with a proof that it computes the same."""
    summary: Summary = moesaic.upcycle(config)
    return summary
