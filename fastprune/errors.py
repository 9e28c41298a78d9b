"""The error that a user can correct, and how messages name what was given."""

from collections.abc import Mapping


class InputError(ValueError):
    """Bad input. The message is one line: what is wrong, where, and what to do. Scripts exit with code 2."""


def kind_of(value: object) -> str:
    """What a caller gave, as messages name it: "a dict", "an ndarray", "the str 'x'", "None"."""
    if value is None:
        return "None"
    kind = type(value).__name__
    if isinstance(value, str):
        return f"the {kind} {value[:40]!r}"
    return f"{'an' if kind[0].lower() in 'aeiou' or kind == 'ndarray' else 'a'} {kind}"


def not_a_module(model: object, user: str) -> TypeError:
    """The error for `model`, which is no torch.nn.Module. user: what takes one."""
    if isinstance(model, Mapping):
        return TypeError(
            f"{user} takes a module, not {kind_of(model)}: a state dict has no layers, load it into its model "
            "(model.load_state_dict) and give the model"
        )
    if isinstance(model, type):
        return TypeError(f"{user} takes a module, not a class: give an instance of it, {model.__name__}(...)")
    return TypeError(f"{user} takes a module (torch.nn.Module), not {kind_of(model)}")
