"""How a published model names its settings and weights, and how it lays them out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tim4rec_jax.errors import UserError

Path = tuple[Any, ...]  # of a parameter in our model, such as ("blocks", 0, "norm", "scale")

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


class Layout(NamedTuple):
    """Two functions that undo each other."""

    to_torch: Callable[[np.ndarray], np.ndarray]
    from_torch: Callable[[np.ndarray], np.ndarray]


AS_IT_IS = Layout(lambda value: value, lambda value: value)
TRANSPOSED = Layout(np.transpose, np.transpose)  # linear: [in, out] <-> [out, in]
# Depthwise convolution: [width, C] <-> [C, 1, width].
DEPTHWISE = Layout(lambda value: value.T[:, None], lambda value: value[:, 0].T)


@dataclass(frozen=True)
class Format:
    """One published model.

    Attributes:
      model: its name among ours (`tim4rec_jax.models.MODELS`).
      settings: keys its configuration must have, with their types; ours have the same names.
      modules: our modules -> theirs, `*` for the number of a layer; where the last name of a
        parameter differs in more than `kernel`, `scale` or `embedding` for `weight`, the whole
        parameter.
      layouts: of parameters, named as in `modules` but with their last name; others lie as in
        torch, and kernels transposed.
      fixed: settings of ours that its configuration does not have.
    """

    model: str
    settings: Mapping[str, type]
    modules: Mapping[str, str]
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def torch_name(self, path: Path) -> str:
        """The torch name of our parameter."""
        pattern = _pattern(path)
        module, _, leaf = pattern.rpartition(".")
        if pattern in self.modules:
            name = self.modules[pattern]
        else:
            prefix = f"{self.modules[module]}." if module else ""
            name = prefix + _LEAVES.get(leaf, leaf)
        for number in (part for part in path if isinstance(part, int)):
            name = name.replace("*", str(number), 1)
        return name

    def layout(self, path: Path) -> Layout:
        """How our parameter lies in torch."""
        return self.layouts.get(_pattern(path), TRANSPOSED if path[-1] == "kernel" else AS_IT_IS)

    def read_settings(self, config: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Our model settings and the longest history, from the configuration of theirs.

        Raises:
          UserError: a key is missing or has a value of the wrong type.
        """
        kinds = {**self.settings, "MAX_ITEM_LIST_LENGTH": int}
        if missing := [key for key in kinds if key not in config]:
            raise UserError(
                f"the configuration lacks {', '.join(missing)}: give the YAML file the model was "
                "trained with (--config FILE.yaml)"
            )
        settings = {key: _read(config, key, kind) for key, kind in kinds.items()}
        max_length = settings.pop("MAX_ITEM_LIST_LENGTH")
        return {"name": self.model, "dtype": "float32", **self.fixed, **settings}, max_length


def _pattern(path: Path) -> str:
    return ".".join("*" if isinstance(part, int) else part for part in path)


def _read(config: Mapping[str, Any], key: str, kind: type) -> Any:
    try:
        if isinstance(config[key], bool) != (kind is bool):
            raise ValueError
        return kind(config[key])  # PyYAML reads 1e-12 as a string
    except (TypeError, ValueError):
        raise UserError(
            f"the configuration's {key} is {config[key]!r}: expected {kind.__name__}"
        ) from None
