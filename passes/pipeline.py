"""From a recipe to the passes that it means, in order.

1. `widen_halves` where the model is of half precision, then `canonicalize`: one spelling, so that the rest need know no
   architecture; equal calls become one.
2. `quantize_*`: activations first, as their ranges are measured on the float program, then weights, then keys and
   values of attentions.
3. `pack_*`: codes into the layouts that kernels read; after this no float copy of a packed weight is left. Float
   weights of experts take panels here, for every runtime.
4. `fuse_*`: what stands in front of quantizers first, so that norms find them next to their result; attention before
   the linears that feed it (its views then lead to them), linears of experts that read the same rows, epilogues before
   those linears are joined and before norms, which take only the sums that no linear took.
5. `extract_sparsity` where the recipe asks for it, on what is then whole: joined linears with their epilogues, and
   pointwise convolutions (`expose_pointwise`).
   Quantizers that still have one dense reader come last; then, for a runtime without a float matrix product of its own,
   float linears take panels (`pack_dense_linears`) and their epilogues.

Between 1 and 2 come the rounding and the codes that a model already has (`extract_rounding`, `extract_codes`), the
folds that the recipe asks for (`fold_transforms`), then `prune_channels` with `shrink_channels` and `prune_weights`.
Steps that a recipe does not ask for are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..compiler.canonicalize import canonicalize
from ..compiler.driver import Step
from ..compiler.machine import known_machine
from ..compiler.program import Program
from ..compiler.recipe import GROUP_SIZES, Recipe
from .choose_formats import choose_formats, resolve_formats
from .expose_pointwise import expose_pointwise
from .extract_codes import extract_codes
from .extract_rounding import extract_rounding
from .extract_sparsity import extract_sparsity
from .fold_transforms import fold_steps
from .fuse_attention import fuse_attention
from .fuse_epilogues import fuse_epilogues
from .fuse_gated import fuse_gated
from .fuse_linears import fuse_linears
from .fuse_norms import fuse_norms
from .fuse_quantizer_inputs import fuse_quantizer_inputs
from .fuse_quantizers import fuse_quantizers
from .layers import check_recipe
from .pack_codebook_linears import pack_codebook_linears
from .pack_coded_linears import pack_coded_linears
from .pack_convolutions import pack_convolutions
from .pack_dense_linears import pack_dense_linears
from .pack_embeddings import pack_embeddings
from .pack_grouped_linears import pack_grouped_dense, pack_grouped_linears
from .pack_linears import pack_linears
from .prune_channels import prune_channels
from .prune_weights import prune_weights
from .quantize_activations import quantize_activations
from .quantize_cache import quantize_cache
from .quantize_codebooks import quantize_codebooks
from .quantize_coded import quantize_coded
from .quantize_convolutions import quantize_convolutions
from .quantize_embeddings import quantize_embeddings
from .quantize_past import quantize_past
from .quantize_weights import quantize_weights
from .shrink_channels import shrink_channels
from .split_low_rank import split_low_rank
from .widen_halves import has_halves, widen_halves


def plan(
    program: Program, recipe: Recipe, calibration: Iterable[Any] | None = None, dense: bool = False
) -> list[Step]:
    """The steps of `recipe` for `program`; calibration batches as in `calibrate.calibrate`.

    dense: the runtime has no float matrix product of its own.
    """
    if any(form.format == "auto" for form in recipe.weight_formats):
        machine, _ = known_machine()
        wide = widen_halves(program).program if has_halves(program) else program
        recipe, choices = resolve_formats(canonicalize(wide).program, recipe, machine)
        steps = plan(program, recipe, calibration, dense)
        steps.insert(1 + has_halves(program), Step(choose_formats, {"choices": choices}))
        return steps
    options = {"recipe": recipe}
    by_gptq = any(form.solver == "gptq" for form in recipe.weight_formats)
    if calibration is not None and (recipe.fold is not None or recipe.prune_formats or by_gptq):
        calibration = list(calibration)
    steps = [Step(widen_halves)] if has_halves(program) else []
    steps += [Step(canonicalize), Step(check_recipe, options)]
    if recipe.asks_for("weights") or recipe.asks_for("convolutions"):
        steps.append(Step(extract_rounding, options))  # what is rounded already is not rounded twice
    if recipe.is_prequantized:
        steps.append(Step(extract_codes, options))
    steps += fold_steps(recipe, calibration)
    structured = [form.structure is not None for form in recipe.prune_formats]
    if any(structured):
        steps.append(Step(prune_channels, {**options, "calibration": calibration}))
    if any(structured) or recipe.asks_for("sparsity"):
        steps.append(Step(shrink_channels))
    if not all(structured):
        steps.append(Step(prune_weights, options))
    weights, embeddings, convolutions, cache = (
        recipe.asks_for(kind) for kind in ("weights", "embeddings", "convolutions", "kv")
    )
    if any(form.low_rank for form in recipe.weight_formats):
        steps.append(Step(split_low_rank, options))
    if (weights or convolutions) and recipe.quantizes_activations:
        steps.append(Step(quantize_activations, {**options, "calibration": calibration}))
    found = any(form.format == "prequantized" for form in recipe.weight_formats)
    coded = any(form.format in GROUP_SIZES for form in recipe.weight_formats)
    codebooks = any(form.format == "codebook" for form in recipe.weight_formats)
    for wanted, quantize in (
        (coded, quantize_coded),
        (codebooks, quantize_codebooks),
        (weights, quantize_weights),
        (embeddings, quantize_embeddings),
        (convolutions, quantize_convolutions),
        (any(form.storage == "codes" for form in recipe.cache_formats), quantize_past),
        (cache, quantize_cache),
    ):
        if wanted:
            solved = {"calibration": calibration} if quantize is quantize_weights else {}
            steps.append(Step(quantize, {**options, **solved}))
    for wanted, pack in (
        (weights, pack_linears),
        (weights, pack_grouped_linears),
        (True, pack_grouped_dense),
        (coded or found, pack_coded_linears),
        (codebooks, pack_codebook_linears),
        (embeddings, pack_embeddings),
        (convolutions, pack_convolutions),
    ):
        if wanted:
            steps.append(Step(pack))
    if recipe.fuse:
        fusions = (
            fuse_quantizer_inputs,
            fuse_attention,
            fuse_gated,
            fuse_epilogues,
            fuse_linears,
            fuse_norms,
        )
        steps.extend(Step(fuse) for fuse in fusions)
    if recipe.asks_for("sparsity"):
        steps.append(Step(expose_pointwise, options))
        steps.append(Step(extract_sparsity, options))
        if recipe.fuse:
            steps.append(Step(fuse_epilogues))  # float linears had no epilogue before
    if recipe.fuse:
        steps.append(Step(fuse_quantizers))
    if dense:
        steps.append(Step(pack_dense_linears))
        if recipe.fuse:
            steps.append(Step(fuse_epilogues))
    return steps
