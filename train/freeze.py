"""What trains: a table of regexes over parameter names with learning rates; everything else is frozen."""

from __future__ import annotations

import re

from torch import nn

from soundwave_fast.errors import UserError


def parameter_groups(model: nn.Module, trainable: dict[str, float], weight_decay: float) -> list[dict]:
    """Optimizer groups, one or two a regex (decay for matrices only); sets `requires_grad` throughout.

    The first regex that matches a name (re.match) decides.

    Raises:
        UserError: an invalid regex, or one that matches no parameter.
    """
    try:
        patterns = [(re.compile(pattern), lr) for pattern, lr in trainable.items()]
    except re.error as error:
        raise UserError(f"optim.trainable: {error.pattern!r} is no regular expression ({error})") from None
    groups = {(i, decay): [] for i in range(len(patterns)) for decay in (True, False)}
    for name, parameter in model.named_parameters():
        index = next((i for i, (pattern, _) in enumerate(patterns) if pattern.match(name)), None)
        parameter.requires_grad_(index is not None)
        if index is not None:
            groups[index, parameter.ndim > 1].append(parameter)
    made = []
    for index, (pattern, lr) in enumerate(patterns):
        if not groups[index, True] and not groups[index, False]:
            raise UserError(f"optim.trainable: {pattern.pattern!r} matches no parameter")
        for decay in (True, False):
            if groups[index, decay]:
                made.append(
                    {
                        "params": groups[index, decay],
                        "lr": lr,
                        "peak": lr,
                        "weight_decay": weight_decay if decay else 0.0,
                        "name": pattern.pattern,
                    }
                )
    if not made:
        raise UserError("optim.trainable: nothing would train")
    return made
