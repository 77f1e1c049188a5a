"""How a wrapper holds tensors: those of its layer by name, and none of them in a walk over modules."""

from typing import Any

from convattn.attachment import callers

# distinctive, since it is taken out of keys wherever it stands
INNER = "convattn_inner"


class LayerName(str):
    """The name of a wrapped layer: a path to it, and for its tensors the name that it has in the plain network.

    PyTorch names a tensor `name_of_the_module + "." + key`, and training scripts `f"{name_of_the_module}.{key}"`
    or `"%s.%s" % (name_of_the_module, key)`.

    Example:
        >>> name = LayerName("layer1.0.bn2.convattn_inner")
        >>> name + "." + "weight", f"{name}.weight"
        ('layer1.0.bn2.weight', 'layer1.0.bn2.weight')
    """

    def __add__(self, other: str) -> str:
        if not other.startswith("."):
            # a number, as tracers put it behind the name of a layer that is called again
            return str.__str__(self) + other
        plain = self.plain()
        return plain + other if plain else other.removeprefix(".")

    # the tracers of torch and torchvision find a layer by its path, also in texts, and number its calls by it
    def __format__(self, spec: str) -> str:
        return format(str.__str__(self) if callers.module().startswith("torch") else self.plain(), spec)

    def __str__(self) -> str:
        # by the operator % it is a part of a text; whoever calls str() asks for the path
        in_text = callers.does(callers.FORMATS) and not callers.module().startswith("torch")
        return self.plain() if in_text else str.__str__(self)

    def replace(self, old: str, new: str, count: Any = -1) -> str:
        # FullyShardedDataParallel takes its own part out of a name before it puts a key behind
        return (self.plain() if old.startswith("_fsdp") else str.__str__(self)).replace(old, new, count)

    def plain(self) -> str:
        """The name that the layer has in the plain network."""
        return self.removesuffix(INNER).removesuffix(".")


class LayerTensors(dict[str, Any]):
    """Parameters or buffers of a wrapper.

    A walk sees what was registered at the wrapper itself, such as the counters of a profiler. By key, the tensors of
    the layer are there too, to be read, replaced and removed, as pruning and `torch.func.functional_call` do it.

    Args:
        kind: `"_parameters"` or `"_buffers"`.
        modules: the wrapper's own dictionary of modules, in which the layer may be replaced.
        own: what is registered at the wrapper itself.
    """

    def __init__(self, kind: str, modules: dict[str, Any], own: dict[str, Any] | None = None) -> None:
        super().__init__(own or {})
        self.kind = kind
        self.modules = modules

    def layer_tensors(self) -> dict[str, Any]:
        """The layer's own dictionary."""
        layer = self.modules.get(INNER)
        return {} if layer is None else vars(layer)[self.kind]

    def has_own(self, key: object) -> bool:
        """Whether a tensor is registered at the wrapper itself."""
        return super().__contains__(key)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key in self.layer_tensors()

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key) if super().__contains__(key) else self.layer_tensors()[key]

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def __setitem__(self, key: str, value: Any) -> None:
        layer = self.layer_tensors()
        if key in layer and not super().__contains__(key):
            layer[key] = value
        else:
            super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        if super().__contains__(key):
            super().__delitem__(key)
        else:
            del self.layer_tensors()[key]

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(key, *default) if super().__contains__(key) else self.layer_tensors().pop(key, *default)

    def __reduce__(self) -> Any:
        return LayerTensors, (self.kind, self.modules, dict(self))
