"""Coverage: which parameters of a model are pruned, by kind of layer, name, module or predicate."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod

KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "conv": (_ConvNd,),
    "linear": (nn.Linear,),
    "attention": (nn.MultiheadAttention, NonDynamicallyQuantizableLinear),  # the latter is its out_proj
    "recurrent": (nn.RNNBase, nn.RNNCellBase),
}
"""Kinds of layers by name, each with all subclasses. Convs are of one to three dimensions, transposed ones included."""

Kinds = str | type[nn.Module] | Iterable[str | type[nn.Module]]
"""Names in KINDS, "all" for all of them, "bias" for the biases of such layers, or classes of modules."""

Selector = str | nn.Module | Callable[[str, nn.Parameter], bool]
"""A pattern of names as in fnmatch (of the parameter, or of a module that contains it), a module, or a predicate. A
predicate is not asked about weights that are computed from other parameters."""

Selectors = Selector | Iterable[Selector]


@dataclass(frozen=True)
class Covered:
    """A parameter that is pruned. names: all its names in the model, several if it is tied; the first is its name."""

    names: tuple[str, ...]
    parameter: nn.Parameter

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Coverage:
    """What a Pruner prunes, and what it leaves. frozen, excluded: names of weights of the kinds that it leaves."""

    covered: tuple[Covered, ...]
    frozen: tuple[str, ...]
    excluded: tuple[str, ...]
    left: int
    """Number of weights in `frozen` and `excluded`."""
    total: int
    """Number of the model's parameters, tied ones counted once."""

    def left_out(self) -> str:
        """What is not covered, in words; "" if all is."""
        other = self.total - sum(c.parameter.numel() for c in self.covered) - self.left
        parts = [
            f"{len(names)} {why} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for why, names in (("frozen", self.frozen), ("not selected", self.excluded))
            if names
        ]
        return ", ".join([*parts, *([f"{other:,} other parameters (biases, norms, other kinds)"] if other else [])])


