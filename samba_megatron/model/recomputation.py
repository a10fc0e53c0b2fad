"""Results that the forward pass lets go and the backward pass computes again where it reads them.

For what costs little to compute and much to keep (``recompute_modules``: ``mlp_act``, ``conv1d``,
``dt_proj``, ``layernorm``, ``scan``). Whoever reads such a result keeps in its place how it was
computed (torch's hooks on saved tensors), so the memory is free as soon as the forward pass goes
on, and is taken again when the first of the readers comes to its gradient. Megatron's
``CheckpointWithoutOutput`` does the same with storages that it empties and fills by a compiled
extension; here nothing that is alive changes under anybody's hands, and a reader that keeps
something else (an FP8 copy) keeps that, as if nobody had asked.

Mostly the result alone is computed again, without a graph: its gradient goes the way it went. Where
what the function keeps for its gradient is large too (the scan's states), that is let go with it.
What is computed again must depend on its arguments alone and draw no random numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Recipe:
    """How a result was computed; and the result again, from when it is first read."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._function = function
        self._arguments = [_kept(argument) for argument in arguments]
        self._result: Tensor | None = None

    def result(self) -> Tensor:
        """The same numbers in the same layout. It lives as long as a reader that has yet to run."""
        if self._result is None:
            with torch.no_grad():
                self._result = self._function(*self._restored())
            self._arguments = []  # recipes that nobody else needs go
        return self._result

    def _restored(self) -> Iterator[Any]:
        return map(_unpack, self._arguments)


class _GraphRecipe(Recipe):
    """The same of several results, of which the first may be read, with the way to gradients."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        super().__init__(function, arguments)
        self._wanted = [isinstance(a, Tensor) and a.requires_grad for a in arguments]
        self._inputs: list[Any] = []
        self._outputs: tuple[Tensor | None, ...] = ()

    def result(self) -> Tensor:
        """The first result."""
        if self._result is None:
            self._inputs = [
                argument.detach().requires_grad_() if wanted else argument
                for argument, wanted in zip(self._restored(), self._wanted, strict=True)
            ]
            with torch.enable_grad():
                self._outputs = self._function(*self._inputs)
            assert self._outputs[0] is not None
            self._result = self._outputs[0].detach()
        return self._result

    def gradients(self, of_outputs: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """Of all arguments; None where there is none."""
        self.result()
        pairs = zip(self._outputs, of_outputs, strict=True)
        outputs, given = zip(*[(o, g) for o, g in pairs if g is not None], strict=True)
        inputs = [i for i, wanted in zip(self._inputs, self._wanted, strict=True) if wanted]
        found = iter(torch.autograd.grad(outputs, inputs, given, allow_unused=True))
        return [next(found) if wanted else None for wanted in self._wanted]


class _Graph(torch.autograd.Function):
    """A function with the graph of its second run."""

    @staticmethod
    def forward(ctx: Any, recipe: _GraphRecipe, function: Any, *arguments: Any) -> Any:
        """The function's results."""
        ctx.recipe = recipe
        ctx.set_materialize_grads(False)
        return function(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Through the second run, which begins here where nobody has read its result."""
        recipe, ctx.recipe = ctx.recipe, None  # a graph may live on; what it holds shall not
        return None, None, *recipe.gradients(gradients)


class _Part(NamedTuple):
    """What stands for a saved tensor: where its numbers lie in a result."""

    recipe: Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def restore(self) -> Tensor:
        """The saved tensor."""
        return self.recipe.result().as_strided(self.size, self.stride, self.offset)


def recomputable(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """``function(*arguments)``, as something that :func:`dropped` can let go.

    Args:
        function: gives a new tensor, always the same one for the same arguments.
        arguments: are kept alive; worth it where the backward pass needs them in any case.
    """
    result = function(*arguments)
    if torch.is_grad_enabled() and result.requires_grad:
        _mark(result, Recipe(function, arguments))
    return result


def recomputable_with_graph(function: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
    """``function(*arguments)``, whose graph and first result are let go.

    Args:
        function: gives a tuple of new tensors or None, always the same ones for the same arguments.
        arguments: are kept alive, but for those that are recomputable themselves.
    """
    if not torch.is_grad_enabled():
        results: tuple[Any, ...] = function(*arguments)
        return results
    recipe = _GraphRecipe(function, arguments)
    results = _Graph.apply(recipe, function, *arguments)
    if results[0].requires_grad:
        _mark(results[0], recipe)
    return results


def same_memory(view: Tensor, result: Tensor) -> Tensor:
    """``view``, as recomputable as the result that it is a view of; a copy is not."""
    recipe = _recipe(result)
    if recipe is not None and _memory(view) == _memory(result):
        _mark(view, recipe)
    return view


def following(function: Callable[[Tensor], Tensor], result: Tensor) -> Tensor:
    """``function(result)``, as recomputable as the result, whether it is a view or a copy."""
    after, recipe = function(result), _recipe(result)
    if recipe is not None:
        same = _memory(after) == _memory(result)
        _mark(after, recipe if same else Recipe(function, (result,)))
    return after


@contextmanager
def dropped(*results: Tensor) -> Iterator[None]:
    """Inside, whoever saves one of these results, or a view, saves how it was computed.

    Tensors that are not recomputable are saved as ever. Only the innermost of such contexts holds,
    so name all that a reader reads.
    """
    recipes = {
        _memory(result): (recipe, result.dtype)
        for result in results
        if (recipe := _recipe(result)) is not None
    }
    if not recipes:
        yield
        return

    def pack(tensor: Tensor) -> Tensor | _Part:
        if type(tensor) is not Tensor:  # a quantised one has no storage to know it by
            return tensor
        recipe, dtype = recipes.get(_memory(tensor), (None, None))
        return tensor if recipe is None or tensor.dtype != dtype else _part(recipe, tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        yield


def dropping(linear: type[nn.Module]) -> type[nn.Module]:
    """A linear of a layer backend that lets its input go where that is recomputable."""

    def forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with dropped(x):
            return linear.forward(self, x, *args, **kwargs)

    return type(f"Dropping{linear.__name__}", (linear,), {"forward": forward})


def recomputable_module(build: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """A module of one input, whose output, or the first of them, is recomputable."""
    module = build(*args, **kwargs)
    module.register_forward_hook(_remember)
    return module


def _remember(module: nn.Module, arguments: tuple[Any, ...], results: Any) -> None:
    result = _first(results)
    if torch.is_grad_enabled() and result.requires_grad:
        _mark(result, Recipe(partial(_forward, module), arguments))


def _forward(module: nn.Module, *arguments: Any) -> Tensor:
    """Not a call of the module: its hooks have run."""
    return _first(module.forward(*arguments))


def _first(results: Any) -> Tensor:
    first: Tensor = results[0] if isinstance(results, tuple) else results
    return first


def _unpack(saved: Any) -> Any:
    return saved.restore() if isinstance(saved, _Part) else saved


def _part(recipe: Recipe, tensor: Tensor) -> _Part:
    return _Part(recipe, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def _kept(argument: Any) -> Any:
    """What a recipe keeps of an argument: without its graph, or the recipe that it has itself."""
    if not isinstance(argument, Tensor):
        return argument
    recipe = _recipe(argument)
    return argument.detach() if recipe is None else _part(recipe, argument)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _mark(result: Tensor, recipe: Recipe) -> None:
    result.computed_by = recipe  # type: ignore[attr-defined]


def _recipe(result: Tensor) -> Recipe | None:
    return getattr(result, "computed_by", None)
