"""The folds that a recipe asks for, as steps: each looks at the program as the ones before have left it.

1. `untie_embeddings`, `fold_norm_affine`, `center_norms`: what stands in the way of rotations goes away.
2. `balance_scales`: one gauge for all models that compute the same.
3. Queries and keys turn online where a cache is quantized: first, so that learning sees it.
4. Rotations are chosen (or everything is learned at once) and folded.
5. Scales and shifts of sites are chosen, folded where that is free, and put on the edges where not, with the online
   Hadamard transforms of sites that no rotation reaches. Norms take edges back as their gains.

The choosers only propose; every fold checks what it is given against the spaces of the program and is verified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..compiler.driver import Step
from ..compiler.graph import module_path
from ..compiler.passes import PassResult
from ..compiler.program import Program
from ..compiler.recipe import Fold, Recipe
from ..compiler.spaces.analysis import Spaces, analyse
from ..compiler.spaces.atoms import Group, leaves
from .balance_scales import balance_scales
from .center_norms import center_norms
from .choose_edges import choose_edges
from .choose_rotations import choose_rotations, turning
from .fold_edges import absorb_into_norms, run_fold_edges
from .fold_norm_affine import fold_norm_affine
from .fold_rotation import fold_rotation
from .layers import ATTENTIONS
from .learn_transforms import Learned, learn_transforms
from .place_hadamards import place_hadamards
from .sites import EdgeTransform, Site, find_sites
from .transform_edges import transform_edges
from .untie_embeddings import untie_embeddings


@dataclass
class _Choices:
    """What earlier steps chose for later ones."""

    recipe: Recipe
    fold: Fold
    calibration: Sequence[Any] | None
    learned: Learned | None = None
    edges: dict[str, EdgeTransform] = field(default_factory=dict)


@dataclass(frozen=True)
class _Chosen:
    """A pass whose options are chosen on the program it gets."""

    name: str
    run: Callable[[Program], PassResult]

    def __call__(self, program: Program, **options: Any) -> PassResult:
        """Choose, then apply."""
        return self.run(program, **options)


def fold_steps(recipe: Recipe, calibration: Iterable[Any] | None) -> list[Step]:
    """The steps of `recipe.fold`."""
    fold = recipe.fold
    if fold is None:
        return []
    choices = _Choices(recipe, fold, None if calibration is None else list(calibration))
    steps: list[Step] = []
    if fold.rotation != "none":
        steps += [Step(untie_embeddings), Step(fold_norm_affine), Step(center_norms)]
    if fold.balance:
        steps.append(Step(balance_scales))
    if _online(fold) and recipe.asks_for("kv"):
        steps.append(Step(_Chosen("place_hadamards", lambda program: _turn_attentions(program, choices))))
    if fold.rotation != "none" or fold.learns:
        steps.append(Step(_Chosen("fold_rotation", lambda program: _rotate(program, choices))))
    if fold.scale != "none" or fold.shift != "none" or _online(fold):
        steps.append(Step(_Chosen("fold_edges", lambda program: _fold_edges(program, choices))))
        steps.append(Step(_Chosen("transform_edges", lambda program: _transform_edges(program, choices))))
        steps.append(Step(absorb_into_norms))
    if _online(fold):
        steps.append(Step(_Chosen("place_hadamards", lambda program: _turn_linears(program, choices))))
    return steps


def _online(fold: Fold) -> bool:
    return fold.rotation != "none" and fold.online == "auto"


def sites_to_transform(sites: Sequence[Site], spaces: Spaces, fold: Fold) -> set[str]:
    """Sites of quantized activations that no folded rotation evens out (online: under 1 % of a product).

    Learned scales make channels uneven that an orthogonal map had evened out: those are transformed too.
    """
    if not _online(fold):
        return set()
    uneven = fold.scale == "learned"
    turned = {space.atom for space in turning(spaces) if not uneven or space.group == Group.GENERAL}
    nodes = {node.name: node for node in spaces.program.graph.nodes}
    found = set()
    for site in sites:
        if site.kind != "weights" or site.activations.mode == "float":
            continue
        atoms = [atom for atom, _ in leaves(spaces.dims_of[nodes[site.value]][-1])]
        if not any(atom in turned for atom in atoms):
            found.add(site.name)
    return found


def _rotate(program: Program, choices: _Choices) -> PassResult:
    fold = choices.fold
    if fold.learns:
        assert choices.calibration is not None
        choices.learned = learn_transforms(
            program,
            choices.recipe,
            fold,
            choices.calibration,
            hadamard=lambda sites, spaces: sites_to_transform(sites, spaces, fold),
        )
        result = fold_rotation(program, rotations=choices.learned.rotations)
    else:
        result = fold_rotation(
            program, rotations=choose_rotations(analyse(program), fold.rotation, fold.seed)
        )
    return result


def _fold_edges(program: Program, choices: _Choices) -> PassResult:
    fold, recipe = choices.fold, choices.recipe
    if choices.learned is not None:
        transforms = choices.learned.edges
    elif fold.scale == "none" and fold.shift == "none":
        transforms = {}
    else:
        spaces = analyse(program)
        hadamard = sites_to_transform(find_sites(program, recipe), spaces, fold)
        scale: Any = fold.scale
        shift: Any = fold.shift
        chosen = choose_edges(
            program,
            recipe,
            scale=scale,
            shift=shift,
            calibration=choices.calibration,
            hadamard=hadamard,
            seed=fold.seed,
        )
        transforms = {name: choice.transform for name, choice in chosen.items()}
    result, choices.edges = run_fold_edges(program, recipe, transforms)
    return result


def _transform_edges(program: Program, choices: _Choices) -> PassResult:
    return transform_edges(program, recipe=choices.recipe, transforms=choices.edges)


def _turn_attentions(program: Program, choices: _Choices) -> PassResult:
    attentions = [
        node.name
        for node in program.graph.nodes
        if node.op == "call_function"
        and node.target in ATTENTIONS
        and choices.recipe.format_for(module_path(node), "kv") is not None
    ]
    return place_hadamards(program, attentions=attentions, seed=choices.fold.seed)


def _turn_linears(program: Program, choices: _Choices) -> PassResult:
    recipe, fold = choices.recipe, choices.fold
    linears: list[str] = []
    if not choices.edges:
        sites = find_sites(program, recipe)
        chosen = sites_to_transform(sites, analyse(program), fold)
        linears = [reader.node for site in sites if site.name in chosen for reader in site.readers]
    return place_hadamards(program, linears=linears, seed=fold.seed)