def coverage(
    model: nn.Module, kinds: Kinds = "all", include: Selectors | None = None, exclude: Selectors | None = None
) -> Coverage:
    """The weights of the layers of `kinds`: those that `include` selects (default: all), without those of `exclude`.

    Changes nothing. A weight that several layers share is covered once, by its first name in the model; one under a
    hook of torch.nn.utils.prune by the name that it has without. Frozen parameters are not covered. A class in `kinds`
    stands for its own parameters of two dimensions and more, "bias" for the biases of all layers of KINDS. ValueError
    for unknown kinds, for a selector that selects none of their weights, and for a weight that is not initialised yet,
    complex, sharded over processes (DTensor, FSDP), or computed from other parameters (by weight_norm, spectral_norm or
    a parametrization).
    """
    given = [kinds] if isinstance(kinds, (str, type)) else list(kinds)
    classes = _classes([kind for kind in given if kind != "bias"])
    biased = _classes(["all"]) if "bias" in given else ()
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    hooked = torch_pruned(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        name = name.removesuffix("_orig") if id(parameter) in hooked else name
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    chosen, barred = Selecting(model, include), Selecting(model, exclude)
    wanted: dict[int, None] = {}
    left: dict[int, None] = {}
    seen: list[str] = []
    for module_name, module in model.named_modules():
        biases = tuple(_biases(module, biased))
        for own in (*_weights(module, classes), *biases):
            full = f"{module_name}.{own}" if module_name else own
            parameter = module._parameters.get(own)
            if parameter is None and id(module._parameters.get(f"{own}_orig")) in hooked:
                parameter = module._parameters[f"{own}_orig"]
            all_names = names[id(parameter)] if parameter is not None else [full]
            # Both are asked, also where one decides: each notes which of its selectors select anything.
            selected, excepted = chosen.has(all_names, parameter), barred.has(all_names, parameter)
            seen.append(all_names[0])
            if (include is not None and not selected) or excepted:
                left[id(parameter)] = None
                continue
            if parameter is None:
                raise ValueError(_why_not(module, module_name, own))
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(f"{full} is not initialised yet: pass a batch through the model first")
            if hasattr(parameter, "device_mesh"):
                raise ValueError(f"{full} is sharded over processes (DTensor), which a Pruner cannot rank: exclude it")
            if parameter.dim() < 2 and own not in biases:
                shape = list(parameter.shape)
                raise ValueError(f"{full} has the shape {shape}, as shards of FSDP have: a Pruner ranks whole weights")
            if parameter.is_complex():
                raise ValueError(f"{full} is {parameter.dtype}, expected floats: exclude it")
            wanted[id(parameter)] = None
    for selection, argument in ((chosen, "include"), (barred, "exclude")):
        if unused := selection.unused():
            some = f"{', '.join(seen[:3])}{', ...' if len(seen) > 3 else ''}" if seen else "there are none"
            raise ValueError(f"{argument} {unused} selects none of the weights of these kinds ({some})")
    # In the order of named_parameters: masks, ties and files do not depend on the order in which modules are visited.
    order = [key for key in names if key in wanted]
    live = [k for k in order if parameters[k].requires_grad]
    frozen = [k for k in order if not parameters[k].requires_grad]
    excluded = [k for k in left if k in names and k not in wanted]
    return Coverage(
        tuple(Covered(tuple(names[k]), parameters[k]) for k in live),
        tuple(names[k][0] for k in frozen),
        tuple(names[k][0] for k in excluded),
        sum(_numel(parameters[k]) for k in frozen + excluded),
        sum(map(_numel, parameters.values())),
    )


def conv_weights(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, weight) of every conv, which is what the paper's protocol prunes, in the model's order."""
    return [(c.name, c.parameter) for c in coverage(model, "conv").covered]


def torch_pruned(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """By id of the original parameter, the modules and parameter names under hooks of torch.nn.utils.prune."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                original = module._parameters[f"{hook._tensor_name}_orig"]
                found.setdefault(id(original), []).append((module, hook._tensor_name))
    return found


def _numel(parameter: nn.Parameter) -> int:
    return 0 if isinstance(parameter, UninitializedParameter) else parameter.numel()


def _classes(kinds: Iterable[str | type[nn.Module]]) -> tuple[type[nn.Module], ...]:
    found: list[type[nn.Module]] = []
    for kind in kinds:
        if kind == "all":
            found += [cls for classes in KINDS.values() for cls in classes]
        elif isinstance(kind, str) and kind in KINDS:
            found += KINDS[kind]
        elif isinstance(kind, type) and issubclass(kind, nn.Module):
            found.append(kind)
        else:
            raise ValueError(f"unknown kind {kind!r}: give all, {', '.join(KINDS)}, bias, or a class of modules")
    return tuple(found)


def _weights(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> Iterator[str]:
    """Names of the module's own weights, if it is of one of the classes."""
    if not isinstance(module, classes):
        return
    if isinstance(module, (_ConvNd, nn.Linear)):
        yield "weight"
    elif isinstance(module, nn.MultiheadAttention):
        # Either one weight for queries, keys and values, or three.
        if module._qkv_same_embed_dim:
            yield "in_proj_weight"
        else:
            yield from ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    elif isinstance(module, nn.RNNBase):
        yield from (name for names in module._all_weights for name in names if name.startswith("weight"))
    elif isinstance(module, nn.RNNCellBase):
        yield from ("weight_ih", "weight_hh")
    else:
        own = {name: p for name, p in module._parameters.items() if p is not None}
        for name, p in own.items():
            # Originals under weight_norm, spectral_norm or torch's pruning stand for the weight computed from them.
            base, _, suffix = name.rpartition("_")
            if suffix in ("orig", "g", "v") and hasattr(module, base):
                yield base
            elif isinstance(p, UninitializedParameter) or p.dim() >= 2:
                yield name
        if is_parametrized(module):
            yield from module.parametrizations  # type: ignore[misc]


def _biases(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> Iterator[str]:
    """Names of the module's own biases, if it is of one of the classes."""
    if isinstance(module, classes):
        own = [name.removesuffix("_orig") for name, p in module._parameters.items() if p is not None]
        own += module.parametrizations if is_parametrized(module) else []  # type: ignore[arg-type]
        yield from (name for name in own if "bias" in name)


def _why_not(module: nn.Module, module_name: str, own: str) -> str:
    """Why the weight is no parameter of the module."""
    name = module_name or type(module).__name__
    held = set(module._parameters)
    if is_parametrized(module, own):
        how = ", ".join(type(p).__name__ for p in module.parametrizations[own])  # type: ignore[index]
        remove = f"torch.nn.utils.parametrize.remove_parametrizations({name}, {own!r})"
    elif f"{own}_g" in held and f"{own}_v" in held:
        how, remove = "weight_norm", f"torch.nn.utils.remove_weight_norm({name}, {own!r})"
    elif f"{own}_orig" in held:
        how, remove = "spectral_norm", f"torch.nn.utils.remove_spectral_norm({name}, {own!r})"
    else:
        return f"{name} has no parameter {own}: exclude it"
    return (
        f"{name}.{own} is computed from other parameters ({how}), so zeros in it do not stay: {remove}, or exclude it"
    )


class Selecting:
    """What selectors select, and which of them have selected anything yet. ValueError for what is no selector."""

    def __init__(self, model: nn.Module, selectors: Selectors | None) -> None:
        if selectors is None:
            given: list[Selector] = []
        elif isinstance(selectors, (str, nn.Module)) or callable(selectors):
            given = [selectors]
        else:
            given = list(selectors)
        self._used = [False] * len(given)
        self._tests: list[Callable[[str, nn.Parameter | None], bool]] = []
        self._given = given
        for selector in given:
            if isinstance(selector, type):
                raise ValueError(f"cannot select by the class {selector.__name__}: give it as kinds=")
            if isinstance(selector, str):
                self._tests.append(partial(_matches, selector))
            elif isinstance(selector, nn.Module):
                places = [name for name, m in model.named_modules(remove_duplicate=False) if m is selector]
                self._tests.append(partial(_is_inside, places))
            elif callable(selector):
                self._tests.append(partial(_agrees, selector))
            else:
                kind = type(selector).__name__
                raise ValueError(f"cannot select by a {kind}: give a pattern of names, a module or a predicate")

    def has(self, names: list[str], parameter: nn.Parameter | None) -> bool:
        """Whether a parameter, by any of its names, is selected. parameter: None for a computed weight."""
        found = False
        for i, test in enumerate(self._tests):
            if any(test(name, parameter) for name in names):
                self._used[i] = found = True
        return found

    def unused(self) -> str:
        """The first selector that selected nothing, in words; "" if there is none."""
        names = (
            s
            if isinstance(s, str)
            else type(s).__name__
            if isinstance(s, nn.Module)
            else getattr(s, "__name__", "function")
            for s, used in zip(self._given, self._used, strict=True)
            if not used
        )
        return next(names, "")


def _matches(pattern: str, name: str, parameter: nn.Parameter | None) -> bool:
    """Whether the pattern matches the parameter's name, or that of a module that contains it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _is_inside(modules: list[str], name: str, parameter: nn.Parameter | None) -> bool:
    return any(not module or name.startswith(f"{module}.") for module in modules)


def _agrees(predicate: Callable[[str, nn.Parameter], bool], name: str, parameter: nn.Parameter | None) -> bool:
    return parameter is not None and bool(predicate(name, parameter))
